"""Part of run.py: what kvlab claims as exact holds on a GPU, in fp32, fp16 and bf16.

A law is a function of a device and a precision; each pair of law and precision is one check. Where a
law says "equal", two computations are compared that differ in nothing but rounding.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedModel

from kvlab import align, fuse, lab, speculate
from kvlab import cache as kv
from kvlab.compress import METHODS, evict, key_norm, snapkv
from kvlab.distill import KVDistiller
from kvlab.evaluate import chi_square, figure
from kvlab.generation import encode
from kvlab.knowledge import splice
from kvlab.lab.report import problems
from kvlab.layers import proportional
from kvlab.losses import kl
from kvlab.models import differences, fingerprint, require_supported, rotary_of
from kvlab.parallel import ParallelDraft
from kvlab.slots import Slots, step
from kvlab.speculate import Runner, Sampling, decode, generate, summarize
from kvlab.training import fit

# The largest error of a vector (a token's key or value in one head, or its logits) that counts as
# rounding, relative to the root mean square of the norms of such vectors. In half precision one
# rounding is off by at most half of eps = torch.finfo(dtype).eps; the three layers of these models
# make some thirty in a row, which add up like a random walk. The largest error on a CPU is 7 eps
# (keys at another position: a model rounds the sines of its angles too); a GPU rounds in another
# order in each kernel, so 16 eps. In fp32 a model computes angles in float32: an angle of 150
# radians is off by 1e-5, and 6e-6 is the largest error on a CPU; so 1e-4.
# The same number says when two tokens tie: if their logits are nearer than this, in standard
# deviations of the logits, rounding decides which one is the best.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 16 * torch.finfo(torch.float16).eps,  # 0.016
    torch.bfloat16: 16 * torch.finfo(torch.bfloat16).eps,  # 0.125
}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FAMILIES = {
    "Qwen3": {"rope_type": "default", "rope_theta": 10000.0},
    "Llama": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
LAYERS = 3
PAIRS = {"cpu": 1000, "cuda": 3000}  # rows of the chi-square test
PRECISION = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}  # of `fit`
errors = {dtype: {} for dtype in NAMES}  # the largest of each comparison


def tiny(device: str, dtype: torch.dtype, family="Qwen3", seed=0, **changes) -> PreTrainedModel:
    """A random model of 3 layers, 4 heads, 2 KV heads and 97 tokens."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 256, "initializer_range": 0.2}
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes |= {"rope_parameters": dict(FAMILIES[family])}
    config = getattr(transformers, f"{family}Config")(**sizes | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.to(device, dtype).eval().requires_grad_(False)


def both(device: str, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """A Qwen3 and a Llama."""
    for family in FAMILIES:
        yield tiny(device, dtype, family)


def tokens(device: str, rows: int, count: int, seed=0) -> Tensor:
    """Random token ids, (rows, count)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (rows, count), generator=generator).to(device)


def error(one: Tensor, two: Tensor) -> float:
    """The largest error of a vector of `one`, over the root mean square of the norms in `two`."""
    one, two = one.detach().double(), two.detach().double()
    size = two.square().sum(-1).mean().sqrt()
    return ((one - two).norm(dim=-1).max() / size).item()


def near(one: Tensor, two: Tensor, dtype: torch.dtype, what: str) -> None:
    """Assert that tensors are equal up to rounding."""
    value = error(one, two)
    errors[dtype][what] = max(value, errors[dtype].get(what, 0.0))
    assert value <= TOLERANCE[dtype], f"{what}: error {value:.2g}, allowed {TOLERANCE[dtype]:.2g}"


def far(one: Tensor, two: Tensor, dtype: torch.dtype) -> None:
    """Assert that tensors differ by more than rounding: the control of a law."""
    value = error(one, two)
    assert value > 2 * TOLERANCE[dtype], f"The control differs by {value:.2g} only."


def near_caches(one, two, dtype: torch.dtype, what: str) -> None:
    """Assert that caches are equal up to rounding, layer by layer, keys and values each."""
    for a, b in zip(kv.to_tensor(one).flatten(0, 1), kv.to_tensor(two).flatten(0, 1), strict=True):
        near(a, b, dtype, what)


def same_bits(one, two) -> bool:
    """Whether two caches are equal to the last bit."""
    return torch.equal(kv.to_tensor(one), kv.to_tensor(two))


# -- cache


def cache_in_parts(device: str, dtype: torch.dtype) -> None:
    """A text read in parts is the text read at once."""
    ids = tokens(device, 2, 40)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for model in both(device, dtype):
        for whole_mask in (None, mask):
            whole, parts = kv.prefill(model, ids, attention_mask=whole_mask), None
            for start, stop in pairwise((0, 17, 18, 40)):
                part_mask = None if whole_mask is None else whole_mask[:, start:stop]
                parts = kv.prefill(model, ids[:, start:stop], parts, attention_mask=part_mask)
            text = mask.bool() if whole_mask is not None else torch.ones_like(mask, dtype=bool)
            stored = [kv.to_tensor(x.cache).transpose(3, 4)[:, :, text] for x in (parts, whole)]
            for one, two in zip(stored[0].flatten(0, 1), stored[1].flatten(0, 1), strict=True):
                near(one, two, dtype, "cache in parts")
            near(parts.logits, whole.logits, dtype, "logits in parts")


def cache_shift(device: str, dtype: torch.dtype) -> None:
    """Shifting is reading at that position; what follows does not change."""
    ids, text = tokens(device, 2, 40), tokens(device, 2, 6, seed=1)
    for model in both(device, dtype):
        here, there = kv.prefill(model, ids), kv.prefill(model, ids, position=100)
        moved = kv.shift(here.cache, 100, rotary_of(model))
        near_caches(moved, there.cache, dtype, "shift")
        after = kv.prefill(model, text, kv.Prefix(moved, 140)).logits
        near(after, kv.prefill(model, text, there).logits, dtype, "logits after a shift")
        wrong = kv.shift(here.cache, 101, rotary_of(model))
        far(kv.to_tensor(wrong)[0, 0], kv.to_tensor(there.cache)[0, 0], dtype)


def cache_select(device: str, dtype: torch.dtype) -> None:
    """Dropping entries is hiding them with a mask."""
    ids, text = tokens(device, 2, 40), tokens(device, 2, 6, seed=1)
    kept = torch.tensor([0, 1, 2, 9, 10, 17, 28, 31, 38, 39], device=device)
    mask = torch.zeros_like(ids)
    mask[:, kept] = 1
    for model in both(device, dtype):
        full = kv.prefill(model, ids)
        hidden = kv.prefill(model, text, kv.Prefix(full.cache, 40, attention_mask=mask))
        dropped = kv.prefill(model, text, kv.Prefix(kv.select(full.cache, kept), 40))
        near(dropped.logits, hidden.logits, dtype, "logits after select")
        far(kv.prefill(model, text, full).logits, hidden.logits, dtype)


def cache_file(device: str, dtype: torch.dtype) -> None:
    """A cache comes back from a file to the last bit, on the model's device."""
    for model in both(device, dtype):
        prefix = kv.prefill(model, tokens(device, 1, 40))
        with tempfile.TemporaryDirectory() as folder:
            kv.save(prefix, f"{folder}/a.safetensors", model)
            loaded = kv.load(f"{folder}/a.safetensors", model)
            on_cpu = kv.load(f"{folder}/a.safetensors", fingerprint(model)).cache
        assert loaded.cache.layers[0].keys.device.type == torch.device(device).type
        assert on_cpu.layers[0].keys.device.type == "cpu"
        assert same_bits(loaded.cache, prefix.cache)
        assert torch.equal(kv.to_tensor(on_cpu), kv.to_tensor(prefix.cache).cpu())
        assert loaded.next_position == 40


def cache_rotation(device: str, dtype: torch.dtype) -> None:
    """Keys are un-rotated and rotated there and back."""
    positions = torch.arange(100, 140, device=device)
    for model in both(device, dtype):
        cache, rotary = (
            kv.prefill(model, tokens(device, 1, 40), position=100).cache,
            rotary_of(model),
        )
        restored = kv.rotate(kv.unrotate(cache, positions, rotary), positions, rotary)
        near_caches(restored, cache, dtype, "rotation there and back")


def model_identity(device: str, dtype: torch.dtype) -> None:
    """A model has one fingerprint on all devices, and is supported on each."""
    for model in both(device, dtype):
        require_supported(model)
        here = fingerprint(model)
        on_cpu = copy.deepcopy(model).cpu()
        require_supported(on_cpu)
        assert not differences(fingerprint(on_cpu), here)
        model.lm_head.weight.data[0] += 1
        assert "sha256" in differences(fingerprint(model), here)


# -- slots


def slots_rows(device: str, dtype: torch.dtype) -> None:
    """Rows of different lengths in one batch are the rows alone, after a guess was taken back."""
    lengths = (9, 2, 30)
    texts = [tokens(device, 1, n + 5, seed=n) for n in lengths]
    for model in both(device, dtype):
        pasts = [kv.prefill(model, text[:, :n]) for text, n in zip(texts, lengths, strict=True)]
        pasts[2] = kv.Prefix(
            kv.select(pasts[2].cache, torch.tensor([0, 3, 5, 29], device=device)), 30
        )
        for fixed in (False, True):
            slots = Slots(model, len(texts), 24)
            for row, past in enumerate(pasts):
                slots.put(row, past.cache, past.next_position)
            guess = tokens(device, 3, 4, seed=9)
            step(model, slots, guess, slots.set_write_positions(slots.lengths, 4, fixed))
            for start, stop in pairwise((0, 1, 4, 5)):  # lengths did not grow: the guess is gone
                new = [x[:, n + start : n + stop] for x, n in zip(texts, lengths, strict=True)]
                columns = slots.set_write_positions(slots.lengths, stop - start, fixed)
                logits = step(model, slots, torch.cat(new), columns)
                slots.lengths = [n + stop - start for n in slots.lengths]
            for row, (text, n, past) in enumerate(zip(texts, lengths, pasts, strict=True)):
                alone = kv.prefill(model, text[:, n:], past)
                near(logits[row, -1:], alone.logits, dtype, "logits of a row in slots")
                near_caches(slots.entries(row), alone.cache, dtype, "a row in slots")


# -- speculation


def noisy(model: PreTrainedModel, scale: float = 0.02) -> PreTrainedModel:
    """A model with other weights close by: it guesses right often, not always."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    for weight in other.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator).to(weight)
    return other


def by_transformers(model: PreTrainedModel, ids: Tensor, count: int) -> list[int]:
    """The greedy text of `generate`, all settings explicit."""
    options = {"max_new_tokens": count, "do_sample": False, "repetition_penalty": 1.0}
    config = GenerationConfig(**options, eos_token_id=None, pad_token_id=0)
    ids = ids[None].to(model.device)
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, generation_config=config)
    return output[0, ids.shape[1] :].tolist()


@torch.no_grad()
def distance_from_best(model: PreTrainedModel, ids: Tensor, new: list[int]) -> Tensor:
    """How far the logit of each new token is below the best one, in deviations of the logits.

    The text is read once, all tokens given.
    """
    new = torch.tensor(new, device=model.device)
    text = torch.cat((ids.to(model.device), new))[None]
    logits = model(text).logits[0, len(ids) - 1 : -1].float()
    chosen = logits.gather(1, new[:, None])[:, 0]
    return (logits.amax(1) - chosen) / logits.std(1)


def require_same_text(model, prompts: Sequence[Tensor], got, want, dtype, what: str) -> None:
    """In fp32 texts are equal; in half precision they differ in near ties of the target only.

    So each token of both texts must be the target's best or tie with it, whatever came before it.
    """
    got = [row.tolist() if isinstance(row, Tensor) else row for row in got]
    want = [row.tolist() if isinstance(row, Tensor) else row for row in want]
    assert dtype != torch.float32 or got == want, f"{what}: {got} instead of {want}"
    for ids, *texts in zip(prompts, got, want, strict=True):
        for new in texts:
            far = distance_from_best(model, ids, new).max().item()
            where = f"{what} (distance from the best logit)"
            errors[dtype][where] = max(far, errors[dtype].get(where, 0.0))
            assert far <= TOLERANCE[dtype], f"{what}: a token is {far:.2g} below the target's best"


def speculation_greedy(device: str, dtype: torch.dtype) -> None:
    """Whatever drafts, the greedy text of each row is the target's, with a prefix and without."""
    prompts, known = [tokens(device, 1, n, seed=n)[0] for n in (7, 1, 20)], tokens(device, 1, 12)
    qwen, llama = both(device, dtype)
    texts = [torch.cat((known[0], ids)) for ids in prompts]
    heads = ParallelDraft(qwen.config.hidden_size, guesses=3)
    nn.init.normal_(heads.output_proj, std=0.1)
    heads.to(device, dtype)
    for model, read, prefix in ((qwen, prompts, None), (llama, texts, kv.prefill(llama, known))):
        options = {"max_new_tokens": 16, "prefix": prefix}
        want = generate(model, prompts, **options).tokens
        if dtype == torch.float32:
            expected = [by_transformers(model, ids, 16) for ids in read]
            assert [row.tolist() for row in want] == expected
        for proposer in (
            speculate.ModelProposer(noisy(model)),
            speculate.EarlyExitProposer(model, 2),
            speculate.LookupProposer(),
            speculate.ParallelProposer(model, heads),
        ):
            name = type(proposer).__name__
            got = generate(model, prompts, proposer, gamma=3, **options)
            require_same_text(model, read, got.tokens, want, dtype, name)
            assert any(any(r.drafted) for r in got.rounds), f"{name} drafted nothing"


def speculation_whole(device: str, dtype: torch.dtype) -> None:
    """A draft that is the target is accepted whole, but for near ties."""
    prompts = [tokens(device, 1, n, seed=n)[0] for n in (4, 9, 1)]
    least = 1.0 if dtype == torch.float32 else 0.8
    for model in both(device, dtype):
        draft = speculate.ModelProposer(model)
        got = generate(model, prompts, draft, gamma=4, max_new_tokens=21)
        acceptance = summarize(got.rounds).acceptance
        assert acceptance >= least, f"acceptance {acceptance:.2f}"


def speculation_lab(device: str, dtype: torch.dtype) -> None:
    """The same for the trained lab models; the draft knows word problems, and not the FAQ."""
    tokenizer = lab.load_tokenizer("lab-target")
    target, draft = (lab.load(name, dtype).to(device) for name in ("lab-target", "lab-draft"))
    question = {"role": "user", "content": lab.faq()[0]["question"]}
    conversations = problems(3, "long", 1, seed=1)[0][:-1], [question]
    prompts = [torch.tensor(encode(tokenizer, conversation)) for conversation in conversations]
    options = {"max_new_tokens": 16, "eos_token_id": []}
    want = generate(target, prompts, **options).tokens
    if dtype == torch.float32:
        expected = [by_transformers(target, ids, 16) for ids in prompts]
        assert [row.tolist() for row in want] == expected
    got = generate(target, prompts, speculate.ModelProposer(draft), gamma=4, **options)
    require_same_text(target, prompts, got.tokens, want, dtype, "lab pair")
    assert 0.1 < summarize(got.rounds).acceptance < 1


def without_residual(p: Tensor, proposal, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Verification that samples from p itself after a rejection: wrong, as the test must show."""
    accepted, _ = speculate.verify(p, proposal, uniform)
    p_next = p[torch.arange(len(p), device=p.device), accepted]
    return accepted, speculate.sample_categorical(p_next, uniform[:, -1])


def speculation_sampled(device: str, dtype: torch.dtype) -> None:
    """Pairs of sampled tokens have the target's own probabilities, and without the residual not."""
    small = {
        "vocab_size": 6,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "initializer_range": 0.25,
    }
    small |= {"num_key_value_heads": 1, "intermediate_size": 64}
    target = tiny(device, dtype, seed=1, num_hidden_layers=2, **small)
    draft = tiny(device, dtype, seed=2, num_hidden_layers=1, **small)
    begun = torch.tensor([[3, 1, 4, 1, 5]])
    state = kv.prefill(target, begun.to(device))
    every = torch.arange(6, device=device)[:, None, None]
    after = [kv.prefill(target, token, state).logits[0] for token in every]
    first, second = state.logits[0].double().softmax(-1), torch.stack(after).double().softmax(-1)
    expected = (first[:, None] * second).flatten().cpu().numpy()
    p_values = {}
    exact_rules = speculate.verify, speculate.verify_block
    for rule in (*exact_rules, without_residual):
        sampling = Sampling(1.0, generator=torch.Generator().manual_seed(0))
        options = {"gamma": 3, "max_new_tokens": 5, "sampling": sampling, "verify": rule}
        rows = begun.expand(PAIRS[device], -1)
        pairs = generate(target, rows, speculate.ModelProposer(draft), **options).tokens
        pairs = torch.stack(pairs)[:, :2]
        counts = np.bincount(6 * pairs[:, 0] + pairs[:, 1], minlength=36)
        p_values[rule] = chi_square(counts, expected)
    for rule in exact_rules:
        assert p_values[rule] > 1e-3, f"{rule.__name__}: p is {p_values[rule]:.2g}"
    assert p_values[without_residual] < 1e-6, (
        f"without residual p is {p_values[without_residual]:.2g}"
    )


def draws_of_a_cpu_generator(device: str, dtype: torch.dtype) -> None:
    """A CPU generator's draws give the same text on CPU and GPU.

    A draw falls within the rounding of a border between two tokens (1e-6 of the 97 borders in
    [0, 1)) with probability 1e-4, so in one of eight rows of twenty tokens rarely, in two never.
    """
    model = tiny(device, dtype, initializer_range=0.1)
    prompts = [tokens("cpu", 1, n, seed=n)[0] for n in range(3, 11)]
    for draft in (None, noisy(model)):
        texts = []
        for place in ("cpu", device):
            proposer = draft and speculate.ModelProposer(copy.deepcopy(draft).to(place))
            generators = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
            sampling = Sampling(0.9, top_p=0.95, generator=generators)
            options = {"max_new_tokens": 20, "sampling": sampling}
            got = generate(copy.deepcopy(model).to(place), prompts, proposer, **options)
            texts.append([row.tolist() for row in got.tokens])
        other = sum(one != two for one, two in zip(*texts, strict=True))
        assert other <= 1, f"{other} of {len(prompts)} rows differ"
        assert len({tuple(row) for row in texts[0]}) == len(prompts)


@contextmanager
def quick_compiler(device: str) -> Iterator[None]:
    """On a CPU leave out the compiler's back end, which takes a minute there."""
    real = torch.compile

    def compile_graph(function, options, **rest):
        kept = {name: value for name, value in options.items() if name == "guard_filter_fn"}
        return real(function, backend="eager", options=kept, **rest)

    if device == "cpu":
        torch.compile = compile_graph
    try:
        yield
    finally:
        torch.compile = real
        torch._dynamo.reset()


def places_of(runner: Runner) -> list[int]:
    """Where a runner's memory is."""
    return [x.data_ptr() for layer in runner.slots.layers for x in (layer.keys, layer.values)]


def compiled_path(device: str, dtype: torch.dtype) -> None:
    """Compiled calls (CUDA graphs on a GPU) give the eager text, in memory that stays in place."""
    gamma = 2 if dtype == torch.float32 else 1  # one shape less to compile
    target = tiny(device, dtype, num_hidden_layers=1)
    draft = noisy(target, 0.04)
    fast, fast_draft = Runner(target, 64), Runner(draft, 64)
    first, *later = [
        [tokens(device, 1, n, seed=n)[0] for n in two] for two in ((20, 3), (5, 11), (1, 8))
    ]
    options = {"gamma": gamma, "max_new_tokens": 20}
    with quick_compiler(device):
        proposer = speculate.ModelProposer(fast_draft)
        stopped = decode(fast, first, proposer, **options)
        for _ in range(6):  # the third call of a program replays its graph
            next(stopped)
        places = places_of(fast), places_of(fast_draft)
        for prompts in later:
            got = generate(fast, prompts, proposer, **options)
            want = generate(target, prompts, speculate.ModelProposer(draft), **options)
            require_same_text(target, prompts, got.tokens, want.tokens, dtype, "compiled")
            assert 0 < summarize(got.rounds).acceptance < 1
            if dtype == torch.float32:
                assert [r.tokens for r in got.rounds] == [r.tokens for r in want.rounds]
        assert (places_of(fast), places_of(fast_draft)) == places
        assert len(fast._programs) == 1
        assert len(fast_draft._programs) == gamma


# -- splice, evict, distill


def splice_arms(device: str, dtype: torch.dtype) -> None:
    """Reading all tokens again is reading in full; "shift" is shifting and joining by hand."""
    ids = tokens(device, 1, 40)
    for model in both(device, dtype):
        prefixes = [kv.prefill(model, ids[:, a:b]) for a, b in pairwise((0, 9, 20, 40))]
        full, rotary = kv.prefill(model, ids).cache, rotary_of(model)
        for arm in ("full", "prefix", "recompute", "gradual", "legolink"):
            spliced = splice(model, prefixes, arm, fraction=1.0, first_tokens=20)
            near_caches(spliced.cache, full, dtype, f"splice {arm}")
        moved = splice(model, prefixes, "shift").cache
        by_hand = prefixes[0].cache
        for start, prefix in zip((9, 20), prefixes[1:], strict=True):
            by_hand = kv.join(by_hand, kv.shift(prefix.cache, start, rotary))
        near_caches(moved, by_hand, dtype, "splice shift")
        far(moved.layers[-1].values, full.layers[-1].values, dtype)


def evict_entries(device: str, dtype: torch.dtype) -> None:
    """Keeping everything changes nothing; dropping entries is hiding them from what follows."""
    ids, text = tokens(device, 1, 40), tokens(device, 1, 6, seed=1)
    for model in both(device, dtype):
        full = kv.prefill(model, ids)
        for score in METHODS.values():
            near_caches(
                evict(model, ids, score, retention=1.0).cache, full.cache, dtype, "evict nothing"
            )
        for score in (key_norm, snapkv):
            prefix = evict(model, ids, score, budget=11, scope="token")
            mask = torch.full((46, 46), float("-inf"), device=device, dtype=dtype).triu(1)
            hidden = torch.ones(40, device=device).index_fill(0, prefix.positions[0], 0).bool()
            mask[40:, :40] = mask[40:, :40].masked_fill(hidden, float("-inf"))
            masked = model(torch.cat([ids, text], 1), attention_mask=mask[None, None]).logits[:, -1]
            after = kv.prefill(model, text, prefix).logits
            near(after, masked, dtype, "logits after eviction")
            far(kv.prefill(model, text, full).logits, masked, dtype)


def distiller_of(model: PreTrainedModel, bias: float) -> KVDistiller:
    """A small distiller whose gates begin at sigma(bias)."""
    torch.manual_seed(0)
    distiller = KVDistiller(model, layer=1, rank=4, scorer_hidden_size=16)
    distiller.scorer.down.bias.data.fill_(bias)
    return distiller


def distill_open(device: str, dtype: torch.dtype) -> None:
    """With open gates and everything kept, a new distiller gives the ordinary cache."""
    ids, text = tokens(device, 1, 40), tokens(device, 1, 6, seed=1)
    for model in both(device, dtype):
        distiller, full = distiller_of(model, 1e3), kv.prefill(model, ids)
        prefix = distiller.compress(ids, retention=1.0)
        near_caches(prefix.cache, full.cache, dtype, "distill, all kept")
        after = kv.prefill(model, text, prefix).logits
        near(after, kv.prefill(model, text, full).logits, dtype, "logits after distill")
        half = distiller_of(model, 0.0).compress(ids, retention=1.0)
        far(half.cache.layers[0].keys, full.cache.layers[0].keys, dtype)


def distill_gradient(device: str, dtype: torch.dtype) -> None:
    """The gradient of a loss on the text reaches scorer and adapters, and not the model."""
    ids, text = tokens(device, 2, 40), tokens(device, 2, 6, seed=1)
    for model in both(device, dtype):
        distiller = distiller_of(model, 0.0)
        logits = distiller(ids, torch.ones_like(ids), text, 0.4)
        log_q, log_p = (x.float().log_softmax(-1) for x in logits)
        kl(log_q, log_p).mean().backward()
        grads = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
        assert all(grad.isfinite().all() for grad in grads.values())
        for part in ("scorer.up.weight", "scorer.down.weight", "v_proj.lora_B"):
            assert any(part in name and grad.any() for name, grad in grads.items()), part
        assert all(p.grad is None for p in model.parameters())


# -- fuse


def fuse_gates(device: str, dtype: torch.dtype) -> None:
    """Closed gates change no bit; open ones do, and a part fused alone is that part of the whole."""
    ids = tokens(device, 2, 24)
    other = {"num_hidden_layers": 5, "num_key_value_heads": 1, "head_dim": 8}
    sharer = kv.prefill(tiny(device, dtype, seed=1, **other), ids)
    sizes = fuse.Size(LAYERS, 2, 16), fuse.Size(5, 1, 8)
    for model in both(device, dtype):
        receiver = kv.prefill(model, ids)
        torch.manual_seed(0)
        fuser = fuse.Fuser(*sizes, settings=fuse.Settings(hidden=32)).to(device)
        assert same_bits(fuser(receiver, sharer), receiver.cache)
        fuser.gate_logit.data.fill_(1.0)
        whole = fuser(receiver, sharer)
        for start, stop in pairwise((0, 11, 24)):
            alone = fuser(kv.part(receiver, start, stop), kv.part(sharer, start, stop))
            expected = kv.select(whole, torch.arange(start, stop, device=device))
            near_caches(alone, expected, dtype, "fuse a part")
        far(kv.to_tensor(whole), kv.to_tensor(receiver.cache), dtype)


# -- align


def resample_in_a_loop(x: Tensor, student: Sequence[int], teacher: Sequence[int]) -> Tensor:
    """The formula of `plan_time` for one row (L, T, D), token by token, in float64."""
    columns = []
    for (a, b), (c, d) in zip(pairwise(student), pairwise(teacher), strict=True):
        segment = x[:, c:d].double()
        for i in range(b - a):
            if b - a == 1:
                columns.append(segment.mean(1))
                continue
            u = i * (d - c - 1) / (b - a - 1)
            left = min(int(u), d - c - 1)
            right = min(left + 1, d - c - 1)
            columns.append((1 - (u - left)) * segment[:, left] + (u - left) * segment[:, right])
    return torch.stack(columns, 1)


def align_time(device: str, dtype: torch.dtype) -> None:
    """Resampling to other tokens is its formula in a plain loop, row by row."""
    student = [[0, 5, 6, 20], [0, 3, 9, 13]]
    teacher = [[0, 2, 8, 17], [0, 7, 10, 30]]
    x = torch.randn(2, LAYERS, 30, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    plan = align.plan_time(torch.tensor(student), torch.tensor(teacher))
    got = align.resample(x, plan)
    assert got.dtype == dtype
    for row in range(2):
        size, length = student[row][3], teacher[row][3]
        want = resample_in_a_loop(x[row, :, -length:], student[row], teacher[row])
        near(got[row, :, -size:], want, dtype, "resample")
    assert not got[1, :, :-13].any()


def align_rotation(device: str, dtype: torch.dtype) -> None:
    """Un-rotated keys of a text do not depend on where it is read."""
    ids = tokens(device, 2, 40)
    for model in both(device, dtype):
        here, there = (align.features(kv.prefill(model, ids, position=at)) for at in (0, 150))
        for one, two in zip(here, there, strict=True):
            for layer in range(LAYERS):
                near(one[:, layer], two[:, layer], dtype, "features at another position")
        prefix = kv.prefill(model, ids, position=150)
        again = align.as_prefix(there, prefix.positions, model)
        near_caches(again.cache, prefix.cache, dtype, "a cache from features")


def align_gradient(device: str, dtype: torch.dtype) -> None:
    """Features of a student in training are its cache's, and their loss reaches k_proj and v_proj."""
    ids = tokens(device, 2, 20)
    with torch.no_grad():
        target = align.features(kv.prefill(tiny(device, dtype, seed=1), ids))
    for model in both(device, dtype):
        stored = align.features(kv.prefill(model, ids))
        model.requires_grad_(True)
        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        student = align.own_features(model, states)
        for one, two in zip(student, stored, strict=True):
            for layer in range(LAYERS):
                near(one[:, layer], two[:, layer], dtype, "own features")
        align.kv_loss(student, target, torch.ones_like(ids)).backward()
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                grad = projection.weight.grad
                assert grad.isfinite().all()
                assert grad.any()


def align_training(device: str, dtype: torch.dtype) -> None:
    """Training toward a teacher in mixed precision gives finite losses that fall."""
    borders = torch.tensor([0, 8, 16, 20])
    texts = [align.Segmented(ids, borders) for ids in tokens("cpu", 8, 20)]
    others = [
        align.Segmented(ids, borders + torch.tensor([0, 2, 2, 3])) for ids in tokens("cpu", 8, 23)
    ]
    teacher = tiny(device, dtype, "Llama", seed=5).requires_grad_(True)
    seen = align.encode_with_teacher(teacher, others, texts, proportional(LAYERS, LAYERS))
    student = tiny("cpu", torch.float32).requires_grad_(True)  # `fit` takes it to the GPU
    aligned = align.AlignedStudent(
        student, [align.Projector(32, 32)], [nn.Linear(64, 64, bias=False)]
    )
    problems = list(zip(texts, seen, strict=True))
    loader = DataLoader(problems, batch_size=8, collate_fn=align.pad_problems)
    # fp16 begins with steps that its scaler leaves out, until gradients are finite.
    options = {"steps": 20, "warmup": 1, "learning_rate": 3e-3, "precision": PRECISION[dtype]}
    history = fit(aligned, loader, lambda model, batch: model(batch), **options)
    for name in ("loss", "ce", "kv", "codi"):
        values = [entry[name] for entry in history]
        assert np.isfinite(values).all(), f"{name}: {values}"
        assert values[-1] < values[0], f"{name}: {values}"
    assert all(p.grad is None for p in teacher.parameters())
    assert next(student.parameters()).is_cuda == torch.cuda.is_available()


LAWS = (
    cache_in_parts,
    cache_shift,
    cache_select,
    cache_file,
    cache_rotation,
    model_identity,
    slots_rows,
    speculation_greedy,
    speculation_whole,
    speculation_lab,
    speculation_sampled,
    draws_of_a_cpu_generator,
    splice_arms,
    evict_entries,
    distill_open,
    distill_gradient,
    fuse_gates,
    align_time,
    align_rotation,
    align_gradient,
    align_training,
    compiled_path,  # last: compiling takes longer than all the others
)


def largest_errors() -> list[dict]:
    """The largest error of each precision as a figure."""
    figures = []
    for dtype, measured in errors.items():
        if not measured:
            continue
        what = max(measured, key=measured.get)
        conditions = f"{what}; allowed {TOLERANCE[dtype]:.2g}"
        figures.append(
            figure(f"law_error_{NAMES[dtype]}", [measured[what]], "fraction", conditions)
        )
    return figures


def checks(device: str, dry: bool):
    """Each law in each precision."""
    torch.set_float32_matmul_precision("highest")  # no TF32, as by default: fp32 laws are exact
    for law in LAWS:
        for dtype, name in NAMES.items():
            if dry and dtype == torch.float16:
                continue  # bf16 runs the same lines
            if law is draws_of_a_cpu_generator and dtype != torch.float32:
                continue  # devices round differently
            title = f"{law.__name__.replace('_', ' ')}, {name}"
            yield title, lambda law=law, dtype=dtype: law(device, dtype)
    yield "largest errors", largest_errors
