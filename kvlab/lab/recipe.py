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
    """One run of `fit`: depth, mix of documents, steps, batch size and learning rate."""

    layers: int
    mix: Mix
    steps: int
    batch: int
    learning_rate: float


SHORT = Mix(row=192, repetition=0.22, arithmetic=0.25, easy=0.6)
MIXED = replace(SHORT, repetition=0.18, arithmetic=0.34, faq=0.06, easy=0.5)
LONG = replace(SHORT, row=320, repetition=0.04, arithmetic=0.3, faq=0.1, facts=(4, 40))
LONG = replace(LONG, questions=10, easy=0.2)
LOOKUP = replace(LONG, repetition=0.03, arithmetic=0.2, faq=0.08, facts=(8, 40), questions=12)
LOOKUP = replace(LOOKUP, kinds=(75, 0, 15, 10), easy=0.0)
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


def train_lab_model(name: str, work: Path, out: Path, seed: int = 0) -> Path:
    """Train one lab model from scratch and write it, in float16, with its tokenizer to `out/name`.

    Args:
        work: folder of the checkpoints, from which an interrupted run continues.
        seed: random seed (initialization, documents, shuffling).

    Returns:
        The folder of the model.
    """
    tokenizer, stages = train_tokenizer(*TOKENIZERS[name]), STAGES[name]
    model = models.make(name, seed, num_hidden_layers=stages[0].layers)
    for number, stage in enumerate(stages):
        if stage.layers != model.config.num_hidden_layers:
            model = models.grow(model, stage.layers)
        rows = Rows(tokenizer, stage.mix, stage.steps * stage.batch, seed=seed + number)
        loader = DataLoader(rows, batch_size=stage.batch)
        settings = {"steps": stage.steps, "learning_rate": stage.learning_rate, "every": 100}
        settings["checkpoint"] = work / f"{name}-{number}.safetensors"
        fit(model, loader, _losses, weight=_answer_weight, seed=seed, **settings)
    model.to(torch.float16).save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    return out / name


def _losses(model, batch):
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return {"ce": cross_entropy(logits, batch["input_ids"], batch["weights"])}


def _answer_weight(batch):
    return batch["weights"][:, 1:].sum()


def train_embedder(out: Path, steps: int = 400) -> Path:
    """Train the lab's sentence embedder and write it to `out/lab-embedder`; takes seconds.

    Each token of the lab's tokenizer has a vector, and a question is the mean of its tokens'
    vectors. Wordings of an item are pulled to its question, against the other items' and against
    questions that the FAQ does not answer (multiple negatives ranking, Henderson et al. 2017, arXiv
    1705.00652, section 4.4).

    Returns:
        The folder of the embedder.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    words = train_tokenizer(*TOKENIZERS["lab-target"]).backend_tokenizer
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    table = StaticEmbedding(words, embedding_weights=0.1 * torch.randn(words.get_vocab_size(), 128))
    embedder = SentenceTransformer(modules=[table], device="cpu")

    def collate(rows):
        return {name: table.preprocess([row[name] for row in rows]) for name in rows[0]}

    loader = DataLoader(Wordings(steps), batch_size=len(faq()), collate_fn=collate)
    schedule = {"warmup": 0, "decay": 1.0, "learning_rate": 0.02, "weight_decay": 0.0}
    fit(embedder, loader, _ranking_loss, steps=steps, every=steps, **schedule)
    folder = out / models.EMBEDDER
    embedder.save_pretrained(str(folder), create_model_card=False)
    # Older releases of sentence-transformers know the module under this name too.
    parts = (folder / "modules.json").read_text("utf-8")
    parts = parts.replace(StaticEmbedding.__module__, "sentence_transformers.models")
    write_text(folder / "modules.json", parts)
    return folder


def _ranking_loss(embedder, batch):
    vectors = {}
    for name, tokens in batch.items():
        vectors[name] = functional.normalize(embedder(dict(tokens))["sentence_embedding"])
    candidates = torch.cat([vectors["wording"], vectors["other"]])
    scores = 10 * vectors["question"] @ candidates.T  # (n, 2 n), the matches on the diagonal
    labels = torch.arange(len(scores))
    forward = functional.cross_entropy(scores, labels)
    backward = functional.cross_entropy(scores.T[labels], labels)
    return {"ranking": (forward + backward) / 2}
