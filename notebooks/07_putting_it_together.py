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
# - see after each step that the answer is still the target's, token for token;
# - read off a waterfall what each part saves, and which does not pay here;
# - take the same code to models of your own.
#
# **Time and memory**: about half a minute and 1 GB, most of it PyTorch itself, at `tiny`; what the models take at any scale is printed by the second cell.
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
from pathlib import Path

import pandas as pd
import torch
from IPython.display import display

import kvlab
from kvlab import Scale, cache, lab, plots
from kvlab.models import fingerprint
from kvlab.cache import Prefix
from kvlab.compress import KVDistiller
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
# A document lies in a store, and somebody asks about it. The target is to answer, in its own words and as soon as it can. Without this book it reads the document and the request, and then writes a token at a time:

# %%
conversation = Requests(1, seed=5, test=True)[0]
document, request = (torch.tensor(ids) for ids in encode_parts(tokenizer, conversation))
print(textwrap.fill(conversation[0]["content"], 78))
print(">", conversation[1]["content"], "\n")


def answer(ids, proposer=None, prefix=None):
    return generate(target, [ids], proposer, gamma=4, max_new_tokens=96, prefix=prefix)


plain = answer(torch.cat((document, request)))
print(textwrap.fill(tokenizer.decode(plain.tokens[0], skip_special_tokens=True).strip(), 78))

# %% [markdown]
# ## What is stored
#
# The document is read once, when it comes into the store, by everybody who will need it. What each made of it is kept as a file ({doc}`chapter 01 <01_knowledge_caching>`). For the draft there are three forms of it:
#
# - **as it read it** itself;
# - **fused** with what the target made of it ({doc}`chapter 06 <06_cache_fusion>`). Nobody has to wait for that, for there is no question yet;
# - **distilled**: a quarter of the fused entries. A distiller chooses them ({doc}`chapter 03 <03_kv_distill>`); what it would also write into the target's entries does not fit the draft's, and is left out.
#
# Only the draft's cache is changed. The target's stays as it is, and with it the text. What comes after the document, the draft reads on top of what it was given, as any model reads on top of a cache.

# %%
# The lab's are shipped. For other models `kvlab train-fuser` and `kvlab distill` write these two folders.
tiny, models = scale.name == "tiny", lab.models.MODELS
made = [models / "lab-fuser", models / "lab-distiller"] if tiny else [Path("fuser"), Path("distiller")]
if all(folder.exists() for folder in made):
    fuser = Fuser.from_pretrained(made[0])
    distiller = KVDistiller.from_pretrained(made[1], target)
else:  # not trained: the fuser changes nothing, and the distiller chooses at random
    print(f"There is no {made[0]} or no {made[1]}, so that the last two steps show how it runs, not what it brings.")
    fuser = Fuser(Size.of(draft.config), Size.of(target.config), settings=Settings(hidden=64))
    distiller = KVDistiller(target)
fuser = fuser.to(draft.device, torch.float32)

ids = document[None]
with torch.no_grad():
    own, theirs = cache.prefill(draft, ids.to(draft.device)), cache.prefill(target, ids.to(target.device))
    fused = fuser(own, theirs)
    chosen = distiller.compress(ids.to(target.device), retention=0.25)
kept = chosen.positions[0]
forms = {
    "target": (theirs.cache, target),
    "read": (own.cache, draft),
    "fused": (fused, draft),
    "distilled": (cache.select(fused, kept), draft),
}
folder = Path(tempfile.mkdtemp())
for name, (made, model) in forms.items():
    cache.save(made, folder / f"{name}.safetensors", model, len(document))
    print(f"{name:9} {cache.length(made):4} entries, {cache.nbytes(made) / 1e3:6.0f} kB")


# %%
plots.score_view(document.tolist(), {"kept": (chosen.scores[0].float().tolist(), kept.tolist())}, tokenizer)

# %% [markdown]
# ## Step by step
#
# Each step is a different way to get the same answer. `known` loads a form from its file; the time of that counts.

# %%
owned = {"target": target, "draft": draft}
owners = {name: fingerprint(model) for name, model in owned.items()}


def known(name):
    model = "target" if name == "target" else "draft"
    found = cache.load(folder / f"{name}.safetensors", owners[model])
    there = cache.from_tensor(cache.to_tensor(found.cache).to(owned[model].device))
    return Prefix(there, found.next_position, document.tolist())


steps = {
    "plain": lambda: answer(torch.cat((document, request))),
    "knowledge cache": lambda: answer(request, None, known("target")),
    "a draft, which reads all": lambda: answer(request, ModelProposer(draft), known("target")),
    "it has a cache, too": lambda: answer(request, ModelProposer(draft, known("read")), known("target")),
    "fused": lambda: answer(request, ModelProposer(draft, known("fused")), known("target")),
    "distilled": lambda: answer(request, ModelProposer(draft, known("distilled")), known("target")),
}
rows, last = {}, None
for _ in range(2):  # the first round warms up
    for name, run in steps.items():
        started = time.perf_counter()
        made = run()
        seconds, found = time.perf_counter() - started, summarize(made.rounds)
        rows[name] = {
            "answer (ms)": 1000 * seconds,
            "first token (ms)": 1000 * found.ttft,
            "accepted": found.acceptance,
            "tokens a call": found.tokens_per_call,
        }
        last = made
        if target.dtype == torch.float32:
            assert torch.equal(made.tokens[0], plain.tokens[0])  # the target's answer, at every step
display(pd.DataFrame(rows).T.round(2))

# %% [markdown]
# The last step's rounds: what was guessed, what was accepted, and what the target said itself.

# %%
plots.token_view(last.rounds, tokenizer)

# %% [markdown]
# ## The waterfall
#
# One request says little, least of all about time. The benchmark has sixty, each answered by all steps in turn, three times over. It has one step more: after the draft comes *the same draft, trained* on what the target said to other requests ({doc}`chapter 02 <02_draft_training>`), and the fuser is for that one.

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
savings = results.intervals({f"saved_{name}": names[name] for name in list(names)[1:]})
plots.waterfall(totals, savings, "milliseconds from the files to the last token")
print(textwrap.fill(results["ms_plain"].conditions, 78))

# %%
columns = {"per target call": "tokens_per_call", "same text": "equal", "accepted": "acceptance"}
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

# %% [markdown]
# The draft pays here, and so does its training. The caches save little time on passages as short as these; chapter 01 measures longer ones. Fusing brings nothing to a draft that was trained for this target and that has read the same (chapter 06 has the case where it has not). And with a quarter of the entries it guesses worse: that saves memory, not time.
#
# ## A check you can break
#
# Whatever is done to the draft, the text is the target's. Choose a quarter of the target's own entries in the same way, and it is not its text any more. (Chapter 03 does better with a quarter, since there the distiller also writes into what it keeps. Equal it is not there either.)

# %%
others = Requests(8, seed=5, test=True)
same = {"draft": [], "target": []}
for one in others:
    passage, rest = (torch.tensor(part) for part in encode_parts(tokenizer, one))
    with torch.no_grad():
        both = [cache.prefill(model, passage[None].to(model.device)) for model in (target, draft)]
        some = distiller.compress(passage[None].to(target.device), retention=0.25).positions[0]
    right = answer(rest, None, both[0]).tokens[0]
    poor = [p._replace(cache=cache.select(p.cache, some)) for p in both]
    same["draft"].append(torch.equal(answer(rest, ModelProposer(draft, poor[1]), both[0]).tokens[0], right))
    same["target"].append(torch.equal(answer(rest, None, poor[0]).tokens[0], right))
print({who: sum(equal) for who, equal in same.items()}, "of", len(others), "answers unchanged")
if target.dtype == torch.float32:
    assert all(same["draft"])
assert scale.name != "tiny" or not all(same["target"])

# %% [markdown]
# ## Exercises
#
# ```{exercise-start} Distill harder
# :label: ex-harder
# ```
# *Easy, 5 minutes.* How many entries of the document does the draft need? Give it 50, 25, 10 and 2 % of the fused ones, and print what is accepted.
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-harder
# :class: dropdown
# ````

# %%
for share in (0.5, 0.25, 0.1, 0.02):
    some = distiller.compress(ids.to(target.device), retention=share).positions[0]
    prefix = Prefix(cache.select(fused, some), len(document), document.tolist())
    made = answer(request, ModelProposer(draft, prefix), known("target"))
    found = summarize(made.rounds)
    print(f"{share:4.0%} {len(some):3} entries: accepted {found.acceptance:.2f}, {found.tokens_per_call:.2f} tokens a call")

# %% [markdown]
# One request is a coarse measure: all of the entries had less than half of them. From there down the direction shows. What the draft forgets costs acceptance, never the text.
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise-start} No draft at all
# :label: ex-lookup
# ```
# *Easy, 5 minutes.* The answer is made of sentences of the document. So prompt lookup (chapter 05), which needs no model, no cache and no training, should find them. Does it?
# ```{exercise-end}
# ```

# %% [markdown]
# ````{solution-start} ex-lookup
# :class: dropdown
# ````

# %%
from kvlab.speculate import LookupProposer

made = answer(request, LookupProposer(), known("target"))
found = summarize(made.rounds)
print(f"accepted {found.acceptance:.2f}, {found.tokens_per_call:.2f} tokens a call")

# %% [markdown]
# It finds some: the lookup copies what followed the same words, and here many sentences begin alike and go on differently. It costs next to nothing, so try it first.
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - The parts fit together because each hands over an ordinary cache, with its next position and the ids that it stands for.
# - Only the target's cache decides about the text. Everything that is approximate belongs to the draft.
# - Work that does not depend on the question (reading, fusing, distilling) belongs to the store, where nobody waits for it.
# - Measure each step against the one before, on the same requests, and leave out those that do not pay.
#
# The cell below runs alone.

# %%
import torch

from kvlab import Scale, cache, speculate
from kvlab.generation import encode_parts

scale = Scale.current()
target, draft, tokenizer = scale.load("target"), scale.load("draft"), scale.load_tokenizer("target")
document = {"role": "system", "content": "Anna lives in Rome. Anna has a dog. Ben lives in Oslo."}
turns = [document, {"role": "user", "content": "Tell me about Anna."}]
passage, request = (torch.tensor(ids) for ids in encode_parts(tokenizer, turns))
with torch.no_grad():
    stored = [cache.prefill(model, passage[None].to(model.device)) for model in (target, draft)]
proposer = speculate.ModelProposer(draft, stored[1])
made = speculate.generate(target, [request], proposer, prefix=stored[0], max_new_tokens=48)
print(tokenizer.decode(made.tokens[0], skip_special_tokens=True))

# %% [markdown]
# **Further reading**: the page {doc}`At scale <../book/at_scale>` takes the commands to several GPUs.
