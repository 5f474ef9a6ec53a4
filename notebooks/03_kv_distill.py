# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03. KV-Distill
#
# ```{admonition} In this chapter
# :class: tip
# - see which tokens of a text a cache could do without, as scores from the literature judge it;
# - evict the others for real, keep positions right, and watch a model forget;
# - let entries of all layers and heads compete for one budget, as {term}`KVzip` does, and keep a cache whose heads have lengths of their own;
# - write {term}`KV-Distill` in twenty lines, and check them: a {term}`scorer`, adapters that act on some tokens only, a {term}`gate` that keys can carry;
# - train it, and compare it with the best scores at the same size: answers, bytes, milliseconds;
# - find out what it is good for and what not, with ablations, needles, and a question that was known beforehand;
# - keep a distilled cache on disk, in the store of chapter 01.
#
# **Time and memory**: about two minutes and 1 GB, most of it PyTorch itself, at `tiny`; what the models take at any scale is printed by the second cell.
#
# **Code**: `kvlab/compress.py`, `kvlab/ragged.py` and `kvlab/distill.py`; what is written out here is checked against them.
# ```

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kvlab") is None:  # on Colab
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "git+https://github.com/kvlab/kvlab"], check=True)

# %%
import re
import tempfile
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import kvlab
from kvlab import Scale, cache, compress, lab, plots
from kvlab.models import fingerprint
from kvlab.compress import compact, evict
from kvlab.distill import DistillDataset, KVDistiller, encode_turns, routed
from kvlab.distill import train_distiller
from kvlab.evaluate import close, mean_interval
from kvlab.lab.corpora import Readings
from kvlab.speculate import generate

scale = Scale.current()
print(scale.describe("03_kv_distill"))
target, tokenizer = scale.load("target"), scale.load_tokenizer("target")
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The question
#
# A cache has one entry per token, in every layer and every head, and none is ever thrown away.
# At eight thousand tokens the cache of Qwen3-0.6B is four fifths as large as its weights (chapter 00 has the formula), and whoever keeps many texts, as chapter 01 does, pays for each.
#
# But a text says less than its tokens take.
# *The favorite color of Stefan is black*: seven words, and three that matter.
# So: **which entries can go, and can those that stay be made to say what the others said?**
# The second half of the question is what this chapter is about.
# What is forgotten must be chosen before anybody asks.
# There turn out to be three questions in one: *which* entries stay, *where* they may stay, and what is *written* into them.
# We do not know the question when we compress.
#
# ## A passage, and what to ask
#
# The lab's reading world makes passages of facts, and the target answers questions about them.
# The passage is the {term}`context`: what is to be compressed.
# The question comes later.

# %%
test = Readings(10, facts=(16, 16), questions=5, seed=7, test=True)
text, turns = test[0]
print(textwrap.fill(text, 76))
for question, answer in turns[:3]:
    print(f"  {question} {answer}")


# %%
def encode_passage(text, turns):
    """A context in token ids, its questions in token ids, and their answers."""
    examples = [encode_turns(tokenizer, text, [turn]) for turn in turns]
    context = examples[0].context[None].to(target.device)
    questions = [e.text[e.weights == 0] for e in examples]  # answers have weight 1
    return context, questions, [answer for _, answer in turns]


everything = partial(cache.prefill, target)  # the whole cache, and where to go on
passages = [encode_passage(*reading) for reading in test]
ids = passages[0][0]
whole = everything(ids).cache
print(f"{ids.shape[1]} tokens, {cache.nbytes(whole)} bytes")

# %% [markdown]
# An answer counts if its word is in the model's greedy answer after a prefix.
# Questions are asked one by one, each after the same cache:

# %%
def accuracy(compress_context, passages=passages):
    """The fraction of each passage's questions answered after its compressed context."""
    rows, prefixes, answers = [], [], []
    for context, questions, texts in passages:
        rows += questions
        answers += texts
        prefixes += [compress_context(context)] * len(questions)
    length = 8 if scale.name == "tiny" else 24
    generated = generate(
        target, rows, prefix=prefixes, max_new_tokens=length
    ).tokens
    matches = []
    for answer, ids in zip(answers, generated):
        text = tokenizer.decode(ids, skip_special_tokens=True).lower()
        matches.append(answer.lower() in re.findall(r"\w+", text))
    return np.reshape(matches, (len(passages), -1)).mean(1)


def shown(values):
    return "{:.2f} [{:.2f}, {:.2f}]".format(*mean_interval(values))


full = accuracy(everything)
print("answered with the full cache:", shown(full))

# %% [markdown]
# ## Which tokens matter?
#
# Four answers from the literature need no training.
# Each is a score per entry, computed in every layer from what attention has at hand: queries $q$, keys $k$, and the weights $a_{ij} = \operatorname{softmax}_j(q_i \cdot k_j / \sqrt d)$.
#
# | score | of entry $j$ | idea |
# |---|---|---|
# | sinks and recent {cite}`xiao2023streamingllm` | $\infty$ if $j < 4$, else $j$ | the first tokens hold attention that has nowhere to go; the latest are what the text is about now |
# | H2O {cite}`zhang2023h2o` | $\sum_i a_{ij}$, half the room for the latest | who was looked at will be looked at |
# | SnapKV {cite}`li2024snapkv` | $\sum_{i \in \text{window}} a_{ij}$, smoothed over neighbors | what the last tokens look at |
# | key norm {cite}`devoto2024l2` | $-\lVert k_j \rVert$ | small keys get much attention |
#
# (The library has more: TOVA {cite}`oren2024tova`, KeyDiff {cite}`park2025keydiff`, Expected Attention {cite}`devoto2025expected` and Compactor {cite}`chari2025compactor`. All are in a table below.)
#
# All are used here in one way: once, after the whole context, and at first for the same fraction in every head.
# The papers differ: H2O evicts while it writes, SnapKV's window is the end of a question (here, without one, the end of the context), and key norm spares the first two layers.
# `random` keeps any entries.
#
# Here is H2O, for one layer, beside the library's.
# `capture_attention` calls a function with the queries, keys and values of each attention layer.

# %%
layers = []
with compress.capture_attention(target, lambda *layer: layers.append(layer)):
    cache.prefill(target, ids)
layer = compress.Attention(*layers[5], context=ids.shape[1])

heads, groups = (
    layer.queries.shape[1],
    layer.queries.shape[1] // layer.keys.shape[1],
)
keys = layer.keys.repeat_interleave(
    groups, 1
)  # each key head serves several query heads
weights = layer.queries.float() @ keys.float().mT * layer.scaling
later = torch.ones_like(weights, dtype=torch.bool).triu(1)
weights = weights.masked_fill(later, float("-inf")).softmax(-1)  # (1, H, T, T)
received = weights.sum(2).unflatten(1, (-1, groups)).sum(2)  # (1, H_kv, T)

latest = 12  # half of a budget of 24 entries
ours = compress.h2o(layer, budget=2 * latest)
assert torch.allclose(ours[..., :-latest], received[..., :-latest], rtol=1e-2)
assert ours[..., -latest:].isinf().all()

# %% [markdown]
# `evict` computes a score in every layer, keeps the best entries of each head, and frees the others.
# For a picture, all heads keep the same entries (`scope="token"`), by the mean of their scores: dark tokens have a high score, underlined ones stay.

# %%
simple = ["random", "sinks_recent", "h2o", "snapkv", "key_norm", "key_norm_reversed"]
simple = {name: compress.METHODS[name] for name in simple}
budget, views = compress.count_kept(ids.shape[1], retention=0.25), {}
for name, score in simple.items():
    if name != "random":
        scores, _ = compress.score_entries(target, ids, score, budget)
        prefix = evict(target, ids, score, budget=budget, scope="token")
        views[name] = (
            scores.mean((0, 2))[0].tolist(),
            prefix.positions[0].tolist(),
        )
plots.score_view(ids[0].tolist(), views, tokenizer)

# %% [markdown]
# The scores were made for other texts, and it shows: they keep full stops and articles, the beginning or the end.
# The last, `key_norm_reversed`, is from no paper: it is key norm with its sign turned round, and will be explained.
#
# ## Evict, and watch it forget
#
# `evict` returns a smaller cache and the position at which to continue, together as a `Prefix`, as chapters 01 and 05 use it.
# As long as all heads keep the same number, the cache is an ordinary one.

# %%
small = evict(target, ids, compress.snapkv, retention=0.25)
print("entries:", cache.length(whole), "->", cache.length(small.cache))
print("bytes:  ", cache.nbytes(whole), "->", cache.nbytes(small.cache))
print("next position:", small.next_position)

# %%
torch.manual_seed(scale.seed)
evicted = {}
for name, score in simple.items():
    for fraction in (0.5, 0.25, 0.1):
        small = partial(evict, target, score=score, retention=fraction)
        evicted[name, fraction] = accuracy(small)
if scale.name == "tiny":
    at_half = {name: evicted[name, 0.5] for name in simple}
    reversed_half = at_half.pop("key_norm_reversed").mean()
    gains = [mean_interval(values - at_half["random"])[1] for values in at_half.values()]
    best = max(values.mean() for values in at_half.values())
    assert max(gains) <= 0
    assert 0.35 < best < 0.65
    assert reversed_half > best + 0.2
table = {"everything": {"100 %": shown(full)}}
for (name, fraction), values in evicted.items():
    table.setdefault(name, {})[f"{100 * fraction:g} %"] = shown(values)
pd.DataFrame(table).T.fillna("")

# %% [markdown]
# With half of the entries the best of these published scores leaves about half of the answers.
# In ten passages none of them at half is distinguishable from random, except those that are worse.
# They were made for other uses: SnapKV for long prompts that end in a question, H2O and StreamingLLM for going on writing.
# Here every token of the text counts, and there is no question yet.
# (Intervals are over passages. Ten that all give 0 do not show that the next gives 0, so this interval is no point either.)
#
# The key norm is worse than random: it says something, with the wrong sign.
# In the models it was found on, small keys draw attention.
# This target, as all of the Qwen3 family, normalizes keys and weights their channels; and here it is the *large* keys that matter (whether that is why, and whether it holds for Qwen3 itself, is not measured).
# The last row has the sign turned round, and is the best of these by far.
# So signs of such rules must be measured on the model at hand.
# This one is a warning, too: a lab finding about a score is a lead, not a result.
# On a real model whose keys are not normalized, the reversed sign is expected to be the wrong one again.

# %% [markdown]
# ### Where may they stay?
#
# Until now every head kept the same number of entries.
# But heads do different things, and need not need the same number.
# {term}`KVzip` {cite}`kim2025kvzip` lets the entries of all layers and heads compete for one budget.
#
# Its score asks for nothing that a user might ask: it lets the model *repeat the context*.
# What the model looks at while it repeats is what the context is made of.
# An entry's score is the highest attention weight that it receives from any token of the repetition, in any query head of its group:

# %%
texts = compress.repeat_texts(tokenizer, ids)
print(textwrap.fill(tokenizer.decode(texts[0].input_ids[0, :40]), 76), "...")

context, repeated = everything(ids), []
with compress.capture_attention(target, lambda *layer: repeated.append(layer)):
    cache.prefill(target, texts[0].input_ids, context)
queries, keys, _, scaling = repeated[5]
weights = queries.float() @ keys.repeat_interleave(groups, 1).float().mT * scaling
later = torch.ones_like(weights, dtype=torch.bool)
later = later.triu(keys.shape[2] - queries.shape[2] + 1)
weights = weights.masked_fill(later, float("-inf")).softmax(-1)
highest = weights[..., : ids.shape[1]].amax(2)  # over the tokens of the repetition
by_hand = highest.unflatten(1, (-1, groups)).amax(2)  # (1, H_kv, T)

sinks = 0 if scale.name == "tiny" else 4  # first tokens that always stay
zip_score = partial(compress.kvzip, sinks=sinks)
scores, _ = compress.score_entries(target, ids, zip_score, 24, repeat=texts)
assert torch.allclose(scores[5][..., sinks:], by_hand[..., sinks:], rtol=1e-2)

# %% [markdown]
# (The paper keeps the first four entries of every head, as attention sinks.
# At the sizes here that would be most of what may stay, so in the lab none is protected; the benchmark has both.)
#
# Now the same score with three budgets: the same number for each head, one budget for each layer, and one for the whole model.
# Beside it are the reversed key norm and random entries:


# %%
def with_scope(score, scope, fraction):
    """A function that evicts for `accuracy`, with the repetition for KVzip."""

    def compress_context(context):
        options = {"retention": fraction, "scope": scope}
        if score is zip_score:
            options["repeat"] = compress.repeat_texts(tokenizer, context)
        return evict(target, context, score, **options)

    return compress_context


rivals = {"KVzip": zip_score, "key norm, reversed": compress.key_norm_reversed}
rivals["random"] = compress.random
scopes, placed = {"head": "each head", "layer": "each layer", "model": "all"}, {}
for name, score in rivals.items():
    for scope in scopes:
        for fraction in (0.1, 0.05):
            way = with_scope(score, scope, fraction)
            placed[name, scope, fraction] = accuracy(way)
rows = {}
for (name, scope, fraction), values in placed.items():
    row = rows.setdefault(f"{name}, a budget for {scopes[scope]}", {})
    row[f"{100 * fraction:g} %"] = shown(values)
if scale.name == "tiny":
    for name in ("KVzip", "key norm, reversed"):
        for fraction in (0.1, 0.05):
            means = [placed[name, scope, fraction].mean() for scope in scopes]
            assert means[2] > means[0] + 0.2
    assert placed["random", "model", 0.1].mean() < 0.3
pd.DataFrame(rows).T

# %% [markdown]
# Where entries stay matters more here than which of the two scores chooses them.
# With the same number in each head, a tenth is a loss for both.
# With one budget for all, both answer nearly as from the whole cache, even at a twentieth.
# (Random entries gain little by it: where to stay is part of what a score says.)
# Which heads get the budget?

# %% mystnb={"image": {"alt": "A heat map of layers by key heads: the fraction of entries that KVzip keeps at 10 percent. Some heads keep several times as many as others."}}
tenth = with_scope(zip_score, "model", 0.1)(ids)
kept = (tenth.positions >= 0).sum(-1)[:, 0].float() / ids.shape[1]  # (L, H_kv)
names = range(kept.shape[1]), range(kept.shape[0])
plots.score_maps({"fraction kept": kept.T.numpy()}, "head", "layer", *names)
counts = kept.flatten().sort().values
print(f"the fullest head keeps {counts[-1]:.0%}, the emptiest {counts[0]:.0%},")
print(f"the middle one {counts[len(counts) // 2]:.0%}")
if scale.name == "tiny":
    assert counts[-1] > 2 * counts[len(counts) // 2]
    assert counts[0] < counts[len(counts) // 2] / 2

# %% [markdown]
# ### A cache whose heads have lengths of their own
#
# Such a cache is no rectangle any more, it is {term}`ragged <ragged cache>`.
# The library keeps it as layers of their own lengths: the heads of a layer are padded on the left to the longest of them, new tokens go on at the right, and what attention is told hides the padding.
# `prefill`, `generate` and speculation (chapter 05), `save` and `load`, and the store of chapter 01 take it.
# So does `kvlab.evaluate`, while functions that need a rectangle refuse it in a sentence.
#
# First the rule: removed is the same as hidden.
# To hide is easy, and saves nothing: read with the whole cache, and add minus infinity to the logits of what does not stay.
# Then a violation of it: heads of a layer that keep what others of it should.

# %%
from kvlab.cache import Prefix, from_ragged
from kvlab.ragged import RaggedLayer

question = passages[0][1][0][None].to(target.device)
everywhere = torch.arange(ids.shape[1], device=ids.device)
stays = (tenth.positions[..., None] == everywhere).any(-2)  # (L, 1, H_kv, T)


def hidden(stays):
    """The whole cache, with what does not stay hidden."""
    layers = []
    for layer, stay in zip(everything(ids).cache.layers, stays):
        bias = torch.zeros_like(layer.keys[..., 0]).masked_fill(~stay, -torch.inf)
        layers.append(RaggedLayer(layer.keys, layer.values, bias))
    return Prefix(from_ragged(layers), ids.shape[1])


removed = cache.prefill(target, question, tenth).logits
assert close(removed, cache.prefill(target, question, hidden(stays)).logits)
swapped = hidden(stays.flip(2))
assert not close(removed, cache.prefill(target, question, swapped).logits)

ideal = int(stays.sum()) * cache.nbytes(whole) / stays.numel()
for name, prefix in {"hidden": hidden(stays), "removed": tenth}.items():
    print(f"{name}: {cache.nbytes(prefix.cache)} bytes, {cache.nbytes(prefix.cache) / ideal:.2f} of the ideal")

# %% [markdown]
# ### Writing without training
#
# What stays can also be changed, so that it stands for what goes.
# Attention matching {cite}`zweiger2026matching` does that by least squares: for the queries of the repetition, each kept key gets a bias, by which attention over what stays weighs as much as over everything, and then values, by which it also says the same.
# The bias is in the cache, where padding has its minus infinity.

# %%
def matched(context, fraction):
    texts = compress.repeat_texts(tokenizer, context)
    options = {"retention": fraction, "score": zip_score}
    return compress.attention_matching(target, context, texts, **options)


some = passages if scale.name == "tiny" else passages[:2]  # minutes on large models
for fraction in (0.1, 0.05):
    values = accuracy(partial(matched, fraction=fraction), some)
    difference = values - placed["KVzip", "model", fraction][: len(some)]
    assert scale.name != "tiny" or difference.mean() <= 0
    print(f"at {100 * fraction:g} %: {shown(values)}, minus KVzip alone {shown(difference)}")

# %% [markdown]
# On these passages it gains nothing, and rather loses.
# Perhaps KVzip has kept what plain facts need already; and the queries that it is fitted to are those of a repetition, not those of questions.
# Its cost is KVzip's readings, and the least squares.

# %% [markdown]
# ### Positions after eviction
#
# After eviction the number of entries is not the next position.
# Kept keys are still rotated to their old positions, so the question must continue at the *old* length.
# Or all kept keys are moved together, to 0, 1, 2 ..., and the question goes on at their number: `compact` does that (it is how StreamingLLM counts), and then `generate` of transformers takes the cache as it is.
# Do not mix the two.

# %%
half = partial(evict, target, score=compress.key_norm_reversed, retention=0.5)


def at_the_number_of_entries(context):
    prefix = half(context)
    return replace(prefix, next_position=cache.length(prefix.cache))


answered = {
    "as it was": evicted["key_norm_reversed", 0.5],
    "compacted": accuracy(lambda c: compact(half(c))),
    "mixed up": accuracy(at_the_number_of_entries),
}
for name, values in answered.items():
    print(f"{name:10} {shown(values)}")
print("mixed up - as it was:", shown(answered["mixed up"] - answered["as it was"]))

# %% [markdown]
# ### Longer texts, and texts that grow
#
# With `chunk_size`, `evict` reads a context chunk by chunk, each after the best entries so far, so a context may be longer than the model reads at once (then the kept entries are compacted after each chunk).
# (Heads share out one budget when all is read, so such a budget does not go with chunks.)
# With `prefix`, it evicts again from what was kept before: `generate_within` does that every few tokens of a text that the model writes.

# %%
options = {"budget": 24, "scope": "token"}
at_once = evict(target, ids, compress.sinks_recent, **options)
in_chunks = evict(target, ids, compress.sinks_recent, chunk_size=16, **options)
assert in_chunks.positions.equal(at_once.positions)  # of this score; others choose anew
print("entries:", cache.length(in_chunks.cache), "next:", in_chunks.next_position)

# %% [markdown]
# ## KV-Distill
#
# KV-Distill {cite}`chari2025kvdistill` learns to choose, and it also *writes*: before the other tokens are thrown away, those that stay take over what they said.
#
# A {term}`scorer` looks at the frozen model's hidden states after some layers, $h_j$, and gives each token a number, $s_j = \operatorname{FFN}(h_j)$.
# The source scores after layer 6 of 32; in the lab's target that is layer 2 of 12.
# The $k$ best tokens stay, the same in all layers and heads.
# Then the whole passage goes through the model once more, this time with low-rank adapters:
#
# $$\begin{aligned} K_j &= (W_K + \Delta_K)\,x_j, & V_j &= (W_V + \Delta_V)\,x_j,\\ Q_j &= (W_Q + m_j \Delta_Q)\,x_j, & O_j &= (W_O + m_j \Delta_O)\,y_j, \end{aligned}$$
#
# where $x_j$ is what attention reads at token $j$ and $y_j$ what its heads found, with $m_j = 1$ for tokens that stay and $0$ for the others.
# That is conditional {term}`routing`: a token that stays learns to look around differently, one that goes only learns to be looked at.
#
# How does the scorer learn, when choosing the $k$ best has no gradient?
# By a {term}`gate`: attention logits to kept entries are multiplied by $\sigma(s_j)$,
#
# $$q_i \cdot k_j \;\to\; \sigma(s_j)\, q_i \cdot k_j = q_i \cdot \bigl(\sigma(s_j)\, k_j\bigr),$$
#
# and the right side says how it is kept: in the key.
# The *original* model reads the cache, and needs no change.
# (Where the logit is negative, the factor raises it, and with it the attention. Adding $\log \sigma(s_j)$ instead would always lower it, but no key can hold that; the ablations below have it.)
#
# One step is ours, not the source's, and used at the tiny scale only.
# What a scorer learns by is the slope of its gates, $\sigma(s_j)\,(1-\sigma(s_j))$.
# Left free, the scores of whatever helps grow until those gates are open, and little says any longer which of two kept tokens is worth more.
# So the lab's distiller brings the scores of each context to mean 2 and deviation 1 (`standardize`).
# Their order stays what it was, but no scorer can open all gates any more: at a mean of 2 they stand at 0.88.
# The ablations show what that is worth.
#
# Here is all of it, for one text:


# %%
def distill_by_hand(distiller, ids, k):
    settings, model = distiller.settings, distiller.model
    states = model(ids, output_hidden_states=True).hidden_states
    s = distiller.scorer(states[settings.layer])[0]  # (T,)
    if settings.standardize:
        s = 2 + (s - s.mean()) / s.std(correction=0)
    ranked = s.clone()
    ranked[: settings.sinks] = float("inf")  # the first tokens always stay
    positions = ranked.topk(k).indices.sort().values
    tokens = torch.zeros_like(ids, dtype=torch.bool)
    tokens[0, positions] = True
    with routed(distiller.adapted, tokens):  # q and o: zeros for the others
        entries = distiller.adapted(input_ids=ids).past_key_values
    gate = s[positions].sigmoid()[:, None]
    pairs = (
        (e.keys[:, :, positions], e.values[:, :, positions]) for e in entries.layers
    )
    return [((keys * gate).to(keys.dtype), values) for keys, values in pairs]


# %% [markdown]
# `routed` is a hook that multiplies the adapters' *input* by $m_j$.
# An adapter is $BAx$ without a bias, so zeros in give zeros out, exactly.
# Is it what the library does?

# %%
torch.manual_seed(scale.seed)
settings = {"standardize": True, "rank": 32, "scorer_hidden_size": 512, "sinks": 1}
settings = settings if scale.name == "tiny" else {}
distiller = KVDistiller(target, **settings)
trainable = [p for p in distiller.parameters() if p.requires_grad]
print(f"{sum(p.numel() for p in trainable) / 1e6:.2f} M parameters to train,")
print(f"{target.num_parameters() / 1e6:.2f} M in the frozen model")
print("tokens are scored after layer", distiller.settings.layer)

with torch.no_grad():
    by_hand = distill_by_hand(distiller, ids, k=24)
small = distiller.compress(ids, budget=24)
for (hand_keys, hand_values), e in zip(by_hand, small.cache.layers):
    assert close(hand_keys, e.keys)
    assert close(hand_values, e.values)

# %% [markdown]
# ### A check you can break
#
# An untrained adapter adds nothing.
# With all tokens kept and gates wide open (which takes free scores), the distilled cache must be the cache.
# Open the gates less, or keep one token less, and it is not:

# %%
opened = KVDistiller(target, **settings | {"standardize": False})
with torch.no_grad():
    opened.scorer.down.bias.fill_(100.0)  # sigma(100) = 1
same = opened.compress(ids, retention=1.0).cache
ordinary = cache.to_tensor(cache.prefill(target, ids).cache)
assert close(cache.to_tensor(same), ordinary)
with torch.no_grad():
    opened.scorer.down.bias.fill_(1.0)  # sigma(1) = 0.73
half_open = opened.compress(ids, retention=1.0).cache
assert not close(cache.to_tensor(half_open), ordinary)
del opened

# %% [markdown]
# ## Train it
#
# The teacher is the frozen model with the whole passage, $p$; the student is the same frozen model with what is left of it, $q$.
# They are compared on the tokens of the answers, over the whole vocabulary and both ways:
#
# $$\mathcal{L} = \lambda \operatorname{KL}(p \,\|\, q) + (1-\lambda) \operatorname{KL}(q \,\|\, p),\qquad \lambda = 0.6 .$$
#
# The fraction that is kept, the {term}`retention`, is drawn for each batch, so that one distiller serves every size.
# Each passage has several questions, one after another, so that the kept entries must serve them all.
#
# At a larger scale this is the longest cell: a bar shows how far it is, and a checkpoint is written every 200 steps.
# If Colab disconnects, run the cells again: training goes on from the checkpoint.
# (To keep it when Colab takes the machine back, too, mount a Google Drive and give a path there.)

# %%
steps = 20 if scale.name == "tiny" else 1000
batch = scale.needs["03_kv_distill"].batch
checkpoint = Path("kvlab-runs/03/distiller.safetensors")
readings = Readings(8 * steps, facts=(8, 16), questions=6, seed=scale.seed)
examples = DistillDataset(tokenizer, readings)
before = fingerprint(target)["weights"]
history = train_distiller(
    distiller,
    examples,
    steps=steps,
    batch_size=batch,
    accumulate=8 // batch,
    learning_rate=1e-3 if scale.name == "tiny" else 5e-5,
    retention=(0.05, 0.8),
    precision=scale.precision,
    checkpoint=None if scale.name == "tiny" else checkpoint,
)
assert fingerprint(target)["weights"] == before  # frozen

# %% mystnb={"image": {"alt": "The loss of each training step. It falls, and scatters, since each step keeps another fraction."}}
ax = plots.axes(height=2.4)[0]
ax.plot([h["loss"] for h in history], "o-", ms=3, color=plots.BLUE)
ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None));

# %% [markdown]
# That is how it begins.
# The lab ships one that was trained longer, from the start: 400 steps with 16 passages each, about ten minutes on one core, as `kvlab distill --steps 400` makes it.
# (At the larger scales, this chapter goes on with the one it has just trained.)

# %%
shipped = lab.models.MODELS / "lab-distiller"
if scale.name == "tiny":
    distiller = KVDistiller.from_pretrained(shipped, target)
print(textwrap.fill(str(distiller.settings), 76))

# %% [markdown]
# Which tokens of our passage does it keep?

# %%
small = distiller.compress(ids, retention=0.25)
scores = distiller.scores(ids)[0].tolist()
positions = small.positions[0].tolist()
kept = tokenizer.decode(ids[0, positions])
if scale.name == "tiny":
    assert all(answer in kept for _, answer in turns)
view = {"KV-Distill": (scores, positions)}
plots.score_view(ids[0].tolist(), view, tokenizer)

# %% [markdown]
# It keeps the answer to each question about this passage, and lets most other tokens go, which it was never told about.
# Whose value it is must be in the entry already: the model wrote that there while it read.
# How many questions does that answer?

# %%
distilled = {
    fraction: accuracy(partial(distiller.compress, retention=fraction))
    for fraction in (0.5, 0.25, 0.1, 0.05)
}
evicted["key_norm_reversed", 0.05] = accuracy(
    partial(evict, target, score=compress.key_norm_reversed, retention=0.05)
)
rows = {
    f"{100 * fraction:g} %": {
        "KV-Distill": shown(values),
        "key norm, reversed": shown(evicted["key_norm_reversed", fraction]),
    }
    for fraction, values in distilled.items()
}
print(
    f"at 10 %: {compress.count_kept(ids.shape[1], 0.1)} entries for {test.facts[0]} facts"
)
pd.DataFrame(rows).T

# %% [markdown]
# ## One budget for all, learned
#
# KV-Distill chooses once for all layers and heads, and that is what KVzip does better.
# So give the distiller what made KVzip strong: a score for each layer and head, and one budget over all of them.
#
# `FreeDistiller` reads the context *once*, with adapters.
# A small network per layer turns the hidden states that enter the layer into a score for each of its heads.
# These networks first learn the logarithm of KVzip's scores by least squares, as KVzap {cite}`jegou2026kvzap` does.
# Then they are frozen, and the adapters learn to write, by the loss above.
# (Routing and gate are gone: which entries stay is known only after the pass, and the scores learn from KVzip. A relative, RestoreKV (arXiv 2608.01247), adds learned tokens to what KVzip keeps.)
#
# A few steps of the first part show how it goes:

# %%
from kvlab.distill import FreeDistiller, ScoreDataset, fit_scores

free = FreeDistiller(target, rank=8, scorer_hidden_size=32, sinks=sinks)
few = {"steps": 20 if scale.name == "tiny" else 200, "batch_size": batch}
contexts = [text for text, _ in Readings(40, facts=(8, 16), questions=1)]
scored = ScoreDataset(target, tokenizer, contexts, sinks)
fitted = fit_scores(free, scored, **few)
first, last = fitted[0]["loss"], fitted[-1]["loss"]
print(f"squared error of the log scores: {first:.2f} -> {last:.2f}")
if scale.name == "tiny":
    assert last < first / 2

small = free.compress(ids, retention=0.1)
entries = int((small.positions >= 0).sum())
print(f"{entries} entries in {small.positions[..., 0].numel()} heads,", end=" ")
print("to be continued at", small.next_position)

# %% [markdown]
# ## The figure
#
# Ten passages are few.
# The benchmark asks about more, with three seeds: each has its own passages, the same for all methods, and its own `FreeDistiller` (KV-Distill as published is the one that ships).
# Intervals are over passages.
# First the two ways to share out the budget:

# %%
results = kvlab.results("distill")
PERCENTS = (50, 25, 10, 5, 2)


def curves_of(names):
    """Value and interval by percentage, by method."""
    return {
        label: results.intervals({f"em_{name}_{p}": p for p in PERCENTS})
        for name, label in names.items()
    }


# %% mystnb={"image": {"alt": "Share of questions answered against the percentage of entries kept, from 2 to 100: one budget for all heads, solid, stays near the full cache down to 5 percent; the same number in each head, dashed, falls from 25 percent on."}}
names = {
    "distill_free": "KV-Distill, one budget",
    "kvzip": "KVzip, one budget",
    "key_norm_reversed_free": "key norm reversed, one budget",
    "distill": "KV-Distill, the same tokens everywhere",
    "kvzip_uniform": "KVzip, the same number per head",
    "key_norm_reversed": "key norm reversed, per head",
}
dashed = [names[name] for name in ("distill", "kvzip_uniform", "key_norm_reversed")]
plots.retention_curves(curves_of(names), results["em_full"].value, dashed)
print(textwrap.fill(results["em_distill_25"].conditions, 78))

# %% [markdown]
# And all of them, at the sizes where they differ (the question is not known to any):

# %%
titles = {
    "distill_free": "KV-Distill, one budget",
    "kvzip": "KVzip, one budget",
    "kvzip_plus": "KVzip+, one budget",
    "attention_matching": "attention matching",
    "key_norm_reversed_free": "key norm rev., one budget",
    "expected_attention_free": "Expected Att., one budget",
    "kvzip_sinks": "KVzip, with four sinks",
    "kvzip_layer": "KVzip, per layer",
    "kvzip_uniform": "KVzip, per head",
    "distill": "KV-Distill",
    "choice": "KV-Distill, choice only",
    "key_norm_reversed": "key norm reversed",
    "expected_attention": "Expected Attention",
    "compactor": "Compactor",
    "keydiff": "KeyDiff",
    "snapkv": "SnapKV",
    "h2o": "H2O",
    "tova": "TOVA",
    "key_norm": "key norm",
    "sinks_recent": "sinks and recent",
    "random": "random",
    "random_free": "random, one budget",
}
results.table(
    {
        label: {f"{p} %": f"em_{name}_{p}" for p in PERCENTS[1:]}
        for name, label in titles.items()
    }
)

# %% [markdown]
# Choosing, where to choose, writing: what is each worth?
# Differences, passage by passage:

# %%
steps = {
    "KVzip: one budget - per head": "where",
    "KV-Distill, one budget - KVzip": "gain_free",
    "the same - key norm reversed": "gain_reversed",
    "attention matching - KVzip": "gain_matching",
    "KV-Distill as published - KVzip": "gain_kvzip",
    "everything - KV-Distill, one budget": "lost_free",
}
sizes = (10, 5, 2)
for p in sizes:
    assert results[f"where_{p}"].low > 0.2
    assert results[f"gain_kvzip_{p}"].high < -0.1
    assert results[f"gain_matching_{p}"].value < 0
    assert abs(results[f"gain_reversed_{p}"].value) < 0.05
    assert results[f"lost_free_{p}"].value < 0.06
    assert results[f"gain_free_{p}"].value >= 0
for p in (5, 2):
    assert results[f"gain_reversed_{p}"].high < 0
best = ("distill_free", "kvzip", "kvzip_plus", "key_norm_reversed_free")
for p in (10, 5):
    values = [results[f"em_{name}_{p}"].value for name in best]
    assert max(values) - min(values) < 0.05
    assert results[f"em_expected_attention_free_{p}"].value < min(values) - 0.05
    gained = results[f"em_distill_{p}"].value - results[f"em_choice_{p}"].value
    assert abs(gained) < 0.05
counted = results["em_random_counts_10"]
assert results["em_random_10"].value < counted.value < counted.high < 0.5
results.table(
    {
        label: {f"{p} %": f"{name}_{p}" for p in sizes}
        for label, name in steps.items()
    }
)

# %% [markdown]
# Between good scores, **where** is worth most, by far: the same score, with one budget instead of one for each head.
# (It is not the numbers alone: random entries, as many in each head as KVzip keeps, answer more than other random ones, and far less than KVzip's. Both are in the results file.)
#
# With one budget for all, the **choice** hardly matters down to a twentieth, among the best: KV-Distill, KVzip with or without the plus, and the reversed key norm.
# (Others are worse: see Expected Attention, and random entries.)
# KV-Distill with scores of its own for each head answers at least as much as KVzip at all three sizes, from one reading instead of more than two; whether it is more, three seeds do not show.
# But the reversed key norm, which has learned nothing and reads nothing twice, answers as much at a tenth, and more at a twentieth and a fiftieth.
# Its success may be the lab's: one short fact per sentence, on a model with normalized keys.
# Where the cheapest score is the strongest, a learned one cannot shine.
#
# **Writing** by least squares costs answers, and what training writes adds little: compare KV-Distill as published with its choice only.
# (With one budget for all, what it writes was not measured alone.)
# And KV-Distill as published, which chooses once for all heads, is no match for a free budget from a tenth downwards.

# %% [markdown]
# ### If the question is known
#
# Some methods may look at the question before they choose.
# Then a good score finds the one fact that is asked for, and needs little else; with a quarter of the entries more is answered than from the whole cache.
# (H2O, which sums over all tokens, hardly notices the question.)
# That is another task: such a cache answers *this* question.
# So these figures have a table of their own, and none of them belongs beside the curves above.

# %%
known = {
    "h2o_aware": "H2O, question known",
    "snapkv_aware": "SnapKV, question known",
}
rows = {
    label: {f"{p} %": f"em_{name}_{p}" for p in PERCENTS}
    for name, label in known.items()
}
assert results["em_snapkv_aware_25"].low > results["em_full"].high
results.table(rows)

# %% [markdown]
# What happens to the second question?
# Choose with the first in view, and then ask all:

# %%
def for_the_first(context, questions, fraction=0.25):
    asks = questions[0][None].to(target.device)
    options = {"retention": fraction, "question_ids": asks}
    return evict(target, context, compress.snapkv, **options)


first, others = [], []
for context, questions, answers in passages:
    prefix = for_the_first(context, questions)
    one = [(context, [q], [a]) for q, a in zip(questions, answers)]
    scores = accuracy(lambda c: prefix, one)
    first.append(scores[0])
    others += [
        s for s, a in zip(scores, answers) if a != answers[0]
    ]  # some ask for the same
print("the question it was chosen for:", shown(first))
print("the others:                    ", shown(others))

# %% [markdown]
# The others fare as they do with SnapKV and no question at all (in the table above).

# %% [markdown]
# ## Bytes and milliseconds
#
# Evicted entries free their memory: bytes fall with the number of entries.
# And every new token reads the whole cache once, so decoding gets faster where the cache is what it waits for.
# Measured behind 8,192 tokens, on a model of Qwen3-0.6B's shape (random weights: time does not depend on them):

# %% mystnb={"image": {"alt": "Two panels over the percentage of entries kept: megabytes of the cache, which fall in proportion, and milliseconds a token, which fall to a floor, the reading of the weights."}}
panels = plots.axes(2, width=7, height=2.8)
quantities = {"cache_mb": "cache (MB)", "decode_ms": "decoding (ms per token)"}
percents = sorted([100, *PERCENTS])
for ax, (name, ylabel) in zip(panels, quantities.items()):
    points = [results[f"{name}_{p}"].interval for p in percents]
    labels = {"xlabel": "entries kept (%)", "ylabel": ylabel}
    plots.draw_lines(ax, percents, {"": points}, ylim=(0, None), **labels)
print(textwrap.fill(results["decode_ms_100"].conditions, 78))

# %% [markdown]
# And if heads have lengths of their own?
# Hidden entries save nothing; removed ones save bytes and time, less what padding costs.
# With eight heads in a layer, as here, the longest of them is far from the mean (heads differ as much as under KVzip in the lab):

# %%
rows = {}
ways = {"all": "100", "the same number per head, 10 %": "10"}
ways |= {"one budget, 10 %, hidden": "masked_10", "one budget, 10 %": "free_10"}
for label, name in ways.items():
    rows[label] = {"cache": f"cache_mb_{name}", "decoding": f"decode_ms_{name}"}
assert results["cache_mb_free_10"].value < results["cache_mb_masked_10"].value / 2
assert results["decode_ms_free_10"].high < results["decode_ms_masked_10"].low
results.table(rows, ".3g")

# %% [markdown]
# The lab's layers have two heads, so padding costs less; it costs more as less is kept, since the heads differ more.
# Bytes of the cache over those of its entries:

# %%
rows = {}
for name in ("kvzip", "kvzip_plus", "distill_free", "key_norm_reversed"):
    suffix = "" if name != "key_norm_reversed" else " (per head: a rectangle)"
    row = {f"{p} %": f"bytes_over_ideal_{name}_{p}" for p in (25, 10, 5)}
    rows[titles[name] + suffix] = row
results.table(rows)

# %% [markdown]
# ### What choosing costs
#
# KVzip reads the context, and then reads it again behind itself.
# A score of keys, or a distiller with one budget, needs what one reading has at hand; KV-Distill as published reads the first layers twice.
# In tokens that pass through all layers, and in time beside that of a plain reading:

# %%
rows = {}
cheap = ["key_norm_reversed", "expected_attention", "compactor", "distill_free"]
for name in [*cheap, "distill", "kvzip", "kvzip_plus", "attention_matching"]:
    costs = {"tokens": f"readings_{name}", "time": f"readings_ms_{name}"}
    rows[titles[name]] = costs | {"ms": f"ms_{name}"}
results.table(rows)

# %% [markdown]
# ## What is it made of?
#
# The paper {cite}`chari2025kvdistill` takes the method apart on SQuAD, with Llama-3-8B; percent of exact matches at 20 % of the entries: $\lambda = 0.6$ 86.0, forward KL alone 83.4, reverse KL alone 82.7; and with a learned embedding in place of routing 67.4.
# The benchmark does it in the lab, in short runs that differ in one thing each from the lab's distiller, standardized scores included.
# Each is trained twice, and two seeds leave intervals so wide that only the largest gaps stand out.
# (Here every token of the answer must be the likeliest after the right ones before it, which is not the measure above.)

# %% mystnb={"image": {"alt": "Dots with intervals: share of questions answered after short trainings that differ in one thing, at 25 and at 10 percent of the entries."}}
arms = {
    "base": "as in this chapter",
    "free_scores": "scores left free",
    "forward_kl": "forward KL only",
    "reverse_kl": "reverse KL only",
    "routing_all": "adapters on all tokens",
    "routing_embedding": "the same, kept ones marked",
    "gate_log": "gate adds log sigma(s)",
    "gate_none": "no gate",
    "no_adapters": "a scorer, no adapters",
    "layer_1": "scored after layer 1",
    "layer_6": "scored after layer 6",
    "layer_12": "scored after layer 12",
}
panels = {
    f"at {p} %": results.intervals(
        {f"ablation_{name}_{p}": arms[name] for name in arms}
    )
    for p in (25, 10)
}
plots.splice_panels(panels)
conditions = results["ablation_base_25"].conditions
print(textwrap.fill(conditions.partition("; ")[2].partition(":")[0], 78))

# %% [markdown]
# What matters here is that a gate can teach.
# Without one, what stays is what a random network happens to like.
# With scores left free, as the source has them, so few steps at so high a rate are a matter of luck.
# Compare the slopes of the gates of kept tokens (standardized scores cannot have one near 0):

# %%
for name, scores in {"base": "standardized", "free_scores": "left free"}.items():
    slope = results[f"gate_slope_{name}"].value
    print(f"mean slope of the gates, scores {scores}: {slope:.1e}")

# %% [markdown]
# Free scores that are almost all open teach little more.
# Trained longer they may yet learn; that they can learn well in larger models, the paper shows.
#
# With both seeds, adding $\log \sigma(s)$ teaches worse than multiplying, and without adapters much is lost at a tenth.
# To score after layer 6 or 12 costs something at a tenth, too, with both seeds.
# Neither the divergences nor routing make a difference that two seeds can show: the paper's order of $\lambda$, and what routing gained it, are not to be seen here.
# In passages of plain facts, one entry per fact may be nearly all there is to find.
# Whether denser text needs them is not tested.
#
# ## Options, and needles
#
# Is an answer that is not said lost, or just outranked?
# With four options of a kind, three of them from the same passage if it has so many, chance is 0.25:

# %%
rows = {"everything": {"picked": "choice_full"}}
for p in (25, 10, 5):
    for name in ("distill_free", "kvzip", "distill", "snapkv", "random"):
        rows[f"{titles[name]}, {p} %"] = {"picked": f"choice_{name}_{p}"}
results.table(rows)

# %% [markdown]
# And does it depend on where a fact stands?
# A needle test asks for the fact at a certain depth of a passage of a certain length.
# Passages of 32 facts are longer than any the distiller was trained on.
# At a tenth, KV-Distill as published loses facts; with one budget for all heads, it and KVzip keep them at all depths:

# %% mystnb={"image": {"alt": "Maps of the share answered by number of facts in the passage, 8, 16, 32, and depth of the fact asked for: everything kept, and at 10 percent KV-Distill as published, KV-Distill with one budget, and KVzip."}}
lengths, depths = (8, 16, 32), (0, 25, 50, 75, 100)
arms = {
    "full": "everything",
    "distill_10": "KV-Distill, 10 %",
    "distill_free_10": "one budget, 10 %",
    "kvzip_10": "KVzip, 10 %",
}
maps = {label: np.empty((len(lengths), len(depths))) for label in arms.values()}
for arm, label in arms.items():
    for i, n in enumerate(lengths):
        maps[label][i] = [
            results[f"needle_{arm}_{n}_{depth}"].value for depth in depths
        ]
plots.score_maps(maps, "facts", "depth (%)", lengths, depths)
least = {label: values.min() for label, values in maps.items()}
assert least["KV-Distill, 10 %"] < min(least["one budget, 10 %"], least["KVzip, 10 %"])

# %% [markdown]
# ## Keep it
#
# A distilled cache is a cache: `cache.save` writes it with its next position, `cache.load` gives it back to the model it was made for.
# And a knowledge cache (chapter 01) compresses items as it reads them, given a function that does:

# %%
file = folder / "passage.safetensors"
small = distiller.compress(ids, retention=0.25)
cache.save(small, file, target, {"text": text})
loaded = cache.load(file, target)
assert torch.equal(cache.to_tensor(loaded.cache), cache.to_tensor(small.cache))
print(
    f"{file.stat().st_size / 1000:.0f} kB for {cache.length(loaded.cache)} entries,",
    end=" ",
)
print("to be continued at", loaded.next_position)

# %%
from kvlab.knowledge import KnowledgeCache
from kvlab.lab import corpora

records, stores = corpora.made_up(20), {}
quarter = {"retention": 0.25, "scope": "token"}
ways = {
    "all entries": None,
    "a quarter, by KV-Distill": partial(distiller.compress, retention=0.25),
    "a quarter, by key norm reversed": partial(
        evict, target, score=compress.key_norm_reversed, **quarter
    ),
    "a quarter, by SnapKV": partial(
        evict, target, score=compress.snapkv, **quarter
    ),
    "a quarter, by KVzip, one budget": with_scope(zip_score, "model", 0.25),
}
for number, (name, way) in enumerate(ways.items()):
    parts = folder / str(number), records, target, tokenizer
    stores[name] = KnowledgeCache.build(*parts, compress=way)
sizes = {name: store.summary().loc["all"] for name, store in stores.items()}
pd.DataFrame(sizes).T[["items", "tokens", "size (MB)"]].round(2)

# %% [markdown]
# The items are made-up answers to questions, which the model can only read.
# That is not the kind of text that this distiller was trained on.
# How much of the next word's distribution, $\sum_x \min(p(x), q(x))$, stays what it is with the whole item?
# If nothing at all is given, this much:

# %%
def next_word(store, item):
    """Probabilities of the first word of an answer, after an item or after nothing."""
    prefix = store.splice([item], "shift") if store else None
    prompt = stores["all entries"].prompt(item.question)
    prompt = torch.tensor([prompt], device=target.device)
    out = cache.prefill(target, prompt, prefix)
    return out.logits.float().softmax(-1)[0]


rows = {}
for name, store in {"nothing": None, **stores}.items():
    pairs = [
        (
            next_word(stores["all entries"], item),
            next_word(store, store[item.id] if store else item),
        )
        for item in stores["all entries"]
    ]
    rows[name] = shown([torch.minimum(p, q).sum().item() for p, q in pairs])
pd.DataFrame({"stays": rows})

# %% [markdown]
# Outside its kind of text the distiller helps no more than nothing at all would, while SnapKV and KVzip, which have learned nothing, keep more than half of what the item changes.
# (All heads share their entries here, except under KVzip; so this is not the reversed key norm of the tables above.)
# For a store of answers one would have to train one on answers.
# The mechanism is the same, and so are the bytes.
#
# ## Exercises
#
# ```{exercise-start} Without the gate
# :label: ex-ungated
# ```
# *Easy, 5 minutes.*
# The gate scales kept keys by $\sigma(s_j)$.
# Does the model still need it once the distiller is trained?
# Divide it out again (`cache.scale_keys` multiplies keys by factors), and ask.
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-ungated
# :class: dropdown
# ````

# %%
def ungated(context, fraction=0.25):
    small = distiller.compress(context, retention=fraction)
    return replace(
        small, cache=cache.scale_keys(small.cache, 1 / gates(context, small))
    )


@torch.no_grad()
def gates(context, small):
    return distiller.scores(context).gather(1, small.positions).sigmoid()


open_gates = gates(ids, distiller.compress(ids, retention=0.25))
print(f"gates of kept tokens: {open_gates.min():.2f} to {open_gates.max():.2f}")
print(f"with gates:    {shown(distilled[0.25])}")
print(f"without gates: {shown(accuracy(ungated))}")

# %% [markdown]
# The gates of tokens that stay are nearly open, so dividing them out changes little.
# They were needed to *learn* what stays.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Is it the choice, or the writing?
# :label: ex-choice-or-writing
# ```
# *Medium, 10 minutes.*
# KV-Distill chooses tokens and rewrites them.
# Keep the tokens it chooses, but with the entries that the plain model made of them.
# Then the other way round: its adapters, on tokens chosen at random.
# Which half does the work at a quarter, and which at a tenth?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-choice-or-writing
# :class: dropdown
# ````

# %%
def only_chosen(context, fraction):
    positions = distiller.compress(context, retention=fraction).positions
    plain = everything(context)
    return replace(
        plain, cache=cache.select(plain.cache, positions), positions=positions
    )


def only_written(context, fraction):
    k = compress.count_kept(context.shape[1], fraction)
    positions = (
        torch.randperm(context.shape[1], device=context.device)[:k].sort().values
    )
    tokens = torch.zeros_like(context, dtype=torch.bool)
    tokens[0, positions] = True
    with torch.no_grad(), routed(distiller.adapted, tokens):
        entries = distiller.adapted(input_ids=context).past_key_values
    small = cache.select(entries, positions)
    return replace(everything(context), cache=small, positions=positions[None])


rows = {
    f"{100 * fraction:g} %": {
        "both": shown(distilled[fraction]),
        "only the choice": shown(accuracy(partial(only_chosen, fraction=fraction))),
        "only the writing": shown(
            accuracy(partial(only_written, fraction=fraction))
        ),
    }
    for fraction in (0.25, 0.1)
}
pd.DataFrame(rows)

# %% [markdown]
# The learned choice does nearly all of it.
# It keeps the values, and whoever keeps these has most of what such a passage says.
# What the adapters write adds a little (the benchmark has the choice alone at all sizes); into entries that the scorer did not choose they write in vain.
# But to train a scorer without any adapters costs much at a tenth: see the ablations.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Longer than a chunk
# :label: ex-chunks
# ```
# *Medium, 10 minutes.*
# Contexts longer than `chunk_size` tokens are read in chunks that do not attend to each other.
# Set `chunk_size` to 50 (`dataclasses.replace` on the `settings` of the distiller), and ask again.
# What is lost, and what would be lost in a text in which every sentence refers to the one before?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-chunks
# :class: dropdown
# ````

# %%
settings = distiller.settings
by_size = {settings.chunk_size: distilled[0.25]}
for size in (50, 25):
    distiller.settings = replace(settings, chunk_size=size)
    by_size[size] = accuracy(partial(distiller.compress, retention=0.25))
distiller.settings = settings
for size, values in by_size.items():
    print(f"chunks of {size:4} tokens: {shown(values)}")

# %% [markdown]
# Each fact is one sentence, and still some answers are lost, more with shorter chunks.
# Perhaps sentences are cut, and the first tokens of later chunks have no {term}`attention sink` before them.
# Where sentences depend on others, a fact about a name in an early chunk would not reach the chunk that uses it.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - *Which*: eviction by a score needs no training. How good a score is, and even its sign, depends on the model: measure, and compare with the best.
# - *Where*: with one budget over all layers and heads, the best scores keep nearly everything at a tenth of the entries; with the same number in each head they lose about half of it. Here that is worth more than what the best scores, or training, differ by, and it makes a cache ragged.
# - *Writing*: KV-Distill learns what to keep, and to write into it what goes; in passages of plain facts the writing adds little. As published, one choice for all heads, it falls behind a training-free method with a free budget. With scores for each head it is level with KVzip, from one reading instead of more than two. A cheaper score is as good here; on another model it may be the worst, so measure.
# - The gate is a way for the choice to be learned. It folds into the keys, so the reader of the cache is the unchanged model.
# - A cache chosen for a question answers that question. Never compare it with one that was chosen for all.
# - A distiller serves the kind of text it was trained on. Measure on yours (`kvlab eval-compression`).
#
# The cell below runs alone, after the imports.

# %%
from kvlab import Scale, distill, speculate
from kvlab.lab.corpora import Readings

scale = Scale.current()
target, tokenizer = scale.load("target"), scale.load_tokenizer("target")
distiller = distill.KVDistiller(target, rank=8)
examples = distill.DistillDataset(tokenizer, Readings(8, facts=(4, 8), questions=2))
distill.train_distiller(
    distiller, examples, steps=3, batch_size=4, learning_rate=1e-3
)

turn = ("Where does Anna live?", "Rome")
example = distill.encode_turns(tokenizer, "Anna lives in Rome.", [turn])
small = distiller.compress(example.context[None].to(target.device), retention=0.8)
question = example.text[example.weights == 0]
answer = speculate.generate(target, [question], prefix=small, max_new_tokens=4)
print(tokenizer.decode(answer.tokens[0], skip_special_tokens=True))

# %% [markdown]
# **Further reading**: the paper {cite}`chari2025kvdistill`; scores and a library of them {cite}`li2024snapkv,zhang2023h2o,xiao2023streamingllm,devoto2024l2`; learned tokens that stand for a context {cite}`ge2024icae`.
# Next: models that learn from caches of other shapes.
