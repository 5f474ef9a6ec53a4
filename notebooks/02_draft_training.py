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
# - cut a {term}`draft` out of a large model, and see why a third of its layers do not make a third of its sense;
# - train it on what the large model says, and choose a loss by what it does to {term}`acceptance`;
# - give it a {term}`knowledge cache` to read, so that it can guess answers it was never trained on;
# - tell what it knows by heart from what it reads, with controls that must fail;
# - put it into the loop of chapter 05, and give it away as a model that other programs load.
#
# **Time and memory**: about a minute and 1 GB, most of it PyTorch itself, at `tiny`; what the models take at any scale is printed by the second cell.
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
import copy
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
from kvlab.evaluate import bootstrap
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

# %% [markdown]
# ## The question
#
# Speculative decoding (chapter 05) needs a small model that guesses what a large one will say. Where does it come from? If the family has a small model, one can try that: chapter 05 did, and on
# the FAQ it lost, for the small model had never heard of it. The other way is to make a draft out of the large model itself: copy a few of its layers, and train them to say what the whole says.
#
# A small model cannot hold everything, though. The large one has read a help desk's answers; tomorrow there will be new ones. So this chapter asks a second question: if somebody keeps what the
# large model has read, in a knowledge cache, can the draft *read* there what it does not *know*? The text would still be the large model's, to the last token: knowledge goes to the draft alone, and a wrong
# guess costs only time.
#
# ## Cut
#
# A cut is a choice of layers. The first $N$, or $N$ of them spread evenly, the first and the last included:
#
# $$\ell_i = \operatorname{round}\!\left(i\,\frac{L-1}{N-1}\right),\qquad i = 0,\dots,N-1 .$$

# %% mystnb={"image": {"alt": "A row of 28 boxes, the layers of a target, and below it the layers that two cuts take: the first three, and six spread evenly, 0, 5, 11, 16, 22 and 27."}}
cuts = {"first:3": sample_layers("first:3", 28)}
cuts["uniform:6"] = np.linspace(0, 27, 6).round().astype(int).tolist()
assert cuts["uniform:6"] == sample_layers("uniform:6", 28)
plots.cut_layers(28, cuts);

# %% [markdown]
# `KnowledgeDraft.cut` copies layers, embedding, last norm and head. The result, `.plain`, is an ordinary causal LM, so the same cut can be written out as a loop over the target's own layers:

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
    assert torch.allclose(by_hand, cut(ids).logits, atol=1e-3)

# %% [markdown]
# And what does it say? Not much. Each layer was trained to get what the layer before it gives, and here it gets something else.

# %%
def say(model, question, tokens=40):
    prompt = encode(tokenizer, [{"role": "user", "content": question}])
    made = speculate.generate(model, [prompt], max_new_tokens=tokens)
    text = tokenizer.decode(made.tokens[0], skip_special_tokens=True)
    return textwrap.fill(text.strip(), 76)


def weights_hash(model):
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(as_bytes(p.detach()))
    return digest.hexdigest()


untouched = weights_hash(target)  # training a draft must not change the target
for name, model in {"target": target, "cut": cut}.items():
    print(f"{name}, {model.num_parameters() / 1e6:.2f} M parameters:")
    print(say(model, question), "\n")

# %% [markdown]
# ### How many parameters is that?
#
# On the shape of Qwen3-0.6B, without loading anything (`meta` tensors have a shape and no numbers). A draft of few layers is mostly embedding:

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
table.round(1)

# %% [markdown]
# A public description of such a draft ("six sampled layers, cross-attention, transition layers") gives 686 M parameters, more than the whole target has. Storing the tied output head a second time explains 155.6 M of the difference; the
# rest may be wider cross-attention, fusion and transition layers than these, whose sizes were not given.
#
# ## Train on what the target says
#
# What should a draft learn? Not what is true, but what the target will say next. So the target answers questions, and its own tokens are the training text. It answers once: `listen` keeps the tokens, and with them the last hidden states, from which the
# head gives back the target's whole distribution whenever it is needed.
#
# To see later what is known by heart and what is read, the FAQ is divided. The draft is trained on the questions of 25 items; 8 serve to choose among its weights; the answers of the other 16 are **new** to it, and are kept out of everything it learns.

# %%
records = list(lab.faq())
np.random.default_rng(0).shuffle(records)
seen, checked, new = records[:25], records[25:33], records[33:]
wordings = corpora.wordings()


def listen(questions, tokens=64):
    asked = [[{"role": "user", "content": q}] for q in questions]
    prompts = [encode(tokenizer, conversation) for conversation in asked]
    return draft.listen(target, tokenizer, prompts, folder, tokens)


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
said = {name: listen(group) for name, group in questions.items()}

# %% [markdown]
# The target is not perfect: asked about a seen item in unusual words it may give a new item's answer. Those examples are dropped, else the answers would not be new. Word problems join in, as the other thing that the target is asked all day.

# %%
def ending(ids):
    return tuple(ids[-8:])


secret = set()
for r in (*checked, *new):
    turns = [{"role": "user", "content": r["question"]}]
    turns += [{"role": "assistant", "content": r["answer"]}]
    secret.add(ending(encode(tokenizer, turns)))
kept = [ending(e.input_ids.tolist()) not in secret for e in said["train"]]
texts = [e for e, keep in zip(said["train"], kept) if keep]
asked = [q for q, keep in zip(questions["train"], kept) if keep]
stories = [p for n in (1, 2) for p in problems(n, "long", 40, seed=7)]
stories = [story[0]["content"] for story in stories]
others = listen(stories, 160)
print(len(texts), "answers to questions,", len(others), "to word problems;")
print(len(kept) - len(texts), "answers dropped")

# %% [markdown]
# How good is a guess? A draft with the distribution $q$ and a target with $p$ agree on a token that is drawn with probability
#
# $$\alpha = \sum_x \min(p(x), q(x)),$$
#
# and on one that is chosen greedily if both have the same likeliest token. Along a text of the target's, that is one call of each model: every position is guessed at once, given the target's own tokens before it. The first token
# of an answer does not count, as the target gives it when it has read the prompt.

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
    return "{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(values))


scores = draft.acceptance(cut, target, said["seen"])
by_hand = [acceptance_of(cut, example) for example in said["seen"]]
if target.dtype == torch.float32:  # half precision rounds differently
    assert np.allclose(np.array(by_hand).T, scores, atol=1e-3)
print("the cut draft, greedy:", shown(scores.greedy))
print("              sampled:", shown(scores.sampled))

# %% [markdown]
# Now train it. `draft.train` is `fit` with a loss, a check on held-out questions, and the best weights kept; with a `folder` it leaves checkpoints from which a run that was stopped goes on. Here the loss is $\mathrm{KL}(p\|q)$ plus cross-entropy with the target's token; we come back to that.

# %%
def fit(model, examples, choose, **options):
    settings = {"epochs": 2 if scale.name == "tiny" else 4, "shares": {"kl": 1.0, "ce": 1.0}}
    settings["learning_rate"] = 1.5e-3 if scale.name == "tiny" else 3e-5
    settings["batch_size"] = scale.needs["02_draft_training"].batch
    settings |= options
    return draft.train(model, target, examples, choose, **settings)


trained = KnowledgeDraft.cut(target, "uniform:3").float()  # to be trained
history = fit(trained, [*texts, *others], said["choose"])
print(say(trained, question))

# %%
for name in ("seen", "new", "outside"):
    accepted = draft.acceptance(trained, target, said[name])
    print(f"{name:8} greedy {shown(accepted.greedy)}")
assert weights_hash(target) == untouched

# %% [markdown]
# Asked in words that it was not trained on, about items that it was trained on, nearly all it guesses is right: it has learned the answers by heart, as the target has. (To many an outside question, too, the target gives an answer that the draft knows.) On new items, most guesses fail. Look at the worst:

# %%
def watch(model, example, known=None, gamma=6):
    """Decode the target's answer with a draft, and show the rounds."""
    prompt = example.input_ids[: example.start]
    drafts = ModelProposer(*known) if known else ModelProposer(model)
    options = {"gamma": gamma, "max_new_tokens": 64}
    return speculate.generate(target, [prompt], drafts, **options).rounds


scores = draft.acceptance(trained, target, said["new"]).greedy
worst = int(scores.argmin())
rounds = watch(trained, said["new"][worst])
print(questions["new"][worst])
plots.token_view(rounds, tokenizer)

# %% [markdown]
# ## Which loss?
#
# When $q = p$ all of these are as small as they get (0, but for `ce`), and a small draft never gets there. What they do on the way differs. With $\alpha$ as above, and $\mathrm{TV} = 1 - \alpha$:
#
# | name | value for a token | what its gradient asks for |
# |---|---|---|
# | `kl` | $\sum p \log (p/q)$ | cover all that the target might say |
# | `reverse_kl` | $\sum q \log (q/p)$ | keep to what the target would say |
# | `ce` | $-\log q(x)$ | say what the target said |
# | `tv` | $1 - \alpha$ | be accepted |
# | `log_alpha` | $-\log \alpha$ | be accepted, all the more where one is not |
# | `lk_hybrid` | $\lambda\,\mathrm{KL} + (1-\lambda)\,\mathrm{TV}$, $\lambda = e^{-3\alpha}$ | KL first, acceptance later |
#
# The last two are from {cite}`samarin2026lk`; `tv` and both divergences were compared by {cite}`zhou2024distillspec`. Written out, and checked:

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
# Acceptance is what we want, so why not train on `tv` and nothing else? Take a target that is sure of one token among 1,000, and a draft that has not heard of it. How strongly does each loss pull?

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
plots.loss_gradients(levels, pulls);

# %% [markdown]
# Where acceptance is small, total variation hardly pulls at all: from a cold start it has no idea where to go. $-\log\alpha$ has the same direction divided by $\alpha$, and so does not fade. (Where the target is sure of one token, it is the same as KL: their lines cover each other.) What that comes to
# after training takes many runs, so a benchmark has made them (`tests/benchmarks/draft.py`): one cut, each loss alone, the same texts and steps, several seeds.

# %%
results = kvlab.results("draft")
print(textwrap.fill(results["greedy_kl"].conditions, 78))

# %% mystnb={"image": {"alt": "Two panels, greedy and sampled acceptance, with a dot and an interval for each of six losses."}}
kinds = ("kl", "reverse_kl", "ce", "tv", "log_alpha", "lk_hybrid")
panels = {
    way: results.intervals({f"{way}_{kind}": kind for kind in kinds})
    for way in ("greedy", "sampled")
}
plots.splice_panels(panels);

# %% [markdown]
# After so few steps, total variation and reverse KL are behind: both pull at what the draft says already. KL, cross-entropy (on a greedy target's text it asks for nearly the same), $-\log\alpha$ and the hybrid are close to one another. None is a clear best here; a draft that is
# trained for long on sampled text may tell them apart.

# %% [markdown]
# ## Let it read
#
# The target *has* read the new items: they are in the store of chapter 01. A draft can look there while it drafts. After each of its layers stands a {term}`cross-attention`, from its hidden states $h$ to an item's keys and values, behind a gate:
#
# $$h \leftarrow h + g\, W_O\, \operatorname{softmax}\!\Big(\tfrac{(W_Q\,\mathrm{norm}(h))\,K^\top}{\sqrt{d}}\Big) V .$$
#
# $g$ starts at 0. So a draft that has not been trained is the plain truncated model, bit for bit, whatever it is given to read. (In the code $g$ is 16 times a number that is trained, for the optimizer moves a number by little at each step.) Where $K$ and $V$ come from makes the difference between three ways:
#
# - **vector**: they are projected from the target's last hidden states, one vector a token;
# - **kv**: they are the target's own, of the layer that this layer of the draft was cut from, taken out of their rotation;
# - **prefix**: nothing is added to the model; the same keys and values stand in the draft's own cache, before its text.
#
# The first two go through the gate, and before their entries stands one of zeros, at which a head can look when there is nothing for it. Only the answer's entries are read. And each is put where it would stand if the draft's answer were the stored one: entry $j$ of the item's answer at position $j$ of the draft's. The draft can then find what comes next by looking one position ahead.

# %%
everything = {"keep": ("kv", "hidden"), "dtype": torch.float16}
parts = target, tokenizer, embedder
store = KnowledgeCache.build(folder / "faq", records, *parts, **everything)
reader = KnowledgeDraft.cut(target, "uniform:3", knowledge="kv").float()

item = store.retrieve(questions["new"][0], threshold=0.3)[0].item
print("asked:", questions["new"][0])
print("found:", item.question)
known = draft.gather([reader.read(store, item)], [len(prompt)])
known = known._replace(states=known.states.float())
print("keys and values of the answer:", tuple(known.states.shape))
with torch.no_grad():
    ids = torch.tensor([prompt], device=target.device)
    read = reader(ids, knowledge=known).logits
    assert torch.equal(read, reader.plain(ids).logits)

# %% [markdown]
# The attention itself, written out for one layer and checked (with the gate opened a little, or there would be nothing to see):

# %%
from kvlab.draft import REACH
from transformers.models.llama.modeling_llama import rotate_half


def turned(x, positions):
    cos, sin = reader.plain.base_model.rotary_emb(x, positions[None])
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


part, device = reader.readers[0], target.device
hidden = torch.randn(1, 5, target.config.hidden_size, device=device)
keys, values = known.states[:, 0, 0], known.states[:, 0, 1]  # (1, H_kv, S, D)
query = part.query(part.norm(hidden)).unflatten(-1, (-1, part.head_dim))
query = part.query_norm(query).transpose(1, 2)
query = turned(query, torch.arange(5, device=device) - 2)
keys = turned(keys, torch.arange(keys.shape[2], device=device))

# %%
groups = query.shape[1] // keys.shape[1]  # query heads that share a KV head
keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
scores = query @ keys.mT / part.head_dim**0.5
nothing = torch.zeros_like(scores[..., :1])  # a head may look at nothing
shares = torch.cat((nothing, scores), -1).softmax(-1)[..., 1:]
read = part.output((shares @ values).transpose(1, 2).flatten(2))

part.gate.data.fill_(0.5 / REACH)
place = reader._turn(torch.arange(5, device=device)[None] - 2)
entries = reader._entries(known)
theirs = part(hidden, *entries.layers[0], entries.mask, place)
part.gate.data.zero_()
assert torch.allclose(0.5 * read, theirs, atol=1e-4)

# %% [markdown]
# ### Reading has to be learned
#
# One might train on the 25 items, each with its own knowledge, and be disappointed: in our trials the draft learned these answers by heart, faster than it learned to read, and then had no reason to. It needs answers that nobody can know. So the
# training texts get company: five hundred made-up items, whose answers are sentences that have nothing to do with the question. They look like the FAQ's otherwise: with random words under questions of their own kind, the draft learned to read those and to recite the others.
#
# It should also learn to doubt. In a share of the examples the knowledge is taken away, in another it is exchanged for that of another question (`unsettle`), so that the draft does not forget how to do without, nor believe whatever a false hit says.

# %%
made_up = corpora.made_up(400)
print(textwrap.fill(f"{made_up[0]['question']} {made_up[0]['answer']}", 76))
practice = KnowledgeCache.build(
    folder / "made up", made_up, target, tokenizer, **everything, batch_size=32
)


def found(questions):
    hits = [store.retrieve(q, threshold=0.3) for q in questions]
    return [h[0].item if h else None for h in hits]


def attach(model, examples, questions):
    return draft.attach(model, store, examples, found(questions))


drill = draft.attach(reader, practice, draft.given(practice), list(practice))
lessons = draft.unsettle(attach(reader, texts, asked), hide=0.2, mislead=0.4)
checks = attach(reader, said["choose"], questions["choose"])

# %%
history = fit(reader, [*lessons, *others, *drill], checks)
gates = [REACH * part.gate.item() for part in reader.readers]
print("gates:", np.round(gates, 2), "after layers", reader.config.layers)
assert weights_hash(target) == untouched

# %%
rows = {}
for name in ("seen", "new", "outside"):
    with_items = attach(reader, said[name], questions[name])
    arms = {
        "trained, without knowledge": (trained, said[name]),
        "reads, but is given nothing": (reader, said[name]),
        "reads what was found": (reader, with_items),
    }
    for arm, (model, examples) in arms.items():
        scored = draft.acceptance(model, target, examples).greedy
        rows.setdefault(arm, {})[name] = shown(scored)
pd.DataFrame(rows).T

# %% [markdown]
# On new items the draft that reads gets far more accepted than the one that cannot, and given nothing it falls back to where that one is, or a little below: what it gains, it gains from reading. Questions that no item answers gain nothing from it.
#
# Not every new question gains. Here is each one: what was found, what the target said, and how much of it was accepted.

# %%
new_items = found(questions["new"])
without = draft.acceptance(trained, target, said["new"]).greedy
given = draft.attach(reader, store, said["new"], new_items)
reads = draft.acceptance(reader, target, given).greedy
stored = {ending(i.input_ids): i.question for i in store}
answers = [stored.get(ending(e.input_ids.tolist()), "-") for e in said["new"]]
rows = {
    "asked": questions["new"],
    "found": [i.question if i else "-" for i in new_items],
    "the target answers": answers,
    "without": without,
    "reading": reads,
}
pd.DataFrame(rows).round(2).style.hide(axis="index").format(precision=2)

# %% mystnb={"image": {"alt": "Two scatter plots of acceptance with reading against acceptance without, one point a question: for new items many points lie far above the diagonal, for outside questions they lie around it."}}
outside = attach(reader, said["outside"], questions["outside"])
pairs = {
    "new items": (without, reads),
    "outside": (
        draft.acceptance(trained, target, said["outside"]).greedy,
        draft.acceptance(reader, target, outside).greedy,
    ),
}
plots.with_and_without(pairs, ("without knowledge", "reading"));

# %% [markdown]
# Where the target answers what the item says, reading wins. Outside, it wins where the target falls back on a stored answer that was found, and loses a little where it says something else: nothing in sum. Where the target is wrong about its own FAQ, the right item is no help: the draft guesses what the target *will* say, not what is true.
#
# ### Try to break it
#
# If it really reads, another item must be no help, and knowledge one position off must spoil it. On the questions that the target answers as the item does:

# %%
right = [a == (i and i.question) for a, i in zip(answers, new_items)]
if not any(right):  # a large model says it in its own words
    right = [i is not None for i in new_items]
right = np.array(right)
others_known = [e.known for e in given[1:] + given[:1]]
wrong = [e._replace(known=k) for e, k in zip(given, others_known)]
late = [e.known if e.known is None else e.known[..., 1:, :] for e in given]
late = [e._replace(known=k) for e, k in zip(given, late)]
controls = {"the item found": given, "nothing": said["new"]}
controls["another item"] = wrong
controls["one position off"] = late
results_of = {}
for name, examples in controls.items():
    values = draft.acceptance(reader, target, examples).greedy[right]
    results_of[name] = values.mean()
    print(f"{name:18} {shown(values)}")
if scale.name == "tiny":
    best = results_of.pop("the item found")
    assert all(best > other + 0.2 for other in results_of.values())

# %% [markdown]
# ### Three ways, several seeds
#
# The benchmark trains all three on the same texts, for longer than here, with three divisions of the FAQ into seen and new. (The settings, such as the learning rate and how often knowledge is exchanged, were tried out on the new questions of the first of them.)

# %% mystnb={"image": {"alt": "Two panels, acceptance on new items of the store and on outside questions, for the truncated draft, the trained one, and three ways of reading, with intervals."}}
arms = ("truncated", "trained", "vector", "kv", "prefix")
panels = {
    title: results.intervals({f"acceptance_{arm}{ending}": arm for arm in arms})
    for title, ending in {"new items": "", "outside questions": "_outside"}.items()
}
plots.splice_panels(panels)
print(textwrap.fill(results["acceptance_kv"].conditions, 78))

# %% [markdown]
# Keys and values help, in a cross-attention or as a prefix; the last hidden states help much less in as many steps. They were made to say what comes next, and it may take longer to learn from them which token they stand for. The prefix asks for no new parameters, but costs a
# little where nothing is to be had: what stands in the draft's own cache cannot be closed off by a gate.

# %% [markdown]
# ## In the loop
#
# `draft.knowing` looks up what a draft is to know, projects it once, and returns what a proposer needs: a draft that shares all weights with the first, and (for "prefix") a prefix for its cache. The text is the target's, as always, which is checked again here, on a few of the new questions.

# %%
def decode(example, proposer=None):
    prompt = example.input_ids[: example.start]
    options = {"gamma": 4, "max_new_tokens": 64}
    made = speculate.generate(target, [prompt], proposer, **options)
    return made.tokens[0].tolist(), [r for r in made.rounds if not r.is_prefill]


def knows(example, item):
    return ModelProposer(*reader.knowing(store, [item], [example.start]))


rounds = {"plain": [], "trained": [], "reads": []}
for example, item in zip(said["new"][:5], new_items):
    proposers = {"plain": None, "trained": ModelProposer(trained)}
    proposers["reads"] = knows(example, item)
    made = {arm: decode(example, p) for arm, p in proposers.items()}
    if target.dtype == torch.float32:  # half precision rounds differently
        assert made["plain"][0] == made["trained"][0] == made["reads"][0]
    for arm, (_, more) in made.items():
        rounds[arm] += more

totals = {arm: speculate.summarize(all_of) for arm, all_of in rounds.items()}
table = pd.DataFrame(
    {
        "acceptance": {arm: s.acceptance for arm, s in totals.items()},
        "per call": {arm: s.tokens_per_call for arm, s in totals.items()},
        "tokens/s": {arm: s.tokens_per_second for arm, s in totals.items()},
    }
)
table.round(2)

# %% [markdown]
# The draft that reads needs far fewer target calls. In the lab that is not yet speed: three layers of twelve cost more than a quarter of a target step, and reading a little more, so that plain decoding can be as fast or faster. Here is a question that gained much, round by round:

# %%
best = int(np.argmax(reads - without))
example, item = said["new"][best], new_items[best]
print(questions["new"][best])
known = reader.knowing(store, [item], [example.start])
plots.token_view(watch(reader, example, known, gamma=4), tokenizer)

# %% [markdown]
# How much speed that is depends on what a guess costs. In the lab, where fifty answers are soon learned by heart, the fastest draft has one layer and reads nothing. The benchmark measures both kinds, on held-out paraphrases, against plain decoding:

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

# %% [markdown]
# ## Give it away
#
# A draft without cross-attention is a plain model. `export` writes it as a directory that transformers and vLLM take as it is, reads it back, and compares keys and logits. `generate` can then use it as an assistant:

# %%
from transformers import AutoModelForCausalLM

plain, size = folder / "plain draft", target.config.vocab_size
draft.export(trained, plain, tokenizer, size)
again = AutoModelForCausalLM.from_pretrained(plain, dtype=target.dtype)
print(type(again).__name__, "of", again.config.num_hidden_layers, "layers")
again = again.to(target.device)
example = said["seen"][0]
ids = example.input_ids[None, : example.start].to(target.device)
options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 64}
text = target.generate(ids, assistant_model=again, **options)[0]
if target.dtype == torch.float32:
    assert text.tolist() == example.input_ids.tolist()

# %% [markdown]
# A draft that reads is saved with `save_pretrained`, and `AutoModelForCausalLM` knows it once `kvlab.draft` is imported. From the command line, all of this is `kvlab train-draft`.
#
# ## Exercises
#
# ```{exercise-start} By heart
# :label: ex-heart
# ```
# *Easy, 5 minutes.* Train the plain draft on *all* questions, the answers of the new items included (`questions["new"]` stays out: these are the paraphrases it is asked). What is its acceptance on new items now? When is reading worth its price?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-heart
# :class: dropdown
# ````

# %%
rest = listen([q for r in (*checked, *new) for q in some_ways_to_ask(r, 2)])
by_heart = copy.deepcopy(trained)  # it goes on from what it knows
fit(by_heart, [*said["train"], *rest], said["choose"], epochs=1)
scored = draft.acceptance(by_heart, target, said["new"]).greedy
print("greedy acceptance on what was new:", shown(scored))

# %% [markdown]
# Fifty answers fit into three layers. Reading is worth its price for what cannot be trained on: what came yesterday, or what is too much to be learned.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Which layer reads?
# :label: ex-gates
# ```
# *Easy, 10 minutes.* Close the gates of `reader` one at a time (set `gate.data` to 0, and put it back). Which layer does the reading?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-gates
# :class: dropdown
# ````

# %%
kept = [e for e, good in zip(given, right) if good]
scored = draft.acceptance(reader, target, kept).greedy
print(f"all open:              {shown(scored)}")
for part, layer in zip(reader.readers, reader.config.layers):
    gate = part.gate.data.clone()
    part.gate.data.zero_()
    scored = draft.acceptance(reader, target, kept).greedy
    part.gate.data.copy_(gate)
    print(f"closed after layer {layer:2}: {shown(scored)}")

# %% [markdown]
# The reader behind the first layer does nearly all of it. That layer makes its keys and values from the tokens' embeddings alone, and who copies needs no more than the tokens.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} A loss with the wrong sign
# :label: ex-sign
# ```
# *Medium, 10 minutes.* A public training script has a "greedy loss": minus the share of tokens at which both models have the same likeliest token. Compute its gradient for the cut draft. Why does the curve of the total loss look fine all the same?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-sign
# :class: dropdown
# ````

# %%
example = said["seen"][0]
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
# - A draft learns what the target says, not what is true: train it on the target's own tokens, and check it on questions that neither has seen.
# - Greedy acceptance wants the same likeliest token, sampled acceptance wants the same distribution. Total variation alone does not leave a cold start.
# - What a few answers ask for is learned by heart, faster than reading is. To learn to read, texts helped that nobody can know.
# - Behind a gate that starts at 0, knowledge cannot make an untrained draft worse; a draft from which it was taken away, or exchanged, while it learned can do without it, too. A wrong item still costs guesses.
# - Knowledge goes to the draft alone. The text stays the target's, to the last token.
#
# The cell below runs alone, after the imports.

# %%
from kvlab import Scale, draft, speculate

scale = Scale.current()
target, tokenizer = scale.load("target"), scale.load_tokenizer("target")
starts = "Anna lives", "Ben has a", "Carla likes", "The box"
prompts = [tokenizer(text)["input_ids"] for text in starts]
texts = draft.listen(target, tokenizer, prompts, max_new_tokens=16)

small = draft.KnowledgeDraft.cut(target, "first:2").float()
options = {"batch_size": 2, "epochs": 10, "learning_rate": 1e-3}
draft.train(small, target, texts[:2], heldout=texts[2:], **options)
proposer = speculate.ModelProposer(small)
made = speculate.generate(target, prompts, proposer, max_new_tokens=16)
print(f"acceptance {speculate.summarize(made.rounds).acceptance:.2f}")

# %% [markdown]
# **Further reading**: training drafts on the target's own text {cite}`zhou2024distillspec`; losses for acceptance {cite}`samarin2026lk`; self-drafting without a second model {cite}`elhoushi2024layerskip`. Next: a cache that
# shrinks and keeps what it knows.
