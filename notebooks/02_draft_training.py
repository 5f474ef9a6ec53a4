# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02. Draft training
#
# ```{admonition} In this chapter
# :class: tip
# - cut a {term}`draft` out of a large model, and see why a quarter of the layers does not keep a quarter of the ability;
# - train it on the large model's own answers, and choose a loss by its effect on {term}`acceptance`;
# - give it a {term}`knowledge cache` to read, so that it can guess answers it was never trained on;
# - separate the answers that it knows by heart from those that it reads, with controls that must fail;
# - put it into the loop of chapter 05, and give it away as a model that other programs load.
#
# **Time and memory**: one or two minutes and 1 GB, most of it PyTorch itself, at `tiny`; the second cell prints the memory of the models at any scale.
#
# **Code**: `kvlab/draft.py` and `kvlab/losses.py`; what is written out here is checked against them.
# ```

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kvlab") is None:  # on Colab
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "git+https://github.com/kvlab/kvlab"], check=True)

# %%
import hashlib
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import kvlab
from kvlab import Scale, draft, lab, losses, plots, speculate
from kvlab.draft import KnowledgeDraft, KnowledgeDraftConfig, sample_layers
from kvlab.evaluate import close, mean_interval
from kvlab.generation import encode
from kvlab.files import as_bytes
from kvlab.knowledge import KnowledgeCache
from kvlab.lab import corpora
from kvlab.lab.report import problems
from kvlab.speculate import ModelProposer

scale = Scale.current()
print(scale.describe("02_draft_training"))
target, tokenizer = scale.load("target"), scale.load_tokenizer("target")
embedder = scale.load_embedder()
folder = Path(tempfile.mkdtemp())
tiny = scale.name == "tiny"
runs = folder if tiny else Path("kvlab-runs/02")  # answers and checkpoints

# %% [markdown]
# ## The question
#
# Speculative decoding (chapter 05) needs a small model that guesses the next tokens of a large one.
# Where does it come from?
# If the family has a small model, we can try that.
# Chapter 05 did, and on the FAQ it was slower, because the small model had never read the FAQ.
# The other way is to make a draft out of the large model itself: copy a few of its layers, and train them to predict the large model's tokens.
#
# A small model cannot hold everything, though.
# The large one has read a help desk's answers, and tomorrow there will be new ones.
# So this chapter asks a second question: if a knowledge cache keeps what the large model has read, can the draft *read* there what it does not *know*?
# The text would still be the large model's, to the last token: only the draft gets the knowledge, and a wrong guess costs only time.
#
# ## Cut
#
# A cut is a choice of layers: the first $N$, or $N$ of them spread evenly, with the first and the last:
#
# $$\ell_i = \operatorname{round}\!\left(i\,\frac{L-1}{N-1}\right),\qquad i = 0,\dots,N-1 .$$

# %% mystnb={"image": {"alt": "A row of 28 boxes, the layers of a target, and below it the layers that two cuts take: the first three, and six spread evenly, 0, 5, 11, 16, 22 and 27."}}
cuts = {"first:3": sample_layers("first:3", 28)}
cuts["uniform:6"] = np.linspace(0, 27, 6).round().astype(int).tolist()
assert cuts["uniform:6"] == sample_layers("uniform:6", 28)
plots.cut_layers(28, cuts);

# %% [markdown]
# `KnowledgeDraft.cut` copies layers, embedding, last norm and head.
# The result, `.plain`, is an ordinary causal LM, so the same cut can be written out as a loop over the target's own layers:

# %%
question = "What is a hash table?"
prompt = encode(tokenizer, [{"role": "user", "content": question}])
ids = torch.tensor([prompt], device=target.device)
depth = target.config.num_hidden_layers
cut = KnowledgeDraft.cut(target, "uniform:3")

with torch.no_grad():
    body, hidden = target.base_model, target.get_input_embeddings()(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    turn = body.rotary_emb(hidden, positions)
    for layer in sample_layers("uniform:3", depth):
        hidden = body.layers[layer](hidden, position_embeddings=turn)
    by_hand = target.get_output_embeddings()(body.norm(hidden))
    assert close(by_hand, cut(ids).logits)

# %% [markdown]
# And what does it write?
# Nothing useful.
# Each layer was trained on the output of the layer before it, and here it gets another input.

# %%
def write_answer(model, question, tokens=40):
    prompt = encode(tokenizer, [{"role": "user", "content": question}])
    options = {"tokenizer": tokenizer, "max_new_tokens": tokens}
    output = speculate.generate(model, [prompt], **options)
    text = tokenizer.decode(output.tokens[0], skip_special_tokens=True)
    return textwrap.fill(text.strip(), 76)


def weights_hash(model):
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(as_bytes(p.detach()))
    return digest.hexdigest()


untouched = weights_hash(target)  # training a draft must not change the target
written = {}
for name, model in {"target": target, "cut": cut}.items():
    print(f"{name}, {model.num_parameters() / 1e6:.2f} M parameters:")
    written[name] = write_answer(model, question)
    print(written[name], "\n")
if tiny:
    words = {name: set(text.split()) for name, text in written.items()}
    assert len(words["cut"] & words["target"]) < len(words["target"]) / 2
    assert 4 * len(cut.config.layers) == depth

# %% [markdown]
# ### How many parameters is that?
#
# On the shape of Qwen3-0.6B, without loading anything (`meta` tensors have a shape and no numbers).
# A draft of few layers is mostly embedding:

# %%
from kvlab.scale import config_of, parameters

large, counts = config_of("Qwen/Qwen3-0.6B"), {"the target": {}}
counts["the target"]["M parameters"] = parameters(large) / 1e6
shapes = {
    "first 3": ("first:3", {}),
    "uniform 6": ("uniform:6", {}),
    "uniform 6, reads keys and values": ("uniform:6", {"knowledge": "kv"}),
    "... and transitions": (
        "uniform:6",
        {"knowledge": "kv", "transitions": True},
    ),
}
for name, (layers, options) in shapes.items():
    config = KnowledgeDraftConfig.of(large, layers, **options)
    counts[name] = {"M parameters": parameters(config) / 1e6}
table = pd.DataFrame(counts).T
table["of which embedding"] = large.vocab_size * large.hidden_size / 1e6
drafts = table.drop("the target")
assert (drafts["of which embedding"] > drafts["M parameters"] / 2).all()
assert table["M parameters"].max() < 686
table.round(1)

# %% [markdown]
# A public description of such a draft ("six sampled layers, cross-attention, transition layers") gives 686 M parameters, more than the whole target has.
# Storing the tied output head a second time explains 155.6 M of the difference.
# The rest may be wider cross-attention, fusion and transition layers than these; the description does not give their sizes.
#
# ## Train on the target's answers
#
# A draft should learn the target's next token, whether it is true or not.
# So the target answers questions, and its own tokens are the training text.
# It answers once: `generate_targets` keeps the tokens and the last hidden states, from which the head computes the target's whole distribution whenever we need it.
#
# To separate reading from knowing by heart, we divide the FAQ.
# The draft is trained on the questions of 25 items; 8 items serve to choose among its weights.
# The answers of the other 16 items are **new** to it: they are kept out of all its training data.

# %%
records = list(lab.faq())
np.random.default_rng(0).shuffle(records)
seen, checked, new = records[:25], records[25:33], records[33:]
wordings = corpora.wordings()


def answer(questions, tokens=64):
    prompts = []
    for question in questions:
        conversation = [{"role": "user", "content": question}]
        prompts.append(encode(tokenizer, conversation))
    return draft.generate_targets(target, tokenizer, prompts, runs, tokens)


def some_ways_to_ask(record, more):
    mine = record["question"], *record["paraphrases"][:2]
    return [*mine, *wordings[record["id"]][:more]]


questions = {
    "train": [q for r in seen for q in some_ways_to_ask(r, 5)],
    "choose": [q for r in checked for q in some_ways_to_ask(r, 2)],
    "seen": [r["paraphrases"][2] for r in seen],  # held out from all training
    "new": [r["paraphrases"][2] for r in new],
    "outside": list(corpora.outside("test"))[::2],  # no item answers these
}
targets = {name: answer(group) for name, group in questions.items()}

# %% [markdown]
# The target is not perfect: asked about a seen item in unusual words, it may give a new item's answer.
# We drop those examples, or the answers would not be new.
# We add word problems, the other kind of question that the target gets.

# %%
def ending(ids):
    return tuple(ids[-8:])


heldout_endings = set()
for r in (*checked, *new):
    turns = [{"role": "user", "content": r["question"]}]
    turns += [{"role": "assistant", "content": r["answer"]}]
    heldout_endings.add(ending(encode(tokenizer, turns)))
texts, texts_questions = [], []
for example, q in zip(targets["train"], questions["train"]):
    if ending(example.input_ids.tolist()) not in heldout_endings:
        texts.append(example)
        texts_questions.append(q)
stories = [p for n in (1, 2) for p in problems(n, "long", 40, seed=7)]
stories = [story[0]["content"] for story in stories]
others = answer(stories, 160)
print(len(texts), "answers to questions,", len(others), "to word problems;")
print(len(targets["train"]) - len(texts), "answers dropped")

# %% [markdown]
# How good is a guess?
# A draft with the distribution $q$ and a target with $p$ agree on a token that is drawn with probability
#
# $$\alpha = \sum_x \min(p(x), q(x)),$$
#
# and on one that is chosen greedily if both have the same likeliest token.
# Along one of the target's texts, this takes one call of each model: the draft guesses every position at once, given the target's own tokens before it.
# The first token of an answer does not count, because the target computes it when it reads the prompt.

# %%
def acceptance_of(model, example):
    """Greedy and sampled acceptance on one of the target's texts."""
    ids, start = example.input_ids[None].to(model.device), example.start
    with torch.no_grad():
        p, q = (m(ids)[0][0, start:-1].float() for m in (target, model))
    greedy = (p.argmax(-1) == q.argmax(-1)).float().mean()
    alpha = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean()
    return greedy.item(), alpha.item()


def shown(values):
    return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(values))


scores = draft.measure_acceptance(cut, target, targets["seen"])
by_hand = [acceptance_of(cut, example) for example in targets["seen"]]
if target.dtype == torch.float32:  # half precision rounds differently
    assert np.allclose(np.array(by_hand).T, scores, atol=1e-3)
print("the cut draft, greedy:", shown(scores.greedy))
print("              sampled:", shown(scores.sampled))

# %% [markdown]
# Now train it.
# `draft.train_draft` is `fit` with a loss and a check on held-out questions, which decides which weights are kept.
# With a `folder` it writes checkpoints, from which a stopped run goes on: if Colab disconnects, run all cells again.
# (To keep them when Colab takes the machine back, too, mount a Google Drive and set `runs` to a folder there.)
#
# Most of a cut draft is embedding and head.
# On a GPU the draft shares those of the target, frozen, and only its layers are copied, in float32; training computes in half precision.
# So most of the weights need no gradient and no moments of the optimizer.
#
# Here the loss is $\mathrm{KL}(p\|q)$ plus cross-entropy with the target's token; we come back to that.

# %%
def new_draft(**options):
    """A draft to be trained, in float32."""
    if tiny:
        return KnowledgeDraft.cut(target, "uniform:3", **options).float()
    return KnowledgeDraft.cut(target, "uniform:3", share=True, **options)


def fit(model, examples, choose, name, **options):
    settings = {"epochs": 2 if tiny else 4, "precision": scale.precision}
    settings["loss_weights"] = {"kl": 1.0, "ce": 1.0}
    settings["learning_rate"] = 1.5e-3 if tiny else 3e-5
    settings["batch_size"] = scale.needs["02_draft_training"].batch
    settings["folder"] = None if tiny else runs / name
    settings |= options
    history = draft.train_draft(model, target, examples, choose, **settings)
    draft.cast(model, target.dtype)  # to be used
    return history


trained = new_draft()
history = fit(trained, [*texts, *others], targets["choose"], "trained")
print(write_answer(trained, question))

# %%
by_group = {}
for name in ("seen", "new", "outside"):
    accepted = draft.measure_acceptance(trained, target, targets[name])
    print(f"{name:8} greedy {shown(accepted.greedy)}")
    by_group[name] = accepted.greedy.mean()
assert weights_hash(target) == untouched
if tiny:  # most guesses are right for seen items, most are wrong for new ones
    assert by_group["seen"] > 0.5 > by_group["new"]

# %% [markdown]
# For seen items in new words, most guesses are right: the draft has learned their answers.
# (It guesses along the target's text here. Where it writes alone, as above, one wrong token leads to the next, and the answer can be garbled.)
# For new items, most guesses fail.
# Look at the worst:

# %%
def watch(model, example, reading=None, gamma=6):
    """Decode the target's answer with a draft, and show the rounds."""
    prompt = example.input_ids[: example.start]
    drafts = ModelProposer(*reading) if reading else ModelProposer(model)
    options = {"gamma": gamma, "max_new_tokens": 64, "tokenizer": tokenizer}
    return speculate.generate(target, [prompt], drafts, **options).rounds


scores = draft.measure_acceptance(trained, target, targets["new"]).greedy
worst = int(scores.argmin())
rounds = watch(trained, targets["new"][worst])
print(questions["new"][worst])
plots.token_view(rounds, tokenizer)

# %% [markdown]
# ## Which loss?
#
# When $q = p$, each of these has its minimum (0, except for `ce`), which a small draft never reaches.
# They differ on the way.
# With $\alpha$ as above, and $\mathrm{TV} = 1 - \alpha$:
#
# | name | value for a token | its gradient asks the draft to |
# |---|---|---|
# | `kl` | $\sum p \log (p/q)$ | cover all tokens that the target might write |
# | `reverse_kl` | $\sum q \log (q/p)$ | keep to tokens that the target would write |
# | `ce` | $-\log q(x)$ | write the target's token |
# | `tv` | $1 - \alpha$ | be accepted |
# | `log_alpha` | $-\log \alpha$ | be accepted, most of all where it is not |
# | `lk_hybrid` | $\lambda\,\mathrm{KL} + (1-\lambda)\,\mathrm{TV}$, $\lambda = e^{-3\alpha}$ | KL first, acceptance later |
#
# The last two are from {cite}`samarin2026lk`; `tv` and both divergences were compared by {cite}`zhou2024distillspec`.
# Written out, and checked:

# %%
p, q = torch.randn(2, 5, 8, dtype=torch.float64).softmax(-1)
alpha = torch.minimum(p, q).sum(-1)
lam = torch.exp(-3 * alpha)
written_out = {
    "kl": (p * (p / q).log()).sum(-1),
    "reverse_kl": (q * (q / p).log()).sum(-1),
    "tv": 1 - alpha,
    "log_alpha": -alpha.log(),
}
both = lam * written_out["kl"] + (1 - lam) * written_out["tv"]
written_out["lk_hybrid"] = both
for name, values in written_out.items():
    assert torch.allclose(losses.DISTANCES[name](q.log(), p.log()), values)

# %% [markdown]
# We want acceptance, so why not train on `tv` and nothing else?
# Take a target that is sure of one token among 1,000, and a draft that gives this token a low probability.
# How large is the gradient of each loss?

# %% mystnb={"image": {"alt": "Size of the gradient of four losses against the draft's acceptance. Total variation's falls to nothing where acceptance is small; those of KL and minus log alpha stay near one."}}
levels = np.geomspace(1e-5, 0.9, 12)
names = ("kl", "log_alpha", "lk_hybrid", "tv")
pulls = {name: [] for name in names}
sure = torch.full((1000,), 1e-12).index_fill(0, torch.tensor([0]), 1.0).log()
for level in levels:
    logits = torch.zeros(1000)
    logits[0] = np.log(999 * level / (1 - level))  # q(0) = level
    for name in names:
        leaf = logits.clone().requires_grad_()
        log_q, log_p = leaf.log_softmax(-1), sure.log_softmax(-1)
        loss = losses.DISTANCES[name](log_q, log_p)
        pulls[name].append(torch.autograd.grad(loss, leaf)[0].norm().item())
labels = ("acceptance α of the draft", "norm of the gradient")
plots.lines(levels, pulls, *labels, xscale="log", yscale="log")
assert pulls["tv"][0] < 1e-3 * min(pulls[name][0] for name in names[:3])
assert np.allclose(np.array(pulls["tv"]) / levels, pulls["log_alpha"], rtol=1e-3)
assert np.allclose(pulls["kl"], pulls["log_alpha"], rtol=1e-3)

# %% [markdown]
# Where acceptance is small, total variation has hardly any gradient: it does not leave a cold start.
# The gradient of $-\log\alpha$ is the same divided by $\alpha$, so it does not vanish.
# (Where the target is sure of one token, $-\log\alpha$ equals KL: their lines cover each other.)
# The effect on trained drafts takes many runs to measure.
# A benchmark makes them (`tests/benchmarks/draft.py`): one cut, each loss alone, the same texts and steps, several seeds.

# %%
results = kvlab.results("draft")
print(textwrap.fill(results["greedy_kl"].conditions, 78))

# %% mystnb={"image": {"alt": "Two panels, greedy and sampled acceptance, with a dot and an interval for each of six losses."}}
kinds = ("kl", "reverse_kl", "ce", "tv", "log_alpha", "lk_hybrid")
panels = {
    way: results.intervals({f"{way}_{kind}": kind for kind in kinds})
    for way in ("greedy", "sampled")
}
plots.splice_panels(panels)
gaps = {}
for way, by_loss in panels.items():
    lower = [by_loss.pop(kind)[0] for kind in ("reverse_kl", "tv")]
    higher = [value for value, _, _ in by_loss.values()]
    gaps[way] = min(higher) - max(lower)
    print(f"{way}: reverse_kl and tv are {gaps[way]:.3f} or more below the others,")
    print(f"which are within {max(higher) - min(higher):.3f} of one another")
assert gaps["greedy"] > 0.05
assert gaps["sampled"] < gaps["greedy"] / 2

# %% [markdown]
# After these few steps, total variation and reverse KL have a lower greedy acceptance: both weigh the tokens that the draft already prefers.
# KL, cross-entropy (nearly the same on a greedy target's text), $-\log\alpha$ and the hybrid are close to one another.
# In sampled acceptance all six are closer together.
# None of the four is clearly the best here; longer training on sampled text may separate them.

# %% [markdown]
# ## Let it read
#
# The target *has* read the new items: they are in the store of chapter 01.
# A draft can look there while it drafts.
# After each of its layers, we add a {term}`cross-attention` from its hidden states $h$ to an item's keys and values, multiplied by a gate:
#
# $$h \leftarrow h + g\, W_O\, \operatorname{softmax}\!\Big(\tfrac{(W_Q\,\mathrm{norm}(h))\,K^\top}{\sqrt{d}}\Big) V .$$
#
# $g$ starts at 0.
# So an untrained draft is the plain truncated model, bit for bit, whatever it gets to read.
# (In the code $g$ is 16 times a trained parameter, because the optimizer moves a parameter by little at each step.)
# The three ways to read differ in the source of $K$ and $V$:
#
# - **vector**: projections of the target's last hidden states, one vector per token;
# - **kv**: the target's own keys and values, un-rotated, of the layer that this layer of the draft was cut from;
# - **prefix**: the same keys and values, as the first entries of the draft's own cache; the model gets no new parameters.
#
# The first two have the gate, and an extra entry of zeros, so that a head can attend to nothing.
# The draft reads only the answer's entries.
# Each entry gets the position that it would have if the draft's answer were the stored one: entry $j$ of the item's answer is at position $j$ of the draft's answer.
# So the draft can find the next token by looking one position ahead.

# %%
everything = {"keep": ("kv", "hidden"), "dtype": torch.float16}
parts = target, tokenizer, embedder
store = KnowledgeCache.build(folder / "faq", records, *parts, **everything)
reader = KnowledgeDraft.cut(target, "uniform:3", knowledge="kv").float()

item = store.retrieve(questions["new"][0], threshold=0.3)[0].item
print("asked:", questions["new"][0])
print("found:", item.question)
states = reader.read(store, item).float()
knowledge = draft.gather([states], [len(prompt)])
print("keys and values of the answer:", tuple(states.shape))
with torch.no_grad():
    ids = torch.tensor([prompt], device=target.device)
    read = reader(ids, knowledge=knowledge).logits
    assert torch.equal(read, reader.plain(ids).logits)

# %% [markdown]
# The attention itself, written out for one layer and checked (with the gate opened a little, or there would be nothing to see):

# %%
from kvlab.draft import GATE_SCALE
from transformers.models.llama.modeling_llama import rotate_half


def rotate(x, positions):
    cos, sin = reader.plain.base_model.rotary_emb(x, positions[None])
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


part, device = reader.readers[0], target.device
hidden = torch.randn(1, 5, target.config.hidden_size, device=device)
keys, values = states[0, 0][None], states[0, 1][None]  # (1, H_kv, S, D)
query = part.query(part.norm(hidden)).unflatten(-1, (-1, part.head_dim))
query = part.query_norm(query).transpose(1, 2)
query = rotate(query, torch.arange(5, device=device) - 2)
keys = rotate(keys, torch.arange(keys.shape[2], device=device))

# %%
groups = query.shape[1] // keys.shape[1]  # query heads that share a KV head
keys = keys.repeat_interleave(groups, 1)
values = values.repeat_interleave(groups, 1)
scores = query @ keys.mT / part.head_dim**0.5
nothing = torch.zeros_like(scores[..., :1])  # a head can attend to nothing
weights = torch.cat((nothing, scores), -1).softmax(-1)[..., 1:]
read = part.output((weights @ values).transpose(1, 2).flatten(2))

part.gate.data.fill_(0.5 / GATE_SCALE)
entries, mask = reader._entries(knowledge)  # at positions len(prompt) + j
positions = torch.arange(5, device=device)[None] + len(prompt) - 2
rotary = reader.plain.base_model.rotary_emb(hidden, positions)
package = part(hidden, entries[0], mask, rotary)
part.gate.data.zero_()
assert close(0.5 * read, package)

# %% [markdown]
# ### Reading has to be learned
#
# We could train on the 25 items, each with its own knowledge, and be disappointed.
# In our trials, the draft learned these answers by heart faster than it learned to read, and then it had no reason to read.
# It needs answers that nobody can know.
# So we add made-up items, whose answers are sentences that have nothing to do with the question.
# In all else they look like the FAQ's: with random words and questions of another kind, the draft learned to read the made-up items and to recite the others.
#
# It should also learn to doubt.
# `corrupt_knowledge` drops the knowledge of a fraction of the examples and swaps that of another fraction.
# So the draft does not forget how to guess without knowledge, and does not trust every retrieved item.

# %%
made_up = corpora.made_up(400)
print(textwrap.fill(f"{made_up[0]['question']} {made_up[0]['answer']}", 76))
practice = KnowledgeCache.build(
    folder / "made up", made_up, target, tokenizer, **everything, batch_size=32
)


def retrieve(questions):
    hits = [store.retrieve(q, threshold=0.3) for q in questions]
    return [h[0].item if h else None for h in hits]


def attach(model, examples, questions):
    return draft.attach(model, store, examples, retrieve(questions))


drill = draft.item_examples(practice)
drill = draft.attach(reader, practice, drill, list(practice))
reader = new_draft(knowledge="kv")
lessons = attach(reader, texts, texts_questions)
lessons = draft.corrupt_knowledge(lessons, drop=0.2, swap=0.4)
checks = attach(reader, targets["choose"], questions["choose"])

# %%
history = fit(reader, [*lessons, *others, *drill], checks, "reader")
gates = [GATE_SCALE * part.gate.item() for part in reader.readers]
print("gates:", np.round(gates, 2), "after layers", reader.config.layers)
assert weights_hash(target) == untouched

# %%
rows, means = {}, {}
for name in ("seen", "new", "outside"):
    with_items = attach(reader, targets[name], questions[name])
    arms = {
        "trained, without knowledge": (trained, targets[name]),
        "reads, but gets nothing": (reader, targets[name]),
        "reads the retrieved item": (reader, with_items),
    }
    for arm, (model, examples) in arms.items():
        scored = draft.measure_acceptance(model, target, examples).greedy
        rows.setdefault(arm, {})[name] = shown(scored)
        means.setdefault(name, []).append(scored.mean())
if tiny:
    plain, nothing, reading = means["new"]
    assert reading > plain + 0.15
    assert abs(nothing - plain) < 0.1
    plain, _, reading = means["outside"]
    assert abs(reading - plain) < 0.05
pd.DataFrame(rows).T

# %% [markdown]
# On new items, the draft that reads has a far higher acceptance than the one that cannot.
# Without an item it falls back to about the other's acceptance: the gain comes from reading.
# Questions that no item answers gain nothing.
#
# Not every new question gains.
# This table has each question, the retrieved item, the target's answer, and the acceptance.

# %%
new_items = retrieve(questions["new"])
without = draft.measure_acceptance(trained, target, targets["new"]).greedy
with_items_found = draft.attach(reader, store, targets["new"], new_items)
reads = draft.measure_acceptance(reader, target, with_items_found).greedy
stored = {ending(i.input_ids): i.question for i in store}
answers = [stored.get(ending(e.input_ids.tolist()), "-") for e in targets["new"]]
found = [i.question if i else "-" for i in new_items]
rows = {
    "question": questions["new"],
    "found": found,
    "the target answers": answers,
    "without": without,
    "reading": reads,
}
if tiny:  # the target gives the answer of the item found, or another
    gives_it = np.array([a == f for a, f in zip(answers, found)])
    assert (reads - without)[gives_it].mean() > 0.3
    assert (reads - without)[~gives_it].mean() < 0
pd.DataFrame(rows).round(2).style.hide(axis="index").format(precision=2)

# %% mystnb={"image": {"alt": "Two scatter plots of acceptance with reading against acceptance without, one point a question: for new items many points lie far above the diagonal, for outside questions they lie around it."}}
outside = attach(reader, targets["outside"], questions["outside"])
pairs = {
    "new items": (without, reads),
    "outside": (
        draft.measure_acceptance(trained, target, targets["outside"]).greedy,
        draft.measure_acceptance(reader, target, outside).greedy,
    ),
}
plots.with_and_without(pairs, ("without knowledge", "reading"))
if tiny:
    items = retrieve(questions["outside"])
    endings = [stored.get(ending(e.input_ids.tolist())) for e in targets["outside"]]
    gives_it = np.array([i and a == i.question for a, i in zip(endings, items)], bool)
    gain = pairs["outside"][1] - pairs["outside"][0]
    print(f"outside, {gives_it.sum()} answers of the item: {gain[gives_it].mean():+.2f}")
    print(f"outside, {(~gives_it).sum()} others: {gain[~gives_it].mean():+.2f}")
    assert gain[gives_it].mean() > 0.1
    assert gain[~gives_it].mean() < 0

# %% [markdown]
# Where the target gives the item's answer, reading wins.
# Outside, it wins where the target falls back on the retrieved answer, and loses where the target writes something else: nothing in sum.
# Where the target is wrong about its own FAQ, the right item is no help: the draft guesses the target's next token, whether it is true or not.
#
# ### Try to break it
#
# If the draft really reads, another item must not help, and knowledge one position off must fail.
# We test this on the questions to which the target gives the item's answer:

# %%
as_stored = [a == (i and i.question) for a, i in zip(answers, new_items)]
if not any(as_stored):  # a large model says it in its own words
    as_stored = [i is not None for i in new_items]
as_stored = np.array(as_stored)
other_knowledge = [e.knowledge for e in with_items_found[1:] + with_items_found[:1]]
wrong = [e._replace(knowledge=k) for e, k in zip(with_items_found, other_knowledge)]
late = []
for e in with_items_found:
    k = e.knowledge
    late.append(e._replace(knowledge=k if k is None else k[..., 1:, :]))
controls = {"the item found": with_items_found, "nothing": targets["new"]}
controls["another item"] = wrong
controls["one position off"] = late
results_of = {}
for name, examples in controls.items():
    values = draft.measure_acceptance(reader, target, examples).greedy[as_stored]
    results_of[name] = values.mean()
    print(f"{name:18} {shown(values)}")
if scale.name == "tiny":
    best = results_of.pop("the item found")
    assert all(best > other + 0.2 for other in results_of.values())

# %% [markdown]
# ### Three ways, several seeds
#
# The benchmark trains all three on the same texts, for longer than here, with three divisions of the FAQ into seen and new.
# (We chose the settings, such as the learning rate and the fraction of swapped knowledge, on the new questions of the first division.)

# %% mystnb={"image": {"alt": "Two panels, acceptance on new items of the store and on outside questions, for the truncated draft, the trained one, and three ways of reading, with intervals."}}
arms = ("truncated", "trained", "vector", "kv", "prefix")
panels = {
    title: results.intervals({f"acceptance_{arm}{ending}": arm for arm in arms})
    for title, ending in {"new items": "", "outside questions": "_outside"}.items()
}
plots.splice_panels(panels)
print(textwrap.fill(results["acceptance_kv"].conditions, 78))
for arm in ("vector", "kv", "prefix"):
    gain, outside_gain = results[f"gain_{arm}"], results[f"gain_{arm}_outside"]
    print(f"{arm} minus trained: new {gain:+.2f}, outside {outside_gain:+.2f}")
gains = {arm: results[f"gain_{arm}"].value for arm in ("vector", "kv", "prefix")}
assert gains["vector"] < 0.5 * min(gains["kv"], gains["prefix"])
assert results["gain_prefix_outside"].high < 0

# %% [markdown]
# Keys and values help, in a cross-attention or as a prefix; the last hidden states help much less after the same number of steps.
# They predict the next token, and it may take longer to learn which token they belong to.
# The prefix needs no new parameters, but costs a little where there is nothing to read: no gate can close off the draft's own cache.

# %% [markdown]
# ## In the loop
#
# `with_knowledge` reads the items from the store, computes their keys and values once, and returns two things for a proposer: a draft that shares all weights with the first, and (for "prefix") a prefix for its cache.
# The text is the target's, as always.
# We check this again, on a few of the new questions.

# %%
def decode(example, proposer=None):
    prompt = example.input_ids[: example.start]
    options = {"gamma": 4, "max_new_tokens": 64, "tokenizer": tokenizer}
    output = speculate.generate(target, [prompt], proposer, **options)
    return output.tokens[0].tolist(), [r for r in output.rounds if not r.is_prefill]


def reading_proposer(example, item):
    return ModelProposer(*reader.with_knowledge(store, [item], [example.start]))


rounds = {"plain": [], "trained": [], "reads": []}
for example, item in zip(targets["new"][:5], new_items):
    proposers = {"plain": None, "trained": ModelProposer(trained)}
    proposers["reads"] = reading_proposer(example, item)
    decoded = {arm: decode(example, p) for arm, p in proposers.items()}
    if target.dtype == torch.float32:  # half precision rounds differently
        texts_of = [tokens for tokens, _ in decoded.values()]
        assert texts_of[0] == texts_of[1] == texts_of[2]
    for arm, (_, more) in decoded.items():
        rounds[arm] += more

totals = {arm: speculate.summarize(all_of) for arm, all_of in rounds.items()}
table = pd.DataFrame(
    {
        "acceptance": {arm: s.acceptance for arm, s in totals.items()},
        "per call": {arm: s.tokens_per_call for arm, s in totals.items()},
        "tokens/s": {arm: s.tokens_per_second for arm, s in totals.items()},
    }
)
if tiny:
    assert table["per call"]["reads"] > 1.3 * table["per call"]["trained"]
table.round(2)

# %% [markdown]
# The draft that reads needs far fewer target calls.
# In the lab this is not yet a speed-up: three layers of twelve cost more than a quarter of a target step, and reading costs a little more, so plain decoding can be as fast or faster.
# Here is a question that gained much, round by round:

# %%
best = int(np.argmax(reads - without))
example, item = targets["new"][best], new_items[best]
print(questions["new"][best])
reading = reader.with_knowledge(store, [item], [example.start])
plots.token_view(watch(reader, example, reading, gamma=4), tokenizer)

# %% [markdown]
# The speed-up depends on the cost of a guess.
# In the lab, where a draft soon learns fifty answers by heart, the fastest one has one layer and reads nothing.
# The benchmark measures both kinds, on held-out paraphrases, against plain decoding:

# %% mystnb={"image": {"alt": "Dots with intervals: how many times faster drafts are than plain decoding and than generate."}}
names = {
    "speedup": "one layer, by heart, over our plain loop",
    "speedup_over_generate": "... over generate",
    "speedup_end_to_end": "... from the question on",
    "speedup_kv_new": "new items: three layers that read",
    "speedup_kv_new_end_to_end": "... with finding and loading",
    "speedup_trained_new": "new items: three layers that do not",
}
plots.speed_ratios(results.intervals(names))
print(textwrap.fill(results["speedup"].conditions, 78))
assert results["speedup"].low > 1.5 * results["speedup_kv_new"].value

# %% [markdown]
# ## Give it away
#
# A draft without cross-attention is a plain model.
# `export` writes it as a directory that transformers and vLLM load as it is, reads it back, and compares weight names and logits.
# `generate` can then use it as an assistant:

# %%
from transformers import AutoModelForCausalLM

plain, size = folder / "plain draft", target.config.vocab_size
draft.export(trained, plain, tokenizer, size)
again = AutoModelForCausalLM.from_pretrained(plain, dtype=target.dtype)
print(type(again).__name__, "of", again.config.num_hidden_layers, "layers")
again = again.to(target.device)
example = targets["seen"][0]
ids = example.input_ids[None, : example.start].to(target.device)
options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 64}
text = target.generate(ids, assistant_model=again, **options)[0]
if target.dtype == torch.float32:
    assert text.tolist() == example.input_ids.tolist()

# %% [markdown]
# A draft that reads is saved with `save_pretrained`; `AutoModelForCausalLM` loads it once `kvlab.draft` is imported.
# From the command line, all of this is `kvlab train-draft`.
#
# ## Exercises
#
# ```{exercise-start} By heart
# :label: ex-heart
# ```
# *Easy, 5 minutes.*
# Train the plain draft on *all* questions, the answers of the new items included (`questions["new"]` stays out: with these paraphrases it is tested).
# What is its acceptance on new items now?
# When is reading worth its price?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-heart
# :class: dropdown
# ````

# %%
rest = answer([q for r in (*checked, *new) for q in some_ways_to_ask(r, 2)])
by_heart = new_draft()
by_heart.load_state_dict(trained.state_dict())  # training goes on
answers = [*targets["train"], *rest]
fit(by_heart, answers, targets["choose"], "by heart", epochs=1)
scored = draft.measure_acceptance(by_heart, target, targets["new"]).greedy
print("greedy acceptance on what was new:", shown(scored))
if tiny:
    assert scored.mean() > 0.8 > by_group["new"]

# %% [markdown]
# Fifty answers fit into three layers.
# Reading is worth its price for texts that cannot be trained on, because they are new or because there are too many.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Which layer reads?
# :label: ex-gates
# ```
# *Easy, 10 minutes.*
# Close the gates of `reader` one at a time (set `gate.data` to 0, and put it back).
# Which layer does the reading?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-gates
# :class: dropdown
# ````

# %%
examples = [e for e, same in zip(with_items_found, as_stored) if same]
scored = draft.measure_acceptance(reader, target, examples).greedy
print(f"all open:              {shown(scored)}")
closed = []
for part, layer in zip(reader.readers, reader.config.layers):
    gate = part.gate.data.clone()
    part.gate.data.zero_()
    scored = draft.measure_acceptance(reader, target, examples).greedy
    part.gate.data.copy_(gate)
    print(f"closed after layer {layer:2}: {shown(scored)}")
    closed.append(scored.mean())
if tiny:
    assert min(closed) == closed[0]

# %% [markdown]
# Closing the reader after the first layer costs the most.
# That layer computes its keys and values from the tokens' embeddings alone, and copying needs no more than the tokens.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} A loss with the wrong sign
# :label: ex-sign
# ```
# *Medium, 10 minutes.*
# A public training script has a "greedy loss": minus the fraction of tokens at which both models have the same likeliest token.
# Compute its gradient for the cut draft.
# Why does the curve of the total loss look fine all the same?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-sign
# :class: dropdown
# ````

# %%
example = targets["seen"][0]
ids, start = example.input_ids[None].to(target.device), example.start
q = cut(ids).logits[0, start:-1]
with torch.no_grad():
    p = target(ids).logits[0, start:-1]
agreement = (p.argmax(-1) == q.argmax(-1)).float().mean()
print("agreement has a gradient:", agreement.requires_grad)
smooth = losses.tv(q.log_softmax(-1), p.log_softmax(-1)).mean()
print("total variation has one:", smooth.requires_grad)

# %% [markdown]
# `argmax` is a step function: it passes no gradient on, so the term is a constant as far as the optimizer is concerned, and the other terms do all the work.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - A draft learns the target's tokens, whether they are true or not: train it on the target's own answers, and check it on questions that neither has seen.
# - Greedy acceptance needs the same likeliest token, sampled acceptance needs the same distribution. Total variation alone does not leave a cold start.
# - A draft learns a few answers by heart faster than it learns to read. Texts that nobody can know helped it to learn reading.
# - With a gate that starts at 0, knowledge cannot make an untrained draft worse. A draft whose knowledge was dropped and swapped in training can do without it, too. A wrong item still costs guesses.
# - Only the draft gets the knowledge. The text stays the target's, to the last token.
#
# The cell below runs alone, after the imports.

# %%
from kvlab import Scale, draft, speculate

scale = Scale.current()
target, tokenizer = scale.load("target"), scale.load_tokenizer("target")
starts = "Anna lives", "Ben has a", "Carla likes", "The box"
prompts = [tokenizer(text)["input_ids"] for text in starts]
texts = draft.generate_targets(target, tokenizer, prompts, max_new_tokens=16)

small = draft.KnowledgeDraft.cut(target, "first:2", share=True)
options = {"batch_size": 2, "epochs": 10, "learning_rate": 1e-3}
options["precision"] = scale.precision
draft.train_draft(small, target, texts[:2], heldout=texts[2:], **options)
draft.cast(small, target.dtype)
proposer = speculate.ModelProposer(small)
options = {"tokenizer": tokenizer, "max_new_tokens": 16}
made = speculate.generate(target, prompts, proposer, **options)
print(f"acceptance {speculate.summarize(made.rounds).acceptance:.2f}")

# %% [markdown]
# **Further reading**: training drafts on the target's own text {cite}`zhou2024distillspec`; losses for acceptance {cite}`samarin2026lk`; self-drafting without a second model {cite}`elhoushi2024layerskip`.
# Next: a cache that shrinks and keeps what it knows.
