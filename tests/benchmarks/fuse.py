"""C2C fusion: what of a draft is accepted whose cache is fused from the target's, against controls, and the cost."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvlab import draft as drafts
from kvlab import lab
from kvlab.cache import prefill
from kvlab.commands.fuse import FUSER_SMALL, drafters, speculated, tuned
from kvlab.evaluate import benchmark, figure
from kvlab.fuse import (
    Aligned,
    Fuser,
    Lesson,
    Size,
    fuse_prompt,
    rehearsal_loss,
    response_loss,
    train,
)
from kvlab.fuse import Settings as FuserSettings
from kvlab.generation import encode
from kvlab.lab.corpora import Requests, Solutions, blanked
from kvlab.layers import first_aligned, last_aligned
from kvlab.speculate import ModelProposer, generate, summarize

RUNS, GAMMA, NEW, THREADS = Path("lab-runs/fuse"), 4, 96, 2
SETTINGS = FUSER_SMALL | {
    "keys": "unrotated",
    "noise": "logistic",
    "layer_map": "last",
    "control": "none",
}
SETTINGS |= {"no_decode_fusion": False, "prompts": 2400, "steps": 600, "tuned": False}
PUBLISHED = {
    "keys": "rotated",
    "noise": "gumbel",
    "gate": 0.0,
    "dropout": 0.1,
    "no_decode_fusion": True,
}
ARMS = {  # what changes, and with how many seeds
    "fused": ({}, 3),
    "self": ({"control": "self"}, 3),
    "matched": ({"control": "matched"}, 3),
    "tuned": ({"tuned": True}, 3),
    "narrow": ({"hidden": 64}, 1),  # the one that kvlab ships
    "published": (PUBLISHED, 1),
    "rotated": ({"keys": "rotated"}, 1),
    "gates_from_0": ({"gate": 0.0}, 1),
    "proportional": ({"layer_map": "proportional"}, 1),
    "prompts_only": ({"no_decode_fusion": True}, 1),
}
BLANKS = {
    "answered": 3,
    "rehearsed": 1,
    "rehearsed_first": 3,
    "matched": 1,
    "rehearsed_matched": 1,
}  # number of seeds
BLANK_STEPS = 600
TOLD = "lab-target with lab-draft; held-out passages of 8 to 16 facts, tell about somebody; greedy, gamma 4"


def models():
    return lab.load("lab-draft"), lab.load("lab-target"), lab.load_tokenizer("lab-target")


def asked(quick: bool) -> list[list[int]]:
    """Test prompts, the same for all."""
    tokenizer = lab.load_tokenizer("lab-target")
    return [encode(tokenizer, text) for text in Requests(4 if quick else 100, test=True)]


def folder_of(arm: str, seed: int, folder: Path) -> Path:
    """Where a fuser is kept: another setting is another folder."""
    told = json.dumps(SETTINGS | ARMS[arm][0], sort_keys=True)
    return folder / f"{arm}-{seed}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def answered(seed: int, prompts: int, folder: Path) -> list[drafts.Example]:
    """The target's answers to prompts, which all arms of a seed share."""
    _, target, tokenizer = models()
    texts = [encode(tokenizer, text) for text in Requests(prompts, seed=seed)]
    return drafts.listen(target, tokenizer, texts, folder, NEW)


def run(arm: str, seed: int, quick: bool, folder: Path) -> None:
    """Train one fuser, alone in its process, and speculate with it. One that is done is left as it is."""
    made, settings = folder_of(arm, seed, folder), SETTINGS | ARMS[arm][0]
    if (made / "scores.json").exists():
        return
    torch.set_num_threads(1)
    settings |= {"prompts": 16, "steps": 4, "batch_size": 4} if quick else {}
    draft, target, _ = models()
    said = answered(seed, settings["prompts"], folder)
    options = {name: settings[name] for name in ("steps", "batch_size", "learning_rate")} | {
        "seed": seed
    }
    if settings["tuned"]:
        draft = taught(draft, target, said, options)
        draft.save_pretrained(made / "draft")
    fuser, history = tuned(draft, target, said, settings, options, made)
    fuser.save_pretrained(made)
    (made / "history.json").write_text(
        json.dumps([[h["step"], h["ce"], h["seconds"]] for h in history])
    )
    makers = drafters(draft, target, fuser, settings["control"])
    scores = speculated(target, asked(quick), {"plain": lambda: None} | makers, GAMMA, NEW)
    (made / "scores.json").write_text(scores.to_json(orient="records"))
    shutil.rmtree(next(made.glob("run-*")))


def taught(
    draft: PreTrainedModel, target: PreTrainedModel, said: list[drafts.Example], options: dict
):
    """The draft itself, trained for as many steps on the same answers: the way to use them without a fuser."""
    small = drafts.KnowledgeDraft.cut(draft, "first:2")
    epochs = max(1, options["steps"] * options["batch_size"] // len(said))
    rest = {"batch_size": options["batch_size"], "learning_rate": 1e-3, "seed": options["seed"]}
    drafts.train(small, target, said, said[:64], shares={"kl": 1.0}, epochs=epochs, **rest)
    return small.plain


def train_all(quick: bool, seed: int, folder: Path) -> dict[str, list[pd.DataFrame]]:
    """Scores of each arm, a frame a seed; two fusers at a time, each on a core."""
    jobs = [
        (arm, i)
        for i in range(seed, seed + 3)
        for arm, (_, n) in ARMS.items()
        if i < seed + (1 if quick else n)
    ]
    left = [job for job in jobs if not (folder_of(*job, folder) / "scores.json").exists()]
    blind = [(arm, i) for arm, n in BLANKS.items() for i in range(seed, seed + (1 if quick else n))]
    if quick:
        for job in left:
            run(*job, quick, folder)
        for job in blind:
            run_blanks(*job, quick, folder)
    else:
        for i in {i for _, i in left}:
            answered(i, SETTINGS["prompts"], folder)
        with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
            waiting = [pool.submit(run, *job, quick, folder) for job in left]
            waiting += [pool.submit(run_blanks, *job, quick, folder) for job in blind]
            for future in tqdm(waiting, desc="fusers"):
                future.result()
    found: dict[str, list[pd.DataFrame]] = {arm: [] for arm in ARMS}
    for arm, i in jobs:
        found[arm].append(pd.read_json(folder_of(arm, i, folder) / "scores.json"))
    return found


def blanks_of(arm: str, seed: int, folder: Path) -> Path:
    return folder / f"blanks-{arm}-{seed}-{BLANK_STEPS}"


def run_blanks(arm: str, seed: int, quick: bool, folder: Path) -> None:
    """Train a fuser on passages that the draft reads with blanks, and have the draft answer from what is fused."""
    made = blanks_of(arm, seed, folder)
    if (made / "answers.json").exists():
        return
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    draft, target, tokenizer = models()
    settings = FuserSettings(128, 0.0, gate=4.0, sharer_seen=not arm.endswith("matched"))
    sizes = [Size.of(model.config) for model in (draft, target)]
    layers = first_aligned if arm.endswith("first") else last_aligned
    fuser = Fuser(*sizes, layers(*(size.layers for size in sizes)), settings)
    lessons = [blank_lesson(*row) for row in blanked(tokenizer, 16 if quick else 3200, seed=seed)]
    options = {
        "steps": 2 if quick else BLANK_STEPS,
        "batch_size": 4 if quick else 16,
        "learning_rate": 3e-3,
        "seed": seed,
    }
    loss = rehearsal_loss if arm.startswith("rehearsed") else response_loss
    history = train(fuser, draft, target, lessons, loss=loss, **options)
    fuser.save_pretrained(made)
    rows = blanked(tokenizer, 4 if quick else 200, test=True)
    found = {"right": [answered_from(fuser, draft, target, row) for row in rows]}
    found["loss"] = [entry["loss"] for entry in history]
    (made / "answers.json").write_text(json.dumps(found))


def blank_lesson(blanks: Tensor, ids: Tensor, answer: Tensor) -> Lesson:
    return Lesson(Aligned(blanks, ids, torch.eye(len(ids))), answer)


def answered_from(
    fuser: Fuser | None, draft: PreTrainedModel, target: PreTrainedModel, row: tuple, saw: int = 0
) -> float:
    """Whether the draft answers word for word: from a fused cache, or from what it reads itself (blanks 0, all 1)."""
    answer, ids = row[2], row[saw]
    prefix = fuse_prompt(fuser, draft, target, blank_lesson(*row).prompt) if fuser else None
    made = generate(draft, [ids[-1:] if fuser else ids], prefix=prefix, max_new_tokens=len(answer))
    return float(made.tokens[0].tolist() == answer.tolist())


def guessed_from(
    fuser: Fuser | None, draft: PreTrainedModel, target: PreTrainedModel, row: tuple, saw: int = 0
) -> float:
    """The share of the draft's guesses that the target accepts, which reads all; the draft as in `answered_from`."""
    ids = row[1]
    known = (
        fuse_prompt(fuser, draft, target, blank_lesson(*row).prompt)
        if fuser
        else prefill(draft, row[saw][None, :-1])
    )
    proposer = ModelProposer(draft, known._replace(input_ids=ids[:-1].tolist()))
    return summarize(
        generate(target, [ids], proposer, gamma=GAMMA, max_new_tokens=NEW).rounds
    ).acceptance


def guess_figures(quick: bool, seed: int, folder: Path) -> list[dict]:
    """What is accepted of a draft that read blanks, as it is and fused by what was trained on blanks."""
    draft, target, tokenizer = models()
    rows = blanked(tokenizer, 4 if quick else 100, test=True, kind="about")
    told = f"{TOLD}; the draft reads the passages with blanks, the target all; "
    values = {name: np.array([guessed_from(None, draft, target, row, saw) for row in rows]) for name, saw in (
        ("blind", 0), ("sighted", 1))}  # fmt: skip
    notes = {"blind": "nothing fused", "sighted": "the draft reads all, too, nothing fused"}
    for arm, n in BLANKS.items():
        fusers = [
            Fuser.from_pretrained(blanks_of(arm, seed + i, folder))
            for i in range(1 if quick else n)
        ]
        values[arm] = np.mean(
            [[guessed_from(fuser, draft, target, row) for row in rows] for fuser in fusers], 0
        )
        notes[arm] = f"prompts fused, mean over {len(fusers)} fusers"
    figures = [
        figure(
            f"guesses_{name}",
            values[name][~np.isnan(values[name])],
            "fraction",
            f"{told}{notes[name]}; n is prompts",
        )
        for name in values
    ]
    for other in ("blind", "rehearsed_matched", "sighted"):
        gains = values["rehearsed_first"] - values[other]
        text = f"acceptance of rehearsed_first minus that of {other}, prompt by prompt; {told}n is prompts"
        figures.append(
            figure(
                f"gain_rehearsed_first_over_{other}", gains[~np.isnan(gains)], "difference", text
            )
        )
    return figures


def blank_figures(quick: bool, seed: int, folder: Path) -> list[dict]:
    """What the draft answers about passages of which only the target has read what matters."""
    draft, target, tokenizer = models()
    rows = blanked(tokenizer, 4 if quick else 200, test=True)
    told = (
        "lab-draft on held-out passages of 8 to 16 facts in which it reads blanks, word for word; "
    )
    figures = [
        figure(f"answers_{name}", [answered_from(None, draft, target, row, saw) for row in rows], "fraction",
               f"{told}{what}; n is prompts")
        for name, saw, what in (("blind", 0, "nothing fused"), ("sighted", 1, "it reads all, nothing fused"))
    ]  # fmt: skip
    for arm, n in BLANKS.items():
        kept = [
            json.loads((blanks_of(arm, seed + i, folder) / "answers.json").read_text())
            for i in range(1 if quick else n)
        ]
        right = np.array([found["right"] for found in kept])
        figures.append(
            figure(
                f"answers_{arm}",
                right.mean(0),
                "fraction",
                f"{told}mean over {len(kept)} fusers; n is prompts",
            )
        )
        for i, row in enumerate(right):
            figures.append(
                figure(
                    f"answers_{arm}_seed_{i}",
                    row,
                    "fraction",
                    f"{told}fuser of seed {i}; n is prompts",
                )
            )
        if arm.startswith("rehearsed"):
            ends = [np.mean(found["loss"][-20:]) for found in kept]
            figures.append(
                figure(
                    f"unexplained_{arm}",
                    ends,
                    "fraction",
                    "of the variance of the draft's keys and values; n is seeds",
                )
            )
    return figures


def by_prompt(frames: Sequence[pd.DataFrame], ways: str, what: str) -> np.ndarray:
    """One value a prompt: the mean over seeds. Prompts of whose answer nothing could be guessed are left out."""
    return np.nanmean(
        [f[f["arm"] == ways].set_index("prompt")[what].astype(float) for f in frames], 0
    )


def acceptance_figures(found: dict[str, list[pd.DataFrame]]) -> list[dict]:
    """Acceptance and tokens a target call, of each way to fuse and of each control, and what fusing adds to each."""
    figures, arms = [], {ways: ("fused", ways) for ways in ("none", "prefill", "decode", "both")}
    arms |= {
        arm: (arm, "both")
        for arm in ("self", "matched", "narrow", "rotated", "gates_from_0", "proportional")
    }
    arms |= {arm: (arm, "prefill") for arm in ("published", "prompts_only")}
    arms |= {"tuned": ("tuned", "none"), "tuned_fused": ("tuned", "both")}
    values = {}
    for name, (arm, ways) in arms.items():
        frames = found[arm]
        told = f"{TOLD}; {ways} fused; mean over {len(frames)} trained fusers; n is prompts"
        values[name] = {
            what: by_prompt(frames, ways, what) for what in ("acceptance", "tokens_per_call")
        }
        for what, unit in (("acceptance", "fraction"), ("tokens_per_call", "tokens")):
            kept = values[name][what][~np.isnan(values[name][what])]
            figures.append(figure(f"{what}_{name}", kept, unit, told))
        for i, frame in enumerate(frames if len(frames) > 1 else []):
            kept = frame.loc[frame["arm"] == ways, "acceptance"].dropna()
            figures.append(
                figure(
                    f"acceptance_{name}_seed_{i}", kept, "fraction", f"fuser of seed {i}; {told}"
                )
            )
    pairs = [("both", name) for name in arms if not name.startswith(("both", "tuned_"))]
    for one, other in [
        *pairs,
        ("matched", "none"),
        ("self", "none"),
        ("tuned", "none"),
        ("tuned_fused", "tuned"),
    ]:
        gains = values[one]["acceptance"] - values[other]["acceptance"]
        told = f"acceptance of {one} minus that of {other}, prompt by prompt; {TOLD}; n is prompts"
        figures.append(
            figure(f"gain_{one}_over_{other}", gains[~np.isnan(gains)], "difference", told)
        )
    texts = pd.concat([f for frames in found.values() for f in frames]).groupby("prompt")["tokens"]
    equal = [float(all(t == rows.iloc[0] for t in rows)) for _, rows in texts]
    return [
        *figures,
        figure(
            "equal_texts", equal, "fraction", f"{TOLD}; all arms and fusers give the plain text"
        ),
    ]


def speed_figures(fuser: Fuser, quick: bool) -> list[dict]:
    """Decoding with and without the fuser in turn, and what one fusion takes beside a step of each model."""
    torch.set_num_threads(THREADS)
    draft, target, _ = models()
    makers = {"plain": lambda: None, **drafters(draft, target, fuser)}
    prompts = asked(quick)[:40]
    speculated(target, prompts[:1], makers, GAMMA, NEW)  # warms up
    runs = pd.concat(
        [speculated(target, prompts, makers, GAMMA, NEW) for _ in range(1 if quick else 3)]
    )
    seconds = runs.groupby(["prompt", "arm"])[["decoding", "seconds"]].median().unstack("arm")
    told, figures = f"{TOLD}, {THREADS} threads, in turn, the median of 3; n is prompts", []
    for part, ending in (("decoding", ""), ("seconds", "_end_to_end")):
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
    own, theirs = prefill(draft, ids[:, :4]), prefill(target, ids[:, :4])
    pasts = {"draft": (draft, 1), "target": (target, GAMMA + 1)}
    ways: dict[str, Callable] = {"fuser": lambda: fuser(own, theirs)}
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
    found = speculated(target, texts, drafters(draft, target, fuser), GAMMA, NEW)
    told = (
        "held-out word problems of 3 to 5 steps, which the fuser was not trained on; n is prompts"
    )
    values = {ways: by_prompt([found], ways, "acceptance") for ways in ("none", "both")}
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


def measure(quick: bool, seed: int) -> list[dict]:
    """Train fusers and controls, and speculate with each."""
    folder = Path(tempfile.mkdtemp()) if quick else RUNS
    found = train_all(quick, seed, folder)
    fuser = Fuser.from_pretrained(folder_of("fused", seed, folder))
    figures = (
        acceptance_figures(found)
        + blank_figures(quick, seed, folder)
        + guess_figures(quick, seed, folder)
        + training_figures(found, seed, folder)
        + size_figures(fuser)
    )
    figures += elsewhere_figures(fuser, quick) + speed_figures(fuser, quick)
    if quick:
        shutil.rmtree(folder)
    return figures


if __name__ == "__main__":
    benchmark(measure)
