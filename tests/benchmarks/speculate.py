"""Speculative decoding against transformers on the same texts: speed, acceptance, exactness, and where it loses."""

import copy
import functools
import itertools
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from _benchmark import benchmark
from _broken import RawProposer
from tqdm.auto import tqdm
from transformers import CompileConfig, PreTrainedModel

from kvlab import lab, speculate
from kvlab.cache import clone, prefill
from kvlab.draft import generate_targets
from kvlab.evaluate import chi_square, figure
from kvlab.generation import encode
from kvlab.lab.corpora import Requests, Solutions
from kvlab.lab.models import make
from kvlab.lab.report import heldout, problems
from kvlab.parallel import ParallelDraft, train_parallel
from kvlab.speculate import (
    EarlyExitProposer,
    LookupProposer,
    ModelProposer,
    ParallelProposer,
    Proposal,
    Proposer,
    Round,
    Runner,
    Sampling,
    TranslatingProposer,
    best_gamma,
    cost_model,
    costs,
    generate,
    sample_categorical,
    summarize,
    verify,
    verify_block,
)

RUNS = Path("lab-runs/speculate")
NEW, ROOM, GAMMAS, THREADS = 160, 512, (4, 8), 2
SWEEP, TEMPERATURES, ROWS, DRAWS = (1, 2, 4, 8, 12), (0.5, 1.0, 1.5), 8, 4
Ids = list[int]


class Run(NamedTuple):
    """One text: its new tokens, seconds in all and without reading the prompt, and the rounds if they are known."""

    tokens: Ids
    whole: float
    decoding: float
    rounds: Sequence[Round] = ()

    @property
    def rate(self) -> float:
        return (len(self.tokens) - 1) / self.decoding  # reading the prompt gave the first

    @property
    def whole_rate(self) -> float:
        return len(self.tokens) / self.whole


Arm = Callable[[Ids], Run]


# -- arms


def ours(target: Runner, proposer: Proposer | None, gamma: int, temperature: float = 0.0) -> Arm:
    def run(ids: Ids) -> Run:
        sampling = Sampling(temperature, generator=torch.Generator().manual_seed(0))
        started = time.perf_counter()
        made = generate(target, [ids], proposer, gamma=gamma, max_new_tokens=NEW, sampling=sampling)
        whole = time.perf_counter() - started
        return Run(
            made.tokens[0].tolist(),
            whole,
            sum(r.seconds for r in made.rounds if not r.is_prefill),
            made.rounds,
        )

    return run


def peer(
    target: PreTrainedModel,
    draft: PreTrainedModel | None = None,
    gamma: int = 1,
    temperature: float = 0.0,
    **options,
) -> Arm:
    """`generate` of transformers; reading is what the same call takes for one token, and the draft's own reading."""
    options |= (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )

    def call(model: PreTrainedModel, ids: Ids, tokens: int, **more) -> Ids:
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=tokens, repetition_penalty=1.0, **more
        )
        return output[0, len(ids) :].tolist()

    def run(ids: Ids) -> Run:
        if draft:
            draft.generation_config.num_assistant_tokens = gamma
        torch.manual_seed(0)
        started = time.perf_counter()
        tokens = call(target, ids, NEW, assistant_model=draft, **options)
        whole = time.perf_counter() - started
        call(target, ids, 1, assistant_model=draft, **options)
        if draft and "assistant_tokenizer" in options:
            text = options["tokenizer"].decode(ids)
            ids = options["assistant_tokenizer"](text, add_special_tokens=False).input_ids
        if draft:
            call(draft, ids, 1, do_sample=False)
        return Run(tokens, whole, 2 * whole - (time.perf_counter() - started))

    return run


def in_inference_mode(arm: Arm) -> Arm:
    """The arm as our loop runs: without the bookkeeping of autograd that `generate` leaves on."""

    def run(ids: Ids) -> Run:
        with torch.inference_mode():
            return arm(ids)

    return run


@contextmanager
def drafts_of_fixed_length(draft: PreTrainedModel) -> Iterator[None]:
    """Assisted generation as in the paper: always gamma tokens, however unsure the draft is."""
    before = copy.deepcopy(draft.generation_config)
    draft.generation_config.update(
        num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    try:
        yield
    finally:
        draft.generation_config = before


def with_compiled_forward(arm: Arm, *models: PreTrainedModel) -> Arm:
    """The arm with forward compiled for caches of any length; `generate` refuses static ones with an assistant."""
    before = [model.forward for model in models]
    compiled = [_compiled_after_reading(forward) for forward in before]

    def run(ids: Ids) -> Run:
        for model, forward in zip(models, compiled, strict=True):
            model.forward = forward
        try:
            with torch._dynamo.config.patch(recompile_limit=64):
                return arm(ids)
        finally:
            for model in models:
                del model.forward  # the class's own shows again

    return run


def _compiled_after_reading(forward: Callable) -> Callable:
    """As for our arms: the prompt is read eagerly, and no call checks again that no module has changed."""

    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    # Code of its own, by which the compiler tells two models' programs apart.
    own = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    skip = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    fast = torch.compile(own, dynamic=True, options=skip)

    @functools.wraps(forward)  # `generate` reads its signature
    def either(*args, **kwargs):
        return (fast if kwargs["past_key_values"].get_seq_length() else forward)(*args, **kwargs)

    return either


def race(
    arms: dict[str, Arm], prompts: list[Ids], repeats: int, bar: tqdm, same: bool = True
) -> dict[str, list[Run]]:
    """Let the arms take turns on each prompt; of each, keep the run of median decoding time."""
    done = {name: [] for name in arms}
    for ids, (name, arm) in itertools.product(prompts[:repeats], arms.items()):
        bar.set_postfix_str(f"warming up {name}")
        arm(ids)
    for ids in prompts:
        turns = [{name: arm(ids) for name, arm in arms.items()} for _ in range(repeats)]
        for name in arms:
            done[name].append(
                sorted((turn[name] for turn in turns), key=lambda run: run.decoding)[repeats // 2]
            )
            if same and done[name][-1].tokens != done["generate"][-1].tokens:
                raise RuntimeError(
                    f"The greedy text of {name} differs from generate's; all arms must give the same."
                )
        bar.update()
    return done


# -- figures


def ratios(fast: list[Run], slow: list[Run], rate: str = "rate") -> list[float]:
    return [getattr(a, rate) / getattr(b, rate) for a, b in zip(fast, slow, strict=True)]


def against_theory(fast: list[Run], plain: list[Run], gamma: int) -> dict[str, list[float]]:
    """For each text: acceptance, c, v, the best gamma, and the measured speed-up over the predicted one."""
    found = {name: [] for name in ("acceptance", "c", "v", "best_gamma", "measured_over_predicted")}
    for a, b in zip(fast, plain, strict=True):
        summary = summarize(a.rounds)
        c, v = costs(summary, summarize(b.rounds))
        predicted = cost_model(np.nan_to_num(summary.conditional), c, gamma, v).speedup
        best = best_gamma(summary.acceptance, c, lambda g, v=v: 1 + (v - 1) * g / gamma)
        for values, value in zip(
            found.values(),
            (summary.acceptance, c, v, best, a.rate / b.rate / predicted),
            strict=True,
        ):
            values.append(value)
    return found


def speed_figures(
    done: dict[str, list[Run]], gamma: int, told: str, suffix: str = "", per_gamma: str = ""
) -> list:
    """What one draft length gives; the arms that draft are named by `per_gamma`."""
    fast, assisted = done["speculative" + per_gamma], done["assisted" + per_gamma]
    values = {
        "over_assisted": ratios(fast, assisted),
        "over_generate": ratios(fast, done["generate"]),
        "over_assisted_end_to_end": ratios(fast, assisted, "whole_rate"),
        "over_generate_end_to_end": ratios(fast, done["generate"], "whole_rate"),
        **against_theory(fast, done["plain"], gamma),
    }
    units = {"acceptance": "fraction", "best_gamma": "tokens"}
    return [figure(name + suffix, v, units.get(name, "ratio"), told) for name, v in values.items()]


def rate_figures(
    done: dict[str, list[Run]], arms: dict[str, str], told: str, suffix: str = ""
) -> list[dict]:
    rates = {name: [run.rate for run in done[arm]] for name, arm in arms.items()}
    plain = figure(
        "plain_over_generate" + suffix, ratios(done["plain"], done["generate"]), "ratio", told
    )
    return [
        plain,
        *(figure(f"tokens_per_second_{n}{suffix}", r, "tokens/s", told) for n, r in rates.items()),
    ]


def faster(done: dict[str, list[Run]], names: Sequence[str]) -> str:
    return max(names, key=lambda name: np.mean([run.rate for run in done[name]]))


# -- what is measured


class Setup(NamedTuple):
    target: PreTrainedModel
    draft: PreTrainedModel
    quick: bool
    seed: int
    bar: tqdm

    @property
    def repeats(self) -> int:
        return 1 if self.quick else 3

    def prompts(self, task: str) -> list[Ids]:
        count, tokenizer = 2 if self.quick else 24, lab.load_tokenizer("lab-target")
        if task == "requests":
            return [encode(tokenizer, request) for request in Requests(count, test=True)]
        if task == "faq":
            asked = heldout("faq", count, self.seed)
        else:
            asked = [problems(3 + i % 3, task, 1, self.seed + i)[0] for i in range(count)]
        return [
            tokenizer.apply_chat_template(a[:-1], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            for a in asked
        ]

    def told(self, conditions: str) -> str:
        times = "one run" if self.quick else f"median of {self.repeats} runs in turn"
        where = f"batch 1, {torch.get_num_threads()} threads"
        return f"lab-target with lab-draft, {conditions}, {where}, prefill apart, {times} a prompt"


PROBLEMS = "held-out word problems of 3-5 steps, {} style"


def main_figures(s: Setup) -> tuple[int, dict[str, list[Run]], list[dict]]:
    """Both draft lengths; the main one is the better for assisted generation."""
    target, draft = Runner(s.target), ModelProposer(s.draft)
    arms = {"generate": peer(s.target), "plain": ours(target, None, 1)}
    for gamma in GAMMAS:
        arms |= {f"assisted_gamma_{gamma}": peer(s.target, s.draft, gamma)}
        arms |= {f"speculative_gamma_{gamma}": ours(target, draft, gamma)}
        arms |= {
            f"assisted_light_gamma_{gamma}": in_inference_mode(arms[f"assisted_gamma_{gamma}"])
        }
    arms["generate_light"] = in_inference_mode(arms["generate"])
    arms["lookup"] = ours(target, LookupProposer(), max(GAMMAS))
    done = race(arms, s.prompts("long"), s.repeats, s.bar)
    best = int(faster(done, [f"assisted_gamma_{gamma}" for gamma in GAMMAS]).split("_")[-1])
    problems_told = f"greedy, {PROBLEMS.format('long')}"
    told = s.told(f"{problems_told}, gamma {best} (the better of 4 and 8 for assisted generation)")
    figures = speed_figures(done, best, told, per_gamma=f"_gamma_{best}")
    for gamma in GAMMAS:
        figures += speed_figures(
            done, gamma, s.told(f"{problems_told}, gamma {gamma}"), *[f"_gamma_{gamma}"] * 2
        )
    done |= {name: done[f"{name}_gamma_{best}"] for name in ("assisted", "speculative")}
    names = {name: name for name in ("generate", "assisted", "plain", "speculative")}
    figures += rate_figures(done, names, told)
    light = f"{told}; transformers' calls inside torch.inference_mode(), which they do not enter themselves"
    values = {
        "plain_over_generate_in_inference_mode": ratios(done["plain"], done["generate_light"]),
        "over_assisted_in_inference_mode": ratios(
            done["speculative"], done[f"assisted_light_gamma_{best}"]
        ),
    }
    figures += [figure(name, v, "ratio", light) for name, v in values.items()]
    lookup = s.told(f"prompt lookup instead of a draft, {problems_told}, gamma {max(GAMMAS)}")
    figures.append(
        figure("lookup_over_generate", ratios(done["lookup"], done["generate"]), "ratio", lookup)
    )
    return best, done, figures


def task_figures(s: Setup, gamma: int, long: dict[str, list[Run]]) -> list[dict]:
    """Other texts: short solutions, answers that the draft never learned, and sampling."""
    tasks = {
        "arithmetic_long": ("long", 0.0, "greedy, " + PROBLEMS.format("long")),
        "arithmetic_short": ("short", 0.0, "greedy, " + PROBLEMS.format("short")),
        "faq": ("faq", 0.0, "greedy, questions whose answers only the target has learned by heart"),
        "sampled": ("long", 1.0, f"temperature 1, {PROBLEMS.format('long')}"),
    }
    target, draft, figures = Runner(s.target), ModelProposer(s.draft), []
    for task, (prompts, heat, conditions) in tasks.items():
        arms = {
            "generate": peer(s.target, temperature=heat),
            "assisted": peer(s.target, s.draft, gamma, heat),
            "speculative": ours(target, draft, gamma, heat),
        }
        known = task == "arithmetic_long"
        done = long if known else race(arms, s.prompts(prompts), s.repeats, s.bar, same=heat == 0)
        told = s.told(f"{conditions}, gamma {gamma}")
        accepted = [summarize(run.rounds).acceptance for run in done["speculative"]]
        figures.append(figure(f"acceptance_{task}", accepted, "fraction", told))
        for other in ("generate", "assisted"):
            values = ratios(done["speculative"], done[other])
            figures.append(figure(f"over_{other}_{task}", values, "ratio", told))
    return figures


def compiled_figures(s: Setup, gamma: int) -> list[dict]:
    """Ours compiled against the faster of eager and compiled of each peer; a quick run compiles nothing."""
    static = CompileConfig()
    static._compile_all_devices = True
    options = {"cache_implementation": "static", "max_cache_len": ROOM, "compile_config": static}
    with mock.patch("torch.compile", lambda f, **_: f) if s.quick else nullcontext():
        target, draft = Runner(s.target, ROOM), ModelProposer(Runner(s.draft, ROOM))
        assisted = peer(s.target, s.draft, gamma)
        arms = {
            "generate": peer(s.target),
            "generate_compiled": peer(s.target, **options),
            "assisted": assisted,
            "assisted_compiled": with_compiled_forward(assisted, s.target, s.draft),
            "plain": ours(target, None, 1),
            "speculative": ours(target, draft, gamma),
        }
        done = race(arms, s.prompts("long"), s.repeats, s.bar)
    chosen = {name: faster(done, [name, f"{name}_compiled"]) for name in ("generate", "assisted")}
    done |= {name: done[arm] for name, arm in chosen.items()}
    used = ", ".join(
        f"{name} {'compiled' if arm.endswith('compiled') else 'eager'}"
        for name, arm in chosen.items()
    )
    how = (
        "nothing compiled in a quick run"
        if s.quick
        else f"ours compiled, peers as they are faster: {used}"
    )
    told = s.told(f"greedy, {PROBLEMS.format('long')}, gamma {gamma}, {how}")
    names = {name: name for name in ("generate", "assisted", "plain", "speculative")}
    return speed_figures(done, gamma, told, "_compiled") + rate_figures(
        done, names, told, "_compiled"
    )


def batch_figures(s: Setup, gamma: int) -> list[dict]:
    """Eight prompts in one call against eight assisted calls, which take one prompt each."""
    target, draft, assisted = (
        Runner(s.target),
        ModelProposer(s.draft),
        peer(s.target, s.draft, gamma),
    )
    prompts, values = s.prompts("long"), []
    for group in (prompts[i : i + 8] for i in range(0, len(prompts), 8)):
        turns = []
        for _ in range(s.repeats + 1):  # the first warms up
            made = generate(
                target, [torch.tensor(ids) for ids in group], draft, gamma=gamma, max_new_tokens=NEW
            )
            runs = [assisted(ids) for ids in group]
            if [t.tolist() for t in made.tokens] != [run.tokens for run in runs]:
                raise RuntimeError(
                    "The greedy texts of a batch differ from assisted generation's, one by one."
                )
            turns.append(
                sum(run.decoding for run in runs)
                / sum(r.seconds for r in made.rounds if not r.is_prefill)
            )
        values.append(float(np.median(turns[1:])))
        s.bar.update()
    told = s.told(f"greedy, {PROBLEMS.format('long')}, gamma {gamma}").replace(
        "batch 1", "8 prompts a value"
    )
    return [figure("batch_8_over_assisted", values, "ratio", told.replace(" a prompt", ""))]


def early_exit_figures(s: Setup) -> list[dict]:
    target, proposer = Runner(s.target), EarlyExitProposer(s.target, 6)
    runs = [ours(target, proposer, 4)(ids) for ids in s.prompts("long")]
    told = (
        f"the first 6 of lab-target's 12 layers draft, greedy, {PROBLEMS.format('long')}, gamma 4"
    )
    return [
        figure(
            "early_exit_acceptance",
            [summarize(r.rounds).acceptance for r in runs],
            "fraction",
            told,
        )
    ]


REQUESTS = "held-out passages of 8 to 16 facts, tell about somebody"


def gamma_figures(s: Setup) -> list[dict]:
    """Speed over plain decoding by draft length: texts that are easy to guess, and harder ones."""
    target, draft, figures = Runner(s.target), ModelProposer(s.draft), []
    arms = {"generate": ours(target, None, 1)}
    arms |= {str(gamma): ours(target, draft, gamma) for gamma in SWEEP}
    for task, texts in (("long", PROBLEMS.format("long")), ("requests", REQUESTS)):
        done = race(arms, s.prompts(task)[:: 1 if s.quick else 3], s.repeats, s.bar)
        for gamma in SWEEP:
            values = ratios(done[str(gamma)], done["generate"])
            told = s.told(f"greedy, {texts}, gamma {gamma}")
            figures.append(figure(f"over_plain_{task}_at_{gamma}", values, "ratio", told))
        accepted = [summarize(run.rounds).acceptance for run in done["8"]]
        told = s.told(f"greedy, {texts}, gamma 8")
        figures.append(figure(f"acceptance_{task}_at_8", accepted, "fraction", told))
    return figures


class BothRules:
    """Token verification, beside which both rules verify each draft several times with the same numbers."""

    def __init__(self, seed: int):
        self.generator, self.accepted = torch.Generator().manual_seed(seed), []

    def __call__(self, p, proposal: Proposal, uniform):
        tokens, q = (x if x is None else x.repeat_interleave(DRAWS, 0) for x in proposal)
        numbers = torch.rand(len(tokens), uniform.shape[1], generator=self.generator)
        for_all = p.repeat_interleave(DRAWS, 0), Proposal(tokens, q), numbers
        counts = [rule(*for_all)[0].double() for rule in (verify, verify_block)]
        self.accepted.append(torch.stack(counts).view(2, -1, DRAWS).mean(-1))
        return verify(p, proposal, uniform)


def block_figures(s: Setup) -> list[dict]:
    """Accepted tokens per round by token and by block verification, of the same drafts."""
    target, draft, figures = Runner(s.target), ModelProposer(s.draft), []
    told = f"lab-target with lab-draft, {REQUESTS}, gamma 8, mean per prompt over the rounds of {ROWS} texts, "
    told += f"each draft verified with {DRAWS} draws, the same for both rules"
    for temperature in TEMPERATURES:
        means = []
        for i, ids in enumerate(s.prompts("requests")):
            rule, generator = BothRules(i), torch.Generator().manual_seed(i)
            sampling = Sampling(temperature, generator=generator)
            options = {"gamma": 8, "max_new_tokens": NEW, "sampling": sampling, "verify": rule}
            made = generate(target, [torch.tensor(ids)] * ROWS, draft, **options)
            rounds = [r for r in made.rounds if not r.is_prefill]
            drafted = [[len(row) == 8 for row in r.drafted] for r in rounds]
            means.append(torch.stack(rule.accepted, 1)[:, torch.tensor(drafted)].mean(1).tolist())
        by_token, by_block = np.transpose(means)
        values = {"token": by_token, "block": by_block, "gain": by_block - by_token}
        for name, value in values.items():
            name = f"acceptance_block_{name}_at_{temperature:g}"
            conditions = f"temperature {temperature:g}, {told}"
            figures.append(figure(name, value.tolist(), "tokens", conditions))
        if temperature == 1:
            fractions = [float(tokens) / 8 for tokens in by_block]
            figures.append(figure("acceptance_block", fractions, "fraction", conditions))
        s.bar.update()
    return figures


def other_tokenizer_figures(s: Setup) -> list[dict]:
    """A draft with another tokenizer, against transformers' assisted generation for such drafts."""
    own, tokenizer = (lab.load_tokenizer(name) for name in ("lab-teacher", "lab-target"))
    teacher, target = lab.load("lab-teacher"), Runner(s.target)
    proposer, texts = TranslatingProposer(teacher, own, tokenizer), PROBLEMS.format("long")
    with drafts_of_fixed_length(teacher):
        tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": own}
        arms = {
            "generate": peer(s.target),
            "assisted": peer(s.target, teacher, 4, **tokenizers),
            "speculative": ours(target, proposer, 4),
        }
        done = race(arms, s.prompts("long")[:: 1 if s.quick else 3], s.repeats, s.bar)
    told = s.told(f"greedy, {texts}, gamma 4").replace("lab-draft", "lab-teacher (640 tokens)")
    accepted = [summarize(run.rounds).acceptance for run in done["speculative"]]
    figures = [figure("acceptance_other_tokenizer", accepted, "fraction", told)]
    for name in ("generate", "assisted"):
        values = ratios(done["speculative"], done[name])
        figures.append(figure(f"other_tokenizer_over_{name}", values, "ratio", told))
    sampled = [ours(target, proposer, 4, 1.0)(ids) for ids in s.prompts("long")]
    accepted = [summarize(run.rounds).acceptance for run in sampled]
    told = told.replace("greedy", "temperature 1, tokens of both vocabularies")
    return [*figures, figure("acceptance_other_tokenizer_sampled", accepted, "fraction", told)]


# -- exactness


def tiny(seed: int, vocabulary: int, **changes) -> PreTrainedModel:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return make(
        "lab-draft", seed, vocab_size=vocabulary, initializer_range=0.2, **shape | heads | changes
    )


def prefix_figures(s: Setup) -> list[dict]:
    """After a prefilled cache the text must be that of plain decoding."""
    right = {"prefix_equal": [], "prefix_equal_assisted": []}
    for seed in range(4 if s.quick else 20):
        target, draft = tiny(seed, 97).double(), tiny(seed + 100, 97).double()
        ids = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(seed))
        read = prefill(target, ids[:, :16])
        state = speculate.Prefix(clone(read.cache), read.next_position, ids[0, :16].tolist())
        made = generate(target, ids[:, 16:], ModelProposer(draft), max_new_tokens=24, prefix=state)
        options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        wanted = target.generate(ids, **options)[0, 24:]
        assisted = target.generate(
            ids, past_key_values=read.cache, assistant_model=draft, **options
        )[0, 24:]
        right["prefix_equal"].append(float(torch.equal(made.tokens[0], wanted)))
        right["prefix_equal_assisted"].append(float(torch.equal(assisted, wanted)))
        s.bar.update()
    told = "pairs of tiny random models in float64, 24 greedy tokens after a cache of 16, equal to plain decoding"
    return [figure(name, values, "fraction", told) for name, values in right.items()]


@torch.inference_mode()
def joint(model: PreTrainedModel, ids: Ids, sampling: Sampling) -> torch.Tensor:
    """The exact distribution of the first three new tokens, over all V ** 3 continuations."""
    size = model.config.vocab_size
    pairs = list(itertools.product(range(size), repeat=2))
    texts = [[*ids, *pair] for pair in pairs]
    p = sampling.scores(model(torch.tensor(texts)).logits[:, -3:], texts).softmax(-1)
    first, second = torch.tensor(pairs).T
    rows = torch.arange(len(pairs))
    return (p[rows, 0, first] * p[rows, 1, second])[:, None] * p[:, 2]  # (V * V, V)


def p_value(kind: str, gamma: int, rows: int, seed: int, rule=verify, **warping) -> float:
    """Sample three tokens from each of many equal rows in one batch, and test them against the exact joint."""
    target, draft = tiny(seed, 5), tiny(seed + 100, 5)
    proposers = {"model": lambda: ModelProposer(draft), "lookup": LookupProposer}
    proposer = (proposers | {"early exit": lambda: EarlyExitProposer(target, 1)})[kind]()
    ids, sampling = (
        [0, 3, 1, 4, 2, 3, 1],
        Sampling(generator=torch.Generator().manual_seed(seed), **warping),
    )
    made = generate(
        target,
        [torch.tensor(ids)] * rows,
        proposer,
        gamma=gamma,
        max_new_tokens=gamma + 4,  # so that the first three are drafted in full
        sampling=sampling,
        eos_token_id=[],
        verify=rule,
    )
    places = torch.stack(made.tokens)[:, :3] @ torch.tensor([25, 5, 1])
    return chi_square(places.bincount(minlength=125), joint(target, ids, sampling).flatten())


def without_residual(p, proposal: Proposal, uniform):
    """After a rejection draw from p itself."""
    accepted = verify(p, proposal, uniform)[0]
    return accepted, sample_categorical(p[torch.arange(len(p)), accepted], uniform[:, -1])


def with_another_q(p, proposal: Proposal, uniform):
    """Believe that the draft was sampled at half its temperature."""
    if proposal.probabilities is None:  # nothing was drafted
        return verify(p, proposal, uniform)
    q = proposal.probabilities**2
    return verify(p, Proposal(proposal.tokens, q / q.sum(-1, keepdim=True)), uniform)


def off_by_one(p, proposal: Proposal, uniform):
    """Judge each token by the distribution of the place before it."""
    return verify(p.roll(1, dims=1), proposal, uniform)


SETTINGS = (
    ("model", 1, {"temperature": 1.0}),
    ("model", 2, {"temperature": 0.7}),
    ("model", 4, {"temperature": 1.5}),
    ("model", 3, {"temperature": 1.0, "top_k": 3}),
    ("model", 2, {"temperature": 1.0, "top_p": 0.8}),
    ("lookup", 2, {"temperature": 1.0}),
    ("early exit", 2, {"temperature": 1.0}),
    ("early exit", 3, {"temperature": 0.8, "top_k": 4, "top_p": 0.9}),
)
CONTROLS = {"no_residual": without_residual, "another_q": with_another_q, "off_by_one": off_by_one}


def sampling_figures(s: Setup) -> list[dict]:
    """Sampled tokens follow the target's exact joint distribution; with a broken rule they do not."""
    rows, found = 500 if s.quick else 4000, []
    by_block = []
    for i, (kind, gamma, warping) in enumerate(SETTINGS):
        found.append(p_value(kind, gamma, rows, s.seed + i, **warping))
        by_block.append(p_value(kind, gamma, rows, s.seed + i, verify_block, **warping))
        s.bar.update()
    told = f"three tokens of {rows} equal rows against the exact joint of 5 x 5 x 5, chi-square"
    bound = f"{told}, the smallest of {len(found)} settings; at level 0.05 the Bonferroni bound is {0.05 / len(found)}"
    figures = [figure("min_p_value", [min(found)], "p-value", bound) | {"n": len(found)}]
    figures.append(figure("min_p_value_block", [min(by_block)], "p-value", bound))
    figures[-1]["n"] = len(by_block)
    for name, broken in CONTROLS.items():
        value = p_value("model", 2, rows, s.seed, broken, temperature=1.0)
        figures.append(
            figure(
                f"control_{name}_p_value", [value], "p-value", f"{told}, broken: {broken.__doc__}"
            )
        )
        s.bar.update()
    return figures


def q_p_value(proposer: Proposer, target: PreTrainedModel, rows: int, **warping) -> float:
    """Test the first guesses of many equal rows against the distribution that is reported for them."""
    sampling = Sampling(generator=torch.Generator().manual_seed(0), **warping)
    options = {"gamma": 1, "max_new_tokens": 3, "sampling": sampling, "eos_token_id": []}
    propose, proposals = proposer.propose, []
    proposer.propose = lambda gamma: proposals.append(propose(gamma)) or proposals[-1]
    made = generate(target, torch.tensor([[0, 3, 1, 4, 2]]).expand(rows, -1), proposer, **options)
    first, p_values = torch.stack(made.tokens)[:, 0], []
    for token in first.unique():
        guesses, q = (x[first == token, 0] for x in proposals[0])
        if len(guesses) > 100 and q[0].max() < 1:
            p_values.append(chi_square(guesses.bincount(minlength=5), q[0]))
    return min(p_values) * len(p_values)


def q_figures(s: Setup) -> list[dict]:
    """The q that a proposer reports is the distribution that its guesses have."""
    rows, target, draft = 500 if s.quick else 4000, tiny(s.seed, 5), tiny(s.seed + 100, 5)
    warpings = {"temperature": 0.6}, {"temperature": 1.0, "top_k": 3}
    warpings += ({"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.2},)
    makers = [lambda: ModelProposer(draft), lambda: EarlyExitProposer(target, 1)]
    found = [q_p_value(make(), target, rows, **w) for make in makers for w in warpings]
    raw = [q_p_value(RawProposer(draft), target, rows, **w) for w in warpings]
    told = f"first guesses of {rows} equal rows against the reported q, chi-square, Bonferroni over texts"
    worst = f"{told}, the smallest of {len(found)} settings"
    broken = f"{told}, the largest of {len(raw)} settings: a proposer that reports raw logits"
    figures = [figure("q_p_value", [min(found)], "p-value", worst) | {"n": len(found)}]
    return [*figures, figure("control_raw_q_p_value", [max(raw)], "p-value", broken)]


def race_figures(s: Setup) -> list[dict]:
    """Speed against transformers, eager and compiled; all else there is measured at the same gamma."""
    gamma, long, figures = main_figures(s)
    figures += task_figures(s, gamma, long) + batch_figures(s, gamma) + early_exit_figures(s)
    return figures + compiled_figures(s, gamma)


def exact_figures(s: Setup) -> list[dict]:
    return prefix_figures(s) + sampling_figures(s) + q_figures(s)


def learned_heads(s: Setup, seed: int) -> ParallelDraft:
    """A parallel draft, trained on the target's answers to requests and word problems; one that is done is read."""
    done = RUNS / f"heads-{seed}"
    if done.is_dir() and not s.quick:
        return ParallelDraft.from_pretrained(done)
    count, tokenizer = 8 if s.quick else 200, lab.load_tokenizer("lab-target")
    texts = [*Requests(count), *(long[:1] for _, long in Solutions(count, (1, 5)))]
    prompts = [encode(tokenizer, text) for text in texts]
    answers = generate_targets(
        s.target, tokenizer, prompts, None if s.quick else RUNS, 16 if s.quick else 128
    )
    torch.manual_seed(seed)
    heads = ParallelDraft(s.target.config.hidden_size, 8)
    options = {"epochs": 1 if s.quick else 8, "batch_size": 4 if s.quick else 16}
    train_parallel(heads, s.target, answers, learning_rate=5e-3, seed=seed, **options)
    if not s.quick:
        heads.save_pretrained(done)
    return heads


def parallel_figures(s: Setup) -> list[dict]:
    """Heads that guess in one call beside the chain draft: acceptance by position, and speed."""
    tokenizer, target = lab.load_tokenizer("lab-target"), Runner(s.target)
    requests = [encode(tokenizer, text) for text in Requests(2 if s.quick else 24, test=True)]
    tasks = {"": s.prompts("long"), "_requests": requests}
    told = {"": PROBLEMS.format("long"), "_requests": "requests to tell about somebody"}
    chain, figures = ours(target, ModelProposer(s.draft), 8), []
    seeds = range(s.seed, s.seed + (1 if s.quick else 5))
    arms = {}
    for seed in seeds:
        arms[seed] = ours(target, ParallelProposer(s.target, learned_heads(s, seed)), 8)
        s.bar.update()
    for task, prompts in tasks.items():
        conditions = f"greedy, {told[task]}, gamma 8"
        done = race({"generate": peer(s.target), "chain": chain} | arms, prompts, 1, s.bar)
        by_seed = {seed: summarize([r for run in done[seed] for r in run.rounds]) for seed in seeds}
        of_chain = summarize([r for run in done["chain"] for r in run.rounds])
        heads = f"{len(seeds)} trainings of 8 heads, {conditions}; n is trainings"
        figures += summary_figures("parallel" + task, [*by_seed.values()], s.told(heads))
        per_prompt = [summarize(run.rounds) for run in done["chain"]]
        figures += summary_figures(
            "chain" + task, per_prompt, s.told(f"{conditions}; n is prompts")
        )
        figures += position_figures("parallel" + task, [*by_seed.values()], s.told(heads))
        figures += position_figures(
            "chain" + task, per_prompt, s.told(f"{conditions}; n is prompts")
        )
        speeds = [np.mean(ratios(done[seed], done["chain"])) for seed in seeds]
        figures.append(figure(f"parallel_over_chain{task}", speeds, "ratio", s.told(heads)))
        cost = [x.draft_seconds / x.target_calls for x in by_seed.values()]
        cost = [x / (of_chain.draft_seconds / of_chain.target_calls) for x in cost]
        what = f"seconds of drafting per round over the chain's, {heads}"
        figures.append(figure(f"parallel_cost_over_chain{task}", cost, "ratio", s.told(what)))
    return figures


def summary_figures(name: str, summaries: list, told: str) -> list[dict]:
    accepted = [x.acceptance for x in summaries if np.isfinite(x.acceptance)]
    calls = [x.tokens_per_call for x in summaries if np.isfinite(x.tokens_per_call)]
    return [
        figure(f"acceptance_{name}", accepted, "fraction", told),
        figure(f"tokens_per_call_{name}", calls, "tokens", told),
    ]


def position_figures(name: str, summaries: list, told: str) -> list[dict]:
    """Of all guesses at a position, the fraction that is accepted with all before it."""
    told = f"all guesses before it accepted, too; {told}"
    figures = []
    for i in range(max(len(x.unconditional) for x in summaries)):
        values = [x.unconditional[i] for x in summaries if len(x.unconditional) > i]
        position = f"acceptance_{name}_position_{i + 1}"
        figures.append(figure(position, values, "fraction", told))
    return figures


PARTS = {
    "race": race_figures,
    "gammas": gamma_figures,
    "block": block_figures,
    "tokenizers": other_tokenizer_figures,
    "parallel": parallel_figures,
    "exact": exact_figures,
}


def measure(quick: bool, seed: int, parts: Sequence[str] = tuple(PARTS)) -> list[dict]:
    """Measure speculative decoding against transformers: speed, acceptance, exactness."""
    torch.set_num_threads(1 if quick else THREADS)
    prompts, third, pairs = (2, 2, 4) if quick else (24, 8, 20)
    steps = {"race": 5 * prompts + -(-prompts // 8), "gammas": 2 * third, "tokenizers": third}
    steps["parallel"] = 2 * prompts + (1 if quick else 5)
    steps |= {"block": len(TEMPERATURES), "exact": pairs + len(SETTINGS) + len(CONTROLS)}
    total = sum(steps[part] for part in parts)
    target, draft = lab.load("lab-target"), lab.load("lab-draft")
    with tqdm(total=total, desc="speculate") as bar, drafts_of_fixed_length(draft):
        s = Setup(target, draft, quick, seed, bar)
        return [one for part in parts for one in PARTS[part](s)]


if __name__ == "__main__":
    benchmark(measure, parts=tuple(PARTS))
