# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07. Putting it together
#
# ```{admonition} In this chapter
# :class: tip
# - answer one request about a document in steps, each of which adds one part of this book;
# - check after each step that the answer is still the target's, token for token;
# - read off a waterfall how much each part saves, and which part does not pay here;
# - take the same code to models of your own.
#
# **Time and memory**: about half a minute and 1 GB, most of it PyTorch itself, at `tiny`. The second cell prints the size of the models at any scale.
#
# **Code**: nothing new. Everything here is from the chapters before; the measurement is `tests/benchmarks/together.py`.
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
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from IPython.display import display

import kvlab
from kvlab import Scale, cache, lab, plots
from kvlab.models import fingerprint
from kvlab.distill import KVDistiller
from kvlab.generation import encode_parts
from kvlab.fuse import Fuser, Settings, Size
from kvlab.lab.corpora import Requests
from kvlab.speculate import ModelProposer, generate, summarize

scale = Scale.current()
print(scale.describe("07_putting_it_together"))
target, draft = scale.load("target"), scale.load("draft")
tokenizer = scale.load_tokenizer("target")
results = kvlab.results("together")

# %% [markdown]
# ## The question
#
# A document is in a store, and somebody asks about it.
# The target should answer, in its own words and as soon as possible.
# Without this book it reads the document and the request, and then writes one token at a time:

# %%
conversation = Requests(1, seed=1, test=True)[0]
document, request = map(torch.tensor, encode_parts(tokenizer, conversation))
print(textwrap.fill(conversation[0]["content"], 78))
print(">", conversation[1]["content"], "\n")


def answer(ids, proposer=None, prefix=None):
    options = {"gamma": 4, "max_new_tokens": 96, "tokenizer": tokenizer}
    return generate(target, [ids], proposer, prefix=prefix, **options)


plain = answer(torch.cat((document, request)))
text = tokenizer.decode(plain.tokens[0], skip_special_tokens=True).strip()
print(textwrap.fill(text, 78))


def sentences(text):
    return set(text.removesuffix(".").split(". "))


if scale.name == "tiny":  # nothing that the document does not say
    assert sentences(text) <= sentences(conversation[0]["content"])

# %% [markdown]
# The lab's target is small, and about many documents it also says what is not there.
# We chose one that it describes correctly, as the last lines check.
# The other parts of this chapter do not depend on that: they give the target's text, right or wrong, sooner.

# %% [markdown]
# ## What is stored
#
# Each model reads the document once, when it is added to the store.
# Their caches are kept as files ({doc}`chapter 01 <01_knowledge_caching>`).
# The draft's cache has three forms:
#
# - **read** by the draft itself;
# - **fused** with the target's cache ({doc}`chapter 06 <06_cache_fusion>`). Nobody has to wait for that, because there is no question yet;
# - **distilled**: a quarter of the fused entries, chosen by a distiller ({doc}`chapter 03 <03_kv_distill>`). The distiller would also write into the target's entries; this does not fit the draft's, and is left out.
#
# Only the draft's cache is changed.
# The target's cache stays as it is, and with it the text.
# The draft reads the request after the stored cache, as any model continues a cache.

# %%
# The lab's are shipped. For other models `kvlab train-fuser` and `kvlab distill` write them.
tiny = scale.name == "tiny"
folder = lab.models.MODELS if tiny else Path()
trained = folder / ("lab-fuser" if tiny else "fuser")
scorer = folder / ("lab-distiller" if tiny else "distiller")
if trained.exists() and scorer.exists():
    fuser = Fuser.from_pretrained(trained)
    distiller = KVDistiller.from_pretrained(scorer, target)
else:  # not trained: the fuser changes nothing, and the distiller chooses at random
    print(f"No {trained} or no {scorer}: the last two steps only show the code.")
    sizes = Size.of(draft.config), Size.of(target.config)
    fuser = Fuser(*sizes, settings=Settings(hidden=64))
    distiller = KVDistiller(target)
fuser = fuser.to(draft.device, torch.float32)

ids = document[None]
with torch.no_grad():
    draft_prefix = cache.prefill(draft, ids.to(draft.device))
    target_prefix = cache.prefill(target, ids.to(target.device))
    fused = fuser(draft_prefix, target_prefix)
    chosen = distiller.compress(ids.to(target.device), retention=0.25)
kept = chosen.positions[0]


def select(prefix, indices):
    """Keep the entries with these indices, and their positions."""
    positions = prefix.positions[:, indices]
    kept_cache = cache.select(prefix.cache, indices)
    return replace(prefix, cache=kept_cache, positions=positions)


fused_prefix = replace(draft_prefix, cache=fused)
forms = {
    "target": target_prefix,
    "read": draft_prefix,
    "fused": fused_prefix,
    "distilled": select(fused_prefix, kept),
}
folder = Path(tempfile.mkdtemp())
for name, form in forms.items():
    model = target if name == "target" else draft
    cache.save(form, folder / f"{name}.safetensors", model)
    entries, size = cache.length(form.cache), cache.nbytes(form.cache) / 1e3
    print(f"{name:9} {entries:4} entries, {size:6.0f} kB")


# %%
scores = distiller.scores(ids.to(target.device))[0].float().tolist()
plots.score_view(document.tolist(), {"kept": (scores, kept.tolist())}, tokenizer)

# %% [markdown]
# ## Step by step
#
# Each step is a different way to get the same answer.
# `stored` loads a form from its file, and its time counts.

# %%
fingerprints = {model: fingerprint(model) for model in (target, draft)}


def stored(name):
    model = target if name == "target" else draft
    prefix = cache.load(folder / f"{name}.safetensors", fingerprints[model])
    tensor = cache.to_tensor(prefix.cache).to(model.device)
    ids = document.tolist()
    return replace(prefix, cache=cache.from_tensor(tensor), input_ids=ids)


def with_draft(name=None):
    proposer = ModelProposer(draft, stored(name) if name else None)
    return answer(request, proposer, stored("target"))


steps = {
    "plain": lambda: answer(torch.cat((document, request))),
    "knowledge cache": lambda: answer(request, None, stored("target")),
    "a draft, which reads all": with_draft,
    "the draft has a cache, too": lambda: with_draft("read"),
    "fused": lambda: with_draft("fused"),
    "distilled": lambda: with_draft("distilled"),
}
rows = {}
for _ in range(2):  # the first round warms up
    for name, run in steps.items():
        started = time.perf_counter()
        last = run()
        seconds, summary = time.perf_counter() - started, summarize(last.rounds)
        rows[name] = {
            "answer (ms)": 1000 * seconds,
            "first token (ms)": 1000 * summary.ttft,
            "accepted": summary.acceptance,
            "tokens per call": summary.tokens_per_call,
        }
        if target.dtype == torch.float32:  # the target's answer, at every step
            assert torch.equal(last.tokens[0], plain.tokens[0])
display(pd.DataFrame(rows).T.round(2))

# %% [markdown]
# The last step's rounds: the guesses, the accepted ones, and the target's own tokens.

# %%
plots.token_view(last.rounds, tokenizer)

# %% [markdown]
# ## The waterfall
#
# One request shows little, least of all about time.
# The benchmark has sixty, each answered by all steps in turn, three times over.
# It has one more step: after the draft comes *the same draft, trained* on the target's answers to other requests ({doc}`chapter 02 <02_draft_training>`), and the fuser is for that one.

# %% mystnb={"image": {"alt": "A waterfall of milliseconds for an answer: plain decoding, then what the knowledge cache, the draft, its training, its own knowledge cache, fusion and distillation take off or add."}}
names = {
    "plain": "plain",
    "knowledge": "knowledge cache (01)",
    "draft": "a draft, which reads all (05)",
    "trained": "trained (02)",
    "reads": "it has a cache, too (01)",
    "fused": "fused (06)",
    "distilled": "a quarter of it (03)",
}
totals = {label: results[f"ms_{name}"].value for name, label in names.items()}
savings = results.intervals(
    {f"saved_{name}": names[name] for name in list(names)[1:]}
)
plots.waterfall(totals, savings, "milliseconds from the files to the last token")
print(textwrap.fill(results["ms_plain"].conditions, 78))

# %%
columns = {
    "per target call": "tokens_per_call",
    "same text": "equal",
    "accepted": "acceptance",
}
rows = {
    label: {
        column: f"{figure}_{name}"
        for column, figure in columns.items()
        if f"{figure}_{name}" in results
    }
    for name, label in names.items()
}
display(results.table(rows, ".3f"))
for name, cached in {
    "target": "target",
    "reads": "draft",
    "distilled": "draft, distilled",
}.items():
    print(f"cache of a passage, {cached}: {results[f'kb_{name}'].value:.0f} kB")
saved = {name: results[f"saved_{name}"].interval for name in list(names)[1:]}
for name in ("draft", "trained"):  # they pay
    assert saved[name][1] > 0
for name in ("knowledge", "reads"):  # little
    assert saved[name][2] < 0.1 * results["ms_plain"].value
assert saved["fused"][2] < 0.05 * results["ms_plain"].value  # next to nothing
assert saved["distilled"][2] < 0  # costs time
fewer, more = (results[f"acceptance_{arm}"] for arm in ("distilled", "fused"))
assert fewer.value < more.value

# %% [markdown]
# The draft pays here, and so does its training (the last lines of the cell check each of these sentences).
# The caches save little time on passages as short as these; chapter 01 measures longer ones.
# Fusing brings next to nothing to a draft that was trained for this target and has read the same text (chapter 06 has the case where it has not).
# With a quarter of the entries the draft guesses worse: that saves memory, not time.
#
# ## A check you can break
#
# Whatever is done to the draft, the text is the target's.
# Choose a quarter of the target's own entries in the same way, and most of the texts change.
# (Short answers survive such a choice in chapter 03; a description of many facts, in the same words and order, does not.)

# %%
others = Requests(8, seed=5, test=True)
same = {"draft": [], "target": []}
for one in others:
    passage, rest = (torch.tensor(part) for part in encode_parts(tokenizer, one))
    ids = passage[None]
    with torch.no_grad():
        full = cache.prefill(target, ids.to(target.device))
        draft_full = cache.prefill(draft, ids.to(draft.device))
        compressed = distiller.compress(ids.to(target.device), retention=0.25)
    some = compressed.positions[0]
    expected = answer(rest, None, full).tokens[0]
    output = answer(rest, ModelProposer(draft, select(draft_full, some)), full)
    same["draft"].append(torch.equal(output.tokens[0], expected))
    output = answer(rest, None, select(full, some))
    same["target"].append(torch.equal(output.tokens[0], expected))
unchanged = {model: sum(equal) for model, equal in same.items()}
print(unchanged, "of", len(others), "answers unchanged")
if target.dtype == torch.float32:
    assert all(same["draft"])
if scale.name == "tiny":
    assert sum(same["target"]) < len(others) / 2

# %% [markdown]
# ## Exercises
#
# ```{exercise-start} Distill harder
# :label: ex-harder
# ```
# *Easy, 5 minutes.*
# How many entries of the document does the draft need?
# Give it 50, 25, 10 and 2 % of the fused ones, and print the acceptance.
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-harder
# :class: dropdown
# ````

# %%
accepted_at = {}
for retention in (0.5, 0.25, 0.1, 0.02):
    ids = document[None].to(target.device)
    some = distiller.compress(ids, retention=retention).positions[0]
    proposer = ModelProposer(draft, select(fused_prefix, some))
    output = answer(request, proposer, stored("target"))
    summary = summarize(output.rounds)
    print(
        f"{retention:4.0%} {len(some):3} entries: accepted {summary.acceptance:.2f}"
    )
    accepted_at[retention] = summary.acceptance
if scale.name == "tiny":
    assert accepted_at[0.5] > accepted_at[0.02]

# %% [markdown]
# With 2 % of the entries fewer guesses are accepted than with half of them; one request shows no more.
# A forgotten entry costs acceptance, never the text.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} No draft at all
# :label: ex-lookup
# ```
# *Easy, 5 minutes.*
# The answer consists of sentences of the document.
# So prompt lookup (chapter 05), which needs no model, no cache and no training, should find them.
# Does it?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-lookup
# :class: dropdown
# ````

# %%
from kvlab.speculate import LookupProposer

summary = summarize(answer(request, LookupProposer(), stored("target")).rounds)
accepted, gained = summary.acceptance, summary.tokens_per_call
print(f"accepted {accepted:.2f}, {gained:.2f} tokens per call")
if scale.name == "tiny":  # some, not all
    assert 0 < accepted < 0.95
    assert gained > 1

# %% [markdown]
# It finds some: the lookup copies the words that followed the same words before, and here many sentences begin alike and continue differently.
# It costs next to nothing, so try it first.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - The parts fit together because each passes on an ordinary cache, with its next position and its token ids.
# - Only the target's cache determines the text. Every approximation belongs to the draft.
# - Work that does not depend on the question (reading, fusing, distilling) belongs to the store, where nobody waits for it.
# - Measure each step against the one before, on the same requests, and leave out the steps that do not pay.
#
# The cell below runs alone.

# %%
import torch

from kvlab import Scale, cache, speculate
from kvlab.generation import encode_parts
from kvlab.lab.corpora import Requests

scale = Scale.current()
target, draft = scale.load("target"), scale.load("draft")
tokenizer = scale.load_tokenizer("target")
turns = Requests(1, seed=378, test=True)[0]  # a passage, and a request
passage, request = (torch.tensor(ids) for ids in encode_parts(tokenizer, turns))
with torch.no_grad():
    target_prefix = cache.prefill(target, passage[None].to(target.device))
    draft_prefix = cache.prefill(draft, passage[None].to(draft.device))
proposer = speculate.ModelProposer(draft, draft_prefix)
options = {"prefix": target_prefix, "max_new_tokens": 48, "tokenizer": tokenizer}
output = speculate.generate(target, [request], proposer, **options)
answer = tokenizer.decode(output.tokens[0], skip_special_tokens=True).strip()
for message in (*turns, {"role": "assistant", "content": answer}):
    print(f"{message['role']}: {message['content']}")
if scale.name == "tiny":  # it says nothing that the passage does not say
    assert all(part in turns[0]["content"] for part in answer.split(". "))

# %% [markdown]
# **Further reading**: the page {doc}`At scale <../book/at_scale>` takes the commands to several GPUs.
