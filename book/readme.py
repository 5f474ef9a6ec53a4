"""Put results of kvlab.results into README.md: the table between its marks, and the figure.

python book/readme.py            write the table and the figure
python book/readme.py --check    write nothing; exit 1 if the table is not what the results say
"""

import re
import sys
from pathlib import Path

import kvlab
from kvlab import plots

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
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
        "correct answers, four pieces read alone and joined, 15 % of the tokens recomputed",
        "knowledge:em_recompute",
        "read together {knowledge:em_full}; only concatenated {knowledge:em_concat}",
        "lab model, passages of 16 facts",
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
        "correct answers from a quarter of the cache (KV-Distill)",
        "distill:em_distill_25",
        "full cache {distill:em_full}; SnapKV {distill:em_snapkv_25}; "
        "the best other score {distill:em_key_norm_reversed_25}",
        "question unknown at compression",
    ),
    (
        "03",
        "correct answers from a tenth of the cache",
        "distill:em_distill_10",
        "SnapKV {distill:em_snapkv_10}; the best other score {distill:em_key_norm_reversed_10}",
        "the same",
    ),
    (
        "04",
        "problems solved after alignment to the teacher's cache by segments",
        "align:accuracy_segment",
        "no teacher {align:accuracy_ce_only}; by index {align:accuracy_baseline}; "
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
        "06",
        "acceptance, the target's cache fused into the draft's",
        "fuse:acceptance_both",
        "draft alone {fuse:acceptance_none}; "
        "same parameters without the target {fuse:acceptance_matched}; "
        "the draft trained instead {fuse:acceptance_tuned}",
        "descriptions of a person in a passage",
    ),
    (
        "06",
        "correct answers about a passage that only the target read, rehearsed fuser",
        "fuse:answers_rehearsed_first",
        "trained on answers {fuse:answers_answered}; if the draft reads it {fuse:answers_sighted}",
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


def draw() -> None:
    """Answers against the percentage of entries kept."""
    names = {
        "distill": "KV-Distill",
        "key_norm_reversed": "key norm, reversed",
        "snapkv": "SnapKV",
        "random": "random",
    }
    results, percents = kvlab.results("distill"), (50, 25, 10, 5, 2)
    curves = {
        label: results.intervals({f"em_{name}_{p}": p for p in percents})
        for name, label in names.items()
    }
    ax = plots.retention_curves(curves, results["em_full"].value)
    ax.figure.savefig(FIGURE, dpi=120, metadata={"Software": None})


def main(check: bool) -> None:
    text = README.read_text()
    updated = TABLE.sub(lambda marks: marks[1] + table() + marks[2], text)
    if check and updated != text:
        sys.exit(
            "README.md: its table is not that of kvlab/results; "
            "run `python book/readme.py` and commit the result."
        )
    if not check:
        README.write_text(updated)
        draw()


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
