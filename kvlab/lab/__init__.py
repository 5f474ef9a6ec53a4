"""The lab: small models that are really trained, their tokenizers, corpora, FAQ and recipe."""

from kvlab.lab.corpora import faq
from kvlab.lab.models import NAMES, load_embedder, load_tokenizer
from kvlab.lab.models import load_model as load

__all__ = ["NAMES", "faq", "load", "load_embedder", "load_tokenizer"]
