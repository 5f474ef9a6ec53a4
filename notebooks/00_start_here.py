# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A KV cache in your hands
#
# ```{admonition} In this chapter
# :class: tip
# - say what prefill and decoding cost, and measure it;
# - open a cache, and predict its size from five numbers in a configuration;
# - move a cached text to other positions, cut it, join it, save it and go on from the file;
# - meet the small models that the whole book runs on.
#
# **Time and memory**: about a minute and 1 GB at `tiny` (any CPU), two minutes and 4 GB at `t4`.
# **Code**: `kvlab/cache.py`, shown here piece by piece; models from `kvlab/lab`.
# ```

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kvlab") is None:  # on Colab
    address = "git+https://github.com/kvlab/kvlab"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", address], check=True)

# %%
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kvlab import Scale, lab, plots
from kvlab.cache import bytes_per_token, clone, length, nbytes, prefill, rotary_of, select, shift, truncate

scale = Scale.current()
print(scale.describe("00_start_here"))

# %% [markdown]
# ## The question
#
# A language model that answers a question about a text first reads the text. It turns every token, in every layer, into
# a *key* (what this token can be found by) and a *value* (what it has to say). When the next token is computed, its
# *query* is compared with all the keys, and the values are averaged by how well they match:
#
# $$ \mathrm{attention}(q) = \sum_{t} \frac{e^{q \cdot k_t / \sqrt{D}}}{\sum_{s} e^{q \cdot k_s / \sqrt{D}}}\; v_t $$
#
# A token's key and value depend only on what stands before it. So once computed they need never be computed again: they are
# kept, and that is the **KV cache**. Reading the text is called {term}`prefill`; making new tokens, one at a time, is
# called {term}`decoding <decode>`.
#
# Most programs throw the cache away when the answer is done. This book asks what becomes possible when it is kept: when a
# cache is a *value*, which can be stored, cut, joined, shrunk, moved and given to another model. This first chapter puts
# one into your hands.

# %% [markdown]
# ## The models of this book
#
# At scale `tiny` we use models that were trained for this book: small enough for a laptop, but taught to really look up
# facts in a passage, to solve word problems step by step, and (the larger two) to recite an FAQ. Here is one at work, on
# facts that it has never seen.

# %%
model, tokenizer = scale.load("target"), scale.load_tokenizer("target")

passage = (
    "Anna lives in Oslo. The lamp is in the kitchen. Bruno works as a baker. Anna has a parrot. "
    "The lamp belongs to Bruno. Rosa plays the cello. Bruno lives in Lima. Rosa is 34 years old."
)
questions = ["Where does Anna live?", "Who owns the lamp?", "What does Bruno work as?", "How old is Rosa?"]


def encode(messages, **options):
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)


def ask(question):
    messages = [{"role": "system", "content": passage}, {"role": "user", "content": question}]
    return encode(messages, add_generation_prompt=True)


# %%
for question in questions:
    prompt = ask(question)
    output = model.generate(prompt, max_new_tokens=16, do_sample=False)
    print(f"{question:28} {tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()}")

# %% [markdown]
# Three models make up the lab. `lab-target` is deep and knows the FAQ. `lab-draft` has two layers: fast, and often wrong.
# `lab-teacher` has another width, another number of heads and a tokenizer of its own. This is what they can do on held-out
# questions, measured now, with 95 % bootstrap intervals:

# %% mystnb={"image": {"alt": "Dot plot of the fraction of held-out tasks that the target, the draft and the teacher get right, with intervals."}}
from kvlab.lab.report import report

tasks = {
    "reading": "reading, 8-16 facts",
    "reading_long": "reading, 24-40 facts",
    "choice": "multiple choice",
    "arithmetic": "word problems, 1-5 steps",
    "faq": "FAQ, word for word",
}
figures = [f for name in lab.NAMES for f in report(name, n=30, tasks=list(tasks))]
plots.lab_report(figures, tasks, ["target", "draft", "teacher"]);

# %% [markdown]
# A gap between the draft and the target is what several chapters live on: a draft that were always right would need
# no target, and a draft that were always wrong would be no use.

# %% [markdown]
# ## What prefill and decoding cost
#
# `prefill` is a forward pass that keeps the cache. It returns the cache, the logits after the last token, and the
# position at which to continue.

# %%
prompt = ask(questions[0])
cache, logits, next_position = prefill(model, prompt)
print(f"{prompt.shape[1]} tokens read; cache of {length(cache)} entries; continue at position {next_position}")
print("likeliest next token:", repr(tokenizer.decode(logits[0].argmax())))

# %% [markdown]
# Decoding is the same call on one token, after what was read:

# %%
def continue_from(cache, logits, position, steps):
    """Greedy decoding, written out: one forward pass over one token a step."""
    tokens = []
    for _ in range(steps):
        tokens.append(logits.argmax(-1, keepdim=True))
        if tokens[-1].item() == tokenizer.eos_token_id:
            break
        cache, logits, position = prefill(model, tokens[-1], past=cache, position=position)
    return torch.cat(tokens, 1)


print(tokenizer.decode(continue_from(cache, logits, next_position, 8)[0]))

# %% [markdown]
# Without a cache, each new token would have to read everything before it again. With one, a step computes the keys and
# values of a single token and *looks at* the rest. So one way the cost of a token grows with the text, and the other way it is
# almost flat. Is that what happens?

# %%
@torch.inference_mode()
def seconds(forward, repeats=5):
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        forward().logits[0, -1, 0].item()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


lengths = [64, 128, 256, 512, 1024]
text = torch.randint(10, 500, (1, max(lengths) + 1), device=model.device)
whole = prefill(model, text[:, :-1]).cache
costs = {"read all again": [], "use the cache": []}
for n in lengths:
    past = truncate(whole, n)
    costs["read all again"].append(seconds(lambda: model(text[:, : n + 1], logits_to_keep=1)))
    costs["use the cache"].append(seconds(lambda: model(text[:, n : n + 1], past_key_values=clone(past))))

# %% mystnb={"image": {"alt": "Milliseconds for the next token against tokens already read: rising steeply without a cache, nearly flat with one."}}
plots.decode_cost(costs, lengths);

# %% [markdown]
# The two meet at short texts, where a step costs what it costs to go through the layers at all, whatever is computed
# in them. That fixed cost is why {term}`speculative decoding` pays: a target that goes through its layers anyway may as well look
# at several tokens at once.

# %% [markdown]
# ## What is in it
#
# For each layer, two tensors of shape (batch, KV heads, tokens, head size):

# %%
for i in (0, len(cache.layers) - 1):
    keys, values = cache.layers[i].keys, cache.layers[i].values
    print(f"layer {i:2}: keys {tuple(keys.shape)}, values {tuple(values.shape)}, {keys.dtype}")

# %% [markdown]
# Here is the cache of the first three sentences: one head of a middle layer, a row for each token.

# %% mystnb={"image": {"alt": "Heat maps of the keys and values of one head, a row for each token; the first dimensions of the keys show waves along the tokens."}}
start = encode([{"role": "system", "content": " ".join(passage.split(". ")[:3]) + "."}])
layer = prefill(model, start).cache.layers[len(cache.layers) // 2]
tokens = [tokenizer.decode(i) for i in start[0]]
plots.cache_picture({"keys": layer.keys[0, 0], "values": layer.values[0, 0]}, tokens);

# %% [markdown]
# Not much can be read from it by eye: what a number means is between this layer and the ones that read it. One thing can be
# made visible, and it matters in every chapter. Let the text be a single word, again and again. In the first layer
# a value depends on the word alone, so all rows are equal. The keys are not: each carries its *position*.

# %% mystnb={"image": {"alt": "Heat maps for one word repeated: stored keys show waves along the positions, keys turned back and values are the same in every row."}}
from kvlab.cache import unrotate

word = tokenizer(" bread" * 24, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
stored = prefill(model, word).cache
turned_back = unrotate(stored, torch.arange(length(stored)), rotary_of(model))
pictures = {"keys, as stored": stored.layers[0].keys, "keys, turned back": turned_back.layers[0].keys}
pictures["values"] = stored.layers[0].values
plots.cache_picture({name: matrix[0, 0] for name, matrix in pictures.items()}, range(length(stored)));

# %% [markdown]
# The waves on the left are the position: fast ones in the first columns, slow ones further right, and again in the second half of the
# head. We will come to them after a question of size.

# %% [markdown]
# ## How large it is
#
# The shapes give the size. For $L$ layers, $H_{kv}$ KV heads and heads of size $D$, at $b$ bytes a number:
#
# $$ \text{bytes per token} = 2\, L\, H_{kv}\, D\, b $$ (bytes-per-token)

# %%
c = model.config
predicted = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize
measured = nbytes(cache) / length(cache)
print(f"{predicted} bytes a token by the formula, {measured:.0f} in the tensors")
assert predicted == measured == bytes_per_token(c, model.dtype)

# %% [markdown]
# Query heads do not appear in {eq}`bytes-per-token`: in {term}`grouped-query attention <GQA>` {cite}`ainslie2023gqa` several of them share one KV
# head. For models that people use, that is the difference between a cache that fits and one that does not:

# %% mystnb={"image": {"alt": "Bars of cache size for 8192 tokens of five public models, with KV heads as they are and with one KV head for each query head."}}
from kvlab.scale import config_of

names = ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen2-7B-Instruct", "Qwen/Qwen3-14B"]
configs = {name.split("/")[1]: config_of(name) for name in names}
shared = {n: 8192 * bytes_per_token(c, torch.float16) / 1e9 for n, c in configs.items()}
alone = {n: shared[n] * c.num_attention_heads / c.num_key_value_heads for n, c in configs.items()}
plots.cache_sizes(pd.DataFrame({"a KV head for every query head": alone, "as built": shared}));

# %% [markdown]
# That is for one sequence of 8192 tokens in half precision. A knowledge base of a thousand such texts is a question of disks and
# bandwidth, and a cache ten times smaller is worth a method of its own. Both have a chapter.
#
# ## Where it stands
#
# A key knows its position. {term}`RoPE` {cite}`su2021roformer` takes the coordinates of a key in pairs and turns pair $i$ of a
# token at position $m$ by the angle $m\,\theta_i$:
#
# $$
# \begin{pmatrix} k'_i \\ k'_{i+D/2} \end{pmatrix} =
# \begin{pmatrix} \cos m\theta_i & -\sin m\theta_i \\ \sin m\theta_i & \cos m\theta_i \end{pmatrix}
# \begin{pmatrix} k_i \\ k_{i+D/2} \end{pmatrix}, \qquad \theta_i = \text{base}^{-2i/D}
# $$
#
# Queries are turned the same way, so that a score $q \cdot k$ depends only on how far the two stand apart. Turning is
# linear, and angles add up. Hence a stored key can be moved by $n$ positions by turning it by $n\,\theta_i$ more, whatever position it
# was made at. In code:

# %%
def moved(keys, by, theta):
    """Keys (B, H, T, D), each pair turned by `by` more steps."""
    x, y = keys.chunk(2, -1)
    cos, sin = (by * theta).cos(), (by * theta).sin()
    return torch.cat([x * cos - y * sin, y * cos + x * sin], -1)


theta = rotary_of(model).inv_freq
first = cache.layers[0].keys
by_hand = moved(first.float(), 100, theta.float())
by_kvlab = shift(cache, 100, rotary_of(model)).layers[0].keys
print("largest difference:", (by_hand - by_kvlab.float()).abs().max().item())

# %% [markdown]
# Is it right? Prefill the same tokens *at* position 100 and compare. In the first layer the keys depend on nothing but token and
# position, so there moving must give exactly the keys that the model would have made.

# %%
there = prefill(model, prompt, position=100).cache
tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2


def agrees(keys):
    return torch.allclose(keys.float(), there.layers[0].keys.float(), atol=tolerance * first.abs().max().item())


assert agrees(by_kvlab)
assert not agrees(first), "keys left where they were must not agree"
assert not agrees(moved(first.float(), 100, 1.5 * theta.float())), "nor keys turned at another speed"
back = shift(shift(cache, 100, rotary_of(model)), -100, rotary_of(model))
print("there and back:", (back.layers[0].keys - first).abs().max().item())

# %% [markdown]
# Break it yourself: turn by 99 instead of 100, or swap a sign in `moved`, and the assertion fails. The next figure shows what the
# rotation is for. We take one query and one key of the model, and move them.

# %% mystnb={"image": {"alt": "The score of a query and a key stays constant when both are moved together, and swings when only the key is moved."}}
query = moved(first[:1, :1, -1:].float(), 0, theta.float())  # any vector will do as a query
key = first[:1, :1, 3:4].float()
steps = range(65)
together = [(moved(query, n, theta) * moved(key, n, theta)).sum().item() for n in steps]
alone = [(query * moved(key, n, theta)).sum().item() for n in steps]
plots.turned_scores(list(steps), {"both moved": together, "only the key": alone});

# %% [markdown]
# ## The number of entries is not the position
#
# When entries are dropped, the kept keys stay where they are. The next token still stands at the *old* end of the text, not at the
# number of entries left. Public code gets this wrong again and again, because `transformers` counts entries when nobody tells it
# otherwise. Let us drop the two sentences in the middle of the passage that say nothing about Anna or Rosa, and ask on.

# %%
read = encode([{"role": "system", "content": passage}])
whole, _, end = prefill(model, read)
offsets = tokenizer(tokenizer.decode(read[0]), add_special_tokens=False, return_offsets_mapping=True)
sentence = np.searchsorted([tokenizer.decode(read[0]).find(s) for s in passage.split(". ")], [o[1] for o in offsets["offset_mapping"]])
kept = torch.tensor([i for i, s in enumerate(sentence) if s not in (2, 3, 5)])
small = select(whole, kept)
print(f"{length(whole)} entries, {length(small)} kept, {nbytes(whole) / nbytes(small):.2f} times smaller; next position {end}")

# %%
def asked(cache, question, position):
    tail = encode([{"role": "user", "content": question}], add_generation_prompt=True)
    return prefill(model, tail, past=cache, position=position)


def kl(p, q):
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).item()


rows = {}
for question in (questions[0], questions[3]):
    full = asked(whole, question, end).logits
    rows[question] = {
        "dropped, position kept": kl(full, asked(small, question, end).logits),
        "dropped, position miscounted": kl(full, asked(small, question, length(small)).logits),
    }
pd.DataFrame(rows).T.rename_axis("KL to the full cache (nats)").round(4)

# %% [markdown]
# That is why `prefill`, and everything else in kvlab that returns a cache, returns the next position with it.

# %% [markdown]
# ## Read once, ask often
#
# A cache is a value: `prefill(..., past=whole)` leaves `whole` as it is. So a text can be read once, and any number
# of questions asked of it. Take a longer passage, one that no model of the lab has seen, and a dozen questions:

# %%
import random

from kvlab.lab import worlds

rng = random.Random(scale.seed)
long = worlds.make_passage(rng, 40, test=True)
asks = [worlds.ask_free(rng, long) for _ in range(12)]
document = encode([{"role": "system", "content": long.text}])
tails = [encode([{"role": "user", "content": q}], add_generation_prompt=True) for q, _ in asks]
print(long.text[:160], "...")

# %%
started = time.perf_counter()
again = [prefill(model, torch.cat([document, tail], 1)).logits for tail in tails]
seconds_again = time.perf_counter() - started

started = time.perf_counter()
read_once, _, stop = prefill(model, document)
reused = [prefill(model, tail, past=read_once, position=stop) for tail in tails]
seconds_reused = time.perf_counter() - started

# %% [markdown]
# The logits are the same as when everything is read again each time, up to rounding, and the time is not:

# %%
difference = max((a - b.logits).abs().max().item() for a, b in zip(again, reused, strict=True))
assert difference < (1e-3 if model.dtype == torch.float32 else 0.5)
print(f"largest difference between logits: {difference:.1e}")
print(f"{seconds_again / seconds_reused:.1f} times faster for {len(tails)} questions on {document.shape[1]} tokens")
said = [tokenizer.decode(continue_from(*each, 8)[0], skip_special_tokens=True) for each in reused]
print("right:", sum(answer in text for text, (_, answer) in zip(said, asks, strict=True)), "of", len(asks))

# %% [markdown]
# ## Keep it
#
# A saved cache is one safetensors file: tensors, the next position, a checksum, and a fingerprint of the model that made it.
# A cache means nothing to any other model, not even to the same model after a step of training, and so `load` refuses it.

# %%
from kvlab import cache as kv

folder = Path(tempfile.mkdtemp())
kv.save(whole, folder / "passage.safetensors", model, end, metadata={"text": passage})
saved = kv.load(folder / "passage.safetensors", model)
print(f"{(folder / 'passage.safetensors').stat().st_size / 1000:.0f} kB; continue at {saved.next_position}")

_, logits, position = past = asked(saved.cache, "Who owns the lamp?", saved.next_position)
print(tokenizer.decode(continue_from(past.cache, logits, position, 8)[0]))

# %% [markdown]
# And if something is wrong with the file, or with the model?

# %%
def attempt(path, model):
    try:
        kv.load(path, model)
    except kv.CacheError as error:
        print(f"- {str(error).replace(str(folder), '')[:300]}")


data = (folder / "passage.safetensors").read_bytes()
(folder / "short.safetensors").write_bytes(data[: len(data) // 2])
(folder / "flipped.safetensors").write_bytes(data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:])
attempt(folder / "short.safetensors", model)
attempt(folder / "flipped.safetensors", model)
attempt(folder / "passage.safetensors", scale.load("draft"))

# %% [markdown]
# ## Exercises
#
# ```{exercise-start} A budget
# :label: ex-budget
# ```
# *Easy, 5 minutes.* How many tokens of cache fit into 1 GB at half precision, for Qwen3-14B and for Qwen2-7B? Which configuration entry makes
# most of the difference?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-budget
# :class: dropdown
# ````

# %%
for name in ("Qwen3-14B", "Qwen2-7B-Instruct"):
    c = configs[name]
    tokens_in_gb = 1e9 // bytes_per_token(c, torch.float16)
    print(f"{name}: {tokens_in_gb:.0f} tokens; {c.num_hidden_layers} layers x {c.num_key_value_heads} KV heads")

# %% [markdown]
# Layers differ by a factor of 1.4, KV heads by a factor of 2.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Beyond the first layer
# :label: ex-deeper
# ```
# *Medium, 10 minutes.* We compared moved keys with prefilled ones in the first layer. Compare them in all layers, for the whole prompt moved by 100,
# and then for the question alone, prefilled without the passage. Where does moving stop being exact, and why?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-deeper
# :class: dropdown
# ````

# %%
def error_by_layer(one, other):
    return [((a.keys - b.keys).norm() / b.keys.norm()).item() for a, b in zip(one.layers, other.layers, strict=True)]


rotary = rotary_of(model)
moved_prompt = error_by_layer(shift(cache, 100, rotary), there)
tail = encode([{"role": "user", "content": questions[0]}], add_generation_prompt=True)
alone_then_moved = shift(prefill(model, tail).cache, end, rotary)
in_place = select(asked(whole, questions[0], end).cache, torch.arange(end, end + tail.shape[1]))
moved_question = error_by_layer(alone_then_moved, in_place)
pd.DataFrame({"whole prompt moved": moved_prompt, "question made alone": moved_question}).rename_axis("layer").round(5)

# %% [markdown]
# Moving the whole text changes no distance between tokens, so it is exact in every layer. A question prefilled alone has not seen the passage:
# exact in the first layer, an approximation above it. {term}`Splicing <splice>` caches is that approximation, and chapter 01 measures it.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Do without the sink
# :label: ex-sink
# ```
# *Medium, 10 minutes.* Drop the first entry of `whole` and keep all others. How far does the distribution of the answer move, compared with dropping any other
# single entry?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-sink
# :class: dropdown
# ````

# %%
full = asked(whole, questions[0], end).logits
everything = torch.arange(length(whole))
moves = [kl(full, asked(select(whole, everything[everything != i]), questions[0], end).logits) for i in range(length(whole))]
order = np.argsort(moves)[::-1]
print(f"without the first entry: {moves[0]:.4f} nats (rank {1 + list(order).index(0)} of {len(moves)})")
print("largest:", [(tokenizer.decode(read[0, i]), round(moves[i], 4)) for i in order[:4]])

# %% [markdown]
# The entries that matter most for this question are those that hold its answer. How much the first entry matters depends on the model; in
# large models it often matters most of all {cite}`xiao2023streamingllm`.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - Prefill makes a cache, decoding spends it; with it a new token costs about the same however long the text is.
# - Size is $2 L H_{kv} D b$ a token. Query heads do not count.
# - Keys carry their position by rotation. Moving is exact for the keys; what a token has *seen* cannot be moved.
# - The number of entries is not the next position: pass it on.
# - A cache belongs to one model, to the last weight. Check it.
#
# The cell below runs alone, after the imports above.

# %%
from kvlab.cache import load, prefill, save

first = prefill(model, ask("Where does Anna live?"))
save(first.cache, folder / "mine.safetensors", model, first.next_position)
mine = load(folder / "mine.safetensors", model)
assert mine.next_position == length(mine.cache) == first.next_position

# %% [markdown]
# **Further reading**: rotary embeddings {cite}`su2021roformer`; grouped-query attention {cite}`ainslie2023gqa`; attention sinks
# {cite}`xiao2023streamingllm`. Next: a store of prefilled knowledge.
