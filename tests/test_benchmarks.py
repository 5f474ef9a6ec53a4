"""Every benchmark runs alone and quickly, and writes the one form that the book reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab import knowledge

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "tests/benchmarks").glob("[a-z]*.py"))
PROMISED = {
    "lab": {
        *(
            f"{role}_{task}"
            for role in ("target", "draft", "teacher")
            for task in ("reading", "reading_long", "choice", "arithmetic", "faq", "faq_heldout")
        ),
        "tokens_per_second",
        "megabytes",
    },
    "knowledge": {
        *(f"retrieval_at_1{suffix}" for suffix in ("", "_trained", "_words", "_zh")),
        *(name + suffix for name in ("hits", "false_hits") for suffix in ("", "_at_chosen")),
        "threshold_chosen",
        *(
            f"{score}_{arm}{kind}"
            for score in ("kl", "em")
            for arm in (
                *knowledge.ARMS,
                *(f"legolink_{k}" for k in (4, 8, 16)),
                *("dummy", "dummy_legolink"),
            )
            for kind in ("", "_reference")
        ),
        *(f"kl_{arm}_answer" for arm in ("concat", "shift", "recompute", "legolink", "dummy")),
        *(f"kl_recompute_{share}" for share in (0, 5, 15, 30, 100, "random")),
        *(f"kl_{arm}_pieces_{count}" for arm in knowledge.ARMS[3:] for count in (2, 8)),
        *(
            f"kl_{one}_{how}_{other}"
            for one, other in (
                ("concat", "shift"),
                ("shift", "recompute"),
                ("shift", "without_sink"),
                ("recompute_random", "recompute"),
            )
            for how in ("minus", "over")
        ),
        *(
            f"kl_{one}_{how}_{other}{kind}"
            for one, other in (
                ("recompute", "gradual"),
                ("recompute", "legolink"),
                ("gradual", "legolink"),
                ("shift", "dummy"),
                ("legolink", "dummy_legolink"),
            )
            for how in ("minus", "over")
            for kind in ("", "_reference")
        ),
        "kl_shift_without_sink",
        "prefix_error",
        *(
            f"work_{arm}"
            for arm in (*knowledge.RECOMPUTING, *(f"legolink_{k}" for k in (4, 8, 16)))
        ),
        *(f"ttft_ratio{suffix}" for suffix in ("", "_one_token")),
        *(f"ttft_ratio_{arm}" for arm in ("prefix", *knowledge.ARMS[3:])),
        *(
            f"{part}_seconds_{arm}"
            for part in ("load", "splice", "question")
            for arm in ("full", "prefix", *knowledge.ARMS[3:])
        ),
        "load_ratio",
        *(f"{what}_seconds" for what in ("question", "prefill", "load", "lab_faq_build")),
        *(f"{what}_mb" for what in ("resident", "store", "one_item", "lab_faq")),
        *(f"retrieval_ms_100k{suffix}" for suffix in ("", "_domain")),
        *("kills_survived", "kills_mid"),
    },
    "draft": {
        *(
            f"acceptance_{arm}{suffix}"
            for arm in ("truncated", "trained", "vector", "kv", "prefix")
            for suffix in ("", "_seen", "_outside")
        ),
        *(
            f"gain_{way}{suffix}"
            for way in ("vector", "kv", "prefix")
            for suffix in ("", "_seen", "_outside")
        ),
        *(f"{when}_{loss}" for when in ("greedy", "sampled") for loss in ("kl", "reverse_kl")),
        *(
            f"parameters_{shape}"
            for shape in ("target", "first_3", "uniform_6", "uniform_6_kv_transitions")
        ),
        *("speedup", "speedup_over_generate", "speedup_end_to_end", "speedup_kv_new", "identical"),
    },
    "fuse": {
        *(
            f"{what}_{name}"
            for what in ("acceptance", "tokens_per_call")
            for name in (
                "none",
                "prefill",
                "decode",
                "both",
                "self",
                "matched",
                "published",
                "tuned",
                "tuned_fused",
                "low_rank",
                "ridge",
                "ridge_half",
            )
        ),
        *(f"gain_both_over_{name}" for name in ("none", "self", "matched", "tuned")),
        *(
            "gain_matched_over_none",
            "gain_tuned_over_none",
            "gain_tuned_fused_over_tuned",
            "equal_texts",
        ),
        *(
            f"{what}_{arm}"
            for what in ("answers", "guesses")
            for arm in (
                "blind",
                "sighted",
                "answered",
                "matched",
                "rehearsed",
                "rehearsed_first",
                "rehearsed_matched",
                "rehearsed_low_rank",
                "ridge",
            )
        ),
        *(
            f"gain_rehearsed_first_over_{name}"
            for name in ("blind", "rehearsed_matched", "sighted", "rehearsed_low_rank")
        ),
        *(f"gain_{name}_over_none" for name in ("low_rank", "ridge", "ridge_half")),
        *(f"handover_answers_{way}" for way in ("text", "fuser", "sighted")),
        *("gain_narrow_over_low_rank", "gain_handover_fuser_over_text"),
        *("handover_tokens", "handover_seconds_over_fuser"),
        *(f"acceptance_{ways}_arithmetic" for ways in ("none", "both")),
        *(
            "net_speed",
            "net_speed_end_to_end",
            "speedup_both",
            "fuser_over_draft",
            "fuser_over_target",
        ),
        *(
            "fuser_parameters",
            "fuser_parameters_lab",
            "fuser_parameters_low_rank",
            "fuser_parameters_ridge",
            "gate_keys_0",
            "gate_values_1",
            "seconds_fused",
        ),
    },
    "together": {
        *(
            f"{what}_{step}"
            for what in ("ms", "equal", "tokens_per_call")
            for step in ("plain", "knowledge", "draft", "trained", "reads", "fused", "distilled")
        ),
        *(
            f"saved_{step}"
            for step in ("knowledge", "draft", "trained", "reads", "fused", "distilled")
        ),
        *(f"acceptance_{step}" for step in ("draft", "trained", "reads", "fused", "distilled")),
        *(f"kb_{name}" for name in ("target", "reads", "fused", "distilled")),
    },
    "distill": {
        "em_full",
        *(
            f"em_{method}_{percent}"
            for method in (
                "distill",
                "choice",
                "random",
                "sinks_recent",
                "h2o",
                "h2o_aware",
                "snapkv",
                "snapkv_aware",
                "key_norm",
                "key_norm_reversed",
                "tova",
                "keydiff",
                "expected_attention",
                "compactor",
                "kvzip",
                "kvzip_layer",
                "kvzip_uniform",
                "kvzip_plus",
                "kvzip_sinks",
                "attention_matching",
                "distill_free",
                "key_norm_reversed_free",
            )
            for percent in (50, 25, 10, 5, 2)
        ),
        *(
            f"{what}_{percent}"
            for what in ("bytes_ratio", "gain", "gain_free", "where", "lost", "lost_free")
            for percent in (50, 25, 10, 5, 2)
        ),
        *(
            f"em_{method}_shared_{percent}"
            for method in ("h2o", "snapkv", "key_norm")
            for percent in (25, 10)
        ),
        *(f"em_distill_compacted_{percent}" for percent in (25, 10)),
        *(f"em_random_counts_{percent}" for percent in (25, 10)),
        *(
            f"{what}_{method}"
            for what in ("readings", "ms", "readings_ms")
            for method in ("kvzip", "distill_free", "key_norm_reversed", "attention_matching")
        ),
        *(f"bytes_over_ideal_kvzip_{percent}" for percent in (25, 10, 5)),
        "decode_ms_free_10",
        "decode_ms_masked_10",
        *(
            f"choice_{arm}"
            for arm in (
                "full",
                "distill_25",
                "distill_10",
                "distill_5",
                "snapkv_25",
                "key_norm_reversed_10",
            )
        ),
        *(
            f"needle_{arm}_16_{depth}"
            for arm in ("full", "distill_25", "distill_10")
            for depth in (0, 50, 100)
        ),
        *(
            f"ablation_{arm}_{percent}"
            for arm in (
                "base",
                "free_scores",
                "forward_kl",
                "reverse_kl",
                "routing_all",
                "routing_embedding",
                "gate_log",
                "gate_none",
                "no_adapters",
            )
            for percent in (25, 10)
        ),
        "gate_slope_base",
        "gate_slope_free_scores",
        *(f"ablation_layer_{layer}_{percent}" for layer in (1, 6, 12) for percent in (25, 10)),
        *(
            f"{what}_{p}"
            for what in ("decode_ms", "decode_speedup", "cache_mb")
            for p in (100, 50, 25, 10, 5, 2)
        ),
    },
    "align": {
        *(
            f"{what}_{arm}"
            for arm in (
                "ce_only",
                "baseline",
                "cka",
                "segment",
                "full",
                "shuffled",
                "shuffled_segment",
                "random_teacher",
            )
            for what in ("accuracy", "seconds", "mb")
        ),
        *(
            f"gain_{arm}"
            for arm in ("baseline", "cka", "segment", "full", "shuffled", "random_teacher")
        ),
        *(
            f"accuracy_{arm}_{at}"
            for arm in ("ce_only", "full")
            for at in ("part_1", "part_4", "steps_1", "steps_3")
        ),
        *(f"accuracy_tried_{name}" for name in ("source", "weight_1", "learned_projectors")),
        "resampling_over_loop",
        "resampling_over_loop_all_layers",
        "alignment_overhead",
        "reading_over_step",
        "segment_over_shuffled",
        *(
            f"{what}_{arm}_distillation"
            for what in ("accuracy", "gain")
            for arm in ("text", "logit")
        ),
        *(f"cka_layer_{layer}" for layer in range(3)),
        "projector_parameters",
        "projector_parameters_7b",
        "projector_parameters_1.5b",
    },
    "speculate": {
        *(
            name + suffix
            for name in (
                "over_assisted",
                "over_generate",
                "plain_over_generate",
                "measured_over_predicted",
            )
            for suffix in ("", "_compiled")
        ),
        *(
            f"{name}_{task}"
            for name in ("over_generate", "acceptance")
            for task in ("arithmetic_short", "arithmetic_long", "faq", "sampled")
        ),
        *(f"over_assisted_{case}" for case in ("end_to_end", "gamma_4", "gamma_8", "sampled")),
        *(f"tokens_per_second_{arm}" for arm in ("generate", "assisted", "plain", "speculative")),
        *(f"control_{fault}_p_value" for fault in ("no_residual", "another_q", "off_by_one")),
        "over_generate_end_to_end",
        "acceptance",
        "c",
        "v",
        "best_gamma",
        "batch_8_over_assisted",
        "lookup_over_generate",
        "early_exit_acceptance",
        "prefix_equal",
        "prefix_equal_assisted",
        "min_p_value",
        "min_p_value_block",
        "q_p_value",
        "control_raw_q_p_value",
        *(f"over_plain_{task}_at_{g}" for task in ("long", "requests") for g in (1, 2, 4, 8, 12)),
        *(f"acceptance_{task}_at_8" for task in ("long", "requests")),
        *(
            f"acceptance_block_{name}_at_{t}"
            for name in ("token", "block", "gain")
            for t in (0.5, 1, 1.5)
        ),
        "acceptance_block",
        *(
            f"{what}_{arm}{task}"
            for what in ("acceptance", "tokens_per_call")
            for arm in ("parallel", "chain")
            for task in ("", "_requests")
        ),
        *(f"parallel_over_chain{task}" for task in ("", "_requests")),
        "acceptance_other_tokenizer",
        "acceptance_other_tokenizer_sampled",
        "other_tokenizer_over_generate",
        "other_tokenizer_over_assisted",
    },
}


def check(result, name):
    expected = {"figures", "device", "versions", "commit", "seeds", "seconds"}
    assert expected <= set(result) <= expected | {"note", "earlier"}
    names = [figure["name"] for figure in result["figures"]]
    assert len(names) == len(set(names))
    assert set(names) >= PROMISED[name]
    for figure in result["figures"]:
        expected = {"name", "value", "low", "high", "unit", "n", "conditions"}
        assert set(figure) - {"values"} == expected
        assert figure["n"] >= 1
        assert figure["conditions"]
        if figure["low"] is None:
            assert figure["high"] is None
            continue
        assert figure["low"] <= figure["value"] <= figure["high"]
        if figure["unit"] == "fraction":
            assert 0 <= figure["low"] <= figure["high"] <= 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_quick_run_gives_every_figure(script, tmp_path):
    out = tmp_path / "result.json"
    run = [sys.executable, script, "--quick", "--json", "--out", out]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == json.loads(out.read_text())
    assert not list(tmp_path.glob("*.part"))
    check(json.loads(done.stdout), script.stem)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_committed_result_has_the_same_form(script):
    check(json.loads((ROOT / f"kvlab/results/{script.stem}.json").read_text()), script.stem)
