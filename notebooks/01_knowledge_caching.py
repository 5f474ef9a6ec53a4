# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01. Knowledge caching
#
# ```{admonition} In this chapter
# :class: tip
# - build a store of knowledge that a model has already read, keep it on disk, and see that it can be trusted;
# - find the right item for a question in new words, and know when there is none;
# - join pieces that were read apart, in seven ways, and measure the error of each;
# - work out when loading a cache pays, from three numbers of your model and your disk.
#
# **Time and memory**: about two minutes and 1 GB, nearly all of it PyTorch itself, at `tiny`. The second cell prints the memory of the models at any scale.
#
# **Code**: `kvlab/knowledge.py`. The code written out here is checked against it.
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
import time
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import kvlab
from kvlab import Scale, knowledge, lab, plots, speculate
from kvlab.cache import Prefix, bytes_per_token, clone, join
from kvlab.cache import length, nbytes, prefill, shift, to_tensor
from kvlab.cache import truncate
from kvlab.evaluate import close, mean_interval
from kvlab.generation import encode
from kvlab.knowledge import KnowledgeCache
from kvlab.lab import corpora
from kvlab.lab.report import questions, split_questions
from kvlab.models import CacheError, rotary_of

scale = Scale.current()
print(scale.describe("01_knowledge_caching"))
model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
embedder = scale.load_embedder()
tiny = scale.name == "tiny"
exact = model.dtype == torch.float32  # half precision rounds differently

# %% [markdown]
# ## The question
#
# A help desk has fifty answers, and a language model that is asked about them all day.
# Each time, a program puts the right answer into the prompt, and the model reads it again: the same tokens, through the same layers, with the same result.
# Chapter 00 saved that result to a file.
# So why read twice?
#
# Because three things are missing.
# The file has to be *found*: the question comes in new words.
# It has to be *trusted*: a cache from another model, or with one flipped bit, does not fail, it produces nonsense.
# And it has to *fit*: a cache is not text.
# It was read with or without a text before it, at positions that are written into its keys.
#
# This chapter builds a {term}`knowledge cache` that can do all three.
# The last of them, {term}`splice`, is the hardest.
# Suppose three pieces were read apart, and a question is asked about all of them.
# There are seven ways to go on (seven *arms*, in the code and from here on):
#
# - **full**: read everything again, as if there were no cache;
# - **prefix**: keep the first piece, which has no text before it, and read the rest;
# - **concat**: join the caches as they are, the later ones at wrong positions;
# - **shift**: move the later ones to their positions first;
# - **recompute**: shift, then compute again those few tokens that are furthest from their true values;
# - **gradual**: the same, but choose again before every layer, fewer from layer to layer;
# - **legolink**: shift, then compute the first few tokens of each later piece again.
#
# The last three begin where shift ends; the picture has the other four.

# %% mystnb={"image": {"alt": "Four strips, one per way of splicing three pieces and a question: full reads all; prefix loads the first piece and reads the rest; concat loads all at the wrong places; shift moves the later pieces."}}
plots.splice_strips([40, 40, 40], question=16);

# %% [markdown]
# ## Build a store
#
# The records are the FAQ that ships with the lab: questions and answers in seven fields.
# An item is the conversation of one question and its answer, as the chat template renders it.
# Before anything is read, the store can estimate its size: a key and a value for each token, layer and head.

# %%
records = lab.faq()
domains = {record["domain"] for record in records}
print(len(records), "records in", len(domains), "domains, the first:")
for field in ("domain", "question", "answer"):
    print(textwrap.fill(f"{field}: {records[0][field]}", 76))

# %%
folder = Path(tempfile.mkdtemp())
settings = {"keep": ("kv", "hidden"), "dtype": torch.float16}
store = KnowledgeCache.build(
    folder / "faq", records[:7], model, tokenizer, embedder, **settings
)
print(f"the other 42 will take {store.estimate(records) / 1e6:.1f} MB")
store.add(records, batch_size=8)
store.summary().round(2)

# %% [markdown]
# Records that are in the store already are skipped, so you run an interrupted build again.
# With `keep` you choose keys and values, the last hidden states (which a draft in the next chapter can attend to), or both.
# With `dtype` you choose the precision on disk.

# %%
print("added:", store.add(records))
for path in sorted((folder / "faq").rglob("*.*")):
    print(f"{path.stat().st_size / 1e3:9.1f} kB  {path.relative_to(folder)}")

# %% [markdown]
# A *shard* is two files that hold some items: their tensors, and a small index.
# Opening a store reads the indexes; an item's tensors are read when the item is.
# A shard, once written, never changes.
# Adding writes new shards and then replaces the *manifest*, which lists them, in one atomic step.
# Kill the process at any moment, and the store is the old one or the new one.
#
# ### Can it be trusted?
#
# The manifest holds the {term}`fingerprint` of the model (sizes, rotary frequencies, a hash of some numbers from every weight), and those of the tokenizer and the embedder.
# Every item has a checksum of its own.
# Try to break it:

# %%
def refuses(action):
    try:
        action()
    except CacheError as error:
        message = str(error).replace(str(folder), "...")
        print(textwrap.fill(message, 76))
        return True


other = scale.load("draft")
assert refuses(lambda: KnowledgeCache.load(folder / "faq", other, tokenizer))

# %%
broken = store["ai-07"]  # the last item of the first shard
shard = folder / "faq/shards" / f"{broken.shard}.safetensors"
content = shard.read_bytes()
shard.write_bytes(content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:])
assert refuses(lambda: store.read(broken))  # one bit is enough
assert length(store.read(store["ai-01"]).cache)  # the others are intact
shard.write_bytes(content)
assert length(store.read(broken).cache) == len(broken.input_ids)

# %% [markdown]
# ## Look inside
#
# An item has its token ids and the index where the answer starts.
# It has ids, not text: tokenizing joined texts again can move a token's border, and then the cache belongs to other tokens than those of the prompt.

# %%
item = store["ai-05"]
prefix = store.read(item)
start = item.answer_start
for ids in (item.input_ids[:start], item.input_ids[start:]):
    print(textwrap.fill(tokenizer.decode(ids), 76))
kilobytes = nbytes(prefix.cache) / 1e3
print(f"{length(prefix.cache)} tokens, {kilobytes:.0f} kB in memory")
print("hidden states:", tuple(store.hidden_states(item).shape))

# %% [markdown]
# Keys are stored rotated: position $m$ turns each pair of dimensions of a key by an angle proportional to $m$ {cite}`su2021roformer`.
# Read the same item after another one, and all its keys look different.
# Turn the keys of the first reading to the positions of the second, and most of the difference is gone.
# The rest is context: the second time, the item has attended to the text before it.

# %%
def read(ids):
    """The prefix that one list of token ids gives when it is read alone."""
    return prefill(model, torch.tensor([list(ids)], device=model.device))


before = store["ai-01"]
moved, rotary = len(before.input_ids), rotary_of(model)
both = read([*before.input_ids, *item.input_ids]).cache
alone = read(item.input_ids).cache
in_place = shift(alone, moved, rotary)
keys = [c.layers[1].keys[0, 0] for c in (alone, both, in_place)]
alone, behind, in_place = keys[0], keys[1][moved:], keys[2]
pictures = {
    "read alone": alone,
    "read after another": behind,
    "difference": behind - alone,
    "after turning": behind - in_place,
}

# %% mystnb={"image": {"alt": "Heat maps of one head's keys of the same item: read alone, read after another item, and their differences before and after turning the keys; the last is much paler."}}
words = [tokenizer.decode(i) for i in item.input_ids[:24]]
first = {name: keys[:24] for name, keys in pictures.items()}
plots.cache_picture(first, words, shared=True);

# %%
sizes = {name: keys.float().norm().item() for name, keys in pictures.items()}
for name, size in sizes.items():
    print(f"{name:20} {size:6.1f}")
assert sizes["after turning"] < sizes["difference"]
rest = pictures["after turning"].float().square().sum(-1)  # by token
if tiny:
    assert sizes["after turning"] < sizes["difference"] / 2
    assert rest.max() > rest.sum() / 2
    assert words[rest.argmax()].strip() == "-"

# %% [markdown]
# The rest is not spread evenly: in the lab's model most of it is in one row, that of a hyphen.
# Remember that for later.

# %% [markdown]
# ## Find the right item
#
# A sentence embedder {cite}`reimers2019sbert` turns a question into a vector, which is compared with the vectors of the stored *questions*, not of the answers.
# Every item of the FAQ has one paraphrase that neither the lab's models nor its embedder were trained on.
# (The embedder was trained on many *other* wordings of the same items, which a public one would not be.)
# Is the nearest stored question the right one?

# %%
def interval(values):
    return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(values))


held_out = [(item["paraphrases"][2], item["id"]) for item in records]
hits = [store.retrieve(question, threshold=-1)[0] for question, _ in held_out]
right = np.array([hit.item.id == id for hit, (_, id) in zip(hits, held_out)])
score = np.array([hit.score for hit in hits])
print("nearest is right:  ", interval(right))
same = [bool(store.retrieve(question, exact=True)) for question, _ in held_out]
print("same question found:", interval(same))

# %%
wrong = [i for i in range(len(hits)) if not right[i]]
rows = [(held_out[i][0], hits[i].item.question, score[i]) for i in wrong[:6]]
misses = pd.DataFrame(rows, columns=["asked", "found instead", "cosine"])
misses.style.format({"cosine": "{:.2f}"}).hide(axis="index")

# %% [markdown]
# The embedder of the lab is a table of vectors, one per token, averaged.
# It knows only the English words of its training wordings, so it may miss a question in new words.
# A model that was trained on a billion sentences (`t4` and `full` use one) knows more words, and the same code measures it.
#
# ### Knowing when there is none
#
# Some questions have no answer in the store.
# The nearest item is then wrong, however near it is.
# So an item is a hit only above a {term}`threshold`.
# Choosing it means weighing lost right items against wrong items given, and for that we need questions that the store does *not* answer.
# We use half of them to choose the smallest threshold that lets at most one in twenty through, and the other half to report.

# %%
def nearest(asked):
    return np.array([store.retrieve(q, threshold=-1)[0].score for q in asked])


to_choose = nearest(corpora.outside("calibrate"))
to_report = nearest(corpora.outside("test"))
thresholds = np.round(np.arange(0.2, 0.91, 0.01), 2)
allowed = [t for t in thresholds if np.mean(to_choose >= t) <= 0.05]
chosen = allowed[0]
print("threshold:", chosen)
print("right item found:", interval(right & (score >= chosen)))
print("false hits:      ", interval(to_report >= chosen))
if tiny:
    assert np.mean(to_report >= 0.5) > np.mean(to_report >= chosen)

# %% mystnb={"image": {"alt": "Fraction of questions that are given an item over the threshold: right item for held-out paraphrases, wrong item for them, and any item for questions outside the store; the chosen threshold is marked."}}
def above(scores):
    return [np.sum(scores >= t) for t in thresholds]


fractions = {
    "paraphrase, right item": np.divide(above(score[right]), len(score)),
    "outside question, any item": np.divide(above(to_report), len(to_report)),
    "paraphrase, wrong item": np.divide(above(score[~right]), len(score)),
}
plots.hits_over_threshold(thresholds, fractions, chosen);

# %% [markdown]
# `store.retrieve(question, threshold=...)` returns an empty list for a miss, never the first item.
# The default of 0.5 lets more through than the threshold chosen here.
# Cosines of different embedders cannot be compared, so measure the threshold for yours.

# %%
for question in ("How does a dictionary look up a key?", "Who won the World Cup?"):
    hits_above = store.retrieve(question, k=2, threshold=chosen)
    print(question, [(round(hit.score, 2), hit.item.id) for hit in hits_above])

# %% [markdown]
# ## Answer from it
#
# There are two ways to use a hit.
# One is to put the whole item before the question, as an earlier turn of the conversation.
# The other is bolder: if the user's question means the same as the stored one, then *answer the stored question*.
# Its cache, cut off where the answer starts, is the state of the model after reading that question.
# (`speculate.generate` comes with chapter 05; without a draft it is plain greedy decoding, which continues a `Prefix`.)

# %%
asked = held_out[: scale.questions // 3]
found = [store.retrieve(q, threshold=-1)[0] for q, _ in asked]
prompts = [store.prompt(question) for question, _ in asked]
alone = [encode(tokenizer, [{"role": "user", "content": q}]) for q, _ in asked]


def stored_question(item):
    cut = item.answer_start - 1  # the last token of the prompt is read again
    ids = item.input_ids[:cut]
    return Prefix(truncate(store.read(item).cache, cut), cut, ids)


prefixes = {
    "question alone": None,
    "item, then question": [store.splice([hit]) for hit in found],
    "the stored question": [stored_question(hit.item) for hit in found],
}

# %%
def texts_of(made):
    plain = {"skip_special_tokens": True}
    return [tokenizer.decode(ids, **plain).strip() for ids in made.tokens]


last = [[hit.item.input_ids[hit.item.answer_start - 1]] for hit in found]
asks = dict(zip(prefixes, (alone, prompts, last)))
truth = [store[id].answer for _, id in asked]
options, correct = {"tokenizer": tokenizer, "max_new_tokens": 64}, {}
for name, prefix in prefixes.items():
    made = speculate.generate(model, asks[name], prefix=prefix, **options)
    same = [a == b for a, b in zip(texts_of(made), truth)]
    print(f"{name:20} word for word {interval(same)}")
    correct[name] = np.mean(same)
if tiny:
    assert correct["item, then question"] < correct["question alone"] + 0.05
    assert abs(correct["the stored question"] - right[: len(found)].mean()) < 0.06

# %% [markdown]
# The lab's target knows the FAQ by heart under the questions it was trained on, and less surely under new ones.
# It was never taught to look up one FAQ item in order to answer another question, so the item before the question does not help it.
# (A large model may well use it, but will answer in its own words: compare meanings there, not words.)
# Answering the stored question needs no such skill: it is right as often as the nearest item is, and with a threshold, as often as the right item is retrieved.

# %% [markdown]
# ## Move a piece
#
# Now to the pieces themselves.
# We take passages of sixteen facts, cut each into four pieces *at the token level*, read every piece alone, and ask about all of it.
# The model answers well when it reads the whole passage at once, so every error comes from the splice.

# %%
def quarters(passage):
    """A passage in four texts that end with a sentence."""
    sentences = re.findall(r"[^.]+\.", passage)
    return ["".join(part) for part in np.array_split(sentences, 4)]


def ends_with(ids, text):
    return tokenizer.decode(ids).strip().endswith(text.strip())


def pieces_of(document, texts=()):
    """Ids of the passage, cut where each text ends, of question and answer."""
    system, user, answer = document
    whole, cuts = encode(tokenizer, [system, user]), [0]
    for text in texts or quarters(system["content"]):
        begin, ends = cuts[-1], range(cuts[-1] + 1, len(whole))
        cuts.append(next(end for end in ends if ends_with(whole[begin:end], text)))
    ids = tokenizer(" " + answer["content"], add_special_tokens=False).input_ids
    parts = [whole[a:b] for a, b in pairwise(cuts)]
    return parts, whole[cuts[-1] :], ids


documents = questions("free", scale.questions // 2, (16, 16), seed=scale.seed)
parts, question, answer = pieces_of(documents[0])
for ids in (*parts, question, answer):
    print(textwrap.fill(repr(tokenizer.decode(ids)), 76))

# %% [markdown]
# Rotating by an angle is linear, and two rotations add up: $R_{a+b} = R_a R_b$.
# So a key that was stored for position $m$ becomes the key for position $m + d$ by one more turn,
#
# $$ k_{m+d} = R_d\, k_m, $$ (turn)
#
# exactly, from the rotated key alone.
# Values have no position.
# Shift every piece to its positions, join them, and the result looks like a cache of the whole passage:

# %%
def shifted(prefixes):
    """Each prefix moved to its positions, then joined to those before it."""
    cache, start = None, 0
    for prefix in prefixes:
        moved = shift(prefix.cache, start, rotary)
        cache = moved if cache is None else join(cache, moved)
        start += len(prefix.input_ids)
    return cache


pieces = [read(ids) for ids in parts]
by_hand, spliced = shifted(pieces), knowledge.splice(model, pieces, "shift")
assert torch.equal(to_tensor(by_hand), to_tensor(spliced.cache))
print(length(spliced.cache), "entries, next position", spliced.next_position)

# %% [markdown]
# It *looks* like one.
# Each piece was read without the text before it, so its keys and values in deeper layers are not quite those of the whole passage, and its first token was treated as the first of all.
# In a language model the first token is special, the {term}`attention sink`: it gathers the attention that has nowhere else to go {cite}`xiao2023streamingllm`.
# Where do stored and true values differ?

# %%
true = to_tensor(read(spliced.input_ids).cache)
error = (true - to_tensor(spliced.cache)).float().pow(2).sum((2, 3, 5))  # (L, 2, T)
size = true.float().pow(2).sum((2, 3, 5)).mean(-1, keepdim=True)
difference = (error / size).sum(1).cpu()  # keys and values, (L, T)
starts = np.cumsum([0, *(len(ids) for ids in parts[:-1])])
candidates = difference[1, starts[1] :]
worst = starts[1] + candidates.topk(round(0.15 * len(candidates))).indices
if tiny:
    into_piece = [i - max(s for s in starts if s <= i) for i in worst.tolist()]
    assert difference[1, : starts[1]].max() < 0.01 * difference[1].max()  # the first piece is exact
    assert difference[1, worst].sum() > difference[1].sum() / 2
    assert np.mean(np.array(into_piece) < 8) > 0.5  # near the start of a piece

# %% mystnb={"image": {"alt": "Bars of the difference between stored and true keys and values for each token of four pieces; the first piece is exact, and in the later ones a few tokens stand out."}}
plots.token_differences(difference[1], starts, worst.tolist());

# %% [markdown]
# The difference is not spread evenly: a few tokens, mostly at the start of a piece, have much of it.
# That is the idea of CacheBlend {cite}`yao2024cacheblend`: compute the first two layers for all tokens, find those that differ most, and compute only those in the layers above, on top of the stored rest.
# Its gradual filter chooses before every layer, among the tokens of the layer before: many in the lower layers, few in the upper ones.
# LegoLink {cite}`hu2025epic` does not look for them at all: it computes the first $k$ tokens of each later piece again, in all layers.
#
# A comparison must be at the same work.
# `tokens_computed` counts the tokens that an arm computes in each layer.
# CacheBlend pays for its choice with two full layers (which weigh less in a deeper model); for the same work, LegoLink has this many tokens of each piece:

# %%
def link_tokens(parts):
    """The k of LegoLink that is as much work as "recompute" with these pieces."""
    lengths, layers = [len(ids) for ids in parts], model.config.num_hidden_layers
    work = sum(knowledge.tokens_computed("recompute", lengths, layers)) / layers
    return round(work / (len(parts) - 1))


def computed_again(arm):
    """Where the entries of an arm are not those of "shift", (L, T)."""
    k = link_tokens(parts)
    cache = knowledge.splice(model, pieces, arm, first_tokens=k).cache
    return (to_tensor(cache) != to_tensor(spliced.cache)).any(5).any(3).any(1)[:, 0]


masks = {arm: computed_again(arm).cpu() for arm in knowledge.RECOMPUTING}
print("k of LegoLink:", link_tokens(parts))
later = sum(len(ids) for ids in parts[1:])
for arm, mask in masks.items():
    print(f"{arm:10} computes {mask.sum().item() / len(mask) / later:.1%} again")
if tiny and exact:
    work = [mask.sum() for mask in masks.values()]
    assert max(work) - min(work) < 0.02 * later * len(mask)
    assert masks["gradual"][2:].sum(1).diff().max() <= 0  # fewer from layer to layer

# %% mystnb={"image": {"alt": "Three panels of layers by tokens: recompute computes the two lowest layers of the later pieces and some columns of tokens above; gradual a set that shrinks from layer to layer; legolink the first tokens of each later piece in all layers."}}
plots.computed_tokens(masks, starts);

# %% [markdown]
# `fraction=1.0`, or a $k$ as long as the longest piece, computes all again and must give the true cache.

# %%
lengths = [len(ids) for ids in parts]
for arm in knowledge.RECOMPUTING:
    most = {"fraction": 1.0, "first_tokens": max(lengths)}
    again = to_tensor(knowledge.splice(model, pieces, arm, **most).cache)
    deviation = (again - true).abs().max().item()
    print(f"{arm:10} deviates by {deviation:.1e} with all computed again")
    assert close(again, true)

# %% [markdown]
# There is another way, before any question is asked.
# If the trouble is a piece's first token, which takes itself for the first of all, let it not be the first: read every later piece behind the same short *dummy prefix*, and drop the dummy's entries.
# `prefill_behind` does so, and gives pieces that any arm takes.
# They must be stored in this form, but cost nothing more when they are spliced.
# Our dummy is what opens the passage, and a full stop.

# %%
user, reply = documents[0][1:]
(dummy,), _, _ = pieces_of([{"role": "system", "content": "."}, user, reply], ["."])
print("dummy:", repr(tokenizer.decode(dummy)))


def read_behind(parts):
    """Later pieces behind the dummy, and the first alone."""
    later = [knowledge.prefill_behind(model, ids, dummy) for ids in parts[1:]]
    return [read(parts[0]), *later]


# %% [markdown]
# Before you trust a splice of a new model, let `check` compare it with full reading.
# Its `error` is 0, but for rounding, if the caches are right and at their positions; `kl` and `agreement` are the price of not having read the text before each piece.

# %%
for arm in knowledge.ARMS[1:]:
    checked = knowledge.check(model, pieces, arm)
    print(f"{arm:10} {checked.verdict:10} error {checked.error:.3f} kl {checked.kl:.3f}")
    if tiny:  # only "concat" has keys at wrong positions
        assert checked.error > 0.1 if arm == "concat" else checked.error < 0.05

# %% [markdown]
# ## Seven ways, measured
#
# We measure four things for every passage and every arm, and for two arms with pieces that were read behind the dummy: the distance of the next-token distributions, through question and answer, from those after reading it all ({term}`KL divergence`, in nats per token); whether the answer is right; the bytes that would be loaded; and the time to the first token, once they are in memory.

# %%
@torch.inference_mode()
def after(prefix, ids):
    """Log-probabilities (len(ids), vocabulary) of what follows each id."""
    start = prefix.next_position
    places = torch.arange(start, start + len(ids), device=model.device)[None]
    ids = torch.tensor([ids], device=model.device)
    past = clone(prefix.cache)  # the call adds to it
    out = model(input_ids=ids, position_ids=places, past_key_values=past)
    return out.logits[0].float().log_softmax(-1).cpu()


def kl(p, q):
    """Mean over tokens of KL(p || q), from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


# %%
def compare(document, texts=()):
    """For each arm: KL from "full", if the answer is right, seconds."""
    parts, question, answer = pieces_of(document, texts)
    ids, rows, full = [*question, *answer[:-1]], {}, None
    alone, behind = [read(part) for part in parts], read_behind(parts)
    ways = {arm: (alone, arm) for arm in knowledge.ARMS}
    ways |= {f"dummy, {arm}": (behind, arm) for arm in ("shift", "legolink")}
    k = link_tokens(parts)
    for name, (pieces, arm) in ways.items():
        begun = time.perf_counter()
        prefix = knowledge.splice(model, pieces, arm, first_tokens=k)
        after(prefix, question)[-1].argmax()  # the first token of an answer
        seconds, logs = time.perf_counter() - begun, after(prefix, ids)
        full = logs if name == "full" else full
        right = logs[len(question) - 1 :].argmax(-1).tolist() == answer
        rows[name] = kl(full, logs), right, seconds
    return rows


def by_arm(results):
    """Of each quantity an array with a value per passage, for each arm."""
    return (
        {arm: np.array([r[arm][i] for r in results], float) for arm in results[0]}
        for i in range(3)
    )


def kl_interval(values):
    """Mean and interval; 0 without an interval where there is only rounding."""
    return (0.0,) * 3 if abs(values).max() < 1e-5 else mean_interval(values)


def quality(kls, rights):
    """Two panels: KL and right answers."""
    return {
        "KL, nats per token": {arm: kl_interval(v) for arm, v in kls.items()},
        "answers right": {arm: mean_interval(v) for arm, v in rights.items()},
    }


# %%
compare(documents[0])  # the first call is slower
bar = {"desc": "splicing", "leave": False}
kls, rights, times = by_arm([compare(d) for d in tqdm(documents, **bar)])
size = [nbytes(piece.cache) / 1e6 for piece in pieces]
loaded = dict.fromkeys(kls, sum(size)) | {"full": 0, "prefix": size[0]}
panels = quality(kls, rights) | {
    "MB loaded": {arm: (mb, mb, mb) for arm, mb in loaded.items()},
    "ms to the first token": {
        arm: mean_interval(1e3 * v) for arm, v in times.items()
    },
}

# %% mystnb={"image": {"alt": "Four panels, one row per way of splicing: KL is zero for full and prefix, largest for concat, smaller for shift and recompute, smallest for gradual, legolink and dummy prefixes; answers right; megabytes loaded; milliseconds to the first token."}}
plots.splice_panels(panels);

# %%
for worse, better in (
    ("concat", "shift"),
    ("shift", "recompute"),
    ("recompute", "gradual"),
    ("recompute", "legolink"),
    ("shift", "dummy, shift"),
):
    gap = interval(kls[worse] - kls[better])
    print(f"{worse} is worse than {better} by {gap} nats per token")
every = sum(map(len, parts)) + len(question)  # of the first document
print(f"shift reads {len(question) / every:.0%} of the tokens that full reads")
for arm in ("shift", *knowledge.RECOMPUTING):
    fraction = times[arm].mean() / times["full"].mean()
    print(f"{arm} takes {fraction:.0%} of the time that full takes")
if exact:
    assert kls["prefix"].max() < 1e-5
if tiny:
    mean = {arm: v.mean() for arm, v in kls.items()}
    assert mean["concat"] > mean["shift"] > mean["recompute"]
    assert mean["recompute"] > mean["legolink"] > mean["dummy, legolink"]
    assert mean["shift"] > 2 * mean["dummy, shift"]
    assert rights["full"].mean() > 0.8
    assert all(r.mean() > rights["full"].mean() - 0.15 for r in rights.values())

# %% [markdown]
# Reusing a *prefix* is always exact: there is no text before it.
# Wrong positions cost most.
# The error that is left after shifting is missing context.
# LegoLink removes more of it than CacheBlend does at the same work.
# And the dummy prefix removes much of it at no work at all: that part of the error comes from sinks in the middle, not from what the pieces say.
# The *answers* hardly change, even at wrong positions: this model looks a fact up by its words, and in these passages every fact is in one sentence, so a piece loses little when it is read alone.
#
# ### Pieces that refer to one another
#
# Real pieces do lose something: "she" is the person of the piece before.
# The lab's texts have no pronouns, and its model cannot resolve them.
# But pieces of a fixed number of tokens end anywhere, also between the subject of a sentence and what is said of it.
# So we cut the same kind of passage there, and ask about one of the sentences that were cut.

# %%
split = split_questions(scale.questions // 4, 16, 4, seed=scale.seed)
for ids in chain(*pieces_of(*split[0])[:1]):
    print(textwrap.fill(repr(tokenizer.decode(ids)), 76))
kls_split, rights_split, _ = by_arm([compare(*d) for d in tqdm(split, **bar)])

# %% mystnb={"image": {"alt": "Two panels for pieces that begin in the middle of a sentence, one row per way of splicing: with concat, shift and a dummy prefix alone hardly any answer is right; recompute has some, gradual more, and legolink nearly as many as full."}}
plots.splice_panels(quality(kls_split, rights_split));

# %%
right = {arm: v.mean() for arm, v in rights_split.items()}
for arm in knowledge.RECOMPUTING:
    gap = interval(rights_split["full"] - rights_split[arm])
    print(f"{arm} loses {gap} of the answers")
if tiny:
    assert right["full"] > 0.8
    nothing = ("concat", "shift", "dummy, shift")
    assert max(right[arm] for arm in nothing) < 0.25
    assert right["recompute"] < right["gradual"] < right["legolink"]
    assert min(right["legolink"], right["dummy, legolink"]) > right["full"] - 0.15

# %% [markdown]
# Read whole, the passage answers nearly every question; with pieces that were moved only, nearly none is answered, and the dummy prefix does not help.
# What must be computed again is at the start of a piece, where a reference to the text before is resolved.
# CacheBlend looks for it by differences, and finds it in a part of the passages; LegoLink has it by design.
#
# The lab is kind to LegoLink: here the reference is within the first words of a piece.
# Where it comes later, LegoLink misses it and a choice by differences may not.
# The benchmark of this chapter (`tests/benchmarks/knowledge.py`) measured both kinds of passages, 200 of each, at the same work:

# %%
measured = kvlab.results("knowledge")
ways = (*knowledge.RECOMPUTING, "dummy_legolink")
for kind, suffix in (("whole sentence", ""), ("cut sentence", "_reference")):
    found = {arm: measured[f"kl_{arm}{suffix}"] for arm in ways}
    for arm, figure in found.items():
        answers = measured[f"em_{arm}{suffix}"]
        print(f"{kind} {arm:15} KL {figure:.4f}  right {answers:.2f}")
    order = sorted(ways, key=lambda arm: found[arm].value)
    print(f"{kind}, the best first: {', '.join(order)}")
    assert order[:2] == ["dummy_legolink", "legolink"]
for pair in ("recompute_over_gradual", "recompute_over_legolink"):
    ratios = measured[f"kl_{pair}"], measured[f"kl_{pair}_reference"]
    print(f"KL of {pair.replace('_', ' ')}:", *(f"{ratio:.1f}" for ratio in ratios))
    assert ratios[1].low > 1
    assert (ratios[0].low > 1) == pair.endswith("legolink")

# %% [markdown]
# The strongest is LegoLink on pieces that were read behind a dummy, and after it LegoLink on pieces read alone.
# The ratios are geometric means over the passages, of whole and of cut sentences.
# On whole sentences, choosing anew before each layer is not distinguishable from choosing once; on cut ones it helps much, but not as much as LegoLink.

# %% [markdown]
# ### The time
#
# The gain in time is smaller than what is saved in tokens (the lines above).
# On a model as small as the lab's, much of a call's time goes into starting its operations, not into arithmetic.
# Shifting saves most of the arithmetic, but less of the time.
# CacheBlend and LegoLink make one more call, over the tokens that they compute, which on so small a model costs about as much as it saves.
# The benchmark has the same for a model of the shape of Qwen3-0.6B with random weights, three items of 512 tokens, and LegoLink's own $k = 16$:

# %% mystnb={"image": {"alt": "Stacked bars of the time to the first token by way of splicing, in loading, splicing and reading the question: full and prefix spend nearly all in reading the items, shift little in anything, recompute and gradual much in computing tokens again, legolink little."}}
timed = ("full", "prefix", "shift", *knowledge.RECOMPUTING)
kinds = ("load", "splice", "question")
tokens = 3 * 512
spent = {
    arm: {k: measured[f"{k}_seconds_{arm}"].value / tokens for k in kinds}
    for arm in timed
}
del spent["full"]["load"]
plots.time_spent(spent, kinds, "milliseconds per token of the items");

# %%
total = {arm: sum(parts.values()) for arm, parts in spent.items()}
assert total["shift"] < total["legolink"] < total["recompute"] < total["full"]

# %% [markdown]
# So when does a cache pay?
#
# ## When a cache pays
#
# Reading a token costs about two operations for each parameter of the model.
# Loading it costs the bytes of its keys and values.
# Both grow with the number of tokens, so one number decides: at which bandwidth does loading become as fast as reading?
#
# $$ \text{break-even bandwidth} = \frac{\text{bytes per token}}{\text{seconds to read a token}} $$ (breakeven)
#
# Measure it here, with items of growing length, from the file to the first token after one more token of question.
# We take the median of several runs.
# After the first run the file is in the system's memory, so the disk itself is not measured:

# %%
def median_seconds(action, repeats=5):
    """The time of an action, without the first run."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        action().logits[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - begun)
    return np.median(times[1:])


# %%
passages = " ".join(d[0]["content"] for d in documents)
long = tokenizer(passages, add_special_tokens=False, verbose=False).input_ids
texts = [tokenizer.decode(long[:n]) for n in (64, 128, 256, 512, 1024)]
items = [{"question": "?", "answer": text} for text in texts]
speed = KnowledgeCache.build(folder / "speed", items, model, tokenizer)
more = torch.tensor([long[:1]], device=model.device)


def read_it(item):
    ids = torch.tensor([item.input_ids], device=model.device)
    return prefill(model, torch.cat([ids, more], 1))


def load_it(item):
    return prefill(model, more, speed.read(item))


# %%
with torch.inference_mode():
    taken = {
        "read it": [median_seconds(lambda: read_it(item)) for item in speed.items],
        "load it": [median_seconds(lambda: load_it(item)) for item in speed.items],
    }
tokens = [len(item.input_ids) for item in speed.items]

# %% mystnb={"image": {"alt": "Milliseconds to the first token by tokens of knowledge, on logarithmic scales: reading grows with the tokens, loading stays almost flat."}}
plots.reading_or_loading(tokens, taken);

# %%
reading = taken["read it"]
per_token = (reading[-1] - reading[0]) / (tokens[-1] - tokens[0])
bytes_each = bytes_per_token(model.config, model.dtype)
print(f"{1e6 * per_token:.0f} microseconds to read a token of {bytes_each} bytes")
print(f"break-even bandwidth here: {bytes_each / per_token / 1e9:.2f} GB/s")

# %% [markdown]
# For larger models, the same follows from their shapes.
# Parameters grow with the square of a model's width, its cache only with the number of its layers and key-value heads, so with grouped-query attention {cite}`ainslie2023gqa` a slower disk is fast enough for a large model.
# Suppose a device does 30 TFLOP/s ($30 \cdot 10^{12}$ operations per second) while it reads:

# %%
from kvlab.scale import config_of, parameters

rows, names = {}, ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen2-7B-Instruct", "Qwen3-14B")
for name in names:
    config = config_of(f"Qwen/{name}")
    kilobytes = bytes_per_token(config, torch.float16) / 1e3
    microseconds = 2 * parameters(config) / 30e12 * 1e6
    rows[name] = kilobytes, microseconds, kilobytes / microseconds
columns = ["cache (kB/token)", "reading (µs/token)", "break-even (GB/s)"]
even = [row[2] for row in rows.values()]
assert max(even[2:]) < min(even[:2]) / 4  # of the large two and the small two
pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(2)

# %% [markdown]
# A solid-state disk gives a few GB/s, memory a few tens.
# The first token also needs the question read, which is one pass over all weights with or without a cache.
# On a CPU this pass remains: the time to the first token cannot fall below it, however fast the cache is loaded.
# The benchmark measured it on the same shape, for items of about 512 tokens:

# %%
names = """prefill_seconds load_seconds question_seconds load_ratio ttft_ratio
    ttft_ratio_one_token ttft_ratio_shift ttft_ratio_recompute
    ttft_ratio_gradual ttft_ratio_legolink
    store_mb resident_mb retrieval_ms_100k kills_survived"""
for name in names.split():
    print(f"{name:22} {measured[name]:.3g} {measured[name].unit}")
print(measured.device, "- torch", measured.versions["torch"])

# %% [markdown]
# `load_ratio` compares reading the item with loading it, and `ttft_ratio` the time to the first token, with a question of twelve tokens on both sides.
# Those that end in the name of an arm join three items, against reading all three.
# `resident_mb` is the growth of the process while all items of the store were read, one after another.
# `kills_survived` is the fraction of processes, killed with `kill -9` while they added to a store, that left a store that opens, with old or new content.
#
# ## Exercises
#
# ```{exercise-start} Half the bytes
# :label: ex-dtype
# ```
# *Easy, 10 minutes.*
# A store can keep float16 or bfloat16 where the model computes in float32.
# Both have the same size.
# Which costs less KL, and why?
# (`to_tensor(cache)` gives one tensor, `from_tensor` the cache again; prefix reuse of the whole passage is exact without rounding.)
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-dtype
# :class: dropdown
# ````

# %%
from kvlab.cache import from_tensor


def rounded(document, dtype):
    """KL that comes from keeping the passage's cache in another precision."""
    parts, question, answer = pieces_of(document)
    passage = read(chain(*parts))
    stored = from_tensor(to_tensor(passage.cache).to(dtype).to(model.dtype))
    stored = Prefix(stored, passage.next_position)
    ids = [*question, *answer]
    return kl(after(passage, ids), after(stored, ids))


by_dtype = {}
for dtype in (torch.float16, torch.bfloat16):
    cost = [rounded(d, dtype) for d in documents[:16]]
    print(dtype, "{:.1e} [{:.1e}, {:.1e}]".format(*mean_interval(cost)))
    by_dtype[dtype] = np.mean(cost)
if tiny and exact:
    assert by_dtype[torch.float16] < by_dtype[torch.bfloat16]
    assert by_dtype[torch.bfloat16] < kls["recompute"].mean() / 100

# %% [markdown]
# float16 spends its bits on precision, bfloat16 on range.
# Keys and values have no great range, so float16 is closer.
# Both cost far less than any inexact splice above.
# (Where the model itself computes in half precision, storing that loses nothing.)
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} How much to compute again
# :label: ex-fraction
# ```
# *Easy, 10 minutes.*
# Draw the KL of "recompute" against the fraction of tokens computed again, from 0 to 1 (`splice` takes `fraction`).
# Then choose the tokens at random instead of by their differences: kvlab chooses them by `difference.topk(...)`, and `unittest.mock.patch.object` can put another `topk` into `torch.Tensor` for a while.
# Is *any* choice of as many tokens as good?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-fraction
# :class: dropdown
# ````

# %%
def read_apart(document):
    """The pieces, the ids after them, and the distributions if all is read."""
    parts, question, answer = pieces_of(document)
    pieces, ids = [read(part) for part in parts], [*question, *answer[:-1]]
    return pieces, ids, after(knowledge.splice(model, pieces, "full"), ids)


apart = [read_apart(d) for d in documents]  # once, for all fractions


def cost(fraction):
    """KL of recomputing this fraction, for each passage."""
    again = {"arm": "recompute", "fraction": fraction}
    spliced = [knowledge.splice(model, p, **again) for p, _, _ in apart]
    pairs = zip(spliced, apart)
    return np.array([kl(full, after(s, ids)) for s, (_, ids, full) in pairs])


costs = {fraction: cost(fraction) for fraction in (0.0, 0.05, 0.15, 0.5, 1.0)}
for fraction, values in costs.items():
    print(f"{fraction:4.0%}: {interval(values)}")

# %%
from unittest import mock


def by_chance(tensor, k, *rest, topk=torch.Tensor.topk):
    """The indices of k random entries, as `topk` returns them."""
    return topk(torch.rand_like(tensor, dtype=torch.float32), k, *rest)


some = 0.15
torch.manual_seed(scale.seed)
with mock.patch.object(torch.Tensor, "topk", by_chance):
    random = cost(some)
print(f"{some:.0%} at random:", interval(random))
print("more than by difference:", interval(random - costs[some]))
if tiny:
    assert random.mean() > costs[some].mean()

# %% [markdown]
# For the same work, random tokens leave more of the error than those that differ most: compare the last interval, which is paired, with zero.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} A question of order
# :label: ex-order
# ```
# *Medium, 10 minutes.*
# Only the first piece is exact after a shift.
# Compare questions whose answer is in the first piece with those whose answer is in a later one.
# Is the KL different?
# What would you do with the item that retrieval ranks first?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-order
# :class: dropdown
# ````

# %%
def piece_with_answer(document):
    """Which piece names the answer (the first that does)."""
    parts, answer = pieces_of(document)[0], document[-1]["content"]
    texts = [tokenizer.decode(ids) for ids in parts]
    return next(i for i, text in enumerate(texts) if answer in text)


where = np.array([piece_with_answer(d) for d in documents])
for name, these in {"first": where == 0, "later": where > 0}.items():
    print(f"{name}: {interval(kls['shift'][these])}, {these.sum()} questions")
if tiny:
    first, later = (mean_interval(kls["shift"][w]) for w in (where == 0, where > 0))
    assert (where == 0).sum() < (where > 0).sum() / 3
    assert first[2] > later[1]

# %% [markdown]
# Few answers are in the first piece, and the two intervals overlap: draw more documents before you believe in a difference.
# The first piece is the exact one, so the most trusted piece belongs there.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - A store can be trusted only if it checks model, tokenizer, rotary embedding and every item's bytes. A cache of another model does not fail, it gives wrong text.
# - Retrieve with the question, choose the threshold with questions that the store cannot answer, and let a miss be a miss.
# - A prefix is exact. Any later piece that was read alone is an approximation: read it behind a dummy prefix, shift it, and compute its first tokens again. A piece that refers to the one before cannot do without that.
# - Loading pays when the disk is faster than the break-even bandwidth: bytes of cache per token over the time to read one. Many parameters for each key-value head make it low.
#
# On the command line, `kvlab build-cache --per-domain` makes such a store (and one for each field), and `kvlab ask "What is overfitting?"` answers from it and without it, with times.
#
# The cell below runs alone, after the imports.

# %%
import tempfile

from kvlab import Scale, lab, speculate
from kvlab.knowledge import KnowledgeCache

scale = Scale.current()
model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
with tempfile.TemporaryDirectory() as path:
    embedder = scale.load_embedder()
    store = KnowledgeCache.build(path, lab.faq(), model, tokenizer, embedder)
    hits = store.retrieve("Why does my network do badly on new data?", k=2)
    print([(round(hit.score, 2), hit.item.question) for hit in hits])
    prefix = store.splice(hits)
    print(prefix.next_position, "tokens before the next question")

# %% [markdown]
# **Further reading**: CacheBlend {cite}`yao2024cacheblend`; EPIC and its LegoLink {cite}`hu2025epic`; prompts put together from cached modules {cite}`gim2024promptcache`; attention sinks {cite}`xiao2023streamingllm`.
# Next: a small model that *reads* this store while it drafts.
