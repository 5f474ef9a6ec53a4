# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05. Speculative decoding
#
# ```{admonition} In this chapter
# :class: tip
# - see why a rejected guess need not be wasted, and why the text stays *exactly* the large model's;
# - write the loop, compare it with kvlab's, and test that it is exact, sampling included;
# - measure acceptance, and predict from three measured numbers how much faster decoding becomes;
# - choose how many tokens to draft, and recognize when drafting does not pay.
#
# **Time and memory**: one or two minutes and 1 GB (with PyTorch itself) at `tiny`; at `t4`, memory is printed by the second cell.
#
# **Code**: `kvlab/speculate.py`; what is written out here is checked against it.
# ```

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kvlab") is None:  # on Colab
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "git+https://github.com/kvlab/kvlab"], check=True)

# %%
import textwrap

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import kvlab
from kvlab import Scale, plots, speculate
from kvlab.cache import prefill
from kvlab.evaluate import chi_square, mean_interval
from kvlab.lab import corpora
from kvlab.lab.report import problems
from kvlab.speculate import ModelProposer, Sampling, summarize

scale = Scale.current("05_speculative_decoding")
print(scale.describe("05_speculative_decoding"))
target, draft = scale.load("target"), scale.load("draft")
tokenizer = scale.load_tokenizer("target")
exact = target.dtype == torch.float32  # in half precision near-ties can flip

# %% [markdown]
# ## The question
#
# A large model spends most of a {term}`decoding <decode>` step on going through its layers at all, and little on how many tokens it looks at: chapter 00 measured that eight tokens cost far less than eight times one.
# But text comes one token at a time, because each depends on the one before.
# So let a small model *guess* the next few tokens, and let the large one look at all the guesses at once.
# Where a guess equals the large model's own choice, a step is saved.
#
# That much is easy.
# The question is what to do about guesses that are *nearly* right.
# With sampling there is no one right token: the large model says "bread" with probability 0.6 and "soup" with 0.3, the small one the other way round.
# When is "soup" to be accepted, so that the text is not a compromise between two models, but one that the large model could have written alone, with exactly the same probability?

# %% [markdown]
# ## One token
#
# Call the small model's distribution $q$ and the large one's $p$.
# Draw a guess $x$ from $q$.
# Accept it with probability $\min(1, p(x)/q(x))$; otherwise draw again, from what $q$ has left uncovered {cite}`leviathan2023speculative,chen2023speculative`:
#
# $$ p_{\text{rest}}(x) = \frac{\max(0,\; p(x) - q(x))}{\sum_y \max(0,\; p(y) - q(y))} $$ (residual)
#
# Token $x$ then comes out in one of two ways.
# As an accepted guess: $q(x)\min(1, p(x)/q(x)) = \min(p(x), q(x))$.
# Or from the rest, after any rejection, which happens with probability $1 - \sum_y \min(p(y), q(y)) = \sum_y \max(0, p(y) - q(y))$: just the denominator, so it gives $\max(0, p(x) - q(x))$.
# The two add up to $p(x)$, whatever $q$ is.

# %%
def accept_or_resample(p, q, rng):
    """One token distributed as p, from a guess distributed as q."""
    x = rng.choice(len(q), p=q)
    if rng.random() < p[x] / q[x]:
        return x
    rest = np.maximum(0, p - q)
    return rng.choice(len(p), p=rest / rest.sum())


target_p = np.array([0.60, 0.28, 0.08, 0.04])
draft_q = np.array([0.35, 0.50, 0.10, 0.05])
rng = np.random.default_rng(scale.seed)
samples = [accept_or_resample(target_p, draft_q, rng) for _ in range(20_000)]
fractions = np.bincount(samples, minlength=4) / len(samples)
p_value = chi_square(np.bincount(samples, minlength=4), target_p)
print("came out:", fractions.round(3), f" p-value {p_value:.2f}")
assert p_value > 0.001

# %% mystnb={"image": {"alt": "Three panels: draft and target probabilities of four tokens; their overlap, which is accepted, and what the target has beyond it, which comes from the residual; together they are the target's distribution."}}
plots.residual(target_p, draft_q);

# %% [markdown]
# The fraction of guesses that are accepted is the overlap of the two distributions, $\sum_x \min(p(x), q(x))$, the {term}`acceptance` of a guess.
# No rule that leaves $p$ exact can accept more: token $x$ can be guessed *and* come out no more often than it is guessed, $q(x)$, or comes out, $p(x)$.
# (The two papers use the letters the other way round: in Chen et al., $p$ is the draft.)

# %% [markdown]
# ## Many tokens
#
# Now guess $\gamma$ tokens, one after another, and let the target give its distribution at all of the $\gamma + 1$ places in one call.
# Accept from the left until the first rejection.
# The token that takes its place comes from {eq}`residual`, and what was guessed after it is thrown away.
# If all are accepted, the target's last distribution gives one more token for free.
# So each target call gains between $1$ and $\gamma + 1$ tokens, and never none.
#
# Here is the whole method without a cache, for greedy decoding, where the rule is simply: accept while the guess is the target's own choice.

# %%
@torch.inference_mode()
def choices(model, ids):
    """The likeliest token after each of (1, T) ids."""
    return model(ids.to(model.device)).logits[0].argmax(-1).cpu()


# %%
def speculative(target, draft, ids, gamma, new_tokens):
    """(1, T) ids, continued as the target alone would."""
    end = ids.shape[1] + new_tokens
    calls = 0
    while ids.shape[1] < end:
        start, guess = ids.shape[1], ids
        for _ in range(gamma):
            choice = choices(draft, guess)[-1]
            guess = torch.cat([guess, choice.view(1, 1)], 1)
        wanted = choices(target, guess)[start - 1 :]  # gamma + 1 of them
        agree = (wanted[:-1] == guess[0, start:]).long()
        n = int(agree.cumprod(0).sum())
        ids = torch.cat([guess[:, : start + n], wanted[n].view(1, 1)], 1)
        calls += 1
    return ids[:, :end], calls


# %% [markdown]
# `kvlab.speculate.generate` does the same with caches, sampling and batches.
# The two must give the same tokens, and both what the target gives alone.
# The text is a word problem of four steps, one that no model of the lab was trained on; `eos_token_id=[]` lets no token end it.

# %%
def encode(messages):
    options = {"add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


problem = problems(4, "long", 1, seed=scale.seed)[0]
prompt = encode(problem[:-1])
by_hand, calls = speculative(target, draft, prompt, gamma=4, new_tokens=24)
by_hand = by_hand[0, prompt.shape[1] :]
print(f"24 tokens in {calls} target calls:", tokenizer.decode(by_hand))

# %%
proposer = ModelProposer(draft)
short = {"gamma": 4, "max_new_tokens": 24, "eos_token_id": []}
by_kvlab = speculate.generate(target, prompt, proposer, **short).tokens[0]
alone = speculate.generate(target, prompt, **short).tokens[0]
if exact:
    assert by_hand.tolist() == by_kvlab.tolist() == alone.tolist()

# %% [markdown]
# With a cache there is one thing to take care of.
# The draft never *reads* the last token it guesses.
# If all guesses are accepted, the next round must begin with two tokens that are not in the draft's cache.
# Forget one, and the text is still right (the target decides), but the draft continues a text with a hole in it and is accepted less.
# It is the classic mistake, because it cannot be seen in the output.
# A draft that *is* the target shows it at once: everything must be accepted.

# %%
same = speculate.generate(target, prompt, ModelProposer(target), **short)
summary = summarize(same.rounds)
print("acceptance by position:", summary.conditional)
if exact:
    assert summary.acceptance == 1.0

# %% [markdown]
# Here is a whole solution, with one line per target call.
# Underlined tokens were drafted and accepted, those struck through were rejected, and the one in a box is the target's own.

# %%
solution = speculate.generate(
    target, prompt, proposer, gamma=4, tokenizer=tokenizer
)
plots.token_view(solution.rounds, tokenizer)

# %% [markdown]
# ## Is it exact?
#
# For greedy decoding, equal tokens settle it (in half precision, rounding can flip a near-tie, so there the comparisons of this chapter are left out).
# For sampling, "the same distribution" is a claim about probabilities, and it can be tested like one.
# Take two random models with a vocabulary of six tokens, so that all 36 continuations of two tokens can be enumerated with their exact probabilities.
# Draw many pairs by speculative decoding, and compare by a chi-square test.

# %%
from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny(layers, seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=6, hidden_size=32, intermediate_size=64, head_dim=16,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.25, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


small_target, small_draft = tiny(2, seed=1), tiny(1, seed=2)
begun = torch.tensor([[3, 1, 4, 1, 5]])


# %%
def exact_pairs(model, temperature):
    """The probability of each pair of next tokens, (36,)."""
    state = prefill(model, begun)
    first = (state.logits[0] / temperature).softmax(-1)
    pairs = []
    for token in range(6):
        step = prefill(model, torch.tensor([[token]]), state)
        pairs.append(first[token] * (step.logits[0] / temperature).softmax(-1))
    return torch.cat(pairs).double().numpy()


# %%
def with_rule(rule, n=8000):
    """Some tokens in each of n rows, in one call; the first two are counted."""
    sampling = Sampling(1.0, generator=torch.Generator().manual_seed(0))
    options = {"gamma": 3, "max_new_tokens": 5, "sampling": sampling}
    same_rows, guess = begun.expand(n, -1), ModelProposer(small_draft)
    return speculate.generate(
        small_target, same_rows, guess, verify=rule, **options
    )


def count_pairs(generated):
    pairs = torch.stack(generated.tokens)[:, :2]
    return np.bincount(6 * pairs[:, 0] + pairs[:, 1], minlength=36)


# %% [markdown]
# A test that has never failed shows little.
# So the same test gets a broken variant as well: on rejection, draw from $p$ itself instead of the rest.
# It looks harmless.
# `speculate.verify` is the rule, an argument of `generate`; of the numbers it is given, `uniform` (rows, $\gamma + 1$), the first $\gamma$ accept or reject and the last draws.

# %%
exact_rule = speculate.verify


def no_residual(p, proposal, uniform):
    accepted, _ = exact_rule(p, proposal, uniform)
    p_there = p[torch.arange(len(p)), accepted]
    return accepted, speculate.sample_categorical(p_there, uniform[:, -1])


# %%
expected = exact_pairs(small_target, 1.0)
by_rule = {
    "speculative": with_rule(exact_rule),
    "without the residual": with_rule(no_residual),
}
counts = {name: count_pairs(generated) for name, generated in by_rule.items()}
p_values = {name: chi_square(c, expected) for name, c in counts.items()}
print({name: f"{value:.2g}" for name, value in p_values.items()})
assert p_values["speculative"] > 0.001
assert p_values["without the residual"] < 1e-6

# %% mystnb={"image": {"alt": "Two histograms of 36 token pairs with the exact probabilities marked: speculative decoding agrees with them, the variant without the residual does not."}}
plots.joint_histogram(expected, counts);

# %% [markdown]
# ### The draft's own probabilities
#
# The proof holds for any $q$, as long as it *is* the distribution that the guess was drawn from.
# Temperature, top-k, top-p and penalties change what is drawn, so they must change the reported $q$, too.
# That is easily forgotten, and nothing crashes.
# But it, too, is a claim about a distribution: let the draft guess in many equal rows, and compare how often each token comes with the $q$ that it reports.
# The broken draft samples at temperature 0.5, and reports the probabilities of the raw logits.

# %%
class RawSampling(speculate.RowSampling):
    def choose(self, logits, texts):
        token, _ = super().choose(logits, texts)
        return token, logits[:, 0].softmax(-1)  # before the temperature


class RawProposer(ModelProposer):
    def start(self, texts, target_cache, sampling, room):
        sampling = RawSampling(**vars(sampling))
        super().start(texts, target_cache, sampling, room)


# %%
def p_value_of_guesses(proposer, n=4000):
    """First guesses in n rows with the same text, against the reported q."""
    proposals, propose = [], proposer.propose
    proposer.propose = lambda gamma: proposals.append(propose(gamma)) or proposals[0]
    sampling = Sampling(0.5, generator=torch.Generator().manual_seed(0))
    options = {"gamma": 1, "max_new_tokens": 3, "sampling": sampling}
    rows = begun.expand(n, -1)
    made = speculate.generate(small_target, rows, proposer, **options)
    first = torch.stack(made.tokens)[:, 0]  # the target's, before the guess
    same = first == first.mode().values
    guesses, q = (x[same, 0] for x in proposals[0])
    return chi_square(guesses.bincount(minlength=6), q[0])


for kind in (ModelProposer, RawProposer):
    p_value = p_value_of_guesses(kind(small_draft))
    print(f"{kind.__name__:14} p-value {p_value:.2g}")
    assert (p_value > 0.001) == (kind is ModelProposer)

# %% [markdown]
# Break it yourself: let the draft lie about its $q$ (square `proposal.probabilities` before calling `exact_rule`), or accept everything.
# Both tests run in kvlab's test suite over many settings: temperatures, top-k, top-p, repetition penalty, prefixes, proposers.

# %% [markdown]
# ## How many guesses are accepted
#
# Now to models that have learned something.
# We let the draft guess for the target on three kinds of text: word problems decoded greedily, the same with sampling at temperature 1, and the FAQ, which the target knows by heart and the draft has never seen.

# %%
few = scale.questions // 32  # more prompts at the larger scales
solved = [p for n in (3, 4, 5) for p in problems(n, "long", few, seed=1)]
questions = [{"role": "user", "content": i["question"]} for i in corpora.faq()]
prompts = {
    "word problems": [encode(p[:-1]) for p in solved],
    "FAQ": [encode([question]) for question in questions[: 2 * few]],
}
longest = 128 if scale.name == "tiny" else 64


# %%
def run(prompts, proposer=None, gamma=8, **options):
    """The rounds of each prompt, one at a time."""
    options = {"gamma": gamma, "max_new_tokens": longest} | options
    options["tokenizer"] = tokenizer
    bar = tqdm(prompts, desc="decoding", leave=False, delay=2)
    return [speculate.generate(target, p, proposer, **options).rounds for p in bar]


def together(many):
    return summarize([r for rounds in many for r in rounds])


def text_of(rounds):
    return [token for r in rounds for token in r.tokens[0]]


# %%
warm = Sampling(1.0, generator=torch.Generator().manual_seed(scale.seed))
accepted = {
    "word problems": together(run(prompts["word problems"], proposer)),
    "sampled": together(run(prompts["word problems"], proposer, sampling=warm)),
    "FAQ": together(run(prompts["FAQ"], proposer)),
}

# %% mystnb={"image": {"alt": "Acceptance of drafted tokens by position, conditional on the position being reached and unconditional, for word problems, sampled word problems and the FAQ."}}
plots.acceptance_by_position(accepted);

# %% [markdown]
# "Acceptance" has two meanings, and papers do not always say which.
# Left: of the guesses at a position *that was reached*, how many were accepted.
# Right: of *all* guesses at that position.
# The second can only fall; the first shows whether the draft loses its way as it guesses further on.
# In this chapter $\alpha_k$ is the first.
# (An accepted end of a text gains nothing: after it there is no further token to have.)

# %%
rows = {}
for kind, s in accepted.items():
    rows[kind] = {
        "acceptance": s.acceptance,
        "tokens per target call": s.tokens_per_call,
    }
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# ## What it costs and what it gains
#
# A round gains one token for sure, a second if the first guess holds, a third if the second holds too.
# So with conditional acceptance $\alpha_k$,
#
# $$ E(\gamma) = 1 + \sum_{k=1}^{\gamma} \prod_{i=1}^{k} \alpha_i, $$ (expected)
#
# which is $(1 - \alpha^{\gamma+1}) / (1 - \alpha)$ if all $\alpha_k$ are one $\alpha < 1$.
# It costs $\gamma$ steps of the draft and one call of the target.
# In units of a plain target step, let $c$ be a draft step and $v(\gamma)$ a target call on $\gamma + 1$ tokens.
# Then
#
# $$ \text{speed-up}(\gamma) = \frac{E(\gamma)}{\gamma\, c + v(\gamma)}. $$ (speedup)

# %%
def speedup_by_hand(alphas, c, v):
    tokens, reach = 1.0, 1.0
    for alpha in alphas:
        reach *= alpha  # all up to here accepted
        tokens += reach
    return tokens / (len(alphas) * c + v)


by_hand = speedup_by_hand([0.8] * 6, c=0.1, v=1.0)
by_kvlab = speculate.cost_model(0.8, c=0.1, gamma=6).speedup
assert abs(by_hand - by_kvlab) < 1e-12
best = speculate.best_gamma(0.8, c=0.1)
print(f"acceptance 0.8, c 0.1: best gamma {best}, {by_kvlab:.2f} times plain")

# %% [markdown]
# The model predicts; does it hold?
# We decode the same prompts plainly and with several $\gamma$, in one run, interleaved prompt by prompt.
# The word problems are easy to guess; requests to tell about somebody in a passage leave more choice.
# The speed-up of a prompt is the ratio of its two times, prefill apart, and the interval is over prompts.

# %%
gammas = [1, 2, 4, 8, 12]
requests = corpora.Requests(2 * few, test=True)
prompts["requests"] = [encode(request) for request in requests]


def run_sweep(these):
    """Rounds of plain decoding, and of each gamma, prompt by prompt in turn."""
    plain, by_gamma = [], {g: [] for g in gammas}
    for ids in tqdm(these, desc="sweep", leave=False):
        plain += run([ids])
        for g in gammas:
            by_gamma[g] += run([ids], proposer, gamma=g)
    return plain, by_gamma


def over_plain(plain, by_gamma):
    """Speed over plain decoding with its interval, for each gamma."""
    intervals = []
    for many in by_gamma.values():
        pairs = zip(plain, many, strict=True)
        ratios = [summarize(a).seconds / summarize(b).seconds for a, b in pairs]
        intervals.append(mean_interval(ratios))
    return intervals


# %%
plain, sweep = run_sweep(prompts["word problems"])
measured = {"word problems": over_plain(plain, sweep)}
measured["requests"] = over_plain(*run_sweep(prompts["requests"]))
base = together(plain)
c_of, v_of = {}, {}
for g in gammas:
    c_of[g], v_of[g] = speculate.costs(together(sweep[g]), base)

pd.DataFrame({"c": c_of, "v": v_of}).rename_axis("gamma").round(2)

# %%
widest = gammas[-1]
alphas = np.nan_to_num(together(sweep[widest]).conditional)  # 0: none got so far
alphas = alphas.tolist()
c = c_of[8]
slope = (v_of[8] - v_of[1]) / 7


def v(gamma):
    """Between the two that were measured, and beyond, along a line."""
    return v_of[1] + slope * (gamma - 1)


each = [speculate.cost_model(alphas, c_of[g], g, v_of[g]).speedup for g in gammas]
two = [speculate.cost_model(alphas, c, g, v).speedup for g in gammas]
predicted = {"costs of each gamma": each, "costs of 1 and 8 alone": two}

# %% mystnb={"image": {"alt": "Speed-up over plain decoding against the number of drafted tokens: measured points with intervals, for word problems close to the curves predicted by the cost model and rising to the largest gamma; for requests lower, with the best gamma in the middle."}}
plots.speedup_over_gamma(gammas, measured, predicted);

# %% [markdown]
# One curve takes $c$ and $v$ from the very runs it predicts, so it tests only {eq}`expected`, with one set of $\alpha_k$ for all $\gamma$.
# The other knows the costs at $\gamma = 1$ and $8$ alone, and has to guess those of the rest.
# The dots and squares are the measurements, and the curves predict the dots, those of the word problems.
# There nearly every guess is accepted, so more guesses are better up to the largest $\gamma$ tried.
# For the requests the best $\gamma$ lies in between: further guesses are seldom reached, and cost the same.
# The benchmark has the same two curves for more prompts:

# %%
results = kvlab.results("speculate")  # of more prompts, on two threads
best = {}
for task in ("long", "requests"):
    speeds = {g: results[f"over_plain_{task}_at_{g}"].value for g in gammas}
    best[task] = max(speeds, key=speeds.get)
    accepted_there = results[f"acceptance_{task}_at_8"]
    print(f"{task}: best gamma {best[task]}, {accepted_there:.2f} accepted at 8")
assert gammas[0] < best["requests"] < gammas[-1] == best["long"]

# %%
layer_ratio = draft.config.num_hidden_layers / target.config.num_hidden_layers
best = speculate.best_gamma(alphas, c, v, maximum=widest)
print(
    f"the draft has {layer_ratio:.2f} of the target's layers, and costs c = {c:.2f} of it"
)
print(f"best gamma up to {widest}:", best)
print(f"in the benchmark: c {results['c']:.2f}, v {results['v']:.2f}")
if scale.name == "tiny":
    assert results["c"].low > layer_ratio
    assert results["v"].low > 1.1

# %% [markdown]
# In the lab $c$ is more than the ratio of the layers: embedding, head and choosing a token cost the same for both models.
# And $v$ is not 1, as the textbook formula has it: already two tokens need a mask that one does not, and more tokens are more arithmetic.
#
# So a pair has to be chosen by depth, too.
# In eager mode on a GPU $c$ is near the ratio of the layers; with a compiled step, which waits only for memory, near the ratio of the weights.
# What can each pair gain at best, if 0.7 of the guesses are accepted?

# %%
from kvlab.scale import config_of, parameters

pairs = {
    "Qwen3-0.6B for 1.7B": ("Qwen3-0.6B", "Qwen3-1.7B"),
    "Qwen3-0.6B for 14B": ("Qwen3-0.6B", "Qwen3-14B"),
    "Qwen2.5-0.5B for 3B": ("Qwen2.5-0.5B-Instruct", "Qwen2.5-3B-Instruct"),
    "Qwen2.5-0.5B for 14B": ("Qwen2.5-0.5B-Instruct", "Qwen2.5-14B-Instruct"),
}
gains = {}
for pair, names in pairs.items():
    small, large = (config_of(f"Qwen/{name}") for name in names)
    ratios = {
        "by layers": small.num_hidden_layers / large.num_hidden_layers,
        "by weights": parameters(small) / parameters(large),
    }
    gains[pair] = {}
    for way, ratio in ratios.items():
        g = max(speculate.best_gamma(0.7, ratio), 1)
        gains[pair][way] = speculate.cost_model(0.7, ratio, g).speedup
gains = pd.DataFrame(gains).T
assert (gains.loc[["Qwen3-0.6B for 1.7B", "Qwen3-0.6B for 14B"], "by layers"] <= 1).all()
assert (gains.filter(like="Qwen2.5", axis="index") > 1).all(axis=None)
gains.round(2)

# %% [markdown]
# The small Qwen3 is nearly as deep as the large ones, 28 layers to 28 and 40, and gains nothing in eager mode.
# So this chapter takes Qwen2.5 at `t4` and `full`, where the small model has 24 layers and the large ones 36 and 48.
# Where does the time go?

# %% mystnb={"image": {"alt": "Milliseconds per token spent in the draft, in the target and in the rest of the loop, for plain decoding and several gammas."}}
def per_token(s):
    parts = {"draft": s.draft_seconds, "target": s.target_seconds}
    parts["rest"] = s.seconds - sum(parts.values())
    return {name: seconds / s.tokens for name, seconds in parts.items()}


chosen = {"plain": base} | {f"gamma {g}": together(sweep[g]) for g in (1, 4, 8)}
plots.time_spent({name: per_token(s) for name, s in chosen.items()});

# %% [markdown]
# ## When it does not pay
#
# On the FAQ the draft's guesses are rejected (the cell below prints how many are accepted).
# Each round then costs $\gamma c + v$ and gains one token: slower than plain decoding, and the more it drafts, the slower.
# `best_gamma` returns 0 when no draft length is predicted to pay.

# %%
some = {"word problems": prompts["word problems"][::2], "FAQ": prompts["FAQ"][1:]}
faq = together(run(some["FAQ"], proposer, gamma=4))
faq_plain = together(run(some["FAQ"]))
ratio = faq.tokens_per_second / faq_plain.tokens_per_second
print(f"acceptance {faq.acceptance:.2f}: {ratio:.2f} times the plain speed")
print("best gamma:", speculate.best_gamma(faq.acceptance, c, v))
if scale.name == "tiny":
    assert faq.acceptance < 0.1
    assert speculate.best_gamma(faq.acceptance, c, v) == 0

# %% [markdown]
# What could be done?
# A better draft: one that can read the answers in a knowledge cache is the subject of chapter 02.
# A shorter $\gamma$ while guesses fail: `AdaptiveGamma` keeps a decaying average of acceptance and takes the best $\gamma$ for it, 0 included.
# Or another proposer.
# Two need no second model at all:
#
# - *prompt lookup* guesses what followed the last few tokens when they occurred earlier in the text {cite}`saxena2023lookup`;
# - *early exit* lets the target's own first layers guess, through its own head, from its own cache {cite}`elhoushi2024layerskip`.

# %%
half = target.config.num_hidden_layers // 2
early = speculate.EarlyExitProposer(target, half)
arms = {
    "plain": (None, 4),
    "draft, gamma 4": (proposer, 4),
    "draft, adaptive": (proposer, speculate.AdaptiveGamma(c, v)),
    "prompt lookup, gamma 4": (speculate.LookupProposer(), 4),
    f"first {half} layers, gamma 4": (early, 4),
}

# %%
rows = {}
for kind, these in some.items():
    ran = {name: [] for name in arms}
    for ids in these:  # in turn on each prompt
        for name, (arm, gamma) in arms.items():
            ran[name] += run([ids], arm, gamma=gamma)
    texts = [[text_of(rounds) for rounds in each] for each in ran.values()]
    assert not exact or all(text == texts[0] for text in texts)
    for name in list(arms)[1:]:
        s, reference = together(ran[name]), together(ran["plain"])
        ratio = s.tokens_per_second / reference.tokens_per_second
        rows[name, kind] = {"acceptance": s.acceptance, "times plain speed": ratio}
if scale.name == "tiny":
    best = max(
        speculate.cost_model(0.99, 0.5, g, v(g)).speedup
        for g in range(1, widest + 1)
    )
    print(f"first {half} layers, 0.99 accepted: at best {best:.2f} times plain")
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# The arms differ in speed only.
# Lookup costs almost nothing to ask, but a round that checks its guesses costs $v(\gamma)$: it pays where it is accepted often enough to earn that, as in texts that copy or repeat much (summaries, edited code), and the table shows that it can be near the border.
# Early exit at half the layers costs about half a target step per guess.
# The line above the table gives what it could gain if 0.99 of its guesses were accepted, by {eq}`speedup` with the $v$ measured here; and the lab target was not trained to answer from its middle.

# %% [markdown]
# ## Sampling against greedy
#
# Sampled text is harder to guess.
# For greedy text the draft must have the same *favorite* as the target; for sampled text its whole distribution counts, by the overlap $\sum_x \min(p(x), q(x))$.
# A lower temperature moves both distributions towards their favorites, which helps where those agree.

# %%
by_temperature = {0.0: together(sweep[4])}  # the same prompts, greedily
for temperature in (0.5, 1.0):
    seeds = torch.Generator().manual_seed(scale.seed)
    by_temperature[temperature] = together(run(prompts["word problems"], proposer, gamma=4,
                                               sampling=Sampling(temperature, generator=seeds)))  # fmt: skip
rows = {
    temperature: {"acceptance": s.acceptance, "tokens per call": s.tokens_per_call}
    for temperature, s in by_temperature.items()
}
if scale.name == "tiny":  # sampled text is harder to guess
    assert by_temperature[1.0].acceptance < by_temperature[0.0].acceptance
pd.DataFrame(rows).T.rename_axis("temperature").round(3)

# %% [markdown]
# Temperature, top-k and top-p are applied to the draft as to the target, which gives the most overlap.
# A draft may be sampled otherwise and the text stays exact, *if* the $q$ it reports is the one it sampled from.
#
# ## Verifying a block
#
# For *one* guess no rule accepts more often.
# For several there is something to be gained {cite}`sun2024block`.
# Where $p(x_1) > q(x_1)$, the first guess is accepted for certain, and the surplus of $p(x_1)/q(x_1)$ over 1 is thrown away.
# Where it is below 1, the guess is perhaps rejected, although the guesses after it may have made up for it: the *block* can be more probable under the target than its beginning is.
# So let the ratio be carried on, as a balance that never exceeds 1:
#
# $$ c_0 = 1, \qquad c_i = \min\left(1,\; c_{i-1}\, \frac{p_i(x_i)}{q_i(x_i)}\right). $$ (carry)
#
# What the target has beyond the draft *after* $i$ guesses is $A_i = \sum_x \max(0, c_i\,p_{i+1}(x) - q_{i+1}(x))$.
# Accept the longest beginning for which its own random number $u_i < A_i / (A_i + 1 - c_i)$ (after the last guess, $u_\gamma < c_\gamma$), also if an earlier number said no.
# The next token comes from $\max(0, c_i\,p_{i+1} - q_{i+1})$.
# With $\gamma = 1$ it is the rule from above, and greedily there is nothing to weigh.

# %%
def verify_block(p, q, guess, u):
    """The number of accepted guesses of one row: p (gamma + 1, V), q (gamma, V)."""
    carry, accepted, gamma = 1.0, 0, len(guess)
    for i in range(gamma):
        carry = min(1.0, carry * p[i, guess[i]] / q[i, guess[i]])
        threshold = carry
        if i + 1 < gamma:
            rest = (carry * p[i + 1] - q[i + 1]).clamp(min=0).sum()
            threshold = rest / (rest + 1 - carry)
        if u[i] < threshold:
            accepted = i + 1  # however the ones before it went
    return accepted


# %%
def random_laws(rows, places):
    shape = (rows, places, 6)
    logits = torch.randn(shape, generator=seeds, dtype=torch.float64)
    return (2 * logits).softmax(-1)


seeds = torch.Generator().manual_seed(scale.seed)
q, p = random_laws(200, 3), random_laws(200, 4)
guess = torch.multinomial(q.flatten(0, 1), 1, generator=seeds).view(200, 3)
u = torch.rand(200, 4, generator=seeds, dtype=torch.float64)
by_kvlab, _ = speculate.verify_block(p, speculate.Proposal(guess, q), u)
by_hand = [verify_block(*row) for row in zip(p, q, guess, u, strict=True)]
assert by_kvlab.tolist() == by_hand

# %% [markdown]
# It is exact as well, which the test from above can say:

# %%
block = with_rule(speculate.verify_block)
p_value = chi_square(count_pairs(block), expected)
by_token = summarize(by_rule["speculative"].rounds).tokens_per_call
print(f"p-value {p_value:.2f}; tokens per call {by_token:.3f} by token,", end=" ")
print(f"{summarize(block.rounds).tokens_per_call:.3f} by block")
assert p_value > 0.001

# %% [markdown]
# How much it gains depends on the texts.
# The benchmark let both rules verify the same drafts of the lab's draft with the same random numbers, on requests to tell about somebody:

# %% mystnb={"image": {"alt": "Accepted tokens per round against temperature for token and block verification of the same drafts, with intervals."}}
temperatures = (0.5, 1.0, 1.5)
accepted_by = {
    f"{rule} verification": [
        results[f"acceptance_block_{rule}_at_{t:g}"].interval for t in temperatures
    ]
    for rule in ("token", "block")
}
words = ("temperature", "accepted tokens per round of 8")
plots.lines(temperatures, accepted_by, *words, xticks=temperatures);

# %%
for t in temperatures:
    gain = results[f"acceptance_block_gain_at_{t:g}"]
    by_token = results[f"acceptance_block_token_at_{t:g}"].value
    more = gain.value / (by_token + 1)  # each call gains one token more
    print(f"temperature {t}: {gain:.2f} more per round, {more:.0%} more per call")
    assert gain.low > 0

# %% [markdown]
# The interval of the difference is above zero at each of the temperatures: the pairs of one draft differ less than drafts do, so the bands of the figure overlap nevertheless.
# It costs nothing, so there is no reason to leave it out: `generate(..., verify=speculate.verify_block)`, or `kvlab speculate --verification block`.
#
# ## A draft with another tokenizer
#
# So far both models split text into the same tokens.
# A good small model of another family does not, and there are two ways to use it all the same {cite}`timor2025vocabularies`.
# For greedy decoding the draft writes *text*, which is encoded anew for the target; a guess is right where the tokens are.
# For sampling that gives no $q$ over the target's tokens, so the draft samples among the tokens that both vocabularies have, and $q$ is renormalized over them: still exactly what was drawn from, so the text stays exact.
# `TranslatingProposer` does both.
# In the other direction, the target's new tokens are encoded for the draft, which crops its cache to the part that it has read in the same tokens.

# %%
from kvlab import lab

phrase = "Anna has 12 apples. She buys three more."
for name in ("lab-target", "lab-teacher"):
    other = lab.load_tokenizer(name)
    pieces = [other.decode(i) for i in other(phrase).input_ids]
    print(f"{name}, {len(other)} tokens:", "|".join(pieces))

# %%
teacher, own = lab.load("lab-teacher"), lab.load_tokenizer("lab-teacher")
lab_target, theirs = lab.load("lab-target"), lab.load_tokenizer("lab-target")
translating = speculate.TranslatingProposer(teacher, own, theirs)
messages = problem[:-1]
ids = theirs.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).input_ids
options = {"max_new_tokens": 48, "tokenizer": theirs}
translated = speculate.generate(lab_target, ids, translating, **options)
alone = speculate.generate(lab_target, ids, **options)
print(f"accepted: {summarize(translated.rounds).acceptance:.2f}")
assert translated.tokens[0].tolist() == alone.tokens[0].tolist()

# %% [markdown]
# `transformers` can do this, too (`assistant_tokenizer=...`).
# In the benchmark, on the same texts:

# %%
for name, label in {
    "acceptance_other_tokenizer": "accepted, greedily",
    "acceptance_other_tokenizer_sampled": "accepted, at temperature 1",
    "other_tokenizer_over_generate": "times as fast as plain generate",
    "other_tokenizer_over_assisted": "times as fast as assisted generation",
}.items():
    print(f"{results[name]:.2f} {label}")

# %% [markdown]
# ## Guessing in one call
#
# A draft model is called once for each guess.
# Small *heads* on the target's own last hidden state can guess several tokens at once: a {term}`parallel draft` {cite}`cai2024medusa`.
# They need no second model and no second cache: the state from which the target chose its last token is there after each verification.
# Head $k$ gets that state and the embedding of the chosen token {cite}`ankner2024hydra`, and its output goes through the target's own head to give $q_k$.
# They learn from the target's own answers, of which the states are kept:

# %%
from kvlab.draft import generate_targets
from kvlab.generation import encode
from kvlab.lab.corpora import Solutions
from kvlab.parallel import ParallelDraft, train_parallel

count = 64 if scale.name == "tiny" else 16
lessons = [long[:1] for _, long in Solutions(count, steps=(1, 5))]
asked = [encode(tokenizer, lesson) for lesson in lessons]
answers = generate_targets(target, tokenizer, asked, max_new_tokens=64)
torch.manual_seed(scale.seed)
heads = ParallelDraft(target.config.hidden_size, guesses=4).to(target.device)
training = {"epochs": 8, "batch_size": 8, "learning_rate": 5e-3}
history = train_parallel(heads, target, answers, **training)
losses = [f"{entry['ce']:.2f}" for entry in history[:: max(1, len(history) // 6)]]
print("cross-entropy:", " ".join(losses))

# %% mystnb={"image": {"alt": "Acceptance by position: high at all positions for the chain draft, falling for the heads."}}
in_one_call = speculate.ParallelProposer(target, heads.to(target.dtype))
word_problems = prompts["word problems"][::2]
chained = together(run(word_problems, proposer, gamma=4))
parallel = together(run(word_problems, in_one_call, gamma=4))
plots.acceptance_by_position({"chain": chained, "heads": parallel})
per_round = {
    name: s.draft_seconds / s.target_calls
    for name, s in (("chain", chained), ("heads", parallel))
}
cheaper = per_round["chain"] / per_round["heads"]
print(f"heads: {cheaper:.0f} times cheaper per round;", end=" ")
print(f"tokens per call {parallel.tokens_per_call:.2f}, chain {chained.tokens_per_call:.2f}")
if scale.name == "tiny":
    assert parallel.acceptance < chained.acceptance
    assert cheaper > 2

# %% [markdown]
# The heads cost next to nothing, and know nothing of each other: the third has to guess without having seen the second's guess.
# So their acceptance falls with the position, where a chain that is good stays good.
# The benchmark trained eight heads for longer, five times, on two kinds of texts:

# %% mystnb={"image": {"alt": "Fraction of guesses accepted by position, on word problems and on requests, for the chain draft and for heads, with intervals."}}
curves = {}
for label, kind in {"word problems": "", "requests": "_requests"}.items():
    for name in ("chain", "parallel"):
        curves[f"{'heads' if name == 'parallel' else name}, {label}"] = [
            results[f"acceptance_{name}{kind}_position_{i}"].interval
            for i in range(1, 9)
        ]
words = ("position of the guess", "accepted, with all before it")
plots.lines(range(1, 9), curves, *words, ylim=(0, 1.02))
for label, kind in {"word problems": "", "requests": "_requests"}.items():
    calls, chain = (
        results[f"tokens_per_call_{name}{kind}"] for name in ("parallel", "chain")
    )
    speed = results[f"parallel_over_chain{kind}"]
    print(f"{label}: {calls:.2f} tokens per call, the chain {chain:.2f};", end=" ")
    print(f"{speed:.2f} times the chain's speed, both with gamma 8")
    assert calls.value < chain.value
    assert results[f"acceptance_parallel{kind}_position_8"].value < 0.1
cost = results["parallel_cost_over_chain"]
print(f"a round of guesses costs {cost:.2f} of the chain's")
assert results["parallel_over_chain"].high < 1
assert results["parallel_over_chain_requests"].low > 1

# %% [markdown]
# Of a good first guess little is left at the fourth.
# On word problems the chain is nearly always right, and no saving makes up for that.
# On requests most of its eight guesses are lost, and the heads, which accept fewer, are faster, because theirs cost nearly nothing.
# (A chain that drafts fewer is faster there than one that drafts eight, as the curve by $\gamma$ shows.)
# The published parallel drafts put more than a layer in place of each head, so that a guess depends on the places before it; see the map below.
# `kvlab train-parallel` trains heads for other models, and `kvlab speculate --parallel_draft` uses them.
#
# ## After a prefix
#
# A {term}`KV cache` is a value: the target may have read a passage long ago, or its cache may come from a file.
# Speculation has to go on from there as plain decoding does.
# A `Prefix` holds the cache, the position of the next token, and the ids of its tokens, which the draft reads itself.

# %%
passage = "Anna lives in Oslo. Bruno works as a baker. Rosa plays the cello."
document = tokenizer(
    passage, add_special_tokens=False, return_tensors="pt"
).input_ids
prefix = prefill(target, document.to(target.device))

begin = tokenizer(" Bruno", add_special_tokens=False, return_tensors="pt").input_ids
after = speculate.generate(target, begin, proposer, prefix=prefix, **short)
whole = speculate.generate(target, torch.cat([document, begin], 1), **short)
print(tokenizer.decode(after.tokens[0]))
if exact:
    assert after.tokens[0].tolist() == whole.tokens[0].tolist()

# %% [markdown]
# `transformers` can speculate too, with `model.generate(..., assistant_model=draft)`, but not after a cache: it feeds the whole prompt again, on top of the cache that holds it already.
# On twenty pairs of small random models, with the first part of the prompt in a cache, how often is the text what plain decoding gives?
# And how do the speeds compare?
# Those figures take minutes, so a benchmark has measured them (`tests/benchmarks/speculate.py`), with 95 % confidence intervals over prompts.

# %%
here, there = results["prefix_equal"], results["prefix_equal_assisted"]
print(f"right after a cache: kvlab {here.value:.0%},", end=" ")
print(f"assistant_model {there.value:.0%} of {here.n} pairs")
print(results.device, "- torch", results.versions["torch"], end=" ")
print("- transformers", results.versions["transformers"])
print(textwrap.fill(results["over_assisted"].conditions, 78))

# %% mystnb={"image": {"alt": "Dots with intervals: how many times faster speculative decoding is than plain generate and than assisted generation, eager and compiled."}}
names = {
    "over_generate": "over plain generate",
    "over_assisted": "over generate(assistant_model=...)",
    "over_assisted_in_inference_mode": "the same, both in inference mode",
    "plain_over_generate": "our plain loop over plain generate",
    "plain_over_generate_in_inference_mode": "plain loops, both in inference mode",
    "over_generate_compiled": "over plain generate, both compiled",
    "over_assisted_compiled": "over assisted, both compiled",
    "batch_8_over_assisted": "8 texts at once, over assisted one by one",
}
plots.speed_ratios(results.intervals(names))
for name in ("over_assisted", "plain_over_generate"):
    assert results[f"{name}_in_inference_mode"].value < results[name].value
peers = "generate compiled, assisted compiled"  # were faster than eager
assert peers in results["over_assisted_compiled"].conditions

# %% [markdown]
# In eager mode a small model's step is mostly the cost of starting each operation, and all programs start much the same ones.
# Part of the difference is `torch.inference_mode()`, which our loop enters and `generate` does not: the rows "in inference mode" give it to both, and their ratios are smaller.
# With `Runner(model, compiled_room=...)` the three shapes of call, draft one, verify $\gamma + 1$, plain one, are compiled on memory that stays where it is, into CUDA graphs on a GPU.
# That takes a minute, so it pays for many texts, not for one.
#
# ## Many texts at once
#
# Rows of a batch accept different numbers of guesses, so they drift apart.
# A cache that is one tensor with one length cannot follow; the one that the loop uses gives every row a length of its own.
# Each row then gets exactly the text it would get alone:

# %%
several = [prompts[kind][i][0] for i in (0, 1) for kind in prompts]
options = {"gamma": 4, "max_new_tokens": longest, "tokenizer": tokenizer}
batch = speculate.generate(target, several, proposer, **options)
for ids, tokens in zip(several, batch.tokens, strict=True):
    one = speculate.generate(target, ids[None], **options)
    if exact:
        assert tokens.tolist() == one.tokens[0].tolist()
rounds = [
    r for r in batch.rounds if not r.is_prefill
]  # not those that read the prompts
print("accepted by row:", [r.accepted for r in rounds[:4]])
gained = np.array([[len(tokens) for tokens in r.tokens] for r in rounds[:4]])
print("tokens of each row after these:", gained.sum(0))
if scale.name == "tiny":
    assert len(set(gained.sum(0))) > 1  # the rows have drifted apart

# %% [markdown]
# ## A map of 2026
#
# A proposer, a rule and a way to train: most of what has been published since changes one of the three, and fits into the same loop.
#
# | method | what it replaces here | how |
# |---|---|---|
# | EAGLE-3 {cite}`li2025eagle3` | proposer, training | one layer drafts from hidden states of several of the target's layers; it is trained on its own guesses |
# | MTP {cite}`gloeckle2024mtp` | proposer, training | the target is trained with heads for further tokens, which draft |
# | DFlash {cite}`chen2026dflash` | proposer | a small diffusion model, conditioned on the target's features, drafts a block in one call |
# | P-EAGLE {cite}`hui2026peagle` | proposer, training | EAGLE's layer drafts all tokens in one call |
# | DSpark {cite}`cheng2026dspark` | proposer, $\gamma$ | one call for the block, then a light sequential module; how many guesses are verified follows confidence and load |
# | SuffixDecoding {cite}`oliaro2025suffix` | proposer | suffix trees over earlier texts instead of a search in this one; nothing to train |
# | block verification {cite}`sun2024block` | rule | above |
#
# Those that draft in one call change {eq}`speedup`: the cost of guessing is then $c$ instead of $\gamma\,c$.

# %% [markdown]
# ## Exercises
#
# ```{exercise-start} The same number of layers
# :label: ex-layers
# ```
# *Easy, 5 minutes.*
# Qwen3-14B has 40 layers, Qwen3-0.6B has 28.
# In eager mode on a fast GPU a step can cost about as many starts of operations as there are layers, so $c$ is near 28/40.
# With $\alpha = 0.8$ and $v = 1$, which $\gamma$ is best and what does it gain?
# What if compiling brings $c$ down to the ratio of the bytes of their weights?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-layers
# :class: dropdown
# ````

# %%
large, small = config_of("Qwen/Qwen3-14B"), config_of("Qwen/Qwen3-0.6B")
by_layers = small.num_hidden_layers / large.num_hidden_layers
by_bytes = parameters(small) / parameters(large)
gains = []
for c in (by_layers, by_bytes):
    g = speculate.best_gamma(0.8, c)
    gains.append(speculate.cost_model(0.8, c, g).speedup)
    print(f"c = {c:.2f}: best gamma {g}, {gains[-1]:.2f} times plain")
assert gains[0] < 1.1
assert gains[1] > 3

# %% [markdown]
# As long as the number of layers decides, there is next to nothing to be gained from a draft of nearly as many.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} A lenient rule
# :label: ex-lenient
# ```
# *Medium, 10 minutes.*
# Accept a guess if $u < 2\,p(x)/q(x)$.
# How much does acceptance rise for the tiny models, and does the chi-square test notice?
# (Give `with_rule` a rule that changes `uniform` and then calls `exact_rule`.)
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-lenient
# :class: dropdown
# ````

# %%
def lenient(p, proposal, uniform):
    halved = uniform.clone()
    halved[:, :-1] /= 2
    return exact_rule(p, proposal, halved)


both = {"exact": by_rule["speculative"], "lenient": with_rule(lenient)}
for name, generated in both.items():
    acceptance = summarize(generated.rounds).acceptance
    p_value = chi_square(count_pairs(generated), expected)
    print(f"{name:8} acceptance {acceptance:.2f}, p-value {p_value:.2g}")
assert p_value < 1e-6
assert acceptance > summarize(both["exact"].rounds).acceptance

# %% [markdown]
# More is accepted, and the text is no longer the target's: it leans towards what the draft likes.
# Some systems make that trade on purpose; it should then not be called lossless.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} The classic mistake
# :label: ex-missing
# ```
# *Medium, 15 minutes.*
# After each round the loop calls `proposer.accept(accepted, target_cache)`.
# `ModelProposer` then holds for every row how many tokens of the text are not yet in its cache, `self.unread[row]` (1, or 2 after full acceptance), and how many entries its cache holds, `self.runner.slots.lengths[row]`.
# Subclass it so that it forgets the second of two: it counts an entry that was never written, and one unread token fewer.
# Which figures show that something is wrong, and does the text?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-missing
# :class: dropdown
# ````

# %%
class Forgetful(ModelProposer):
    def accept(self, accepted, target_cache):
        super().accept(accepted, target_cache)
        for row, unread in enumerate(self.unread):
            if unread == 2:  # leave a hole where the token would be
                self.unread[row] = 1
                self.runner.slots.lengths[row] += 1


texts, per_call = {}, {}
for arm in (ModelProposer(target), Forgetful(target)):
    generated = speculate.generate(target, prompt, arm, **options | {"gamma": 2})
    s = summarize(generated.rounds)
    print(f"{type(arm).__name__}: acceptance {s.acceptance:.2f},", end=" ")
    print(f"{s.tokens_per_call:.2f} tokens per call")
    texts[type(arm).__name__] = generated.tokens[0].tolist()
    per_call[type(arm).__name__] = s.tokens_per_call
if exact:
    assert texts["ModelProposer"] == texts["Forgetful"]
    assert per_call["ModelProposer"] > per_call["Forgetful"]

# %% [markdown]
# Acceptance and tokens per call fall; the text does not change.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - Accept with probability $\min(1, p/q)$, else draw from $\max(0, p - q)$: the text is the target's, whatever the draft. The draft decides only how fast.
# - Exactness is a claim about a distribution. Test it as one, with variants that must fail.
# - Speed-up is $E/(\gamma c + v)$: acceptance, the price of a guess, the price of checking. Measure all three before choosing $\gamma$.
# - Where starting operations is the cost, $c$ follows the number of layers, not of parameters.
# - A draft whose guesses are rarely accepted costs more than it gains.
# - Verify blocks rather than tokens: never fewer accepted tokens on average, at no cost.
#
# The cell below runs alone, after the imports.

# %%
from kvlab import Scale, speculate

scale = Scale.current("05_speculative_decoding")
target, draft = scale.load("target"), scale.load("draft")
tokenizer = scale.load_tokenizer("target")
ids = tokenizer("Anna lives in Oslo. Anna", return_tensors="pt").input_ids

proposer = speculate.ModelProposer(draft)
options = {"gamma": 4, "max_new_tokens": 16, "tokenizer": tokenizer}
stream = speculate.decode(target, ids, proposer, **options)
pieces = [tokenizer.decode(r.tokens[0]) for r in stream]  # print each as it comes
print(tokenizer.decode(ids[0]), *pieces, sep="|")

# %% [markdown]
# **Further reading**: the two papers that found the rule {cite}`leviathan2023speculative,chen2023speculative`; prompt lookup {cite}`saxena2023lookup`; early exit
# {cite}`elhoushi2024layerskip`. A draft whose cache is fused from the target's is in {doc}`chapter 06 <06_cache_fusion>`.
