"""Put results of kvlab.results into README.md, a table and a figure, and into the leaderboard.

python book/readme.py            write them
python book/readme.py --check    write nothing; exit 1 if a table is not what the results say
"""

import re
import sys
from pathlib import Path

import kvlab
from kvlab import plots

ROOT = Path(__file__).resolve().parents[1]
README, LEADERBOARD = ROOT / "README.md", ROOT / "book/leaderboard.md"
FIGURE = ROOT / "book/_static/kv_distill.png"
TABLE = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.S)
# Chapter, quantity, its figure, figures to compare it with, conditions.
ROWS = (
    (
        "01",
        "time to the first token, item and question prefilled, over the item's cache loaded",
        "knowledge:ttft_ratio",
        "",
        "items of about 512 tokens, a question of 12, the shape of Qwen3-0.6B, random weights",
    ),
    (
        "01",
        "correct answers about a sentence cut between two pieces read alone, the first tokens of "
        "pieces computed again (LegoLink)",
        "knowledge:em_legolink_reference",
        "read together {knowledge:em_full_reference}; at the same work CacheBlend "
        "{knowledge:em_recompute_reference}, its gradual filter {knowledge:em_gradual_reference}; "
        "pieces only moved {knowledge:em_shift_reference}",
        "lab model, passages of 16 facts in four pieces",
    ),
    (
        "01",
        "error (KL) of CacheBlend over that of LegoLink at the same work",
        "knowledge:kl_recompute_over_legolink",
        "if the sentence is cut {knowledge:kl_recompute_over_legolink_reference}; LegoLink alone over "
        "LegoLink on pieces read behind a dummy prefix {knowledge:kl_legolink_over_dummy_legolink}",
        "the same, whole sentences; geometric mean",
    ),
    (
        "02",
        "acceptance of a draft that reads the target's keys and values",
        "draft:acceptance_kv",
        "same training without them {draft:acceptance_trained}",
        "items not in the training data; 3 layers of 12",
    ),
    (
        "03",
        "correct answers from a tenth of the cache (KV-Distill, one budget for all heads)",
        "distill:em_distill_free_10",
        "full cache {distill:em_full}; KVzip, one budget, two readings and more "
        "{distill:em_kvzip_10}; key norm reversed, one budget {distill:em_key_norm_reversed_free_10}; "
        "KV-Distill as published {distill:em_distill_10}",
        "question unknown at compression; lab model",
    ),
    (
        "03",
        "correct answers from a fiftieth of the cache",
        "distill:em_distill_free_2",
        "KVzip, one budget {distill:em_kvzip_2}; key norm reversed, one budget "
        "{distill:em_key_norm_reversed_free_2}; KV-Distill as published {distill:em_distill_2}",
        "the same",
    ),
    (
        "04",
        "problems solved after alignment to the teacher's cache by segments",
        "align:accuracy_segment",
        "no teacher {align:accuracy_ce_only}; "
        "the teacher's text instead, one seed {align:accuracy_text_distillation}; "
        "by index {align:accuracy_baseline}; "
        "another problem's teacher {align:accuracy_shuffled_segment}",
        "a student from random weights, 600 problems; interval over a few seeds",
    ),
    (
        "05",
        "speed, over assisted generation of transformers",
        "speculate:over_assisted",
        "compiled {speculate:over_assisted_compiled}; "
        "eight prompts at once, over assisted generation of one by one "
        "{speculate:batch_8_over_assisted}",
        "word problems, greedy, without prefill",
    ),
    (
        "05",
        "guesses accepted per round of eight, verified as a block",
        "speculate:acceptance_block_block_at_1",
        "one by one, the same guesses {speculate:acceptance_block_token_at_1}",
        "requests to describe a person, temperature 1",
    ),
    (
        "06",
        "acceptance, the target's cache fused into the draft's",
        "fuse:acceptance_both",
        "draft alone {fuse:acceptance_none}; "
        "same parameters without the target {fuse:acceptance_matched}; "
        "a low-rank map with 4 % of the parameters {fuse:acceptance_low_rank}; "
        "the draft trained instead {fuse:acceptance_tuned}",
        "descriptions of a person in a passage",
    ),
    (
        "06",
        "correct answers about a passage that only the target read, rehearsed fuser",
        "fuse:answers_rehearsed_first",
        "low-rank map {fuse:answers_rehearsed_low_rank}; "
        "if the draft reads it {fuse:answers_sighted}; "
        "on other questions, text of the target instead {fuse:handover_answers_text}, "
        "fused {fuse:handover_answers_fuser}",
        "the draft reads blanks",
    ),
    (
        "06",
        "acceptance of a draft that has read blanks, rehearsed fuser",
        "fuse:guesses_rehearsed_first",
        "not fused {fuse:guesses_blind}; without the target {fuse:guesses_rehearsed_matched}; "
        "if the draft reads the passage "
        "{fuse:guesses_sighted}",
        "descriptions of a person in a passage",
    ),
    (
        "07",
        "speed of an answer with all parts, over plain decoding",
        "together:speedup_distilled",
        "with the knowledge cache alone {together:speedup_knowledge}; "
        "with it and a trained draft that has one too "
        "{together:speedup_reads}",
        "from the files to the last token",
    ),
)


def table() -> str:
    """The rows as Markdown; figures are named FILE:NAME."""

    def interval(name: str) -> str:
        file, _, figure = name.partition(":")
        return format(kvlab.results(file)[figure], ".2f")

    chapters = {path.name[:2]: path.stem for path in (ROOT / "notebooks").glob("*.py")}
    lines = ["| chapter | measured | | compared with | conditions |", "|---|---|---|---|---|"]
    for chapter, quantity, name, others, conditions in ROWS:
        beside = re.sub(r"\{([^}]+)\}", lambda other: interval(other[1]), others)
        link = f"[{chapter}](notebooks/{chapters[chapter]}.ipynb)"
        lines.append(f"| {link} | {quantity} | **{interval(name)}** | {beside} | {conditions} |")
    return "\n".join(lines) + "\n"


PERCENTS = (50, 25, 10, 5, 2)
METHODS = {  # of the leaderboard, with where their entries compete
    "distill_free": (
        "KV-Distill with a score for each head (`kvlab distill --scope model`)",
        "model",
    ),
    "distill": ("KV-Distill, as published", "tokens"),
    "kvzip": ("KVzip", "model"),
    "kvzip_plus": ("KVzip+", "model"),
    "kvzip_layer": ("KVzip", "layer"),
    "kvzip_uniform": ("KVzip", "head"),
    "kvzip_sinks": ("KVzip, four sinks of each head stay", "model"),
    "attention_matching": ("attention matching on KVzip's entries", "model"),
    "key_norm_reversed_free": ("key norm, reversed", "model"),
    "key_norm_reversed": ("key norm, reversed", "head"),
    "expected_attention_free": ("Expected Attention", "model"),
    "expected_attention": ("Expected Attention", "head"),
    "compactor": ("Compactor", "head"),
    "keydiff": ("KeyDiff", "head"),
    "tova": ("TOVA", "head"),
    "h2o": ("H2O", "head"),
    "snapkv": ("SnapKV", "head"),
    "key_norm": ("key norm", "head"),
    "sinks_recent": ("sinks and recent", "head"),
    "random_free": ("random", "model"),
    "random": ("random", "head"),
}


def leaderboard() -> str:
    """The page of all methods that do not know the question, best first."""
    results = kvlab.results("distill")
    values = {name: [results[f"em_{name}_{p}"] for p in PERCENTS] for name in METHODS}
    order = sorted(values, key=lambda name: -sum(figure.value for figure in values[name]))
    columns = ["method", "entries compete in", *(f"{p} %" for p in PERCENTS)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name in order:
        cells = [*METHODS[name], *(format(figure, ".2f") for figure in values[name])]
        lines.append("| " + " | ".join(cells) + " |")
    text = (ROOT / "book/leaderboard.txt").read_text("utf-8")
    full = results["em_full"]
    conditions = full.conditions.removesuffix("; the whole cache")
    return text.format(full=format(full, ".2f"), conditions=conditions, table="\n".join(lines))


def draw() -> None:
    """Answers against the percentage of entries kept."""
    names = {
        "distill_free": "KV-Distill, one budget for all heads",
        "kvzip": "KVzip, one budget",
        "distill": "KV-Distill, as published",
        "kvzip_uniform": "KVzip, per head",
        "snapkv": "SnapKV",
        "random": "random",
    }
    results = kvlab.results("distill")
    curves = {
        label: results.intervals({f"em_{name}_{p}": p for p in PERCENTS})
        for name, label in names.items()
    }
    ax = plots.retention_curves(curves, results["em_full"].value)
    ax.figure.savefig(FIGURE, dpi=120, metadata={"Software": None})


def main(check: bool) -> None:
    text = README.read_text()
    updated = TABLE.sub(lambda marks: marks[1] + table() + marks[2], text)
    pages = {README: updated, LEADERBOARD: leaderboard()}
    stale = [path for path, page in pages.items() if path.read_text() != page]
    if check and stale:
        names = " and ".join(path.name for path in stale)
        sys.exit(f"{names}: not what kvlab/results says; run `python book/readme.py` and commit.")
    if not check:
        for path in stale:
            path.write_text(pages[path])
        draw()


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
