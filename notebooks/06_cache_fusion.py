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
# - add what a large model's cache holds of a text to a small model's, with a {term}`fuser`, and check each of its parts;
# - see the effect of three details of the published fuser: rotated keys, one token for many, a gate that is open in training and closed in use;
# - find out whether any information crosses, with a text in which the small model reads blanks;
# - give the fuser to a draft in speculative decoding, separate the large model's contribution from that of mere parameters, and see when it pays.
#
# **Time and memory**: about a minute and 1 GB, most of it PyTorch itself, at `tiny`. The second cell prints the size of the models at any scale.
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
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch

import kvlab
from kvlab import Scale, cache, draft, fuse, lab, plots
from kvlab.commands.fuse import fusion_proposers, measure_fusion
from kvlab.evaluate import close, mean_interval
from kvlab.generation import encode
from kvlab.fuse import Aligned, Fuser, FuserArm, FuserExample, Settings, Size
from kvlab.lab import worlds
from kvlab.lab.corpora import Requests, blanked
from kvlab.layers import first_aligned
from kvlab.speculate import ModelProposer, generate, summarize

scale = Scale.current()
print(scale.describe("06_cache_fusion"))
sharer, receiver = scale.load("target"), scale.load("draft")
tokenizer = scale.load_tokenizer("target")
results = kvlab.results("fuse")

# %% [markdown]
# ## The question
#
# Two models read the same text, and the large one understands more of it.
# Usually models exchange information in words: the large one writes, and the small one reads token by token.
# *Cache-to-Cache* {cite}`fu2025c2c` transfers it directly: a small network reads the {term}`sharer <fuser>`'s keys and values and changes the {term}`receiver <fuser>`'s.
# No word is written.
#
# Speculative decoding (chapter 05) has everything that this needs: the target has already read the text that the draft continues, and its cache is in memory.
# Does the draft guess better with it?

# %% mystnb={"image": {"alt": "Two grids of cells with the same number of columns, one for each token. The sharer has more rows, which are its layers, than the receiver."}}
text = encode(tokenizer, Requests(1, seed=4)[0])
ids = torch.tensor([text], device=sharer.device)
sizes = [Size.of(model.config) for model in (receiver, sharer)]
shapes = {}
for name, size in zip(("sharer", "receiver"), reversed(sizes)):
    cell = f"{size.heads} KV heads of {size.head_dim} per cell"
    shapes[name] = (size.layers, [0, len(text)], cell)
plots.cache_shapes(shapes);

# %% [markdown]
# ## The fuser
#
# Each layer of the receiver has two small networks, one for keys and one for values.
# A network reads both models' entries of a token, heads side by side; the sharer's entry is from the layer that is mapped to this one.
# With $[\,s, r\,]$ the two joined,
#
# $$h = B_1\big(W_0[s, r] + b_0\big),\qquad \hat r = r + g\;\sigma\big(W_w B_3(h) + b_w\big)\,\big(W_p B_2(h) + b_p\big),$$
#
# where each block $B$ is $x + W_2\,\mathrm{GELU}(W_1\,\mathrm{RMSNorm}(x))$, without bias.
# The projection $W_p$ proposes a change, $\sigma$ weights it per head and token, and the gate $g$ lets it pass in this layer or not.
# In plain lines, for one of the networks:

# %%
def linear(layer, i, x):
    """Network i of a product that computes all networks at once."""
    product = x @ layer.weight[i]
    return product if layer.bias is None else product + layer.bias[i]


def block(mlp, i, x):
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mlp.norm[i]
    up = torch.nn.functional.gelu(linear(mlp.up, i, normed))
    return x + linear(mlp.down, i, up)


def change(fuser, i, s, r):
    """The change of r, (T, H d). Network 2 l is for keys of layer l, 2 l + 1 for values."""
    h = linear(fuser.input_proj, i, torch.cat((s, r), -1))
    h = block(fuser.shared_mlp, i, h)
    value = linear(fuser.value_out, i, block(fuser.value_mlp, i, h))
    weight = linear(fuser.weight_out, i, block(fuser.weight_mlp, i, h)).sigmoid()
    heads = weight.shape[-1]
    return (weight[..., None] * value.unflatten(-1, (heads, -1))).flatten(-2)


# %% [markdown]
# Keys are un-rotated first, and their change is rotated to the receiver's positions, so the fuser does not depend on the position of a token.
# Values are used as they are:

# %%
torch.manual_seed(0)
small = Settings(hidden=64, gate=1.0)
fuser = Fuser(*sizes, settings=small).to(receiver.device)  # random, all gates open
receiver_prefix = cache.prefill(receiver, ids)
sharer_prefix = cache.prefill(sharer, ids)
with torch.no_grad():
    fused = fuser(receiver_prefix, sharer_prefix)

layer = sizes[0].layers - 1  # the last, to which the sharer's last is mapped


def last_values(kv_cache):
    """The last layer's values, heads side by side, (T, H d)."""
    return kv_cache.layers[-1].values[0].transpose(0, 1).flatten(1).float()


s, r = last_values(sharer_prefix.cache), last_values(receiver_prefix.cache)
with torch.no_grad():
    by_hand = r + change(fuser, 2 * layer + 1, s, r)
assert close(by_hand, last_values(fused).to(receiver.dtype))

# %% [markdown]
# The gates of an untrained fuser are closed: it returns the receiver's cache, bit for bit.
# Between the models of the paper, Qwen2.5-0.5B and Qwen3-0.6B, a fuser 1,024 wide is nearly as large as another model.
# The *meta* device counts its parameters without allocating them:

# %%
closed = Fuser(*sizes, settings=Settings(hidden=64)).to(receiver.device)
unchanged = closed(receiver_prefix, sharer_prefix)
before = cache.to_tensor(receiver_prefix.cache)
assert torch.equal(cache.to_tensor(unchanged), before)

with torch.device("meta"):
    published = Fuser(Size(28, 8, 128), Size(24, 2, 64))
print(f"{published.num_parameters():,} parameters from Qwen2.5-0.5B to Qwen3-0.6B")
print(f"{fuser.num_parameters():,} in this one, 64 wide")

# %% [markdown]
# The fusers of the paper are on the Hugging Face hub, one folder per pair of models, and `Fuser.from_pretrained` reads them as they are:
#
# ```python
# Fuser.from_pretrained("nics-efc/C2C_Fuser:qwen3_0.6b+qwen2.5_0.5b_Fuser")
# ```
#
# A local folder of the same files is read too, and the command line takes the name alone:
#
# ```bash
# kvlab speculate --base_model Qwen/Qwen3-0.6B --teacher_model Qwen/Qwen3-14B \
#     --fuser_checkpoint qwen3_0.6b+qwen3_14b_Fuser --no_decode_fusion
# ```
#
# The equations are those above; what differs in them are the details that follow.
# Published fusers were trained to fuse prompts only, therefore the last option.
#
# ## Three details
#
# ### Positions of keys
#
# The published code fuses keys as the cache stores them, rotated by their positions.
# The same text at another position is then another input, and the fuser must learn every position anew.
# Move both texts by 300 tokens, fuse, and move back:

# %%
def moved_and_back(settings):
    torch.manual_seed(0)
    one = Fuser(*sizes, settings=settings).to(receiver.device)
    with torch.no_grad():
        here = one(receiver_prefix, sharer_prefix)
        moved = [cache.prefill(m, ids, position=300) for m in (receiver, sharer)]
        back = cache.shift(one(*moved), -300, receiver_prefix.rotary)
    return (back.layers[0].keys - here.layers[0].keys).abs().max().item()


off = {}
for keys in ("unrotated", "rotated"):
    off[keys] = moved_and_back(Settings(hidden=64, gate=1.0, keys=keys))
    print(f"{keys + ' keys:':16} the keys of layer 0 differ by up to {off[keys]:.4f}")
assert off["unrotated"] < 0.05 * off["rotated"]

# %% [markdown]
# ### A gate that is open in training and closed in use
#
# A gate has one number per network, its logit $a$.
# In training, noise is drawn per head and token, and $g = \sigma((a + \text{noise})/T)$ hardens to 0 or 1 as the temperature $T$ falls.
# In use a gate is open if $a > 0$.
# With *logistic* noise a gate of logit $a$ is open in training with probability $\sigma(a)$, which is above one half exactly if it is open in use.
# The published code adds *Gumbel* noise, one half of the Gumbel-softmax trick:

# %% mystnb={"image": {"alt": "The fraction of open gates in training against the logit. With logistic noise the curve passes one half at 0, where the gate opens in use; with Gumbel noise it is already at 0.63 there."}}
logits = torch.tensor([-4, -3, -2, -1, -0.5, 0, 0.01, 0.5, 1, 2, 3, 4])
generator = torch.Generator().manual_seed(0)
u = torch.rand(20_000, generator=generator).clamp(1e-6, 1 - 1e-6)
curves = {
    name: [((a + noise(u)) > 0).float().mean().item() for a in logits]
    for name, noise in fuse.NOISES.items()
}
curves["in use"] = (logits > 0).float().tolist()
label = "open in training (fraction)"
ax = plots.lines(logits.tolist(), curves, "logit of the gate", label)
at_zero = {name: curve[5] for name, curve in curves.items()}
print("at logit 0:", {name: round(value, 3) for name, value in at_zero.items()})
assert abs(at_zero["logistic"] - 0.5) < 0.02
assert abs(at_zero["gumbel"] - (1 - np.exp(-1))) < 0.02
assert abs(1 - curves["logistic"][-1] - 0.02) < 0.01  # closed at logit 4

# %% [markdown]
# A gate that starts at 0, as published, is closed in half of the draws with logistic noise, and in more than a third with Gumbel noise.
# In a short training this hardly changes, because the logit moves little.
# So the fusers of this chapter start at logit 4, where noise closes one gate in fifty.
# The effect is measured below.
#
# ### Tokens of two vocabularies
#
# In speculative decoding both models have one tokenizer.
# Elsewhere the two models split a text in different places.
# For each receiver token, `align_tokens` takes every sharer token that spells part of it, weighted by the fraction of common characters.
# The published code takes one of them:

# %%
others = scale.load_tokenizer("teacher")
question = [{"role": "user", "content": "How many biscuits?"}]
for longest in (False, True):
    aligned = fuse.align_tokens(tokenizer, others, question, longest)
    print("longest:" if longest else "all:")
    if aligned.token_weights is None:
        print("  both models have the same tokens")
        continue
    for i, row in zip(aligned.receiver_ids, aligned.token_weights):
        parts = [
            f"{others.decode(j)!r} {weight:.2f}"
            for j, weight in zip(aligned.sharer_ids, row)
            if weight
        ]
        print(f"  {tokenizer.decode(i)!r:12} <- {', '.join(parts) or 'nothing'}")

# %% [markdown]
# ## Does any information cross?
#
# The published training makes right responses likely: next-token cross-entropy on the response, through the receiver, with both models frozen.
# Suppose the loss falls.
# Did the fuser learn to transfer the sharer's information, or did it become a better part of the receiver?
# On texts that both models read, the loss cannot distinguish the two.
# So in this test the receiver reads **blanks** in place of the facts, and only the sharer reads the passage.

# %%
facts = (4, 8)  # of a passage; the benchmark has 8 to 16
rows_of_facts = blanked(tokenizer, 1200, facts, seed=1)
tests = blanked(tokenizer, 40, facts, seed=2, test=True)
blanks, shown, answer = tests[0]
print("receiver:", textwrap.fill(tokenizer.decode(blanks), 76))
print("sharer:  ", textwrap.fill(tokenizer.decode(shown), 76))
print("answer:  ", tokenizer.decode(answer))

# %% [markdown]
# The answers now separate the two kinds of learning.
# A control of the same size that does not read the sharer (`use_sharer=False`) can learn that an answer is a drink, but never which.
#
# There is a second way to train for this.
# The cross-entropy of an answer of one or two tokens constrains the hundred entries before it very little.
# But the right value of each entry is known: the entry that the receiver would have computed from the whole passage.
# `rehearsal_loss` compares with it, entry by entry:
#
# $$\mathcal{L} = \frac{1}{2L}\sum_{\ell}\left(\frac{\sum_t\lVert \hat k_{\ell t} - k^*_{\ell t}\rVert^2}{\sum_t\lVert k^*_{\ell t} - \bar k^*_\ell\rVert^2} + \frac{\sum_t\lVert \hat v_{\ell t} - v^*_{\ell t}\rVert^2}{\sum_t\lVert v^*_{\ell t} - \bar v^*_\ell\rVert^2}\right),$$
#
# over the tokens $t$ of a batch, with keys un-rotated.
# This is the fraction of variance unexplained (FVU): 0 is an exact copy, 1 is as far off as the mean over tokens.
# Here we train for 150 steps, with short passages and the sharer's first layers, from which the fuser learns fastest.
# (At a larger scale checkpoints are written: if Colab disconnects, run the cells again, and training goes on.
# To keep them when Colab takes the machine back, too, mount a Google Drive and set `runs` to a folder there.)

# %%
def example(blanks, shown, answer):
    return FuserExample(Aligned(blanks, shown, torch.eye(len(shown))), answer)


examples = [example(*row) for row in rows_of_facts]
rehearsal = FuserArm(
    hidden=128,
    dropout=0.0,
    gate=4.0,
    layer_map="first",
    decode=False,
    steps=150,
    batch_size=8,
    learning_rate=6e-3 if scale.name == "tiny" else 1e-4,
    precision=scale.precision,
)
loss = fuse.rehearsal_loss
runs = Path(tempfile.mkdtemp() if scale.name == "tiny" else "kvlab-runs/06")
rehearsed, history = rehearsal.train(
    receiver, sharer, examples, loss=loss, checkpoint=runs / "rehearsed.safetensors"
)
losses = [np.mean([h["fvu"] for h in part]) for part in np.array_split(history, 6)]
print("FVU:", *(f"{value:.2f}" for value in losses))
if scale.name == "tiny":
    assert losses[-1] < losses[0] / 2

# %%
def answers(row, fuser=None, reads=0):
    """Whether the receiver answers word for word, from a fused cache or its own."""
    ids, prefix = row[reads], None
    if fuser:
        prefix = fuse.fuse_prompt(fuser, receiver, sharer, example(*row).prompt)
        ids = ids[-1:]
    options = {"max_new_tokens": len(row[2]), "tokenizer": tokenizer}
    output = generate(receiver, [ids], prefix=prefix, **options)
    return float(torch.equal(output.tokens[0].cpu(), row[2]))


correct = {
    "reads blanks, alone": [answers(row) for row in tests],
    "rehearsed": [answers(row, rehearsed) for row in tests],
    "reads everything, alone": [answers(row, reads=1) for row in tests],
}
for name, scores in correct.items():
    print("{:24} {:.2f} [{:.2f}, {:.2f}]".format(name, *mean_interval(scores)))
if scale.name == "tiny":
    blind = np.mean(correct["reads blanks, alone"])
    assert np.mean(correct["rehearsed"]) > blind + 0.2

# %% [markdown]
# The information crosses: the receiver answers with words that it has never read.
# The benchmark has longer passages, 600 steps and both ways to train.
# Each has its control, a fuser with as many parameters that does not read the sharer.
# Some rows are the mean over several fusers, each trained with its own seed: the label has their number in brackets, and without one there is one fuser or none.

# %%
def with_counts(labels):
    """Labels by figure, with the number of trained fusers (or drafts) above 1."""
    counted = {}
    for name, label in labels.items():
        trained = name.replace("guesses_", "answers_", 1)  # the same fusers
        count = sum(other.startswith(f"{trained}_seed_") for other in results)
        counted[name] = f"{label} ({count})" if count > 1 else label
    return counted


def print_conditions(name):
    """Those that all rows have in common, with the number of prompts."""
    parts = results[name].conditions.split("; ")
    own = ("fused", "mean over", "n is")  # of this row
    shared = [part for part in parts if not any(words in part for words in own)]
    print(textwrap.fill(f"{'; '.join(shared)}; {results[name].n} prompts", 78))


# %% mystnb={"image": {"alt": "Fractions of questions answered, with intervals: from blanks nothing; trained on answers and the controls without a sharer hardly more; rehearsed many more, with the sharer's first layers as many as when the receiver reads everything; linear maps hardly any."}}
readers = {
    "answers_blind": "reads blanks, alone",
    "answers_matched": "trained on answers, no sharer",
    "answers_answered": "trained on answers",
    "answers_rehearsed_matched": "rehearsed, no sharer",
    "answers_rehearsed": "rehearsed, the sharer's last layers",
    "answers_rehearsed_first": "rehearsed, its first layers",
    "answers_rehearsed_low_rank": "the same, low rank",
    "answers_ridge": "linear maps, closed form",
}
mark = results["answers_sighted"].value, "reads everything, alone"
rows = results.intervals(with_counts(readers))
plots.intervals(rows, "answered word for word (fraction)", mark)
print_conditions("answers_rehearsed_first")
blind, trained_matched, trained, matched, *rest = (results[name] for name in readers)
last_layers, first_layers, low_rank, closed_form = rest
assert trained.value < trained_matched.high
assert matched.value < blind.high
assert blind.high < 0.1 < last_layers.low
assert first_layers.low < results["answers_sighted"].value < first_layers.high

# %% [markdown]
# Trained on answers, the fuser does no better than its control: nothing crosses.
# Rehearsed without a sharer, nothing crosses either.
# Rehearsed with one, a good part crosses from the sharer's last layers, and from its first layers as much as the receiver would have understood of the text itself.
#
# The last two rows are cheaper rivals.
# Both replace the networks of a layer by linear maps:
#
# - **low rank**: one map of keys and values together, $\hat r = r + U V [s_k, r_k, s_v, r_v] + b$, of rank 24, trained in the same way. *Latent Cache Flow* {cite}`rossi2026latent` maps keys and values together, too, with a few percent of C2C's parameters. (`Settings(rank=24)`, or `kvlab train-fuser --rank 24`.)
# - **closed form**: one map for keys and one for values, from the sharer's entries alone, $\hat r = M s + b$. It is solved by least squares with a ridge, on texts that both models have read, and trains nothing.

# %%
texts = [shown for _, shown, _ in rows_of_facts[:60]]
layers = [size.layers for size in sizes]
ridge = fuse.ridge_fuser(receiver, sharer, texts, first_aligned(*layers))
by_maps = [answers(row, ridge) for row in tests[:20]]
print("closed form, live: {:.2f} [{:.2f}, {:.2f}]".format(*mean_interval(by_maps)))
for name in ("lab", "low_rank", "ridge"):
    count = results[f"fuser_parameters_{name}"]
    print(f"{name:9} {count.value:9,.0f} parameters: {count.conditions}")
assert max(low_rank.high, closed_form.high) < 0.1  # neither carries a fact
assert results["fuser_parameters_low_rank"].value < 0.04 * results["fuser_parameters_lab"].value
unexplained = {
    arm: results[f"unexplained_rehearsed_{arm}"].value
    for arm in ("first", "low_rank", "matched")
}
print({arm: round(value, 3) for arm, value in unexplained.items()})
assert unexplained["first"] < unexplained["low_rank"] < unexplained["matched"]

# %% [markdown]
# Neither carries a fact here, although the low-rank map explains more of the variance than a fuser without a sharer does.
# A linear map of the entries of one token is not enough for these two models; the networks of C2C are.
# (The paper of Latent Cache Flow reports that a small adapter can be more accurate than C2C. The map here shares its idea, not its architecture, and there is one trained fuser of it.)
#
# ## In speculative decoding
#
# `FusedProposer` is a draft with a fused cache.
# At the start it fuses the prompt, all but the last token, which the draft reads afterwards.
# After each verification it fuses the accepted tokens, whose entries the target has computed anyway.
# Only the newest token and the guesses have entries of the draft alone.
# Both fusions can be switched off.
# The fuser is trained for this (`decode=True`): each batch fuses the prompt, predicts a first part of the response of random length, fuses that part too, and predicts the rest.
#
# The text is always the target's.
# Fusing can only change the number of accepted guesses.
# The requests are hard to guess: *tell me about* somebody in a passage, where the draft has to find the facts and to foresee which of them the target mentions next.

# %%
shipped = lab.models.MODELS / "lab-fuser"
if scale.name == "tiny":
    fuser = Fuser.from_pretrained(shipped).to(receiver.device, torch.float32)  # of tests/benchmarks/fuse.py
else:
    prompts = [encode(tokenizer, request) for request in Requests(200)]
    targets = draft.generate_targets(sharer, tokenizer, prompts, max_new_tokens=96)
    turns = [FuserExample.split(t.input_ids, t.start) for t in targets]
    need = scale.needs["06_cache_fusion"]
    options = {"hidden": need.hidden, "batch_size": need.batch, "steps": 200}
    arm = FuserArm(gate=4.0, precision=scale.precision, **options)
    saved = runs / "answers.safetensors"
    fuser, history = arm.train(receiver, sharer, turns, checkpoint=saved)

# %%
def decode(ids, proposer=None):
    options = {"gamma": 4, "max_new_tokens": 96, "tokenizer": tokenizer}
    return generate(sharer, [ids], proposer, **options)


requests = [encode(tokenizer, r) for r in Requests(8, test=True)]
proposers = {"plain": lambda: None} | fusion_proposers(receiver, sharer, fuser)
options = {"gamma": 4, "max_new_tokens": 96, "tokenizer": tokenizer}
scores = measure_fusion(sharer, requests, proposers, **options)
for _, texts in scores.groupby("prompt")["tokens"]:
    if sharer.dtype == torch.float32:  # the target's text, whatever is fused
        assert all(tokens == texts.iloc[0] for tokens in texts)
means = scores[scores["arm"] != "plain"].groupby("arm", sort=False)
means[["acceptance", "tokens_per_call"]].mean().round(3)

# %% [markdown]
# ### What the sharer adds
#
# Eight requests only show that the code runs.
# The benchmark has a hundred, and the comparisons that matter:
#
# - **self**: the draft is its own sharer: the same parameters, no new information.
# - **matched**: as many parameters, with zeros in place of the sharer's features.
# - **trained draft**: no fuser at all. The draft itself is trained on the same answers of the target, for as many steps. This is the alternative without this chapter (chapter 02), and it costs nothing in use.
#
# The paper reports the first, and a control like the third.
# On MMLU-Redux, for one pair, the receiver alone scores 35.5 and the fused one 42.9.
# The receiver as its own sharer reaches most of the gain, 42.2; fine-tuned without a fuser it gains little, 36.8 {cite}`fu2025c2c`.

# %% mystnb={"image": {"alt": "Fractions of guesses accepted, with intervals, for the draft alone, fused in each way, the controls, the published details, low-rank and linear maps, and the trained draft."}}
arms = {
    "acceptance_prefill": "prompt fused",
    "acceptance_decode": "accepted tokens fused",
    "acceptance_both": "both fused",
    "acceptance_self": "both, the draft as sharer",
    "acceptance_matched": "both, no sharer",
    "acceptance_rotated": "both, keys rotated",
    "acceptance_gates_from_0": "both, gates from 0",
    "acceptance_published": "prompt, as published",
    "acceptance_low_rank": "both, low rank",
    "acceptance_ridge": "prompt, linear maps in closed form",
    "acceptance_ridge_half": "the same, half of each entry",
    "acceptance_tuned": "trained draft, nothing fused",
    "acceptance_tuned_fused": "trained draft, both fused",
}
mark = results["acceptance_none"].value, "the draft alone"
rows = results.intervals(with_counts(arms))
plots.intervals(rows, "guesses accepted (fraction)", mark)
print_conditions("acceptance_both")

# %%
gains = {}
for one, other in (
    ("both", "none"),
    ("both", "prefill"),
    ("both", "self"),
    ("both", "matched"),
    ("both", "rotated"),
    ("both", "gates_from_0"),
    ("low_rank", "none"),
    ("ridge", "none"),
    ("ridge_half", "none"),
    ("tuned", "none"),
    ("tuned_fused", "tuned"),
):
    gains[one, other] = results[f"gain_{one}_over_{other}"]
    print(f"{one:11} minus {other:12} {gains[one, other]:+.3f}")
fused_gain = gains["both", "none"].value
lost = {arm: gains["both", arm].value / fused_gain for arm in ("rotated", "gates_from_0")}
for arm, fraction in lost.items():
    print(f"{arm} costs {fraction:.0%} of the gain")
for arm in ("none", "both"):
    print(
        f"on word problems, {arm:4} fused: {results[f'acceptance_{arm}_arithmetic']:.3f}"
    )
assert gains["both", "none"].low > 0  # fusing the prompt helps
assert abs(gains["both", "prefill"].value) < fused_gain / 10  # the rest does not
assert gains["both", "matched"].low < 0
assert all(gains["both", arm].value < fused_gain / 4 for arm in ("self", "matched"))
assert gains["low_rank", "none"].value > fused_gain / 2
assert all(gains[arm, "none"].high < 0 for arm in ("ridge", "ridge_half"))
assert gains["tuned", "none"].value > fused_gain
assert gains["tuned_fused", "tuned"].low < 0
assert lost["gates_from_0"] > 0.9
assert 0.2 < lost["rotated"] < 0.7
assert (
    results["acceptance_both_arithmetic"].high < results["acceptance_none_arithmetic"].low
)

# %% [markdown]
# Fusing the prompt helps; fusing accepted tokens does not.
# But most of the gain comes from the parameters: a module that does not read the target gains nearly as much, and the difference could be chance.
# The low-rank map, with a twenty-fifth of the parameters, gains more than half of it.
# Linear maps in closed form do harm: they approximate entries that the draft has exactly.
# The trained draft gains more than any fuser (in the paper fine-tuning brings little), and on top of it the fuser adds nothing distinguishable from chance.
# Both models have read the same text here, and beyond that this fuser finds little in the target's cache that improves the guesses.
#
# Of the published details, gates that start at 0 cost all of the gain in a training as short as this, and rotated keys a part of it (one fuser each; the noise was not measured alone).
# And a fuser is specific to its texts: on word problems, which it was not trained on, it does harm.

# %% [markdown]
# ### Where the draft knows less
#
# In those requests the draft has read everything that the target has.
# Suppose it has not: its cache of the passage is of an older version, or lacks the facts behind the blanks.
# The rehearsed fuser can fill them in from the target's cache.
# The same requests, live, with short passages:

# %%
def guesses(row, fuser=None, reads=0):
    """The fraction of guesses that the target, which reads everything, accepts."""
    ids = row[1]
    if fuser:
        prefix = fuse.fuse_prompt(fuser, receiver, sharer, example(*row).prompt)
    else:
        prefix = cache.prefill(receiver, row[reads][None, :-1].to(receiver.device))
    proposer = ModelProposer(receiver, replace(prefix, input_ids=ids[:-1].tolist()))
    return summarize(decode(ids, proposer).rounds).acceptance


about = blanked(tokenizer, 16, facts, seed=3, test=True, kind="about")
accepted = {
    "reads blanks, alone": [guesses(row) for row in about],
    "rehearsed": [guesses(row, rehearsed) for row in about],
    "reads everything, alone": [guesses(row, reads=1) for row in about],
}
for name, fractions in accepted.items():
    print("{:24} {:.2f} [{:.2f}, {:.2f}]".format(name, *mean_interval(fractions)))
if scale.name == "tiny":
    assert np.mean(accepted["rehearsed"]) > np.mean(accepted["reads blanks, alone"])

# %% [markdown]
# And in the benchmark:

# %% mystnb={"image": {"alt": "Fractions of guesses accepted, with intervals, of a draft that reads blanks: alone, trained on answers and rehearsed, each with and without a sharer, the rehearsed one with the sharer's last and first layers, and linear maps."}}
arms = {
    name.replace("answers_", "guesses_"): label for name, label in readers.items()
}
mark = results["guesses_sighted"].value, "reads everything, alone"
rows = results.intervals(with_counts(arms))
plots.intervals(rows, "guesses accepted (fraction)", mark)
gains = {}
for other in ("blind", "rehearsed_matched", "sighted"):
    gains[other] = results[f"gain_rehearsed_first_over_{other}"]
    print(f"rehearsed, first layers, minus {other:17} {gains[other]:+.3f}")
assert gains["blind"].low > 0
assert gains["rehearsed_matched"].low > 0
assert abs(gains["sighted"].value) < gains["blind"].value / 4
blind, *on_answers, matched = (
    results[f"guesses_{name}"]
    for name in ("blind", "matched", "answered", "rehearsed_matched")
)
assert matched.value < blind.high
assert all(figure.high < blind.low for figure in on_answers)

# %% [markdown]
# Fused from the first layers, its guesses are as good as if it had read everything itself.
# Without a sharer, rehearsal gains nothing.
# So the target's cache does help if it holds information that the draft's lacks.
# (The fusers trained on answers of a word or two do harm here, because these responses are of another kind.)
#
# ### Handing over the text instead
#
# The usual way needs no fuser: the sharer writes, and the receiver reads.
# Asked to tell about the subject of a question, the sharer writes a sentence or two, and the receiver reads them in place of the passage:

# %%
def handed_over(seed):
    """A passage, a prompt with what the sharer writes instead of it, and the answer."""
    passage = worlds.make_passage(Random(seed), 6, test=True)
    kinds = ("about", "free")  # of one fact: the choice is drawn first, with one seed
    (request, _), (question, answer) = (
        worlds.QUESTIONS[kind](Random(seed), passage) for kind in kinds
    )
    told = [{"role": "system", "content": passage.text}]
    told.append({"role": "user", "content": request})
    written = decode(encode(tokenizer, told)).tokens[0]
    text = tokenizer.decode(written, skip_special_tokens=True).strip()
    turns = [{"role": "system", "content": text}, {"role": "user", "content": question}]
    return passage.text, turns, answer


def answer_to(turns):
    options = {"max_new_tokens": 8, "tokenizer": tokenizer}
    tokens = generate(receiver, [encode(tokenizer, turns)], **options).tokens[0]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


passage, turns, answer = handed_over(seed=2)
print("sharer reads:   ", textwrap.fill(passage, 76))
print("receiver reads: ", textwrap.fill(" ".join(t["content"] for t in turns), 76))
print("it answers:     ", answer_to(turns), "; right is", answer)
by_text = [answer_to(turns) == right for _, turns, right in map(handed_over, range(20))]
print("of 20 answered:  {:.2f} [{:.2f}, {:.2f}]".format(*mean_interval(by_text)))

# %% [markdown]
# The benchmark asks a hundred questions about longer passages, and measures both ways in turn, from the unread passage to the answer:

# %%
ways = {
    "handover_answers_text": "reads what the sharer writes",
    "handover_answers_fuser": "reads blanks, fused (rehearsed)",
    "handover_answers_sighted": "reads everything",
}
for name, label in ways.items():
    print(f"{label:32} {results[name]:.2f}")
print(f"fuser minus text, paired: {results['gain_handover_fuser_over_text']:+.2f}")
print(f"tokens handed over: {results['handover_tokens']:.1f}")
print(f"seconds, over the fuser's: {results['handover_seconds_over_fuser']:.1f}")
answered_from_text, gain, slower = (
    results[name]
    for name in (
        "handover_answers_text",
        "gain_handover_fuser_over_text",
        "handover_seconds_over_fuser",
    )
)
assert answered_from_text.low > 0.5
assert gain.low < 0 < gain.high
assert slower.low > 2

# %% [markdown]
# About as many questions are answered from text as from the fused cache; the difference could be chance.
# Text needs no training, and a receiver of any kind can read it.
# But it takes several times as long, because the sharer has to write token by token what the fuser takes from its cache.
# For speculative decoding it is no option: the text that the target would hand over is the text that the draft should guess.
#
# ### The gates
#
# Where does the fuser write?
# Each layer's keys and values have a gate; the change that it lets pass can be compared with the entries it changes:

# %% mystnb={"image": {"alt": "Bars for keys and values of each layer: the size of the change relative to the entries it changes."}}
ids = torch.tensor([requests[0]], device=sharer.device)
receiver_prefix = cache.prefill(receiver, ids.to(receiver.device))
sharer_prefix = cache.prefill(sharer, ids)
with torch.no_grad():
    fused = cache.to_tensor(fuser(receiver_prefix, sharer_prefix)).float()
before = cache.to_tensor(receiver_prefix.cache).float()


def rms(x):
    """Root mean square per layer, of keys and of values, (L, 2)."""
    return x.square().mean((2, 3, 4, 5)).sqrt()


size = rms(fused - before) / rms(before)
plots.gates(fuser.gate_logits(), size.cpu());

# %% [markdown]
# ### What it costs
#
# A call of the fuser on a few tokens costs about as much as a step of the draft (below, with its ratio to a call of the target).
# Fusing the prompt is one call, on many tokens; fusing the accepted tokens is one more call per round.
# The tokens gained per target call have to pay for them:

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
assert 0.5 < results["fuser_over_draft"].value < 2
prompt, counted, accepted_tokens, both = (results[name] for name in list(names)[:4])
assert prompt.value > max(1, counted.value, both.value)
assert accepted_tokens.high < 1

# %% [markdown]
# Decoding gets a little faster with the prompt fused, and less or none of that is left when the fusion itself is counted.
# A fusion of accepted tokens in every round costs more than it gains, with the prompt fused or without.
# A fuser is better used where nobody waits: on a stored text, as in the next chapter.
#
# ## A check you can break
#
# The fused entries must belong to the same tokens.
# A loop that forgets that the target has not read the newest token shifts the sharer's entries by one.
# Then the fused cache changes, and so does the acceptance, but the text stays the target's and shows nothing.
# First the rule, then a violation of it:

# %%
some = cache.part(receiver_prefix, 5, 25)
with torch.no_grad():
    same = cache.to_tensor(fuser(some, cache.part(sharer_prefix, 5, 25)))
    shifted = cache.to_tensor(fuser(some, cache.part(sharer_prefix, 4, 24)))
expected = fused[..., 5:25, :]
assert close(same, expected)  # a part can be fused alone
rounding, error = ((x - expected).abs().max() for x in (same, shifted))
assert error > 10 * rounding

# %% [markdown]
# ## Exercises
#
# ```{exercise-start} Read nothing
# :label: ex-nothing
# ```
# *Easy, 5 minutes.*
# The rehearsed fuser computes the receiver's entries from the sharer's.
# What if the receiver reads only blanks, the question included, except for the last token?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-nothing
# :class: dropdown
# ````

# %%
blank = tokenizer(" unknown", add_special_tokens=False).input_ids[0]
nothing = []
for _, shown, answer in tests:
    unread = torch.full_like(shown, blank)
    unread[-1] = shown[-1]
    nothing.append((unread, shown, answer))
scores = [answers(row, rehearsed) for row in nothing]
print("{:.2f} [{:.2f}, {:.2f}]".format(*mean_interval(scores)))
if scale.name == "tiny":
    assert np.mean(scores) <= 0.05

# %% [markdown]
# None, or hardly any, is answered.
# It was rehearsed with a few blanks only, and relies on the receiver's own entries of the words around them.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Which layers?
# :label: ex-map
# ```
# *Medium, 10 minutes.*
# As published, the last layers of the sharer are mapped to those of the receiver (`layers.last_aligned`).
# Rehearse for twenty steps with each map, and compare the FVU.
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-map
# :class: dropdown
# ````

# %%
unexplained = {}
for name in fuse.LAYER_MAPS:
    arm = replace(rehearsal, layer_map=name, steps=20)
    one, history = arm.train(receiver, sharer, examples, loss=loss)
    chosen = one.layer_map.indices.flatten().tolist()
    unexplained[name] = history[-1]["fvu"]
    print(f"{name:12} {chosen} FVU {unexplained[name]:.3f}")
if scale.name == "tiny":
    assert unexplained["first"] < unexplained["last"]

# %% [markdown]
# First layers represent the token itself, last layers the next one.
# The entries of a shallow receiver are nearer to the former.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - A fuser adds a change to each entry; with closed gates it returns the receiver's cache bit for bit. Un-rotate keys first, use logistic noise, and start with open gates if training is short.
# - Cross-entropy on answers constrains a hundred entries very little; the entries of the whole text constrain them completely. If the sharer reads more than the receiver, rehearse.
# - Never report a fuser without its controls and rivals: the receiver as its own sharer, as many parameters without a sharer, a small linear map, and a draft trained on the same answers. Where both models read the same text, the last one won.
# - If the sharer's cache holds information that the receiver's lacks, a fuser transfers it, and the guesses get better. A sentence or two of text transfers it about as well, but takes several times as long.
# - In speculative decoding the text stays the target's whatever is fused. Mistakes cost acceptance and show nowhere else, so test which entries are fused.
#
# The cell below runs alone.

# %%
import torch

from kvlab import Scale, speculate
from kvlab.generation import encode
from kvlab.fuse import FuserArm, FuserExample

scale = Scale.current()
target, draft_model = scale.load("target"), scale.load("draft")
tokenizer = scale.load_tokenizer("target")

ids = encode(tokenizer, [{"role": "user", "content": "Tell me about Anna."}])
response = tokenizer(" Anna lives in Rome.").input_ids
example = FuserExample.split(torch.tensor(ids + response), start=len(ids))
arm = FuserArm(hidden=64, gate=4.0, steps=2, batch_size=2)
fuser, history = arm.train(draft_model, target, [example] * 4)
proposer = speculate.FusedProposer(draft_model, fuser)
options = {"gamma": 4, "max_new_tokens": 16, "tokenizer": tokenizer}
output = speculate.generate(target, [ids], proposer, **options)
print(tokenizer.decode(output.tokens[0]))

# %% [markdown]
# **Further reading**: Cache-to-Cache {cite}`fu2025c2c`; a draft that reads the target's last hidden states instead of its cache {cite}`li2024eagle`.
# The next chapter puts all parts of this book together.
