# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00. A KV cache in your hands
#
# ```{admonition} In this chapter
# :class: tip
# - say what prefill and decoding cost, and measure it;
# - open a cache, and predict its size from four numbers;
# - move a cached text to other positions, cut it, join it, save it and go on from the file;
# - meet the small models that the whole book runs on.
#
# **Time and memory**: about a minute and 1 GB (with PyTorch itself) at `tiny`, two minutes and 4 GB at `t4`. Without a GPU the scale
# is `tiny`; set the variable `KVLAB_SCALE` to `tiny`, `t4` or `full` before the first cell to choose.
#
# **Code**: `kvlab/cache.py`; what is written out here is checked against it. Models: `kvlab/lab`.
# ```

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kvlab") is None:  # on Colab
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "git+https://github.com/kvlab/kvlab"], check=True)

# %%
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kvlab import Scale, lab, plots
from kvlab.cache import Prefix, bytes_per_token, clone, length, nbytes, prefill
from kvlab.cache import select, shift, truncate, unrotate
from kvlab.evaluate import close
from kvlab.models import rotary_of

scale = Scale.current()
print(scale.describe("00_start_here"))

# %% [markdown]
# ## The question
#
# A language model that answers a question about a text first reads the text.
# It turns every token, in every layer, into a *key* (what this token can be found by) and a *value* (what it contributes).
# When the next token is computed, its *query* is compared with all the keys, and the values are averaged by how well they match:
#
# $$ \mathrm{attention}(q) = \sum_{t} \frac{e^{q \cdot k_t / \sqrt{D}}}{\sum_{s} e^{q \cdot k_s / \sqrt{D}}}\; v_t $$
#
# A token's key and value depend only on the token, its position and what stands before it.
# So once computed they need never be computed again: they are kept, and that is the **KV cache**.
# Reading the text is called {term}`prefill`; making new tokens, one at a time, is called {term}`decoding <decode>`.
#
# Most programs throw the cache away when the answer is done.
# This book asks what becomes possible when it is kept: when a cache is a *value*, which can be stored, cut, joined, shrunk, moved and given to another model.
# This first chapter puts one into your hands.

# %% [markdown]
# ## The models of this book
#
# At scale `tiny` we use models that were trained for this book: small enough for a laptop, but taught to really look up facts in a passage, to solve word problems step by step, and (the larger two) to recite an FAQ.
# Here is one at work, on a passage that we make up.

# %%
model, tokenizer = scale.load("target"), scale.load_tokenizer("target")

passage = (
    "Anna lives in Oslo. The lamp is in the kitchen. Bruno works as a baker. "
    "Anna has a parrot. The lamp belongs to Bruno. Rosa plays the cello. "
    "Bruno lives in Lima. Rosa is 34 years old."
)
questions = [
    "Where does Anna live?",
    "Who owns the lamp?",
    "What does Bruno work as?",
    "How old is Rosa?",
]

# %% [markdown]
# A conversation is a list of messages.
# The tokenizer's chat template turns it into text, and the text into ids of shape (1, tokens).
# The passage is the system's message, and the question the user's.

# %%
def encode(messages, **options):
    options |= {"tokenize": False, "enable_thinking": False}
    text = tokenizer.apply_chat_template(messages, **options)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ids.to(model.device)


read_passage = {"role": "system", "content": passage}


def ask(question):
    messages = [read_passage, {"role": "user", "content": question}]
    return encode(messages, add_generation_prompt=True)


def words(ids):
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# %%
for question in questions:
    prompt = ask(question)
    output = model.generate(prompt, max_new_tokens=16, do_sample=False)
    print(f"{question:28} {words(output[0, prompt.shape[1] :])}")

# %% [markdown]
# Three models make up the lab.
# `lab-target` is deep and knows the FAQ.
# `lab-draft` has two layers: fast, and more often wrong.
# `lab-teacher` has another width, another number of heads and a tokenizer of its own.
# This is what they can do, measured now, with 95 % confidence intervals.
# Passages and problems are held out from training; the FAQ is asked as it was learned.

# %% mystnb={"image": {"alt": "Dot plot of the fraction of held-out tasks that the target, the draft and the teacher get right, with intervals."}}
from kvlab.lab.report import report

tasks = {
    "reading": "reading, 8-16 facts",
    "reading_long": "reading, 24-40 facts",
    "choice": "one answer of four",
    "arithmetic": "word problems, 1-5 steps",
    "faq": "FAQ (as trained)",
}
figures = []
for name in lab.NAMES:
    figures += report(name, n=20, tasks=list(tasks))
plots.lab_report(figures, tasks, ["target", "draft", "teacher"])
right = {figure["name"]: figure["value"] for figure in figures}
if scale.name == "tiny":
    assert all(right[f"target_{task}"] > right[f"draft_{task}"] for task in tasks)
    assert right["target_faq"] == 1

# %% [markdown]
# (Twenty right answers of twenty do not show that the next is right, so this interval is no point either.)
# A gap between the draft and the target is what several chapters live on: a draft that were always right would need no target, and a draft that were always wrong would be no use.

# %% [markdown]
# ## What prefill and decoding cost
#
# `prefill` is a forward pass that keeps the cache.
# It returns a `Prefix`: the cache, the position at which to continue, and the logits after the last token.

# %%
prompt = ask(questions[0])
prefix = prefill(model, prompt)
cache = prefix.cache
print(f"{prompt.shape[1]} tokens read, a cache of {length(cache)} entries")
print("continue at position", prefix.next_position)
print("likeliest next token:", repr(tokenizer.decode(prefix.logits[0].argmax())))

# %% [markdown]
# Decoding is the same call on one token, after what was read:

# %%
def continue_from(prefix, steps):
    """Greedy decoding, written out: one forward pass over one token a step."""
    tokens = []
    for _ in range(steps):
        tokens.append(prefix.logits.argmax(-1, keepdim=True))
        if tokens[-1].item() == tokenizer.eos_token_id:
            break
        prefix = prefill(model, tokens[-1], prefix)
    return torch.cat(tokens, 1)[0]


print(words(continue_from(prefix, 8)))

# %% [markdown]
# Without a cache, each new token would have to read everything before it again.
# With one, a step computes the keys and values of a single token and *looks at* the rest.
# So one way the cost of a token should grow with the text, and the other way it should be almost flat.
# Is that what happens?

# %%
@torch.inference_mode()
def seconds(forward, repeats=5):
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        forward().logits[0, -1, 0].item()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def step(n, new=1):
    """Seconds for `new` tokens after n tokens that are in the cache."""
    pasts = [clone(truncate(whole, n)) for _ in range(5)]  # each is used up
    ids = text[:, n : n + new]
    return seconds(lambda: model(ids, past_key_values=pasts.pop()))


lengths = [1, 64, 256, 512, 1024]
text = torch.randint(10, 500, (1, max(lengths) + 8), device=model.device)
whole = prefill(model, text[:, : max(lengths)]).cache
step(1)  # the first call warms up
costs = {"read all again": [], "use the cache": []}
for n in lengths:
    again = seconds(lambda: model(text[:, : n + 1], logits_to_keep=1))
    costs["read all again"].append(1000 * again)
    costs["use the cache"].append(1000 * step(n))

# %% mystnb={"image": {"alt": "Milliseconds for the next token against tokens already read: rising steeply without a cache, nearly flat with one."}}
labels = ("tokens already read", "milliseconds for the next token")
plots.lines(lengths, costs, *labels, ylim=(0, None))
for way, (first_cost, *_, last_cost) in costs.items():
    print(f"{way}: {lengths[-1]} tokens cost {last_cost / first_cost:.1f} times one")

# %% [markdown]
# The two meet where there is nothing to read again.
# What is left there is a fixed cost of going through the layers at all: on a small model, starting each operation; on a large one, loading the weights.
# It is paid once per step, however many tokens the step looks at:

# %%
spent = {k: step(256, k) for k in (1, 4, 8)}
for k, cost in spent.items():
    ratio = cost / spent[1]
    print(f"{k} new tokens at once: {1000 * cost:.1f} ms, {ratio:.1f} times one")

# %% [markdown]
# {term}`Speculative decoding <speculative decoding>` lives on this: a target that goes through its layers anyway may as well check several
# proposed tokens.

# %% [markdown]
# ## What is in it
#
# For each layer, two tensors of shape (batch, KV heads, tokens, head size):

# %%
for i in (0, len(cache.layers) - 1):
    keys, values = cache.layers[i].keys, cache.layers[i].values
    shapes = f"keys {tuple(keys.shape)}, values {tuple(values.shape)}"
    print(f"layer {i:2}: {shapes}, {keys.dtype}")

# %% [markdown]
# Here is the cache of the first three sentences: one head of a middle layer, one row per token.

# %% mystnb={"image": {"alt": "Heat maps of the keys and values of one head, a row for each token; no pattern is plain to the eye."}}
opening = ". ".join(passage.split(". ")[:3]) + "."
start = encode([{"role": "system", "content": opening}])
layer = prefill(model, start).cache.layers[len(cache.layers) // 2]
tokens = [tokenizer.decode(i) for i in start[0]]
pictures = {"keys": layer.keys[0, 0], "values": layer.values[0, 0]}
plots.cache_picture(pictures, tokens);

# %% [markdown]
# Not much can be read from it by eye: what a number means is between this head's keys and its own queries.
# One thing can be made visible, and it matters in every chapter.
# Let the text be a single word, again and again.
# In the first layer a value depends on the word alone, so all rows are equal.
# The keys are not: each carries its *position*.

# %% mystnb={"image": {"alt": "Heat maps for one word repeated: stored keys show waves along the positions, keys turned back and values are the same in every row."}}
bread = tokenizer(" bread", add_special_tokens=False).input_ids
stored = prefill(model, torch.tensor([bread * 24], device=model.device)).cache
places = torch.arange(length(stored))
turned_back = unrotate(stored, places, rotary_of(model))
pictures = {
    "keys, as stored": stored.layers[0].keys[0, 0],
    "keys, turned back": turned_back.layers[0].keys[0, 0],
    "values": stored.layers[0].values[0, 0],
}
plots.cache_picture(pictures, places.tolist())
spread = {name: rows.float().std(0).max().item() for name, rows in pictures.items()}
assert spread["keys, as stored"] > 20 * spread["keys, turned back"]
assert spread["keys, as stored"] > 20 * spread["values"]

# %% [markdown]
# The waves on the left are the position: fast ones in the first columns, slow ones further right, and again in the second half of the head.
# We will come to them after a question of size.

# %% [markdown]
# ## How large it is
#
# The shapes give the size.
# For $L$ layers, $H_{kv}$ KV heads and heads of size $D$, at $b$ bytes per number:
#
# $$ \text{bytes per token} = 2\, L\, H_{kv}\, D\, b $$ (bytes-per-token)

# %%
c = model.config
numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
predicted = numbers * model.dtype.itemsize
measured = nbytes(cache) / length(cache)
print(f"{predicted} bytes a token by the formula, {measured:.0f} measured")
assert predicted == measured == bytes_per_token(c, model.dtype)

# %% [markdown]
# Query heads do not appear in {eq}`bytes-per-token`: in {term}`grouped-query attention <GQA>` {cite}`ainslie2023gqa` several of them share one KV head.
# For models that people use, at 8192 tokens in half precision:

# %% mystnb={"image": {"alt": "Bars of cache size for 8192 tokens of four public models, with KV heads as they are and with one KV head for each query head."}}
from kvlab.scale import config_of

names = ["Qwen3-0.6B", "Qwen3-1.7B", "Qwen2-7B-Instruct", "Qwen3-14B"]
configs = {name: config_of(f"Qwen/{name}") for name in names}
sizes = pd.DataFrame(index=names)
for name, c in configs.items():
    gigabytes = 8192 * bytes_per_token(c, torch.float16) / 1e9
    query_heads = c.num_attention_heads / c.num_key_value_heads
    sizes.loc[name, "a KV head for every query head"] = gigabytes * query_heads
    sizes.loc[name, "as built"] = gigabytes
plots.cache_sizes(sizes);

# %% [markdown]
# That is for one text.
# A knowledge base of a thousand such texts is a question of disks and bandwidth, and a cache ten times smaller is worth a method of its own.
# Both will have a chapter.
#
# ## Keys carry positions
#
# A key knows its position.
# {term}`RoPE` {cite}`su2021roformer` takes the coordinates of a key in pairs and turns pair $i$ of a token at position $m$ by the angle $m\,\theta_i$:
#
# $$
# \begin{pmatrix} k'_i \\ k'_{i+D/2} \end{pmatrix} =
# \begin{pmatrix} \cos m\theta_i & -\sin m\theta_i \\ \sin m\theta_i & \cos m\theta_i \end{pmatrix}
# \begin{pmatrix} k_i \\ k_{i+D/2} \end{pmatrix}, \qquad \theta_i = \text{base}^{-2i/D}
# $$
#
# Queries are turned the same way, so that a score $q \cdot k$ depends only on how far apart the two are.
# Turning is linear, and angles add up.
# Hence a stored key can be moved by $n$ positions by turning it by $n\,\theta_i$ more, whatever position it was made at.
# In code:

# %%
def moved(keys, by, theta):
    """Keys (B, H, T, D), each pair turned by `by` more steps."""
    x, y = keys.chunk(2, -1)
    cos, sin = (by * theta).cos(), (by * theta).sin()
    return torch.cat([x * cos - y * sin, y * cos + x * sin], -1)


theta = rotary_of(model).inv_freq
base, half = model.config.rope_parameters["rope_theta"], len(theta)
assert torch.allclose(theta.cpu(), base ** (-torch.arange(half) / half))

first = cache.layers[0].keys
by_hand = moved(first.float(), 100, theta)
by_kvlab = shift(cache, 100, rotary_of(model)).layers[0].keys
print("largest difference:", (by_hand - by_kvlab.float()).abs().max().item())

# %% [markdown]
# Is it right?
# Prefill the same tokens *at* position 100 and compare.
# In the first layer the keys depend on nothing but token and position, so there moving must give exactly the keys that the model would have made.

# %%
there = prefill(model, prompt, position=100).cache
made_there = there.layers[0].keys

assert close(by_hand, made_there)
assert close(by_kvlab, made_there)
assert not close(first, made_there), "keys left where they were"
assert not close(moved(first.float(), -100, theta), made_there), "the wrong way"
assert not close(moved(first.float(), 100, 1.5 * theta), made_there), "another speed"
back = shift(shift(cache, 100, rotary_of(model)), -100, rotary_of(model))
print("there and back:", (back.layers[0].keys - first).abs().max().item())

# %% [markdown]
# Break it yourself: turn by 99 instead of 100, or swap a sign in `moved`, and the assertion fails.
# The next figure shows what the rotation is for.
# Take any two vectors, here two keys of the model; call one a query, and move them.

# %% mystnb={"image": {"alt": "The score of a query and a key stays constant when both are moved together, and swings when only the key is moved."}}
query = first[:, :1, -1:].float()
key = first[:, :1, 3:4].float()
steps = list(range(65))
keys_moved = [moved(key, n, theta) for n in steps]
together = [moved(query, n, theta) * k for n, k in zip(steps, keys_moved)]
alone = [query * k for k in keys_moved]
scores = {"both moved": together, "only the key": alone}
scores = {way: [s.sum().item() for s in list_] for way, list_ in scores.items()}
plots.lines(steps, scores, "positions moved", "query · key", height=2.6)
swing = {way: max(values) - min(values) for way, values in scores.items()}
assert swing["both moved"] < 0.01 * swing["only the key"]

# %% [markdown]
# ## The number of entries is not the position
#
# When entries are dropped, the kept keys stay where they are.
# The next token still belongs at the *old* end of the text, not at the number of entries left; but `transformers` counts entries unless it is given positions.
# Let us drop the four sentences about the lamp and Bruno, and ask on about Anna and Rosa.

# %%
read = encode([read_passage])
passage_prefix = prefill(model, read)
whole = passage_prefix.cache
end = passage_prefix.next_position

period = tokenizer(".", add_special_tokens=False).input_ids[0]
ends = (read[0] == period).long()
sentence = ends.cumsum(0) - ends  # the number of each token's sentence
dropped = torch.tensor([1, 2, 4, 6], device=model.device)
kept = (~torch.isin(sentence, dropped)).nonzero()[:, 0]
small = select(whole, kept)
print(f"{length(whole)} entries, {length(small)} kept; next position {end}")

# %%
def asked(cache, question, position):
    user = {"role": "user", "content": question}
    tail = encode([user], add_generation_prompt=True)
    return prefill(model, tail, Prefix(cache, position))


def kl(p, q):
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).item()


# %% [markdown]
# What should come out?
# The same as if the dropped entries were still there, but *hidden* by an attention mask.
# That is the exact reference:

# %%
def hidden(question):
    """Logits from the whole cache with a mask over the dropped entries."""
    user = {"role": "user", "content": question}
    tail = encode([user], add_generation_prompt=True)
    mask = torch.zeros(1, end, dtype=torch.long, device=model.device)
    mask[0, kept] = 1
    return prefill(model, tail, Prefix(whole, end, attention_mask=mask)).logits


rows = {}
for question in (questions[0], questions[3]):
    truth = hidden(question)
    right = asked(small, question, end).logits
    wrong = asked(small, question, length(small)).logits
    rows[question] = {
        "position kept": (truth - right).abs().max().item(),
        "entries counted": (truth - wrong).abs().max().item(),
    }
errors = pd.DataFrame(rows).T
assert (errors["position kept"] < 0.05 * errors["entries counted"]).all()
errors.rename_axis("largest error of a logit").map("{:.1e}".format)

# %% [markdown]
# Dropping does exactly what hiding does, if the position is kept.
# That is why `prefill` and `load` return a `Prefix`: the cache with its next position.
# `select` does not change it, and `shift` moves it with the entries.

# %% [markdown]
# ## Read once, ask often
#
# A cache is a value: `prefill(model, ids, prefix)` leaves `prefix` as it is.
# So a text can be read once, and any number of questions asked of it.
# Take a longer passage, one that no model of the lab has seen, and a dozen questions:

# %%
import random

from kvlab.lab import worlds

rng = random.Random(scale.seed)
long = worlds.make_passage(rng, 40, test=True)
asks = {}
while len(asks) < 12:  # different questions
    asks.update([worlds.ask_free(rng, long)])
document = encode([{"role": "system", "content": long.text}])
tails = []
for question in asks:
    user = {"role": "user", "content": question}
    tails.append(encode([user], add_generation_prompt=True))
print(long.text[:160], "...")

# %%
started = time.perf_counter()
whole_texts = [torch.cat([document, tail], 1) for tail in tails]
again = [prefill(model, ids).logits.cpu() for ids in whole_texts]
seconds_again = time.perf_counter() - started

started = time.perf_counter()
read_once = prefill(model, document)
reused = [prefill(model, t, read_once) for t in tails]
first_tokens = [state.logits.cpu() for state in reused]
seconds_reused = time.perf_counter() - started

# %% [markdown]
# The logits are the same as when everything is read again each time, up to rounding, and the time is not:

# %%
assert length(read_once.cache) == document.shape[1], (
    "the cache we read from has grown"
)
again, first_tokens = torch.cat(again), torch.cat(first_tokens)
assert close(again, first_tokens)
difference = (again - first_tokens).abs().max().item()
print(f"largest difference between logits: {difference:.1e}")
print(f"{document.shape[1]} tokens read once instead of {len(tails)} times:",
      f"{seconds_again / seconds_reused:.1f} times faster")  # fmt: skip
said = [words(continue_from(each, 8)) for each in reused]
right = [text == answer for text, answer in zip(said, asks.values())]
print("answers right:", sum(right), "of", len(right))

# %% [markdown]
# Less than twelve times faster, because each question still pays the fixed cost of its own tokens.

# %% [markdown]
# ## Keep it
#
# A saved cache is one safetensors file: tensors, the next position, a checksum, and a fingerprint of the model that made it.
# A cache is right only for the model that made it; after a step of training it is already a little wrong.
# `load` compares sizes, rotation and a sample of every weight tensor, and refuses a cache of another model.

# %%
from kvlab import cache as kv

file = Path(tempfile.mkdtemp()) / "passage.safetensors"
kv.save(passage_prefix, file, model, metadata={"text": passage})
saved = kv.load(file, model)
print(f"{file.stat().st_size / 1000:.0f} kB; go on at {saved.next_position}")

state = asked(saved.cache, "Who owns the lamp?", saved.next_position)
print(words(continue_from(state, 8)))

# %% [markdown]
# And if something is wrong with the file, or with the model?

# %%
import textwrap


def attempt(path, model):
    try:
        kv.load(path, model)
    except kv.CacheError as error:
        text = str(error).replace(f"{path.parent}/", "")
        print(textwrap.fill(text, 78), end="\n\n")


data = bytearray(file.read_bytes())
short, flipped = file.with_stem("short"), file.with_stem("flipped")
short.write_bytes(data[: len(data) // 2])
data[-1000] ^= 1  # one bit
flipped.write_bytes(data)
attempt(short, model)
attempt(flipped, model)
attempt(file, scale.load("draft"))

# %% [markdown]
# ## Exercises
#
# ```{exercise-start} A budget
# :label: ex-budget
# ```
# *Easy, 5 minutes.*
# How many tokens of cache fit into 1 GB ($10^9$ bytes) at half precision, for Qwen3-14B and for Qwen2-7B-Instruct?
# Which entry of their configurations (in `configs`) makes most of the difference?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-budget
# :class: dropdown
# ````

# %%
for name in ("Qwen3-14B", "Qwen2-7B-Instruct"):
    c = configs[name]
    fit = 1e9 // bytes_per_token(c, torch.float16)
    layers, heads = c.num_hidden_layers, c.num_key_value_heads
    print(f"{name}: {fit:.0f} tokens; {layers} layers, {heads} KV heads")
large, small = (configs[name] for name in ("Qwen3-14B", "Qwen2-7B-Instruct"))
assert round(large.num_hidden_layers / small.num_hidden_layers, 1) == 1.4
assert large.num_key_value_heads == 2 * small.num_key_value_heads

# %% [markdown]
# Layers differ by a factor of 1.4, KV heads by a factor of 2.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Beyond the first layer
# :label: ex-deeper
# ```
# *Medium, 10 minutes.*
# We compared moved keys with prefilled ones in the first layer.
# Compare them in all layers, for the whole prompt moved by 100, and then for the question alone, prefilled without the passage.
# Where does moving stop being exact, and why?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-deeper
# :class: dropdown
# ````

# %%
def error_by_layer(one, other):
    pairs = zip(one.layers, other.layers, strict=True)
    return [((a.keys - b.keys).norm() / b.keys.norm()).item() for a, b in pairs]


rotary = rotary_of(model)
user = {"role": "user", "content": questions[0]}
tail = encode([user], add_generation_prompt=True)
alone_then_moved = shift(prefill(model, tail).cache, end, rotary)
in_place = asked(whole, questions[0], end).cache
in_place = select(in_place, torch.arange(end, length(in_place)))
errors = {
    "whole prompt moved": error_by_layer(shift(cache, 100, rotary), there),
    "question made alone": error_by_layer(alone_then_moved, in_place),
}
if scale.name == "tiny":
    together, alone = errors.values()
    assert max(together) < 0.05
    assert alone[0] < 0.05 < 0.1 < min(alone[1:])
pd.DataFrame(errors).rename_axis("layer").round(5)

# %% [markdown]
# Moving the whole text changes no distance between tokens, so up to rounding it is exact in every layer.
# A question prefilled alone has not seen the passage: its keys are right in the first layer and far off above it, as the second column says.
# {term}`Splicing <splice>` caches is that approximation, and chapter 01 measures it.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Do without the sink
# :label: ex-sink
# ```
# *Medium, 10 minutes.*
# Large models send much attention to the first token, whatever it says: an {term}`attention sink`
# {cite}`xiao2023streamingllm`. Does the lab model? Drop the first entry of `whole` and keep all others. How far does the distribution of the
# answer move (use `kl`), compared with dropping any other single entry?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-sink
# :class: dropdown
# ````

# %%
full = asked(whole, questions[0], end).logits
everything, moves = torch.arange(length(whole)), []
for i in everything:
    without = select(whole, everything[everything != i])
    moves.append(kl(full, asked(without, questions[0], end).logits))
order = list(np.argsort(moves)[::-1])
rank = f"rank {1 + order.index(0)} of {len(moves)}"
print(f"without the first entry: {moves[0]:.1e} nats ({rank})")
for i in order[:4]:
    print(f"without {tokenizer.decode(read[0, i])!r}: {moves[i]:.1e} nats")
if scale.name == "tiny":
    assert order.index(0) >= 4

# %% [markdown]
# These are the entries that matter most for this question.
# The first is not among them: this model has learned no sink.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - Prefill makes a cache, decoding spends it: a new token no longer pays for reading the text again, only for looking at it.
# - Size is $2 L H_{kv} D b$ per token. Query heads do not count.
# - Keys carry their position by rotation. Moving is exact for the keys; what a token has *seen* cannot be moved.
# - The number of entries is not the next position: pass it on.
# - A cache belongs to one model. `load` checks that; everything else checks only shapes.
#
# The cell below runs alone.

# %%
import tempfile

from kvlab import Scale
from kvlab.cache import load, prefill, save

scale = Scale.current()
model, tokenizer = scale.load("target"), scale.load_tokenizer("target")
begin = tokenizer("Anna lives in Oslo.", return_tensors="pt").input_ids
more = tokenizer(" Anna has a parrot.", return_tensors="pt").input_ids

read = prefill(model, begin.to(model.device))
with tempfile.TemporaryDirectory() as folder:
    save(read, f"{folder}/mine", model)
    mine = load(f"{folder}/mine", model)
went_on = prefill(model, more.to(model.device), mine)
print(went_on.next_position, tuple(went_on.logits.shape))

# %% [markdown]
# **Further reading**: rotary embeddings {cite}`su2021roformer`; grouped-query attention {cite}`ainslie2023gqa`; attention sinks
# {cite}`xiao2023streamingllm`. Next: a store of prefilled knowledge.
