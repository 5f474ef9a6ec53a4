# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04. 4D alignment
#
# ```{admonition} In this chapter
# :class: tip
# - see in which four ways the caches of two models differ: {term}`time, layer, head and hidden <4D alignment>`;
# - carry a teacher's keys and values over to a student, a step for each, and check every step;
# - compare layers by {term}`CKA`, and see what a biased estimate of it would show;
# - train students toward keys and values like their teacher's, by four arms, with controls that should fail;
# - compare with a teacher's text and probabilities, the plainest rivals;
# - find out where that helps and where it does harm.
#
# **Time and memory**: about a minute and 1.2 GB, most of it PyTorch itself, at `tiny`; what the models take at any scale is printed by the second cell.
#
# **Code**: `kvlab/align.py` and `kvlab/layers.py`; the code written out here is checked against it.
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

import kvlab
from kvlab import Scale, align, cache, lab, plots
from kvlab.align import AlignedStudent, Projector, plan_time, resample, segment
from kvlab.lab.corpora import Solutions
from kvlab.layers import CKA, layer_map, proportional
from kvlab.layers import hsic as package_hsic

scale = Scale.current()
print(scale.describe("04_alignment_4d"))
student, tokenizer = scale.load("student"), scale.load_tokenizer("student")
teacher, words = scale.load("teacher"), scale.load_tokenizer("teacher")

# %% [markdown]
# ## The question
#
# A large model reads a problem and its solution.
# Its cache has keys and values for every token, and somewhere in them is the knowledge of how to solve such problems.
# A small model should learn it.
# The usual ways give it the teacher's text, or the teacher's probabilities of the next token.
# Could it learn from the teacher's **cache** instead, from the keys and values of every token in every layer?
#
# If both caches had one shape, that would be a loss in one line.
# They do not.
# Here is one problem, as each model reads it, with the solution in its own style:

# %%
short, long = Solutions(1, steps=(2, 2), seed=3)[0]
for name, text in (("student", short), ("teacher", long)):
    print(f"{name}: {textwrap.fill(text[0]['content'], 76)}")
    print(textwrap.indent(textwrap.fill(text[1]["content"], 72), "    "), "\n")

# %% [markdown]
# `segment` finds {term}`prompt, reasoning and answer <segment>` by the character at which each token begins.
# That works for any tokenizer with offsets and for any chat template, in English and Chinese.

# %%
own, theirs = segment(tokenizer, short), segment(words, long)
for name, one, vocabulary in (
    ("student", own, tokenizer),
    ("teacher", theirs, words),
):
    for part, start, end in zip(align.SEGMENTS, one.borders, one.borders[1:]):
        text = vocabulary.decode(one.input_ids[start:end])
        print(
            f"{name} {part:9} {end - start:3} tokens  {textwrap.shorten(text, 48)}"
        )


# %% mystnb={"image": {"alt": "Two grids of cells, a column a token and a row a layer. The teacher has more of both than the student."}}
def width_of(model):
    """H_kv * d: what a layer keeps of a token, as keys and again as values."""
    return model.base_model.layers[0].self_attn.k_proj.out_features


def cell_of(model):
    heads = model.config.num_key_value_heads
    return f"{heads} KV heads of {width_of(model) // heads} a cell"


shapes = {
    "teacher": (
        teacher.config.num_hidden_layers,
        theirs.borders.tolist(),
        cell_of(teacher),
    ),
    "student": (
        student.config.num_hidden_layers,
        own.borders.tolist(),
        cell_of(student),
    ),
}
plots.cache_shapes(shapes);

# %% [markdown]
# Four things differ: how many tokens (**time**), how many layers (**layer**), how many heads of what size in each cell (**head**), and the number and meaning of the values in a cell (**hidden**).
# The recipe of this chapter aligns the four, one after another, so that keys and values of the teacher become targets for those of the student.
# It comes from a public project (called *the source* below), in which Qwen2-7B and Qwen2-1.5B teach a Qwen2-1.5B.
# The project describes the steps, but its code has errors in several of them, and it measured nothing.
# Here each step is checked, and the whole is measured.
#
# ## Time
#
# Inside a segment of $T_s$ student tokens and $T_t$ teacher tokens, student token $i$ is at
#
# $$u_i = i\,\frac{T_t - 1}{T_s - 1},\qquad x_i = (1 - f)\,y_{\lfloor u_i \rfloor} + f\,y_{\lfloor u_i \rfloor + 1},\quad f = u_i - \lfloor u_i \rfloor .$$
#
# A segment of one student token takes the mean of the teacher's; at the last token $f = 0$.
# In plain lines:

# %%
def stretch(y, length):
    """Rows (T_t, D) to (length, D), first to first and last to last."""
    if length == 1:
        return y.mean(0, keepdim=True)
    u = torch.arange(length) * (len(y) - 1) / (length - 1)
    low = u.floor().long()
    f = (u - low)[:, None]
    return (1 - f) * y[low] + f * y[(low + 1).clamp(max=len(y) - 1)]


features = torch.randn(len(theirs.input_ids), 8)
by_hand = torch.cat(
    [
        stretch(features[start:end], int(own.borders[i + 1] - own.borders[i]))
        for i, (start, end) in enumerate(zip(theirs.borders, theirs.borders[1:]))
    ]
)
plan = plan_time(own.borders[None], theirs.borders[None])
assert torch.allclose(
    resample(features[None, None], plan)[0, 0], by_hand, atol=1e-4
)

# %% [markdown]
# `plan_time` computes this for a batch, and `resample` applies a plan to all layers in one pass.
# What happens without segments?
# Token $i$ of the student would get token $i$ of the teacher, or the teacher's last (`by_index`):

# %% mystnb={"image": {"alt": "Lines from each student token to the teacher tokens it is made of. By index they run straight across segments; by segments none crosses a border."}}
simple, wordy = Solutions(1, steps=(1, 1), seed=4)[0]
a, b = segment(tokenizer, simple), segment(words, wordy)


def links(plan):
    return zip(plan.tokens.tolist(), plan.columns.tolist(), plan.weights.tolist())


borders = a.borders[None], b.borders[None]
plots.token_links(
    [words.decode(i) for i in b.input_ids],
    [tokenizer.decode(i) for i in a.input_ids],
    (b.borders.tolist(), a.borders.tolist()),
    {
        "by index": links(align.by_index(*borders)),
        "by segments": links(plan_time(*borders)),
    },
)
if scale.name == "tiny":  # the segments of teacher tokens with the student's indices
    of_teacher = np.repeat(align.SEGMENTS, np.diff(b.borders))
    reasoning, answer = (of_teacher[slice(*a.borders[i : i + 2])] for i in (1, 2))
    assert reasoning[0] == "prompt"
    assert set(answer) == {"reasoning"}

# %% [markdown]
# By index, the student's reasoning begins to learn from the end of the teacher's prompt, and its answer learns from the teacher's reasoning.
# By segments, prompt learns from prompt and answer from answer.
# Inside the reasoning the alignment is only proportional: the student's "=" need not fall on the teacher's.
#
# ### A check you can break
#
# Interpolation is exact on a straight line, so the teacher's positions, stretched, must run evenly inside each segment and start and end on its borders.
# Nearest rounding, which public code calls interpolation, fails:

# %%
positions = torch.arange(len(theirs.input_ids), dtype=torch.float64)[
    None, None, :, None
]
stretched = resample(positions, plan)[0, 0, :, 0]
for i, (start, end) in enumerate(zip(own.borders, own.borders[1:])):
    part = stretched[start:end]
    assert part[0] == theirs.borders[i]
    assert part[-1] == theirs.borders[i + 1] - 1
    assert torch.allclose(part.diff(), part.diff().mean().expand(len(part) - 1))

start, end = own.borders[1:3]
nearest = stretched[start:end].round().diff()
assert not torch.allclose(nearest, nearest.mean().expand(len(nearest)))

# %% [markdown]
# ## Heads and rotation
#
# Cached keys have been rotated by their positions ({term}`RoPE`), with the teacher's own angles.
# A mean of keys from two positions is no key at any position.
# So keys are un-rotated first, aligned, and rotated again for the student's positions with the student's angles.
# Then the {term}`GQA` heads of a token (KV heads, not attention heads) are laid side by side: $(B, L, H_{kv}, T, d) \to (B, L, T, H_{kv} d)$.

# %%
def read(model, text, start=0):
    """The prefix of a text whose positions begin at `start`."""
    return cache.prefill(
        model, text.input_ids[None].to(model.device), position=start
    )


here, there = read(teacher, theirs), read(teacher, theirs, start=500)
flat, moved = align.features(here), align.features(there)
print("keys:", tuple(flat.keys.shape), " (B, L, T, H_kv d)")
spread = flat.keys[:, 0].std()
assert (flat.keys[:, 0] - moved.keys[:, 0]).abs().max() < 0.05 * spread
stored = [prefix.cache.layers[0].keys for prefix in (here, there)]  # rotated
assert (stored[0] - stored[1]).abs().max() > spread

# %% [markdown]
# The same text at another position: in the cache its keys differ; as features they are the same.
# (This holds exactly in the first layer; later layers read the output of earlier ones, with the small errors of rotations by hundreds of positions.)
#
# ## Layer
#
# Which teacher layer should a student layer learn from?
# The simple answer is the one at the same fraction of the depth.
# The other is to measure similarity.
# {term}`CKA` {cite}`kornblith2019cka` compares two layers by which *tokens* they represent similarly, so widths may differ, and neither rotation nor scale matters.
# With $K = XX^\top$ and $L = YY^\top$ the tokens' inner products in two layers,
#
# $$\mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}} .$$
#
# The usual estimate is biased: it reports similarity where there is none, and more so the fewer tokens there are for the width.
# The unbiased one {cite}`nguyen2021cka` leaves out the diagonals, on which each token is compared with itself (here $K$ and $L$ have zeros there):
#
# $$\mathrm{HSIC}_1 = \frac{1}{n(n-3)}\left[\operatorname{tr}(KL) + \frac{\mathbf 1^\top K \mathbf 1\; \mathbf 1^\top L \mathbf 1}{(n-1)(n-2)} - \frac{2}{n-2}\,\mathbf 1^\top K L \mathbf 1\right].$$

# %%
def hsic(x, y):
    k, other = (m @ m.T for m in (x.double(), y.double()))
    k.fill_diagonal_(0), other.fill_diagonal_(0)
    n = len(x)
    sums = k.sum() * other.sum() / ((n - 1) * (n - 2))
    return ((k * other).sum() + sums - 2 / (n - 2) * (k @ other).sum()) / (
        n * (n - 3)
    )


x, y = torch.randn(2, 60, 24)
y = x @ torch.randn(24, 24) + y
assert torch.allclose(hsic(x, y), package_hsic(x, y))
turn = torch.linalg.qr(torch.randn(24, 24)).Q
once = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
turned = (
    hsic(5 * x @ turn, y) / (hsic(5 * x @ turn, 5 * x @ turn) * hsic(y, y)).sqrt()
)
assert torch.allclose(once, turned)

# %% [markdown]
# Two layers of random numbers have nothing in common.
# What do the two estimates show for various numbers of tokens, at a width of 128?

# %% mystnb={"image": {"alt": "CKA of independent layers against the number of tokens. The biased estimate begins near 1 and falls slowly; the unbiased one stays at 0."}}
def biased_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


counts = (16, 32, 64, 128, 256, 512, 1024)
rows = {"biased": [], "unbiased": []}
torch.manual_seed(scale.seed)
for n in counts:
    x, y = torch.randn(2, n, 128)
    rows["biased"].append(biased_cka(x, y).item())
    unbiased = CKA()
    unbiased.update([x], [y])
    rows["unbiased"].append(unbiased.matrix().item())
ax = plots.lines(counts, rows, "tokens", "CKA of independent layers")
ax.set(xscale="log", xticks=counts, xticklabels=counts, ylim=(-0.1, 1.05))
assert rows["biased"][0] > 0.8 > 0.2 > rows["biased"][-1]
assert max(map(abs, rows["unbiased"])) < 0.15

# %% [markdown]
# Minibatches add up: means of HSIC over batches first, then the ratio.
# So hundreds of texts take no more memory than one batch.
# A few dozen problems, tokens of prompt and reasoning only, and the teacher's features brought to the student's tokens first:

# %%
pairs = [*Solutions(48, seed=5)]
texts = [segment(tokenizer, s) for s, _ in pairs]
others = [segment(words, t) for _, t in pairs]
what = ("hidden", "keys", "values")
maps = {w: align.similar_layers(student, texts, teacher, others, w) for w in what}

# %% mystnb={"image": {"alt": "Three tables of CKA between student layers and teacher layers, for hidden states, keys and values."}}
plots.score_maps(maps, "student layer", "teacher layer")
chosen = layer_map(maps["hidden"], k=2)
for layer, (layers, weights) in enumerate(
    zip(chosen.indices.tolist(), chosen.weights.tolist())
):
    print(
        f"student layer {layer}: teacher layers {layers}, weights {np.round(weights, 2)}"
    )
even = proportional(len(chosen.indices), chosen.teacher_layers)
print("proportional:", even.indices.flatten().tolist())
if scale.name == "tiny":
    assert max(map_.max() for map_ in maps.values()) < 0.5
    rows = maps["hidden"]
    assert (rows.max(1).values - rows.min(1).values).max() < 0.15
    assert (chosen.weights - 0.5).abs().max() < 0.05

# %% [markdown]
# At the tiny scale, no layer of one model is very similar to any of the other: their tokens differ, and they were trained separately.
# For hidden states, by which the layers are chosen, the rows are nearly flat, so the choice of the two best means little.
# And the weights, a softmax over numbers from 0 to 1, are nearly even for any two layers.
# For comparison, the student with itself and, at the tiny scale, with a deeper model of the same tokenizer, on the very same texts:

# %% mystnb={"image": {"alt": "Two tables of CKA, a model with itself and with a deeper model of the same tokenizer."}}
likeness = {"with itself": align.similar_layers(student, texts, student, texts)}
if scale.name == "tiny":
    deeper = align.similar_layers(student, texts, scale.load("target"), texts)
    likeness["with the deeper one"] = deeper
plots.score_maps(likeness, "student layer", "layer")
assert torch.allclose(likeness["with itself"].diagonal(), torch.ones(1).double())

# %% [markdown]
# ## Hidden
#
# The meaning of the numbers is left.
# A {term}`projector` is a linear map for keys and one for values, from the teacher's width to the student's, the same for all layers: $\hat k = W_K k$, $\hat v = W_V v$.
# It starts from random numbers (Xavier), from a random orthogonal projection or from a copy (identity), and may learn along.
# Or it is fitted in closed form, by ridge regression on some problems that both models have read:

# %%
def aligned(texts, others, chosen=chosen):
    """Pairs of teacher features, on the student's tokens and layers, and the student's own."""
    for i in range(0, len(texts), 16):
        one, two = texts[i : i + 16], others[i : i + 16]
        plan = plan_time(
            *(torch.stack([t.borders for t in part]) for part in (one, two))
        )
        flats = []
        for model, part in ((student, one), (teacher, two)):
            batch = align.pad_problems([(text,) for text in part])
            ids, mask = (
                batch[name].to(model.device)
                for name in ("input_ids", "attention_mask")
            )
            flats.append(
                align.features(cache.prefill(model, ids, attention_mask=mask))
            )
        mine, given = flats
        given = align.align_kv(given, plan, chosen)
        keep = plan.mask.to(ids.device)
        # all tokens of the batch in a row: (1, L, N, D)
        yield tuple(
            align.KV(*(x.transpose(0, 1)[:, keep][None] for x in kv))
            for kv in (given, mine)
        )


widths = [width_of(model) for model in (teacher, student)]
projectors = {
    "orthogonal": Projector(*widths, "orthogonal"),
    "ridge": Projector(*widths).fit_ridge(aligned(texts[:32], others[:32])),
}
print(f"{projectors['ridge'].num_parameters()} parameters")

# %% [markdown]
# How close does that come to the student's own features, on problems that were not used for the fit?
# The fraction of their variance that is explained, layer by layer (below 0: worse than the mean):

# %%
rows = {}
given, mine = next(aligned(texts[32:], others[32:]))
for name, projector in projectors.items():
    made = projector.to(mine.keys.device)(given)
    for kind in ("keys", "values"):
        truth, guess = getattr(mine, kind), getattr(made, kind).detach()
        error = (truth - guess).square().sum((2, 3))
        spread = (truth - truth.mean(2, keepdim=True)).square().sum((2, 3))
        explained = (1 - error / spread)[0].tolist()
        rows[f"{name}, {kind}"] = {f"layer {i}": v for i, v in enumerate(explained)}
table = pd.DataFrame(rows).T
if scale.name == "tiny":
    ridge = table.filter(like="ridge", axis="index")
    assert ((ridge > 0.1) & (ridge < 0.6)).all(axis=None)
    assert (table.filter(like="orthogonal", axis="index") < 0).all(axis=None)
table.round(2)

# %% mystnb={"image": {"alt": "Heat maps of the values of one layer, tokens by dimensions: the student's own, the teacher's through a random rotation, and through the ridge map, which resembles the first."}}
short_one = min(range(32, 48), key=lambda i: len(texts[i].input_ids))
sample = next(
    aligned(texts[short_one : short_one + 1], others[short_one : short_one + 1])
)
layer = student.config.num_hidden_layers - 1
views = {"the student's own": sample[1].values[0, layer]}
views |= {
    f"teacher, {n}": p(sample[0]).values[0, layer].detach()
    for n, p in projectors.items()
}
pieces = [tokenizer.decode(i) for i in texts[short_one].input_ids]
plots.cache_picture(views, pieces, shared=True)
if scale.name == "tiny":  # the ridge map is the palest
    own_size, _, ridge_size = (view.float().std() for view in views.values())
    assert ridge_size < own_size

# %% [markdown]
# The ridge map finds some of the student's pattern in the teacher's numbers, and leaves out the rest, so it is paler.
# A linear map between models that were trained separately, with different tokens, explains only a part.
#
# For the source's models, teachers of 7B and 1.5B with a student of 1.5B, projectors are small, since their KV heads are few:

# %%
from kvlab.scale import config_of

source = ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-1.5B-Instruct")
configs = [config_of(name) for name in source]
sizes = [
    c.num_key_value_heads * c.hidden_size // c.num_attention_heads for c in configs
]
counts = [Projector(size, sizes[1]).num_parameters() for size in sizes]
print("widths:", sizes, "  parameters:", counts, "  together:", sum(counts))
assert sum(counts) < 21e6 / 50

# %% [markdown]
# The source speaks of about 21 million.
# One gets that ($21 \cdot 2^{20}$) for keys and values of two teachers as $2 \cdot 2 \cdot 3584 \cdot 1536$, from hidden size to hidden size, as if all attention heads were cached and both teachers were of the larger size.
# That is our guess; it does not say how it counts.
# Cached are the KV heads.
#
# ## All steps at once
#
# The steps follow each other in the source's order.
# `features` undoes rotation and heads, `align_kv` aligns time and layers, a `Projector` maps to the student's width, and `fuse` ({term}`fusion`) takes a weighted mean over several teachers.
# `as_prefix` rotates the result for the student and splits it into its heads: a cache that the student can continue.
# A teacher that *is* the student must give back the student's own cache, bit for bit:

# %%
def carried(model, text, own, chosen, projector):
    """A teacher's features of its text, with the student's tokens, layers and width."""
    plan = plan_time(own.borders[None], text.borders[None])
    return projector(
        align.align_kv(align.features(read(model, text)), plan, chosen)
    )


layers, width = student.config.num_hidden_layers, widths[1]
like = Projector(width, width, "identity").to(student.device)
mirror = carried(student, own, own, proportional(layers, layers), like)
assert torch.equal(mirror.keys, align.features(read(student, own)).keys)

# %% [markdown]
# And another teacher?
# What does the student predict next, given the teacher's cache in place of its own?
# We measure the overlap of the two distributions of the next token, $\sum_x \min(p(x), q(x))$, at the end of the prompt, where a solution begins, and at the first digit of the answer:

# %%
def continued(kv, own, at):
    """The student's probabilities after token `at`, given a cache of the tokens before it."""
    positions = torch.arange(len(own.input_ids), device=student.device)[None]
    prefix = cache.part(align.as_prefix(kv, positions, student), 0, at - 1)
    ids = own.input_ids[None, at - 1 : at].to(student.device)
    out = cache.prefill(student, ids, prefix, position=at - 1)
    return out.logits.float().softmax(-1)[0]


rows = {}
for i in range(32, 48):
    one, two, wrong = texts[i], others[i], others[(i + 5) % 48]
    truth = align.features(read(student, one))
    empty = align.KV(*(torch.zeros_like(x) for x in truth))
    arms = {"a cache of zeros": empty}
    for name, text in (("teacher", two), ("teacher, another problem", wrong)):
        arms[name] = carried(
            teacher, text, one, chosen, projectors["ridge"].to(student.device)
        )
    for name, kv in arms.items():
        for place, at in (
            ("prompt ends", one.borders[1]),
            ("first digit", one.borders[2] + 3),
        ):
            with torch.no_grad():
                p, q = (continued(each, one, int(at)) for each in (truth, kv))
            rows.setdefault(name, {}).setdefault(place, []).append(
                torch.minimum(p, q).sum().item()
            )
overlap = pd.DataFrame(
    {name: {k: np.mean(v) for k, v in r.items()} for name, r in rows.items()}
).T
if scale.name == "tiny":
    assert (overlap["prompt ends"].drop("a cache of zeros") > 0.5).all()
    assert overlap["first digit"].max() < 0.3
    gain = overlap.loc["teacher"] - overlap.loc["teacher, another problem"]
    assert gain["first digit"] < 0.05
overlap.round(2)

# %% [markdown]
# At the end of the prompt much of the overlap remains, but also with a teacher that read another problem, so it is form more than content.
# Of the numbers nothing is carried over.
# Linear maps between models that were trained separately do not make a cache that can be read from.
# The source does not use it in that way, either: it lets the student *learn toward* it, and adapt.
#
# ## Learning toward a teacher
#
# While the student learns solutions by cross-entropy, its keys and values are drawn to their targets.
# In each layer the difference is divided by the standard deviation of the student's own features, so that layers with larger numbers do not weigh more:
#
# $$\mathcal L_{\mathrm{KV}} = \frac{1}{2L}\sum_{\ell=1}^{L}\sum_{x \in \{K, V\}} \operatorname{mean}\;\operatorname{smooth\,L1}\!\left(\frac{x_\ell - \hat x_\ell}{\operatorname{std}(x_\ell)}\right),$$
#
# the mean over tokens that are no padding and over the width.
# The deviation gets no gradient; otherwise features would grow to make the loss small.
# The source adds a {term}`CODI` loss {cite}`shen2025codi`: hidden states of all layers, at one token only, the last before the answer, are drawn to the teacher's through a learned map, and their difference is measured in the *target's* deviations.

# %%
def kv_loss(student, target, mask):
    total = 0.0
    for x, goal in zip(student, target):  # keys, then values
        for layer in range(x.shape[1]):
            a, b = x[:, layer][mask], goal[:, layer][mask]  # (N, D)
            scale = a.detach().std(correction=0)
            total += torch.nn.functional.smooth_l1_loss(a / scale, b / scale)
    return total / (2 * x.shape[1])


one, two = (align.KV(*torch.randn(2, 3, 2, 5, 8)) for _ in range(2))
mask = torch.rand(3, 5) > 0.3
assert torch.allclose(
    kv_loss(one, two, mask), align.kv_loss(one, two, mask), atol=1e-5
)

# %% [markdown]
# In the source, the student's keys and values were computed without gradients, and so its loss, a fine-looking curve, taught nothing.
# The check is simple: does the loss reach the weights that make keys and values?
# And does none of it reach the teacher, which was read once and put away (`encode_with_teacher`)?

# %%
def learner():
    """A student that has learned nothing yet; at larger scales, the pretrained one."""
    if scale.name == "tiny":
        return lab.models.make("lab-draft", 0, num_hidden_layers=3)
    model = scale.load("student").float().requires_grad_(True)
    model.gradient_checkpointing_enable()
    return model


problems = [*Solutions(32, seed=6)]
own_texts = [segment(tokenizer, s) for s, _ in problems]
begun = learner()
layers = proportional(
    begun.config.num_hidden_layers, teacher.config.num_hidden_layers
)
teacher_texts = [segment(words, solution) for _, solution in problems]
seen = align.encode_with_teacher(teacher, teacher_texts, own_texts, layers)
examples = list(zip(own_texts, seen))

aligned_student = AlignedStudent(begun, [Projector(*widths)]).to(begun.device)
batch = align.pad_problems(examples[:4])
batch = {name: x.to(begun.device) for name, x in batch.items()}
aligned_student(batch)["kv"].backward()
attention = begun.base_model.layers[0].self_attn
for name in ("k_proj", "v_proj", "q_proj"):
    gradient = getattr(attention, name).weight.grad
    print(f"{name}: {0.0 if gradient is None else gradient.norm().item():.4f}")
assert attention.k_proj.weight.grad.norm() > 0
assert attention.v_proj.weight.grad.norm() > 0
assert all(p.grad is None for p in teacher.parameters())

# %% [markdown]
# ### How much does each loss contribute?
#
# A term can look fine and contribute nothing to learning.
# `fit` logs each loss's fraction of the norm of the gradient (of all trained parameters, projectors included).
# Here are the first steps of two settings: the source's (weight 1, rising over the first 1000 steps, with CODI, projectors that learn along), and the one that the comparison below was made with: projectors that stay as they are, orthogonal, and a large weight that fades to nothing at 60 % of the steps.

# %%
del aligned_student, batch, attention, gradient, begun
teacher.to("cpu")  # it has read all problems: the student needs the room
tiny = scale.name == "tiny"
options = {"epochs": 6, "batch_size": 8, "learning_rate": 2e-3}
if not tiny:
    examples = examples[:12]
    options = {"epochs": 1, "batch_size": 1, "learning_rate": 2e-5}
ways = {
    "as the source": {"kv_weight": 1.0, "codi_weight": 0.5, "kv_warmup": 1000},
    "large and fading": {"kv_weight": 10.0, "kv_warmup": 0, "kv_end": 0.6},
}
shares, histories = {}, {}
for name, way in ways.items():
    torch.manual_seed(scale.seed)
    model, fixed = learner(), name == "large and fading"
    projector = Projector(
        *widths, "orthogonal" if fixed else "xavier"
    ).requires_grad_(not fixed)
    states = [
        torch.nn.Linear(
            teacher.config.hidden_size, model.config.hidden_size, bias=False
        )
    ]
    aligned_student = AlignedStudent(model, [projector], () if fixed else states)
    settings = align.AlignmentSettings(**options, **way)
    history = align.train_student(
        aligned_student, examples, settings, shares_every=2
    )
    histories[name] = history
    shares[name] = [h["share_kv"] for h in histories[name] if "share_kv" in h]
    del model, aligned_student
teacher.to(scale.device);

# %% mystnb={"image": {"alt": "Share of the KV loss in the gradient over the first steps. As the source has it, it stays near 0; large and fading, it begins high and falls to 0."}}
at = [h["step"] for h in histories["as the source"] if "share_kv" in h]
ax = plots.lines(at, shares, "step", "share of the KV loss in the gradient")
ax.set_ylim(0, 1)
if scale.name == "tiny":
    source, fading = shares.values()
    assert max(source) < 0.05
    assert fading[0] > 0.3
    assert fading[-1] < 0.01

# %% [markdown]
# ## The strongest rivals: the teacher's text and its probabilities
#
# A teacher need not give its cache.
# The plainest way to learn from it is {term}`text distillation`, to learn the solutions that it *writes* {cite}`kim2016sequence`, in its own style, right or wrong.
# The next is to learn its probabilities, too: of each token of these solutions, not only which one the teacher chose, but what else it thought of {cite}`hinton2015distilling`.
# Between two vocabularies, these can be compared where both have the same token in the same place, over the tokens that both have.

# %%
from kvlab.vocabularies import agreed_tokens, shared_tokens

shared = shared_tokens(tokenizer, words)
sizes = len(tokenizer), len(words), shared.shape[1]
print("student {} tokens, teacher {}, in both {}".format(*sizes))
(written,) = align.write_solutions(teacher, words, [long])
print("the teacher writes:", textwrap.shorten(written, 76))
if scale.name == "tiny":
    assert written == long[1]["content"]  # it was trained on this style
pair = segment(tokenizer, long), segment(words, long)
agreed, _ = agreed_tokens(*(text.begins for text in pair))
solution = int((pair[0].begins >= 0).sum())
reached = int((pair[0].begins[agreed] >= 0).sum())
print(f"{reached} of the {solution} tokens of the solution are the same in both")
(predicted,) = align.predict_with_teacher(teacher, [pair[1]], [pair[0]], shared)
certain = predicted.probabilities.max(-1).values
unsure = certain.masked_fill(certain == 0, 1).argsort()[:4]
pd.DataFrame(
    {
        "token": [tokenizer.decode(pair[0].input_ids[t]) for t in unsure],
        "the teacher's guesses": [
            ", ".join(
                f"{tokenizer.decode(i)!r} {p:.2f}"
                for i, p in zip(predicted.ids[t, :3], predicted.probabilities[t, :3])
            )
            for t in unsure
        ],
    }
)

# %% [markdown]
# These are the four tokens of the solution in its style that the teacher was least sure of.
# Of most others it is all but certain, so that its probabilities say little more than its text.
#
# ## The arms, and controls that should fail
#
# The source's plan has four arms: time by index or by segments, layers in proportion or by CKA.
# It expects 1 to 2 % from time, 2 to 3 % from layers, 3 to 5 % from both.
# To know whether anything helps, four more questions must be asked.
# What does the student learn with **no teacher** at all, from cross-entropy alone?
# What if the teacher's keys and values belong to **another problem**?
# What if the teacher has **random weights**?
# And is it the same with other seeds?
# If a control helps as much as the method, the gain does not come from the teacher.
#
# The benchmark trains them all: students of three layers, from random weights, with the lab's teacher, 600 problems again and again until they know them by heart, and then 300 new ones to solve.
# All arms have the same problems in the same order, and as many steps; each seed has problems of its own.
# So the question is which of them *generalizes*; and the teacher, which has seen far more arithmetic, has something to give.
# (A layer map by CKA needs a student that has learned something; it is made with the one that learned without a teacher.)

# %%
results = kvlab.results("align")
ARMS = {
    "segment": "segments",
    "ce_only": "no teacher",
    "full": "full: segments and CKA",
    "baseline": "baseline: neither",
    "cka": "CKA",
    "shuffled_segment": "segments, another problem",
    "shuffled": "full, another problem",
    "random_teacher": "full, random teacher",
}

# %% mystnb={"image": {"alt": "Share of test problems solved at four points of the training, for no teacher, four arms and three controls, with intervals over seeds."}}
def number(name):
    return int(name.rsplit("_", 1)[1])


parts = sorted(
    number(name) for name in results if name.startswith("accuracy_full_part")
)
curves = {
    label: [results[f"accuracy_{arm}_part_{part}"].interval for part in parts]
    for arm, label in ARMS.items()
}
percent = [100 * part // len(parts) for part in parts]
ax = plots.lines(
    percent, curves, "training done (%)", "problems solved", height=4.2
)
ax.set(ylim=(0, None), xticks=percent)
print(textwrap.fill(results["accuracy_full"].conditions, 78))
gap = [a - b for (a, _, _), (b, _, _) in zip(*list(curves.values())[:2])]
print("segments minus no teacher:", " ".join(f"{value:+.2f}" for value in gap))
assert max(gap[: len(gap) // 2]) < 0.1 < gap[-2]  # it opens in the third quarter

# %%
rows = {label: {"solved": f"accuracy_{arm}"} for arm, label in ARMS.items()}
gains = {
    label: {"minus no teacher": f"gain_{arm}"}
    for arm, label in ARMS.items()
    if arm != "ce_only"
}
table = results.table(rows, ".3f").join(results.table(gains, "+.3f")).fillna("")
over = results["segment_over_shuffled"]
print(f"segments minus segments with another problem: {over:+.3f} ({over.n} seeds)")
solved, gain = (
    {arm: results[f"{kind}_{arm}"] for arm in ARMS if f"{kind}_{arm}" in results}
    for kind in ("accuracy", "gain")
)
assert all(3 <= figure.n <= 5 for figure in solved.values())
assert solved["segment"].value == max(figure.value for figure in solved.values())
assert gain["segment"].value > 0.1
assert gain["segment"].low < 0
assert gain["baseline"].value < 0
assert gain["random_teacher"].high < 0
assert gain["full"].low < 0
assert gain["cka"].low < 0
assert solved["full"].low < solved["shuffled"].value
assert over.low > 0


def better(arm, other):
    """For each seed that both arms have, whether the first solves more."""
    names = (f"accuracy_{arm}_seed_{i}" for i in range(solved[arm].n))
    pairs = ((name, name.replace(arm, other, 1)) for name in names)
    return [results[a].value > results[b].value for a, b in pairs if b in results]


assert all(better("segment", "shuffled_segment"))
assert any(better("shuffled", "full"))
most = better("segment", "ce_only")
assert sum(most) > len(most) / 2
assert not all(most)
table

# %% mystnb={"image": {"alt": "Share solved, one dot per seed and a line at the mean, one row per arm: the dots of one arm are far apart, those of segments mostly to the right of the others."}}
strips = {}
for arm, label in ARMS.items():
    names = (f"accuracy_{arm}_seed_{i}" for i in range(solved[arm].n))
    strips[label] = [results[name].value for name in names]
plots.seed_strips(strips, "problems solved, a dot for each seed");

# %%
rows = {
    label: {"peak memory": f"mb_{arm}"}
    for arm, label in ARMS.items()
}
results.table(rows, ".0f")

# %% [markdown]
# (With so few seeds, an interval by Student's t is as wide as the range from the worst to the best of them, or wider. A difference from no teacher is computed on the seeds that both have. What the loss costs in time is measured in pairs, further down.)
#
# **Time is what counts.**
# With targets stretched segment by segment, and layers in proportion, students solve the most: on average far more than without a teacher, after the same steps on the same problems.
# But not with every seed: a student that learned without a teacher can have luck, too, and the interval contains 0.
# By index, the same teacher with the same weight is no help and rather does harm: most targets then belong to another token.
#
# **The controls show where the gain comes from.**
# With the same loss and a teacher that read another problem, students of the `segments` arm solve fewer problems with each seed, and the interval of that difference does not contain 0.
# So the features of *this* problem matter.
# A teacher with random weights ruins its student.
# And look at single seeds once more: one student of `full, another problem` did well, better than the `full` arm itself with that seed.
# With one seed each, almost any conclusion would have been possible, and three to five are few.
#
# **With layers by CKA no gain is left** that these seeds could show, neither over no teacher nor over the control, where the source expected more from layers than from time.
# Look where the map sends the student's layers:

# %%
depth = lab.models.make_config("lab-teacher").num_hidden_layers
even = proportional(3, depth).indices.flatten().tolist()
for layer, even_layer in enumerate(even):
    by_cka = results[f"cka_layer_{layer}"]
    print(
        f"student layer {layer}: teacher layer {even_layer} in proportion, {by_cka:.1f} by CKA"
    )
    assert abs(by_cka.value - (depth - 1) / 2) < 1.5  # near the middle

# %% [markdown]
# It sends all three near the middle of the teacher, and hardly by merit: rows of CKA are nearly flat, and another seed gives another map.
# So the first layer is asked for what took the teacher several layers to work out, and the last never hears of the teacher's end.
# The map also takes the mean of two layers where the other takes one; which of the two does the harm was not measured.
#
# The gap opens between half and three quarters of the training.
# By then the KV loss has faded to nothing, but the learning rate begins to fall at the same step, so that the two cannot be told apart here.
# By how many steps a problem takes:

# %% mystnb={"image": {"alt": "Share solved by the number of steps of the problem, one panel each, for all arms."}}
panels = {
    title: results.intervals(
        {f"accuracy_{arm}_steps_{n}": ARMS[arm] for arm in ARMS}
    )
    for n, title in {1: "1 step", 2: "2 steps", 3: "3 steps"}.items()
}
plots.splice_panels(panels);

# %% [markdown]
# ### Beside the teacher's text and probabilities
#
# These two arms were trained in a run of their own, with no teacher and segments again beside them, the same problems, order and number of steps.
# It is one seed so far, so that only large differences mean something.

# %% mystnb={"image": {"alt": "Share solved by a student without a teacher, one aligned by segments, one that learned the teacher's text, and one that learned its probabilities, too."}}
rivals = {
    "accuracy_beside_ce_only": "no teacher",
    "accuracy_beside_segment": "segments",
    "accuracy_text_distillation": "the teacher's text",
    "accuracy_logit_distillation": "its text and probabilities",
}
runs = {label: [results[name].value] for name, label in rivals.items()}
plots.seed_strips(runs, "problems solved")
alone, by_segments, by_text, by_both = (runs[label][0] for label in rivals.values())
assert min(by_segments, by_text) > alone + 0.2
assert by_both < by_text - 0.2
spread = [value for label in strips for value in strips[label] if label == "no teacher"]
print("the same arm with other seeds:", " ".join(f"{value:.2f}" for value in spread))
assert max(spread) - min(spread) > by_text - alone

# %% [markdown]
# With this seed the teacher's text, a rival that needs no cache, no layers and no widths to be aligned, does nearly as well as segments.
# That the probabilities of the same text take the gain away again shows above all how little one seed says: without a teacher, seeds of the runs above are further apart than that (the line below the figure).
# So the honest summary is that alignment by segments has not been shown to beat learning from the teacher's text.
#
# ### What else was tried
#
# Each with one seed, so that small differences mean nothing; the first three rows are arms from above with the same seed.

# %% mystnb={"image": {"alt": "Share solved with other settings, one row each."}}
tried = {
    "source": "as the source: weight 1, warm-up, CODI, Xavier",
    "weight_1": "segments, weight 1",
    "learned_projectors": "segments, projectors that learn along",
}
labels = {
    f"accuracy_{arm}_seed_0": ARMS[arm] for arm in ("ce_only", "segment", "full")
}
labels |= {f"accuracy_tried_{name}": label for name, label in tried.items()}
plots.splice_panels({"problems solved": results.intervals(labels)})
alone, by_segments, _, source, weight_1, learned = (
    results[name].value for name in labels
)
assert source < alone + 0.1
assert weight_1 > by_segments - 0.1
assert learned - alone < (by_segments - alone) / 2

# %% mystnb={"image": {"alt": "Share of the KV loss in the gradient over a whole training, for the segments arm, where it fades to 0, and as the source has it, where it rises."}}
steps = sorted(
    number(name) for name in results if name.startswith("share_segment_")
)
curves = {
    label: [results[f"share_{arm}_{step}"].value for step in steps]
    for arm, label in {"segment": "segments", "source": "as the source"}.items()
}
plots.lines(steps, curves, "step", "share of the KV loss")
source = curves["as the source"]
assert source[0] < 0.1
assert min(source[len(source) // 2 :]) > 0.3
assert curves["segments"][-1] == 0

# %% [markdown]
# As the source has it, nothing much is gained, though not because the loss is silent for good: its share of the gradient is small at first, and large in the second half, when its weight has risen and cross-entropy has fallen (below).
# A weight of 1 in place of 10 does nearly as well, if projectors stay as they are and the weight fades.
# With projectors that start from Xavier and learn along, most of the gain is gone with this seed; perhaps because the loss then has an easier way to fall than through the student.
#
# All of this is one small student, one teacher and one kind of problem, with settings that were chosen on other problems of the same kind, in some twenty trials of the `segments` and `full` arms.
# Controls with random weights were run for `full` only.
# That segments are ahead here does not say that they would be for Qwen2-7B and a pretrained student of 1.5B.
# `kvlab compare-alignments` runs the same comparison, controls included, for any two models and any of the source's data sets.
# It has three more arms, which are not measured here: `full_one_layer`, with the one most similar layer, and the two ablations of KaVa {cite}`kuzina2025kava`, `no_kv_loss` and `no_projector`.

# %% [markdown]
# ## What it costs
#
# The teacher reads each problem once.
# Its features are kept on disk, in half precision, with the student's tokens and layers, so that no teacher is in memory while the student trains, and several teachers are never in memory together.

# %%
per_problem = sum(x.numel() * x.element_size() for x in seen[0])
print(f"{per_problem / 1e6:.2f} MB per problem here")
megabytes = (
    2 * 2 * 512 * configs[1].num_hidden_layers * sizes[0] / 1e6
)  # keys and values, two bytes each
print(f"{megabytes:.0f} MB per problem of 512 tokens for Qwen2-7B and Qwen2-1.5B,")
print(f"so {10_000 * megabytes / 1000:.0f} GB of disk for ten thousand problems")
for name in (
    "resampling_over_loop",
    "resampling_over_loop_all_layers",
    "alignment_overhead",
    "reading_over_step",
):
    print(f"{name}: {results[name]:.2f}")
    print(textwrap.indent(textwrap.fill(results[name].conditions, 74), "    "))

# %% [markdown]
# ## Exercises
#
# ```{exercise-start} A marker of your own
# :label: ex-marker
# ```
# *Easy, 5 minutes.*
# A data set ends its solutions with "So we get 7 eggs." and nothing that `segment` knows.
# Which error does it raise for such a text?
# Give it a `marker`, and print the three segments.
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-marker
# :class: dropdown
# ````

# %%
odd = [
    {"role": "user", "content": "Anna has 3 eggs and buys 4. How many?"},
    {"role": "assistant", "content": "3+4=7. So we get 7 eggs."},
]
try:
    segment(tokenizer, odd)
except ValueError as error:
    print(textwrap.fill(str(error), 78))
ids, borders, _ = segment(tokenizer, odd, marker=r"\bSo we get\b")
for name, start, end in zip(align.SEGMENTS, borders, borders[1:]):
    print(f"{name:9} {tokenizer.decode(ids[start:end])}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Forget to un-rotate
# :label: ex-rotated
# ```
# *Medium, 10 minutes.*
# Fit ridge maps from the teacher's keys to the student's as they are in the cache, rotated, and compare the fraction of variance that they explain on other problems with that of un-rotated keys.
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-rotated
# :class: dropdown
# ````

# %%
def as_stored(texts, others):
    """As `aligned`, one problem at a time, but with rotated keys, as in the cache."""
    for one, two in zip(texts, others):
        plan = plan_time(one.borders[None], two.borders[None])
        given, mine = (
            align.KV(
                *cache.to_tensor(read(model, t).cache)
                .float()
                .permute(1, 2, 0, 4, 3, 5)
                .flatten(4)
            )
            for model, t in ((teacher, two), (student, one))
        )
        yield align.align_kv(given, plan, chosen), mine


def share_explained(projector, pairs):
    error = spread = 0.0
    for given, mine in pairs:
        truth, guess = (
            mine.keys,
            projector.to(mine.keys.device)(given).keys.detach(),
        )
        error += (truth - guess).square().sum().item()
        spread += (truth - truth.mean(2, keepdim=True)).square().sum().item()
    return 1 - error / spread


rotated = Projector(*widths).fit_ridge(as_stored(texts[:32], others[:32]))
explained = share_explained(rotated, as_stored(texts[32:], others[32:]))
print(f"rotated:    {explained:.2f}")
one_by_one = (
    next(aligned([one], [two])) for one, two in zip(texts[32:], others[32:])
)
unrotated = share_explained(projectors["ridge"], one_by_one)
print(f"un-rotated: {unrotated:.2f}")
if scale.name == "tiny":
    assert explained < unrotated

# %% [markdown]
# A rotated key is the un-rotated one turned by an angle that depends on its position, and by other angles in the two models.
# One linear map cannot undo that for all positions at once, so it explains less.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} Two teachers
# :label: ex-two-teachers
# ```
# *Medium, 10 minutes.*
# At the tiny scale there is a second teacher, `lab-target`, with the student's own tokenizer.
# Fit a ridge map for it on the same problems (it reads the long solutions, too), fuse both with weights from 0 to 1, and find the weight that explains most of the student's keys.
# Is the mean of two better than the better teacher alone?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-two-teachers
# :class: dropdown
# ````

# %%
if scale.name == "tiny":
    deep = lab.load("lab-target").to(student.device)
    their = [segment(tokenizer, t) for _, t in pairs]
    likeness = align.similar_layers(student, texts[:32], deep, their[:32])
    second = layer_map(likeness, k=2)

    def of_both(span):
        for one, two, other in zip(texts[span], others[span], their[span]):
            mine = align.features(read(student, one))
            parts = []
            for model, text, chosen_for in (
                (teacher, two, chosen),
                (deep, other, second),
            ):
                plan = plan_time(one.borders[None], text.borders[None])
                parts.append(
                    align.align_kv(
                        align.features(read(model, text)), plan, chosen_for
                    )
                )
            yield *parts, mine

    learned = [*of_both(slice(0, 32))]
    fitted = [
        Projector(learned[0][i].keys.shape[-1], widths[1]).fit_ridge(
            (r[i], r[2]) for r in learned
        )
        for i in (0, 1)
    ]
    explained = []
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        error = spread = 0.0
        for first, other, mine in of_both(slice(32, 48)):
            projected = [p(kv) for p, kv in zip(fitted, (first, other))]
            fused = align.fuse(projected, torch.tensor([1 - weight, weight]))
            error += (mine.keys - fused.keys).square().sum().item()
            spread += (
                (mine.keys - mine.keys.mean(2, keepdim=True)).square().sum().item()
            )
        explained.append(1 - error / spread)
        print(
            f"weight of the second {weight:.2f}: {explained[-1]:.3f} of the variance explained"
        )
    assert explained[2] > max(explained[0], explained[-1])

# %% [markdown]
# The mean of both explains more than either teacher alone: where one is wrong, the other often is not.
# Whether a student *learns* more from two is another question, for `kvlab train-aligned --teacher_model A B`.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - Four things differ between two caches: time, layer, head, and what the numbers mean. Each step can be checked alone, and should be.
# - Align time by segments or not at all. Here that was the difference between a gain with most seeds and none on average.
# - CKA as flat as this does not show what can be learned: layers in proportion taught more than layers by CKA.
# - A KV loss is strong medicine. Look at its fraction of the gradient, let it fade, and run the controls (no teacher, another problem, random weights), each with more seeds than you think.
# - A cache carried over by linear maps cannot be read from, but it can be learned toward.
# - Before you align caches, try the teacher's text. It needs no alignment at all, and may do as well.
#
# The cell below runs alone, after the imports.

# %%
from kvlab import Scale, align, lab
from kvlab.lab.corpora import Solutions
from kvlab.layers import proportional

scale = Scale.current()
teacher, words = scale.load("teacher"), scale.load_tokenizer("teacher")
student, tokenizer = scale.load("student").float(), scale.load_tokenizer("student")
student.requires_grad_(True).gradient_checkpointing_enable()

problems = [*Solutions(16, seed=1)]
texts = [align.segment(tokenizer, mine) for mine, _ in problems]
layers = proportional(
    student.config.num_hidden_layers, teacher.config.num_hidden_layers
)
others = [align.segment(words, theirs) for _, theirs in problems]
seen = align.encode_with_teacher(teacher, others, texts, layers)
teacher.to("cpu")  # it has read all problems
width = (
    seen[0].keys.shape[-1],
    student.base_model.layers[0].self_attn.k_proj.out_features,
)
projector = align.Projector(*width, "orthogonal").requires_grad_(False)
options = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-4}
settings = align.AlignmentSettings(
    **options, kv_warmup=0
)  # and kv_end=0.6 for more steps
aligned_student = align.AlignedStudent(student, [projector])
examples = list(zip(texts, seen))
history = align.train_student(aligned_student, examples, settings)
print([round(h["kv"], 2) for h in history])

# %% [markdown]
# **Further reading**: CKA {cite}`kornblith2019cka,nguyen2021cka`; CODI, which distills reasoning into hidden states {cite}`shen2025codi`.
# The next chapter spends a cache on speed.
