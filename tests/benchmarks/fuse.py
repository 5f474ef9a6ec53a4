"""C2C fusion: acceptance of a draft with a fused cache, against controls and rivals, and the cost."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from _benchmark import benchmark
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvlab import draft as drafts
from kvlab import lab
from kvlab.cache import prefill
from kvlab.commands.fuse import fusion_proposers, measure_fusion
from kvlab.commands.shared import defaults_file
from kvlab.evaluate import figure
from kvlab.fuse import (
    Aligned,
    Fuser,
    FuserArm,
    FuserExample,
    Size,
    fuse_prompt,
    rehearsal_loss,
    response_loss,
    ridge_fuser,
)
from kvlab.generation import encode
from kvlab.lab.corpora import Requests, Solutions, blanked
from kvlab.layers import first_aligned
from kvlab.speculate import FusedProposer, ModelProposer, generate, summarize

RUNS, GAMMA, NEW, THREADS, PROMPTS = Path("lab-runs/fuse"), 4, 96, 2, 2400
DECODING = {"gamma": GAMMA, "max_new_tokens": NEW}
PUBLISHED = {"keys": "rotated", "noise": "gumbel", "gate": 0.0, "dropout": 0.1, "decode": False}
ARMS = {  # what changes, and with how many seeds; "tuned" also trains the draft
    "fused": ({}, 3),
    "self": ({"control": "self"}, 3),
    "matched": ({"control": "matched"}, 3),
    "tuned": ({}, 3),
    "narrow": ({"hidden": 64}, 1),  # the one that kvlab ships
    "published": (PUBLISHED, 1),
    "rotated": ({"keys": "rotated"}, 1),
    "gates_from_0": ({"gate": 0.0}, 1),
    "proportional": ({"layer_map": "proportional"}, 1),
    "prompts_only": ({"decode": False}, 1),
    "low_rank": ({"rank": 24, "learning_rate": 1e-2}, 1),
}
BLANKS = {
    "answered": 3,
    "rehearsed": 1,
    "rehearsed_first": 3,
    "matched": 1,
    "rehearsed_matched": 1,
    "rehearsed_low_rank": 1,
}  # number of seeds
PARTS = {  # number of seeds of the arms and blanks that a part needs
    "c2c": (
        {arm: n for arm, (_, n) in ARMS.items() if arm != "low_rank"},
        {arm: n for arm, n in BLANKS.items() if arm != "rehearsed_low_rank"},
    ),
    "low_rank": ({"low_rank": 1}, {"rehearsed_low_rank": 1, "rehearsed_first": 1}),
    "ridge": ({}, {}),
    "text": ({}, {"rehearsed_first": 1}),
}
RIDGE_TEXTS, HANDOVERS = 400, 100
BLANK_STEPS = 600
TOLD = "lab-target with lab-draft; held-out passages of 8 to 16 facts, tell about somebody; greedy, gamma 4"
READ = "the draft reads the passages with blanks, the target all; "
ANSWERED = (
    "lab-draft on held-out passages of 8 to 16 facts in which it reads blanks, word for word; "
)


def models():
    return lab.load("lab-draft"), lab.load("lab-target"), lab.load_tokenizer("lab-target")


def requests(quick: bool) -> list[list[int]]:
    """Test prompts, the same for all."""
    tokenizer = lab.load_tokenizer("lab-target")
    return [encode(tokenizer, text) for text in Requests(4 if quick else 100, test=True)]


def arm_of(name: str, seed: int, quick: bool = False) -> FuserArm:
    options = (
        yaml.safe_load(defaults_file().read_text("utf-8")).get("train-fuser", {})
        | {"steps": 600}
        | ARMS[name][0]
    )
    if quick:
        options |= {"steps": 4, "batch_size": 4}
    return FuserArm(**options, seed=seed)


def folder_of(name: str, seed: int, folder: Path) -> Path:
    """The folder of a fuser: another setting is another folder."""
    settings = json.dumps([PROMPTS, asdict(arm_of(name, seed))])
    return folder / f"{name}-{seed}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def answered(seed: int, prompts: int, folder: Path) -> list[drafts.DraftExample]:
    """The target's answers to prompts, which all arms of a seed share."""
    _, target, tokenizer = models()
    texts = [encode(tokenizer, text) for text in Requests(prompts, seed=seed)]
    return drafts.generate_targets(target, tokenizer, texts, folder, NEW)


def run(name: str, seed: int, quick: bool, folder: Path) -> None:
    """Train one fuser, alone in its process, and speculate with it, unless it is done."""
    place, arm = folder_of(name, seed, folder), arm_of(name, seed, quick)
    if (place / "scores.json").exists():
        return
    torch.set_num_threads(1)
    draft, target, _ = models()
    answers = answered(seed, 16 if quick else PROMPTS, folder)
    if name == "tuned":
        draft = tuned(draft, target, answers, arm)
        draft.save_pretrained(place / "draft")
    examples = [FuserExample.split(answer.input_ids, answer.start) for answer in answers]
    fuser, history = arm.train(draft, target, examples)
    fuser.save_pretrained(place)
    losses = [[entry["step"], entry["ce"], entry["seconds"]] for entry in history]
    (place / "history.json").write_text(json.dumps(losses))
    proposers = {"plain": lambda: None} | fusion_proposers(draft, target, fuser, arm.control)
    scores = measure_fusion(target, requests(quick), proposers, **DECODING)
    (place / "scores.json").write_text(scores.to_json(orient="records"))


def tuned(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    answers: list[drafts.DraftExample],
    arm: FuserArm,
) -> PreTrainedModel:
    """The draft itself, trained for as many steps on the same answers, without a fuser."""
    small = drafts.KnowledgeDraft.cut(draft, "first:2")
    epochs = max(1, arm.steps * arm.batch_size // len(answers))
    options = {"batch_size": arm.batch_size, "learning_rate": 1e-3, "seed": arm.seed}
    drafts.train_draft(
        small, target, answers, answers[:64], loss_weights={"kl": 1.0}, epochs=epochs, **options
    )
    return small.plain


def train_all(
    quick: bool, seed: int, folder: Path, arms: dict[str, int], blanks: dict[str, int]
) -> dict[str, list[pd.DataFrame]]:
    """Scores of each arm, a frame a seed; two fusers at a time, each on a core."""
    jobs, blind = (
        [(arm, seed + i) for i in range(3) for arm, n in counts.items() if i < (1 if quick else n)]
        for counts in (arms, blanks)
    )
    left = [job for job in jobs if not (folder_of(*job, folder) / "scores.json").exists()]
    if quick:
        for job in left:
            run(*job, quick, folder)
        for job in blind:
            run_blanks(*job, quick, folder)
    else:
        for i in {i for _, i in left}:
            answered(i, PROMPTS, folder)
        with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
            waiting = [pool.submit(run, *job, quick, folder) for job in left]
            waiting += [pool.submit(run_blanks, *job, quick, folder) for job in blind]
            for future in tqdm(waiting, desc="fusers"):
                future.result()
    found: dict[str, list[pd.DataFrame]] = {arm: [] for arm in arms}
    for arm, i in jobs:
        found[arm].append(pd.read_json(folder_of(arm, i, folder) / "scores.json"))
    return found


def blanks_of(arm: str, seed: int, folder: Path) -> Path:
    return folder / f"blanks-{arm}-{seed}-{BLANK_STEPS}"


def run_blanks(name: str, seed: int, quick: bool, folder: Path) -> None:
    """Train a fuser on passages that the draft reads with blanks; answer from the fused cache."""
    place = blanks_of(name, seed, folder)
    if (place / "answers.json").exists():
        return
    torch.set_num_threads(1)
    draft, target, tokenizer = models()
    low_rank = name.endswith("low_rank")
    arm = FuserArm(
        hidden=128,
        dropout=0.0,
        gate=4.0,
        rank=24 if low_rank else None,
        control="matched" if name.endswith("matched") else "none",
        layer_map="first" if name.endswith(("first", "low_rank")) else "last",
        decode=False,
        steps=2 if quick else BLANK_STEPS,
        batch_size=4 if quick else 16,
        learning_rate=1e-2 if low_rank else 3e-3,
        seed=seed,
    )
    rows = blanked(tokenizer, 16 if quick else 3200, seed=seed)
    loss = rehearsal_loss if name.startswith("rehearsed") else response_loss
    fuser, history = arm.train(draft, target, [blank_example(*row) for row in rows], loss=loss)
    fuser.save_pretrained(place)
    rows = blanked(tokenizer, 4 if quick else 200, test=True)
    found = {"right": [answered_from(fuser, draft, target, row) for row in rows]}
    found["loss"] = [entry["loss"] for entry in history]
    (place / "answers.json").write_text(json.dumps(found))


def blank_example(blanks: Tensor, ids: Tensor, answer: Tensor) -> FuserExample:
    return FuserExample(Aligned(blanks, ids, torch.eye(len(ids))), answer)


def answered_from(
    fuser: Fuser | None, draft: PreTrainedModel, target: PreTrainedModel, row: tuple, saw: int = 0
) -> float:
    """Whether the draft answers word for word: from a fused cache, or its own (blanks 0, all 1)."""
    answer, ids = row[2], row[saw]
    prefix = fuse_prompt(fuser, draft, target, blank_example(*row).prompt) if fuser else None
    made = generate(draft, [ids[-1:] if fuser else ids], prefix=prefix, max_new_tokens=len(answer))
    return float(made.tokens[0].tolist() == answer.tolist())


def guessed_from(
    fuser: Fuser | None, draft: PreTrainedModel, target: PreTrainedModel, row: tuple, saw: int = 0
) -> float:
    """The fraction of the draft's guesses that the target, which reads all, accepts."""
    ids = row[1]
    if fuser:
        prefix = fuse_prompt(fuser, draft, target, blank_example(*row).prompt)
    else:
        prefix = prefill(draft, row[saw][None, :-1])
    proposer = ModelProposer(draft, replace(prefix, input_ids=ids[:-1].tolist()))
    return summarize(
        generate(target, [ids], proposer, gamma=GAMMA, max_new_tokens=NEW).rounds
    ).acceptance


def fusers_of(
    arms: dict[str, int], quick: bool, seed: int, folder: Path
) -> dict[str, list[Fuser | None]]:
    """The fusers of each arm that were trained on passages with blanks."""
    return {
        arm: [
            Fuser.from_pretrained(blanks_of(arm, seed + i, folder))
            for i in range(1 if quick else n)
        ]
        for arm, n in arms.items()
    }


def guesses_of(
    quick: bool, fusers: dict[str, list[Fuser | None]]
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Acceptance of a draft that read blanks, with the fusers of each arm; None fuses nothing."""
    draft, target, tokenizer = models()
    rows = blanked(tokenizer, 4 if quick else 100, test=True, kind="about")
    figures, values = [], {}
    for arm, each in fusers.items():
        saw = int(arm == "sighted")
        note = f"prompts fused, mean over {len(each)} fusers" if each[0] else "nothing fused"
        told = f"{TOLD}; {READ}{'the draft reads all, too, ' * saw}{note}; n is prompts"
        accepted = [[guessed_from(one, draft, target, row, saw) for row in rows] for one in each]
        values[arm] = np.mean(accepted, 0)
        kept = values[arm][~np.isnan(values[arm])]
        figures.append(figure(f"guesses_{arm}", kept, "fraction", told))
    return figures, values


def guess_gains(values: dict[str, np.ndarray], others: Sequence[str]) -> list[dict]:
    """What the rehearsed fuser accepts more than other arms, prompt by prompt."""
    figures = []
    for other in others:
        gains = values["rehearsed_first"] - values[other]
        text = f"acceptance of rehearsed_first minus that of {other}, prompt by prompt; {TOLD}; "
        text += f"{READ}n is prompts"
        kept = gains[~np.isnan(gains)]
        figures.append(figure(f"gain_rehearsed_first_over_{other}", kept, "difference", text))
    return figures


def answers_alone(quick: bool) -> list[dict]:
    """Answers of the draft about passages in which it reads blanks, or all."""
    draft, target, tokenizer = models()
    rows, figures = blanked(tokenizer, 4 if quick else 200, test=True), []
    for name, saw in (("blind", 0), ("sighted", 1)):
        correct = [answered_from(None, draft, target, row, saw) for row in rows]
        conditions = f"{ANSWERED}{'it reads all, ' * saw}nothing fused; n is prompts"
        figures.append(figure(f"answers_{name}", correct, "fraction", conditions))
    return figures


def blank_figures(quick: bool, seed: int, folder: Path, arms: dict[str, int]) -> list[dict]:
    """Answers of the draft about passages whose facts only the target has read."""
    figures = []
    for arm, n in arms.items():
        kept = [
            json.loads((blanks_of(arm, seed + i, folder) / "answers.json").read_text())
            for i in range(1 if quick else n)
        ]
        right = np.array([found["right"] for found in kept])
        conditions = f"{ANSWERED}mean over {len(kept)} fusers; n is prompts"
        figures.append(figure(f"answers_{arm}", right.mean(0), "fraction", conditions))
        for i, row in enumerate(right):
            conditions = f"{ANSWERED}fuser of seed {i}; n is prompts"
            figures.append(figure(f"answers_{arm}_seed_{i}", row, "fraction", conditions))
        if arm.startswith("rehearsed"):
            ends = [np.mean(found["loss"][-20:]) for found in kept]
            told = "of the variance of the draft's keys and values; n is seeds"
            figures.append(figure(f"unexplained_{arm}", ends, "fraction", told))
    return figures


def by_prompt(frames: Sequence[pd.DataFrame], ways: str, what: str) -> np.ndarray:
    """The mean over seeds per prompt, without prompts where nothing could be guessed."""
    return np.nanmean(
        [f[f["arm"] == ways].set_index("prompt")[what].astype(float) for f in frames], 0
    )


def arm_figures(
    name: str, frames: Sequence[pd.DataFrame], ways: str, what: str = "trained fusers"
) -> tuple[list[dict], np.ndarray]:
    """Acceptance and tokens per target call of an arm, and its acceptance per prompt."""
    figures = []
    told = f"{TOLD}; {ways} fused; mean over {len(frames)} {what}; n is prompts"
    for measured, unit in (("acceptance", "fraction"), ("tokens_per_call", "tokens")):
        values = by_prompt(frames, ways, measured)
        figures.append(figure(f"{measured}_{name}", values[~np.isnan(values)], unit, told))
    for i, frame in enumerate(frames if len(frames) > 1 else []):
        kept = frame.loc[frame["arm"] == ways, "acceptance"].dropna()
        conditions = f"fuser of seed {i}; {told}"
        figures.append(figure(f"acceptance_{name}_seed_{i}", kept, "fraction", conditions))
    return figures, by_prompt(frames, ways, "acceptance")


def gain_figure(one: str, ones: np.ndarray, other: str, others: np.ndarray) -> dict:
    """The difference of two arms, prompt by prompt."""
    told = f"acceptance of {one} minus that of {other}, prompt by prompt; {TOLD}; n is prompts"
    gains = ones - others
    return figure(f"gain_{one}_over_{other}", gains[~np.isnan(gains)], "difference", told)


def acceptance_figures(found: dict[str, list[pd.DataFrame]]) -> list[dict]:
    """Acceptance and tokens per target call of each fusion and control, and their differences."""
    figures, arms = [], {ways: ("fused", ways) for ways in ("none", "prefill", "decode", "both")}
    arms |= {
        arm: (arm, "both")
        for arm in ("self", "matched", "narrow", "rotated", "gates_from_0", "proportional")
    }
    arms |= {arm: (arm, "prefill") for arm in ("published", "prompts_only")}
    arms |= {"tuned": ("tuned", "none"), "tuned_fused": ("tuned", "both")}
    values = {}
    for name, (arm, ways) in arms.items():
        more, values[name] = arm_figures(name, found[arm], ways)
        figures += more
    pairs = [("both", name) for name in arms if not name.startswith(("both", "tuned_"))]
    for one, other in [
        *pairs,
        ("matched", "none"),
        ("self", "none"),
        ("tuned", "none"),
        ("tuned_fused", "tuned"),
    ]:
        figures.append(gain_figure(one, values[one], other, values[other]))
    texts = pd.concat([f for frames in found.values() for f in frames]).groupby("prompt")["tokens"]
    equal = [float(all(t == rows.iloc[0] for t in rows)) for _, rows in texts]
    return [
        *figures,
        figure(
            "equal_texts", equal, "fraction", f"{TOLD}; all arms and fusers give the plain text"
        ),
    ]


def speed_figures(fuser: Fuser, quick: bool) -> list[dict]:
    """Time of decoding with and without the fuser in turn, and of one fusion."""
    torch.set_num_threads(THREADS)
    draft, target, _ = models()
    proposers = {"plain": lambda: None, **fusion_proposers(draft, target, fuser)}
    prompts = requests(quick)[:40]
    measure_fusion(target, prompts[:1], proposers, **DECODING)  # warms up
    runs = []
    for _ in range(1 if quick else 3):
        runs.append(measure_fusion(target, prompts, proposers, **DECODING))
    runs = pd.concat(runs)
    seconds = runs.groupby(["prompt", "arm"])[["seconds", "end_to_end"]].median().unstack("arm")
    told, figures = f"{TOLD}, {THREADS} threads, in turn, the median of 3; n is prompts", []
    for part, ending in (("seconds", ""), ("end_to_end", "_end_to_end")):
        for name, one, other in (
            *(
                (f"net_speed{'' if ways == 'both' else '_' + ways}", "none", ways)
                for ways in ("both", "prefill", "decode")
            ),
            ("speedup_none", "plain", "none"),
            ("speedup_both", "plain", "both"),
        ):
            ratios = seconds[part][one] / seconds[part][other]
            figures.append(
                figure(
                    name + ending,
                    ratios,
                    "ratio",
                    f"seconds of {one} over those of {other}; {told}",
                )
            )
    return figures + cost_figures(fuser, draft, target, quick)


@torch.inference_mode()
def cost_figures(fuser: Fuser, draft, target, quick: bool) -> list[dict]:
    """Fusing 4 tokens, over a draft step and over a target call on 5 tokens, in turn."""
    ids = torch.arange(10, 110)[None]
    prefixes = prefill(draft, ids[:, :4]), prefill(target, ids[:, :4])
    pasts = {"draft": (draft, 1), "target": (target, GAMMA + 1)}
    ways: dict[str, Callable] = {"fuser": lambda: fuser(*prefixes)}
    for name, (model, count) in pasts.items():
        runner = ModelProposer(model).runner
        runner.start(ids.tolist(), [None], GAMMA + 2)
        tokens = torch.full((1, count), 5)
        ways[name] = lambda runner=runner, tokens=tokens: runner(tokens, [100])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3 if quick else 200):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    told = f"4 tokens, batch 1, float32, {THREADS} threads, in turn; n is repeats"
    return [
        figure(f"fuser_over_{name}", [a / b for a, b in zip(seconds["fuser"], seconds[name], strict=True)][1:], "ratio",
               f"seconds of a fusion over those of a {what}; {told}")
        for name, what in (("draft", "draft step"), ("target", "target call on gamma + 1 tokens"))
    ]  # fmt: skip


def elsewhere_figures(fuser: Fuser, quick: bool) -> list[dict]:
    """Acceptance on texts that the fuser was not trained on."""
    draft, target, tokenizer = models()
    texts = [
        encode(tokenizer, long[:1]) for _, long in Solutions(2 if quick else 60, (3, 5), test=True)
    ]
    scores = measure_fusion(target, texts, fusion_proposers(draft, target, fuser), **DECODING)
    told = (
        "held-out word problems of 3 to 5 steps, which the fuser was not trained on; n is prompts"
    )
    values = {ways: by_prompt([scores], ways, "acceptance") for ways in ("none", "both")}
    return [
        figure(f"acceptance_{ways}_arithmetic", values[ways], "fraction", told) for ways in values
    ]


def size_figures(fuser: Fuser) -> list[dict]:
    with torch.device("meta"):
        published = Fuser(Size(28, 8, 128), Size(24, 2, 64))
    sizes = {
        "": (published, "Qwen2.5-0.5B to Qwen3-0.6B"),
        "_lab": (fuser, "lab-target to lab-draft, width 128"),
    }
    figures = [
        figure(f"fuser_parameters{end}", [f.num_parameters()], "parameters", told)
        for end, (f, told) in sizes.items()
    ]
    logits = fuser.gate_logits()
    return figures + [
        figure(
            f"gate_{what}_{layer}",
            [logits[layer, i].item()],
            "logit",
            f"layer {layer}, {what}, after training, seed 0",
        )
        for layer in range(len(logits))
        for i, what in enumerate(("keys", "values"))
    ]


def training_figures(found: dict[str, list], seed: int, folder: Path) -> list[dict]:
    """The loss over training, in tenths, and what training takes."""
    figures = []
    for arm in ("fused", "self", "matched", "published"):
        runs = [
            json.loads((folder_of(arm, seed + i, folder) / "history.json").read_text())
            for i in range(len(found[arm]))
        ]
        for part in range(parts := min(10, len(runs[0]))):
            means = [
                np.array_split(np.array(history)[:, 1], parts)[part].mean() for history in runs
            ]
            told = f"mean of part {part + 1} of {parts} of training; n is seeds"
            figures.append(figure(f"ce_{arm}_part_{part + 1}", means, "nats per token", told))
        told = "training steps alone, two trainings at a time, one thread each; n is seeds"
        figures.append(
            figure(f"seconds_{arm}", [sum(s for *_, s in h) for h in runs], "seconds", told)
        )
    return figures


def low_rank_figures(found: dict[str, list], quick: bool, seed: int, folder: Path) -> list[dict]:
    """A low-rank fuser beside the one that kvlab ships, and on passages with blanks."""
    figures, low_rank = arm_figures("low_rank", found["low_rank"], "both")
    none = by_prompt(found["low_rank"], "none", "acceptance")
    draft, target, _ = models()
    shipped = Fuser.from_pretrained(lab.models.MODELS / "lab-fuser").float()
    proposers = {"both": partial(FusedProposer, draft, shipped)}
    scores = measure_fusion(target, requests(quick), proposers, **DECODING)
    narrow = by_prompt([scores], "both", "acceptance")
    figures.append(gain_figure("low_rank", low_rank, "none", none))
    figures.append(gain_figure("narrow", narrow, "low_rank", low_rank))
    count = Fuser.from_pretrained(folder_of("low_rank", seed, folder)).num_parameters()
    told = "lab-target to lab-draft, rank 24"
    figures.append(figure("fuser_parameters_low_rank", [count], "parameters", told))
    guesses, values = guesses_of(quick, fusers_of(PARTS["low_rank"][1], quick, seed, folder))
    figures += guesses[:1]  # that of the other has more seeds elsewhere
    figures += guess_gains(values, ["rehearsed_low_rank"])
    return figures + blank_figures(quick, seed, folder, {"rehearsed_low_rank": 1})


def ridge_figures(quick: bool, seed: int, folder: Path) -> list[dict]:
    """Linear maps in closed form: both models read the same, and the draft reads blanks."""
    draft, target, tokenizer = models()
    count = 4 if quick else RIDGE_TEXTS
    texts = [torch.tensor(encode(tokenizer, text)) for text in Requests(count, seed=seed)]
    proposers = {"none": partial(ModelProposer, draft)}
    for name, mix in (("ridge", 1.0), ("ridge_half", 0.5)):
        fuser = ridge_fuser(draft, target, texts, first_aligned(2, 12), mix=mix)
        proposers[name] = partial(FusedProposer, draft, fuser, decode=False)
    scores, figures = measure_fusion(target, requests(quick), proposers, **DECODING), []
    none = by_prompt([scores], "none", "acceptance")
    for name in ("ridge", "ridge_half"):
        rows = scores[scores["arm"] == name].assign(arm="prefill")
        more, values = arm_figures(name, [rows], "prefill", "fitted maps of the first layers")
        figures += [*more, gain_figure(name, values, "none", none)]
    inputs, outputs = (size.heads * size.head_dim for size in (fuser.sharer, fuser.receiver))
    maps = 2 * fuser.receiver.layers * (inputs + 1) * outputs
    told = "lab-target to lab-draft, a map and a constant for keys and for values of each layer"
    figures.append(figure("fuser_parameters_ridge", [maps], "parameters", told))
    texts = [ids for _, ids, _ in blanked(tokenizer, count, seed=seed)]
    fuser = ridge_fuser(draft, target, texts, first_aligned(2, 12))
    rows = blanked(tokenizer, 4 if quick else 200, test=True)
    right = [answered_from(fuser, draft, target, row) for row in rows]
    told = f"{ANSWERED}fitted maps of the first layers; n is prompts"
    figures.append(figure("answers_ridge", right, "fraction", told))
    return figures + guesses_of(quick, {"ridge": [fuser]})[0]


def handover_figures(quick: bool, seed: int, folder: Path) -> list[dict]:
    """Answers of a draft that reads what the target writes about the question's subject."""
    draft, target, tokenizer = models()
    fuser = Fuser.from_pretrained(blanks_of("rehearsed_first", seed, folder))
    rows: dict[str, list] = {name: [] for name in ("text", "fuser", "sighted", "tokens", "ratio")}
    for i in range(4 if quick else HANDOVERS):
        # of one seed both kinds of request are about the same passage and subject
        row, about = (
            blanked(tokenizer, 1, seed=i, test=True, kind=kind)[0] for kind in ("free", "about")
        )
        started = time.perf_counter()
        rows["fuser"].append(answered_from(fuser, draft, target, row))
        fused = time.perf_counter()
        made = generate(target, [about[1]], max_new_tokens=NEW, tokenizer=tokenizer)
        text = tokenizer.decode(made.tokens[0], skip_special_tokens=True)
        question = tokenizer.decode(row[1]).partition("<|user|>")[2].partition("<|assistant|>")[0]
        turns = {"system": text.strip(), "user": question.strip()}
        ids = encode(tokenizer, [{"role": r, "content": c} for r, c in turns.items()])
        right = answered_from(None, draft, target, (torch.tensor(ids), row[1], row[2]))
        rows["ratio"].append((time.perf_counter() - fused) / (fused - started))
        rows["text"].append(right)
        rows["tokens"].append(len(made.tokens[0]))
        rows["sighted"].append(answered_from(None, draft, target, row, 1))
    told = "questions about held-out passages of 8 to 16 facts, of which lab-draft reads {}; n is prompts"
    read = {
        "text": "what lab-target writes about the subject, instead",
        "fuser": "blanks, its cache fused by rehearsed_first",
        "sighted": "all",
    }
    figures = [
        figure(f"handover_answers_{way}", rows[way], "fraction", told.format(reads))
        for way, reads in read.items()
    ]
    gain = np.subtract(rows["fuser"], rows["text"])
    conditions = "right answers with the fuser minus those with text; " + told.format("less")
    figures.append(figure("gain_handover_fuser_over_text", gain, "difference", conditions))
    conditions = "that lab-target writes for a question, and lab-draft reads; n is prompts"
    figures.append(figure("handover_tokens", rows["tokens"], "tokens", conditions))
    conditions = f"seconds with text over those with the fuser, in turn, with both models' reading; {THREADS} threads; n is prompts"
    return [*figures, figure("handover_seconds_over_fuser", rows["ratio"], "ratio", conditions)]


def c2c_figures(found: dict[str, list], quick: bool, seed: int, folder: Path) -> list[dict]:
    """The fuser, its controls and its cost."""
    fuser = Fuser.from_pretrained(folder_of("fused", seed, folder))
    blanks = PARTS["c2c"][1]
    fusers = {"blind": [None], "sighted": [None]} | fusers_of(blanks, quick, seed, folder)
    guesses, values = guesses_of(quick, fusers)
    return [
        *acceptance_figures(found),
        *answers_alone(quick),
        *blank_figures(quick, seed, folder, blanks),
        *guesses,
        *guess_gains(values, ["blind", "rehearsed_matched", "sighted"]),
        *training_figures(found, seed, folder),
        *size_figures(fuser),
        *elsewhere_figures(fuser, quick),
        *speed_figures(fuser, quick),
    ]


def measure(quick: bool, seed: int, parts: Sequence[str] = tuple(PARTS)) -> list[dict]:
    """Train fusers, controls and rivals, and speculate with each."""
    folder, figures = Path(tempfile.mkdtemp()) if quick else RUNS, []
    torch.set_num_threads(THREADS)
    for part in parts:
        found = train_all(quick, seed, folder, *PARTS[part])
        if part == "c2c":
            figures += c2c_figures(found, quick, seed, folder)
        elif part == "low_rank":
            figures += low_rank_figures(found, quick, seed, folder)
        elif part == "ridge":
            figures += ridge_figures(quick, seed, folder)
        else:
            figures += handover_figures(quick, seed, folder)
    if quick:
        shutil.rmtree(folder)
    return figures


if __name__ == "__main__":
    benchmark(measure, parts=tuple(PARTS))
