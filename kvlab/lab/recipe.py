"""How the lab models are made: `python -m kvlab.lab train`. Seeded, resumable, on CPU or GPU.

Look-up of facts grows from plain repetition, so repetition comes first and fades; passages and
problems grow harder along each stage. The deep target is a shallow one that has learned, grown to
its depth and trained on.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import normalizers
from torch.nn import functional
from torch.utils.data import DataLoader

from kvlab.files import write_text
from kvlab.lab import models
from kvlab.lab.corpora import Mix, Rows, Wordings, faq
from kvlab.lab.tokenizers import train_tokenizer
from kvlab.losses import cross_entropy
from kvlab.training import fit


@dataclass(frozen=True)
class Stage:
    """One run of `fit`: a depth, a mix of documents, and for how long."""

    layers: int
    mix: Mix
    steps: int
    batch: int
    learning_rate: float


SHORT = Mix(row=192, repetition=0.22, arithmetic=0.25, faq=0.0, facts=(2, 16), easy=0.6)
MIXED = Mix(row=192, repetition=0.18, arithmetic=0.34, faq=0.06, facts=(2, 16), easy=0.5)
LONG = Mix(
    row=320, repetition=0.04, arithmetic=0.30, faq=0.10, facts=(4, 40), easy=0.2, questions=10
)
LOOKUP = Mix(
    row=320,
    repetition=0.03,
    arithmetic=0.2,
    faq=0.08,
    facts=(8, 40),
    kinds=(75, 0, 15, 10),
    easy=0.0,
    questions=12,
)
FAQ = replace(LOOKUP, repetition=0.02, arithmetic=0.13, faq=0.45, reworded=0.8)
TOKENIZERS = {"lab-target": (1536, 0), "lab-draft": (1536, 0), "lab-teacher": (640, 1)}
STAGES = {
    "lab-draft": [Stage(2, SHORT, 1400, 24, 2e-3)],
    "lab-target": [
        Stage(4, SHORT, 1600, 24, 2e-3),
        Stage(12, LONG, 1300, 16, 1e-3),
        Stage(12, LOOKUP, 420, 16, 7e-4),
        Stage(12, FAQ, 600, 16, 7e-4),
        Stage(12, replace(FAQ, arithmetic=0.17, faq=0.55, reworded=0.9), 900, 16, 7e-4),
    ],
    "lab-teacher": [Stage(6, MIXED, 1900, 24, 2e-3)],
}


def train(
    name: str, work: Path = Path("lab-runs"), out: Path = models.MODELS, seed: int = 0
) -> Path:
    """Train one lab model from nothing and write it, half precision, with its tokenizer to `out/name`.

    Checkpoints stand in `work`; a run that was stopped goes on from them. Returns the folder
    written.
    """
    tokenizer = train_tokenizer(*TOKENIZERS[name])
    model = None
    for number, stage in enumerate(STAGES[name]):
        if model is None:
            model = models.make(name, seed, num_hidden_layers=stage.layers)
        elif stage.layers != model.config.num_hidden_layers:
            model = models.grow(model, stage.layers)
        rows = Rows(tokenizer, stage.mix, stage.steps * stage.batch, seed=seed + number)
        fit(
            model,
            DataLoader(rows, batch_size=stage.batch),
            _losses,
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            weight=lambda batch: batch["weights"][:, 1:].sum(),
            checkpoint=work / f"{name}-{number}.safetensors",
            every=100,
            seed=seed,
        )
    return save(model, tokenizer, out / name)


def train_embedder(out: Path = models.MODELS, seed: int = 0, steps: int = 400) -> Path:
    """Train the lab's sentence embedder and write it to `out/lab-embedder`; takes seconds. Returns the folder.

    A vector for each token of the lab's tokenizer, and a question is the mean of its tokens'
    vectors. Wordings of an item are pulled to its question, against the other items' and against
    questions that the FAQ does not answer (multiple negatives ranking, Henderson et al. 2017, arXiv
    1705.00652, section 4.4).
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(seed)
    words = train_tokenizer(*TOKENIZERS["lab-target"]).backend_tokenizer
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    table = StaticEmbedding(words, embedding_weights=0.1 * torch.randn(words.get_vocab_size(), 128))
    embedder = SentenceTransformer(modules=[table], device="cpu")
    loader = DataLoader(
        Wordings(steps, seed),
        batch_size=len(faq()),
        collate_fn=lambda rows: {
            name: table.preprocess([row[name] for row in rows]) for name in rows[0]
        },
    )
    settings = {
        "learning_rate": 0.02,
        "weight_decay": 0.0,
        "warmup": 0,
        "decay": 1.0,
        "every": steps,
    }
    fit(embedder, loader, _ranking, steps=steps, seed=seed, **settings)
    folder = out / models.EMBEDDER
    embedder.save_pretrained(str(folder), create_model_card=False)
    parts = (folder / "modules.json").read_text("utf-8")
    # Under this name older releases of sentence-transformers know it too.
    write_text(
        folder / "modules.json",
        parts.replace(StaticEmbedding.__module__, "sentence_transformers.models"),
    )
    return folder


def _ranking(embedder, batch):
    vectors = {name: embedder(dict(texts))["sentence_embedding"] for name, texts in batch.items()}
    question, wording, other = (
        functional.normalize(vectors[name]) for name in ("question", "wording", "other")
    )
    scores = (
        10 * question @ torch.cat([wording, other]).T
    )  # (n, 2 n); the right ones are on the diagonal
    right = torch.arange(len(scores))
    return {
        "ranking": (
            functional.cross_entropy(scores, right)
            + functional.cross_entropy(scores.T[right], right)
        )
        / 2
    }


def save(model, tokenizer, folder: Path) -> Path:
    """Write a model in float16 beside its tokenizer, in the Hugging Face layout."""
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _losses(model, batch):
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return {"ce": cross_entropy(logits, batch["input_ids"], batch["weights"])}
