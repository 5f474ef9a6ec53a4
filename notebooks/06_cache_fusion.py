# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06. Cache fusion
#
# ```{admonition} In this chapter
# :class: tip
# - add to a small model's cache what a large one made of the same text, with a {term}`fuser`, and check each of its parts;
# - see what three details of the published fuser do: rotated keys, one token for many, a gate that is open in training and closed in use;
# - find out whether anything gets across, with a text of which the small model reads blanks;
# - give the fuser to a draft in speculative decoding, tell what the large model adds from what mere parameters add, and see when it pays.
#
# **Time and memory**: about half a minute and 1 GB, most of it PyTorch itself, at `tiny`; what the models take at any scale is printed by the second cell.
#
# **Code**: `kvlab/fuse.py`, and `FusedProposer` in `kvlab/speculate.py`; the code written out here is checked against it.
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
import torch

import kvlab
from kvlab import Scale, cache, draft, fuse, lab, layers, plots
from kvlab.evaluate import bootstrap
from kvlab.generation import encode
from kvlab.fuse import Aligned, Fuser, Lesson, Settings, Size
from kvlab.lab.corpora import Requests, blanked
from kvlab.speculate import FusedProposer, ModelProposer, generate, summarize

scale = Scale.current()
print(scale.describe("06_cache_fusion"))
sharer, receiver = scale.load("target"), scale.load("draft")
tokenizer = scale.load_tokenizer("target")
results = kvlab.results("fuse")

# %% [markdown]
# ## The question
#
# Two models read the same text. The large one makes more of it. Usually models tell each other things in words: the large one writes, the small one reads, token by token. *Cache-to-Cache* {cite}`fu2025c2c` lets the small one have it directly: the {term}`receiver <fuser>`'s keys and values are changed by a small network that sees the {term}`sharer <fuser>`'s. No word is written.
#
# In speculative decoding (chapter 05) that costs nothing to try: the target has read everything that the draft goes on from, and its cache lies there. Could the draft guess better with it?

# %% mystnb={"image": {"alt": "Two grids of cells with the same number of columns, one for each token. The sharer has more rows, which are its layers, than the receiver."}}
text = encode(tokenizer, Requests(1, seed=4)[0])
ids = torch.tensor([text], device=sharer.device)
sizes = [Size.of(model.config) for model in (receiver, sharer)]
shapes = {
    name: (size.layers, [0, len(text)], f"{size.heads} KV heads of {size.head_dim} a cell")
    for name, size in zip(("sharer", "receiver"), reversed(sizes))
}
plots.cache_shapes(shapes);

# %% [markdown]
# ## The fuser
#
# For each layer of the receiver there are two small networks, one for keys and one for values. Each sees what both models made of a token, the sharer's part from the layer that is mapped to this one, with heads side by side. With $[\,s, r\,]$ the two joined,
#
# $$h = B_1\big(W_0[s, r] + b_0\big),\qquad \hat r = r + g\;\sigma\big(W_w B_3(h) + b_w\big)\,\big(W_p B_2(h) + b_p\big),$$
#
# where each block $B$ is $x + W_2\,\mathrm{GELU}(W_1\,\mathrm{RMSNorm}(x))$, without bias. The projection $W_p$ says what to add, $\sigma$ how much of it for each head and token, and the gate $g$ whether to add anything in this layer at all. In plain lines, for one of the networks:

# %%
def linear(part, i, x):
    """One network's share of a product that computes all of them at once."""
    made = x @ part.weight[i]
    width = made.shape[-1]
    return made if part.bias is None else made + part.bias[i * width : (i + 1) * width]


def block(part, i, x):
    width = x.shape[-1]
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed * part.norm[i * width : (i + 1) * width]
    return x + linear(part.down, i, torch.nn.functional.gelu(linear(part.up, i, normed)))


def change(fuser, i, s, r):
    """What to add to r, (T, H d): network 2 l is for keys of layer l, 2 l + 1 for its values."""
    h = block(fuser.shared, i, linear(fuser.enter, i, torch.cat((s, r), -1)))
    added = linear(fuser.change, i, block(fuser.project, i, h))
    weight = linear(fuser.weight, i, block(fuser.weigh, i, h)).sigmoid()
    return (weight[..., None] * added.unflatten(-1, (weight.shape[-1], -1))).flatten(-2)


# %% [markdown]
# Keys are un-rotated before they go in, and what is added to them is rotated to the receiver's positions, so that the fuser need not know where a token stands. Values are taken as they are:

# %%
torch.manual_seed(0)
small = Settings(hidden=64, gate=1.0)
fuser = Fuser(*sizes, settings=small).to(receiver.device)  # random, with all gates open
own, theirs = (cache.prefill(model, ids) for model in (receiver, sharer))
with torch.no_grad():
    fused = fuser(own, theirs)

layer = sizes[0].layers - 1  # the last, to which the sharer's last is mapped
plain = [cache.unrotate(x.cache, x.positions, x.rotary) for x in (theirs, own)]
s, r = (x.layers[-1].values[0].transpose(0, 1).flatten(1).float() for x in plain)
with torch.no_grad():
    by_hand = r + change(fuser, 2 * layer + 1, s, r)
got = fused.layers[layer].values[0].transpose(0, 1).flatten(1).float()
if receiver.dtype == torch.float32:
    assert torch.allclose(by_hand, got, atol=1e-3)

# %% [markdown]
# An untrained fuser has its gates closed, and then it returns the receiver's own cache, bit for bit. And the size: between the models of the paper, Qwen2.5-0.5B and Qwen3-0.6B, a fuser 1,024 wide is most of another model. It is counted here without memory for it, on the *meta* device:

# %%
closed = Fuser(*sizes, settings=Settings(hidden=64)).to(receiver.device)
same = cache.to_tensor(closed(own, theirs)), cache.to_tensor(own.cache)
assert torch.equal(*same)

with torch.device("meta"):
    published = Fuser(Size(28, 8, 128), Size(24, 2, 64))
print(f"{published.num_parameters():,} parameters from Qwen2.5-0.5B to Qwen3-0.6B")
print(f"{fuser.num_parameters():,} in this one, 64 wide")

# %% [markdown]
# ## Three details
#
# ### Where keys stand
#
# The published code fuses keys as they lie in the cache, rotated by their positions. So the same text at another position is another input, and the fuser would have to learn each position anew. Move both texts by 300 tokens, fuse, and move back:

# %%
def moved_and_back(settings):
    torch.manual_seed(0)
    one = Fuser(*sizes, settings=settings).to(receiver.device)
    with torch.no_grad():
        here = one(own, theirs)
        there = one(*(cache.prefill(model, ids, position=300) for model in (receiver, sharer)))
        back = cache.shift(there, -300, own.rotary)
    return (back.layers[0].keys - here.layers[0].keys).abs().max().item()


for name in fuse.KEYS:
    off = moved_and_back(Settings(hidden=64, gate=1.0, keys=name))
    print(f"{name + ' keys:':16} the fused keys of layer 0 differ by up to {off:.4f}")

# %% [markdown]
# ### A gate that is open in training and closed in use
#
# A gate is one number for each network, its logit $a$. In training, noise is drawn for each head and token, and $g = \sigma((a + \text{noise})/T)$ hardens to 0 or 1 as the temperature $T$ falls. In use it is open where $a > 0$. With *logistic* noise a gate of logit $a$ is open in training with probability $\sigma(a)$: more often than not exactly where it is open in use. The published code adds *Gumbel* noise, which is one half of the trick that it comes from:

# %% mystnb={"image": {"alt": "How often a gate is open in training against its logit. With logistic noise the curve passes one half at 0, where the gate opens in use; with Gumbel noise it is already at 0.63 there."}}
logits = torch.tensor([-4, -3, -2, -1, -0.5, 0, 0.01, 0.5, 1, 2, 3, 4])
u = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
curves = {
    name: [((a + noise(u)) > 0).float().mean().item() for a in logits]
    for name, noise in fuse.NOISES.items()
}
curves["in use"] = (logits > 0).float().tolist()
ax = plots.lines(logits.tolist(), curves, "logit of the gate", "open in training (share)")
at_zero = {name: curve[5] for name, curve in curves.items()}
print("at logit 0:", {name: round(share, 3) for name, share in at_zero.items()})
assert abs(at_zero["logistic"] - 0.5) < 0.02
assert abs(at_zero["gumbel"] - (1 - np.exp(-1))) < 0.02

# %% [markdown]
# A gate that starts at 0, as published, is closed for half of what is drawn with logistic noise, and for more than a third with Gumbel noise, all through a short training, for its logit moves little. So the fusers of this chapter start at logit 4, where noise closes one in fifty. What that does is measured below.
#
# ### Tokens of two vocabularies
#
# Speculative decoding has one tokenizer for both. Elsewhere the two models cut a text in different places. `align_tokens` takes for each of the receiver's tokens every token of the sharer that spells part of it, each by its share of the characters. The published code takes one of them:

# %%
others = scale.load_tokenizer("teacher")
said = [{"role": "user", "content": "How many biscuits?"}]
for keep in fuse.KEEPS:
    mine, their, shares = fuse.align_tokens(tokenizer, others, said, keep=keep)
    print(f"{keep}:")
    for i, row in zip(mine.tolist(), shares.tolist() if shares is not None else []):
        parts = [f"{others.decode(j)!r} {share:.2f}" for j, share in zip(their.tolist(), row) if share]
        print(f"  {tokenizer.decode(i)!r:12} <- {', '.join(parts) or 'nothing'}")

# %% [markdown]
# ## Does anything get across?
#
# A fuser is trained, as published, to make right responses likely: next-token cross-entropy on the response, through the receiver, both models frozen. Suppose the loss falls. Did the fuser learn to carry over what the sharer knows, or has it become a better part of the receiver? On texts that both can read, nobody can tell. So here is a text that they cannot: the receiver reads **blanks** where the passage says something, and only the sharer reads the passage.

# %%
facts = (4, 8)  # of a passage; the benchmark has 8 to 16
rows = blanked(tokenizer, 1200, facts, seed=1)
asked = blanked(tokenizer, 40, facts, seed=2, test=True)
blanks, shown, answer = asked[0]
print("receiver:", textwrap.fill(tokenizer.decode(blanks), 76))
print("sharer:  ", textwrap.fill(tokenizer.decode(shown), 76))
print("answer:  ", tokenizer.decode(answer))

# %% [markdown]
# What comes back tells the two kinds of learning apart. A control of the same size that sees nothing of the sharer (`sharer_seen=False`) can learn that an answer is a drink, but never which.
#
# There is a second way to train for this. The cross-entropy of an answer of one or two tokens says very little about the hundred entries that it came from. But we know what each of them should be: what the receiver *would have made* had it read the passage. `rehearsal_loss` compares with that, entry by entry:
#
# $$\mathcal{L} = \frac{1}{2L}\sum_{\ell}\left(\frac{\sum_t\lVert \hat k_{\ell t} - k^*_{\ell t}\rVert^2}{\sum_t\lVert k^*_{\ell t} - \bar k^*_\ell\rVert^2} + \frac{\sum_t\lVert \hat v_{\ell t} - v^*_{\ell t}\rVert^2}{\sum_t\lVert v^*_{\ell t} - \bar v^*_\ell\rVert^2}\right),$$
#
# over the tokens $t$ of a batch, keys un-rotated: 0 is an exact copy, 1 is as far off as the mean over tokens. For 150 steps here, with short passages and the sharer's first layers, from which this is learned fastest:

# %%
def lesson(blanks, shown, answer):
    return Lesson(Aligned(blanks, shown, torch.eye(len(shown))), answer)


lessons = [lesson(*row) for row in rows]
settings = Settings(hidden=128, dropout=0.0, gate=4.0)
first = layers.first_aligned(*(size.layers for size in sizes))
torch.manual_seed(0)
rehearsed = Fuser(*sizes, first, settings).to(receiver.device)
options = {"batch_size": 8, "learning_rate": 6e-3 if scale.name == "tiny" else 1e-4}
options["precision"] = "fp16" if receiver.dtype == torch.float16 else "no"  # scales the loss
more = options | {"loss": fuse.rehearsal_loss}
history = fuse.train(rehearsed, receiver, sharer, lessons, steps=150, **more)
course = [np.mean([h["unexplained"] for h in part]) for part in np.array_split(history, 6)]
print("unexplained:", *(f"{value:.2f}" for value in course))

# %%
def answers(row, fuser=None, sees=0):
    """Whether the receiver says the answer, word for word: from a fused cache, or from what it reads itself."""
    prefix = fuse.fuse_prompt(fuser, receiver, sharer, lesson(*row).prompt) if fuser else None
    ids = row[sees][-1:] if fuser else row[sees]
    said = generate(receiver, [ids], prefix=prefix, max_new_tokens=len(row[2])).tokens[0]
    return float(torch.equal(said.cpu(), row[2]))


right = {
    "reads blanks, alone": [answers(row) for row in asked],
    "rehearsed": [answers(row, rehearsed) for row in asked],
    "reads everything, alone": [answers(row, sees=1) for row in asked],
}
for name, scores in right.items():
    print("{:24} {:.2f} [{:.2f}, {:.2f}]".format(name, *bootstrap(scores)))
if scale.name == "tiny":
    assert np.mean(right["rehearsed"]) > np.mean(right["reads blanks, alone"]) + 0.2

# %% [markdown]
# It does get across: the receiver says words that it has never read. The benchmark has longer passages, 600 steps, and both ways to train, each with its control, a fuser of as many parameters that sees no sharer:

# %% mystnb={"image": {"alt": "Shares of questions answered, with intervals: from blanks nothing; trained on answers and the controls without a sharer hardly more; rehearsed many more, with the sharer's first layers as many as when the receiver reads everything."}}
readers = {
    "answers_blind": "reads blanks, alone",
    "answers_matched": "trained on answers, no sharer",
    "answers_answered": "trained on answers",
    "answers_rehearsed_matched": "rehearsed, no sharer",
    "answers_rehearsed": "rehearsed, the sharer's last layers",
    "answers_rehearsed_first": "rehearsed, its first layers",
}
mark = results["answers_sighted"].value, "reads everything, alone"
plots.intervals(results.intervals(readers), "answered word for word (fraction)", mark)
print(textwrap.fill(results["answers_rehearsed_first"].conditions, 78))

# %% [markdown]
# Trained on answers it does no better than its control: nothing gets across. Rehearsed without a sharer, nothing does either. Rehearsed with one, a good part gets across from the sharer's last layers, and from its first ones as much as the receiver would have made of the text itself.
#
# ## In speculative decoding
#
# `FusedProposer` is a draft that has its cache fused: the prompt as it starts (all but the last token, which the draft reads on top), and after each verification the tokens that were accepted, for which the target's entries are there anyway. Only the newest token and the guesses are the draft's alone. Both can be switched off. To be good at this, the fuser is trained for it: each batch fuses the prompt, is asked for a first part of the response (its length is drawn anew each time), fuses that, too, and is asked for the rest (`train(decode=True)`).
#
# The text is the target's at any rate. What fusing can change is how many guesses are accepted. The requests are such that guesses go wrong: *tell me about* somebody in a passage, where the draft has to find the facts, and to foresee which of them the target mentions next.

# %%
def listen(n, seed=0, test=False):
    """The target's own answers to requests."""
    prompts = [encode(tokenizer, r) for r in Requests(n, seed=seed, test=test)]
    return draft.listen(sharer, tokenizer, prompts, max_new_tokens=96)


shipped = lab.models.MODELS / "lab-fuser"
if scale.name == "tiny":
    fuser = Fuser.from_pretrained(shipped).float()  # trained by tests/benchmarks/fuse.py
else:
    heard = [(e.input_ids[: e.start], e.input_ids[e.start :]) for e in listen(200)]
    fuser = Fuser(*sizes, settings=Settings(gate=4.0))
    turns = [Lesson(Aligned(prompt, prompt), response) for prompt, response in heard]
    fuse.train(fuser, receiver, sharer, turns, steps=200, decode=True, **options | {"batch_size": 2})

# %%
ways = {"none": None, "prefill": (True, False), "decode": (False, True), "both": (True, True)}


def proposer(name):
    if ways[name] is None:
        return ModelProposer(receiver)
    prefill, decode = ways[name]
    return FusedProposer(receiver, sharer, fuser, prefill=prefill, decode=decode)


def decode(ids, proposer=None):
    return generate(sharer, [ids], proposer, gamma=4, max_new_tokens=96)


requests = [encode(tokenizer, r) for r in Requests(8, test=True)]
runs = {name: [] for name in ways}
for ids in requests:
    alone = decode(ids).tokens[0]
    for name in ways:
        made = decode(ids, proposer(name))
        if sharer.dtype == torch.float32:
            assert torch.equal(made.tokens[0], alone)  # the target's text, whatever is fused
        runs[name] += made.rounds
for name, rounds in runs.items():
    found = summarize(rounds)
    print(f"{name:8} accepted {found.acceptance:.3f}, {found.tokens_per_call:.2f} tokens a call")

# %% [markdown]
# ### What the sharer adds
#
# Eight requests only show that it runs. The benchmark has a hundred, and the comparisons that matter:
#
# - **self**: the draft in place of the target as sharer. More parameters, no news.
# - **matched**: exactly as many parameters, and zeros in place of what the sharer made.
# - **trained draft**: no fuser at all. The draft itself is trained on the same answers of the target, for as many steps. That is what one would do without this chapter (chapter 02), and it costs nothing in use.
#
# The paper has the first, and its like of the third. Of its gain on MMLU-Redux for one pair (the receiver alone 35.5, fused 42.9), the receiver as its own sharer gets most, 42.2; fine-tuned without a fuser it gets little, 36.8 {cite}`fu2025c2c`.

# %% mystnb={"image": {"alt": "Shares of guesses accepted, with intervals, for the draft alone, fused in each way, the controls, the published details and the trained draft."}}
arms = {
    "acceptance_prefill": "prompt fused",
    "acceptance_decode": "accepted tokens fused",
    "acceptance_both": "both fused",
    "acceptance_self": "both, the draft as sharer",
    "acceptance_matched": "both, no sharer",
    "acceptance_rotated": "both, keys rotated",
    "acceptance_gates_from_0": "both, gates from 0",
    "acceptance_published": "prompt, as published",
    "acceptance_tuned": "trained draft, nothing fused",
    "acceptance_tuned_fused": "trained draft, both fused",
}
mark = results["acceptance_none"].value, "the draft alone"
plots.intervals(results.intervals(arms), "guesses accepted (fraction)", mark)
print(textwrap.fill(results["acceptance_both"].conditions, 78))

# %%
for one, other in (
    ("both", "none"),
    ("both", "self"),
    ("both", "matched"),
    ("tuned", "none"),
    ("tuned_fused", "tuned"),
):
    print(f"{one:11} minus {other:8} {results[f'gain_{one}_over_{other}']:+.3f}")
for arm in ("none", "both"):
    print(f"on word problems, {arm:4} fused: {results[f'acceptance_{arm}_arithmetic']:.3f}")

# %% [markdown]
# Fusing the prompt helps, fusing what was accepted does not. But the help is in the parameters: a module that sees nothing of the target has as much, but for a difference that could be chance. The draft that was trained instead has more (in the paper fine-tuning brings little), and on top of that one the fuser adds nothing that could be told from chance. Both models have read the same here, and beyond that this fuser finds little in the target's cache to guess better with.
#
# Of the published details, gates that start at 0 cost all of the gain in a training as short as this, and rotated keys nearly half of it (one fuser each; the noise was not measured alone). And a fuser is made for its texts: on word problems, which it never saw, it does harm.

# %% [markdown]
# ### Where the draft knows less
#
# In those requests the draft has read all that the target has. Suppose it has not: its cache of the passage is of an older version, or lacks what was in the blanks. The fuser that was rehearsed can fill them in from the target's cache, and then the same requests are made. Live, with its short passages:

# %%
def guesses(row, fuser=None, sees=0):
    """The share of guesses that the target accepts, which reads everything."""
    ids = row[1]
    if fuser:
        known = fuse.fuse_prompt(fuser, receiver, sharer, lesson(*row).prompt)
    else:
        known = cache.prefill(receiver, row[sees][None, :-1].to(receiver.device))
    proposer = ModelProposer(receiver, known._replace(input_ids=ids[:-1].tolist()))
    return summarize(decode(ids, proposer).rounds).acceptance


about = blanked(tokenizer, 16, facts, seed=3, test=True, kind="about")
accepted = {
    "reads blanks, alone": [guesses(row) for row in about],
    "rehearsed": [guesses(row, rehearsed) for row in about],
    "reads everything, alone": [guesses(row, sees=1) for row in about],
}
for name, shares in accepted.items():
    print("{:24} {:.2f} [{:.2f}, {:.2f}]".format(name, *bootstrap(shares)))

# %% [markdown]
# And as the benchmark has it:

# %% mystnb={"image": {"alt": "Shares of guesses accepted, with intervals, of a draft that reads blanks: alone, trained on answers and rehearsed, each with and without a sharer, the rehearsed one with the sharer's last and first layers."}}
arms = {name.replace("answers_", "guesses_"): label for name, label in readers.items()}
mark = results["guesses_sighted"].value, "reads everything, alone"
plots.intervals(results.intervals(arms), "guesses accepted (fraction)", mark)
for other in ("blind", "rehearsed_matched", "sighted"):
    gain = results[f"gain_rehearsed_first_over_{other}"]
    print(f"rehearsed, first layers, minus {other:17} {gain:+.3f}")

# %% [markdown]
# Fused from the first layers, its guesses are as good as if it had read everything itself; without a sharer, rehearsal gains nothing. So the target's cache does help, where it says what the draft's does not. (The fusers that were trained on answers of a word or two do harm here: these responses are of another kind.)
#
# ### The gates
#
# Where does the fuser write? Each layer's keys and values have a gate, and the mean of what it lets through can be set against what was there:

# %% mystnb={"image": {"alt": "Bars for keys and values of each layer: how large the change is, as a share of what it changes."}}
with torch.no_grad():
    own, theirs = (cache.prefill(model, torch.tensor([requests[0]], device=model.device)) for model in (receiver, sharer))
    before, after = (cache.to_tensor(x).float() for x in (own.cache, fuser(own, theirs)))
size = (after - before).square().mean((2, 3, 4, 5)).sqrt() / before.square().mean((2, 3, 4, 5)).sqrt()
plots.gates(fuser.gate_logits(), size.cpu());

# %% [markdown]
# ### What it costs
#
# A call of the fuser on a few tokens costs a little more than a step of the draft. Fusing the prompt is one call, on many tokens; fusing what is accepted is one call more in each round. The tokens gained for each target call have to pay for them:

# %% mystnb={"image": {"alt": "Ratios of speed with intervals: fused drafting over unfused, by what is fused, and both over plain decoding."}}
names = {
    "net_speed_prefill": "prompt fused, over none",
    "net_speed_prefill_end_to_end": "the same, with the prompt's reading",
    "net_speed_decode": "accepted tokens fused, over none",
    "net_speed": "both fused, over none",
    "speedup_none": "none fused, over plain decoding",
    "speedup_both": "both fused, over plain decoding",
}
plots.speed_ratios(results.intervals(names))
for name in ("fuser_over_draft", "fuser_over_target"):
    print(f"{results[name]:.2f}", results[name].conditions.partition(";")[0])

# %% [markdown]
# Decoding gets a little faster with the prompt fused, which is gone again when the fusion itself is counted, and slower with a fusion in every round. A fuser is better used where nobody waits: on a text that is stored, as the next chapter does.
#
# ## A check you can break
#
# The entries to be fused must be those of the same tokens. Shift the sharer's by one, as a loop does that forgets that the target has not read the newest token, and the fused cache is another; so is the text's acceptance, while the text stays the target's and shows nothing. Law and violation:

# %%
a, b = cache.part(own, 5, 25), cache.part(theirs, 5, 25)
late = cache.part(theirs, 4, 24)
with torch.no_grad():
    pieces = [cache.to_tensor(fuser(a, x)) for x in (b, late)]
    whole = cache.to_tensor(cache.select(fuser(own, theirs), torch.arange(5, 25, device=own.mask.device)))
if receiver.dtype == torch.float32:
    assert torch.allclose(pieces[0], whole, atol=1e-3)  # a part of a text can be fused alone
assert not torch.allclose(pieces[1], whole, atol=1e-3)

# %% [markdown]
# ## Exercises
#
# ```{exercise-start} Read nothing
# :label: ex-nothing
# ```
# *Easy, 5 minutes.* The rehearsed fuser makes the receiver's entries from the sharer's. What if the receiver reads nothing but blanks, the question included, all but the last token?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-nothing
# :class: dropdown
# ````

# %%
blank = tokenizer(" unknown", add_special_tokens=False).input_ids[0]
nothing = []
for _, shown, answer in asked:
    unread = torch.full_like(shown, blank)
    unread[-1] = shown[-1]
    nothing.append((unread, shown, answer))
scores = [answers(row, rehearsed) for row in nothing]
print("{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(scores)))

# %% [markdown]
# None. It was rehearsed on blanks in a few places only, and leans on what it finds in the others: the receiver's own entries of the words around them. Rehearsed on such prompts, and four times as long, it learns to do without.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Which layers?
# :label: ex-map
# ```
# *Medium, 10 minutes.* As published, the last layers of the sharer are mapped to those of the receiver (`layers.last_aligned`). Rehearse for twenty steps with each map, and compare what stays unexplained.
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-map
# :class: dropdown
# ````

# %%
for name in ("last_aligned", "proportional", "first_aligned"):
    torch.manual_seed(0)
    chosen = getattr(layers, name)(sizes[0].layers, sizes[1].layers)
    one = Fuser(*sizes, chosen, settings).to(receiver.device)
    history = fuse.train(one, receiver, sharer, lessons, steps=20, **more)
    print(f"{name:12} {chosen.indices.flatten().tolist()}", round(history[-1]["unexplained"], 3))

# %% [markdown]
# First layers say what a token is, last ones what comes next. What a shallow receiver makes of a text is nearer to the former.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - A fuser adds a change to each entry; closed, it returns the receiver's cache bit for bit. Un-rotate keys before, use logistic noise, and let the gates start open if training is short.
# - Cross-entropy on answers says little about a hundred entries. What the receiver would have made says all: where the sharer reads more than the receiver, rehearse.
# - Never show a fuser without its controls: the receiver as its own sharer, as many parameters without a sharer, and a draft trained on the same answers. Where both models read the same, the last one won.
# - Where the sharer's cache has what the receiver's lacks, a fuser carries it over, and the guesses get better.
# - In speculation the text stays the target's whatever is fused. So mistakes cost acceptance and show nowhere else: test which entries are fused.
#
# The cell below runs alone.

# %%
import torch

from kvlab import Scale, fuse, speculate
from kvlab.generation import encode
from kvlab.fuse import Aligned, Fuser, Lesson, Settings, Size

scale = Scale.current()
target, draft_model, tokenizer = scale.load("target"), scale.load("draft"), scale.load_tokenizer("target")

ids = torch.tensor(encode(tokenizer, [{"role": "user", "content": "Tell me about Anna."}]))
response = torch.tensor(tokenizer(" Anna lives in Rome.").input_ids)
sizes = [Size.of(model.config) for model in (draft_model, target)]
fuser = Fuser(*sizes, settings=Settings(hidden=64, gate=4.0))
fuse.train(fuser, draft_model, target, [Lesson(Aligned(ids, ids), response)] * 4, steps=2, batch_size=2, decode=True)
proposer = speculate.FusedProposer(draft_model, target, fuser)
made = speculate.generate(target, [ids], proposer, gamma=4, max_new_tokens=16)
print(tokenizer.decode(made.tokens[0]))

# %% [markdown]
# **Further reading**: Cache-to-Cache {cite}`fu2025c2c`; a draft that reads the target's last hidden states instead of its cache {cite}`li2024eagle`. The next chapter puts all parts of this book together.
