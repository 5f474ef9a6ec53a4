"""The lab: small models that have really learned something, their tokenizers, corpora, FAQ and recipe."""

from kvlab.lab.corpora import faq
from kvlab.lab.models import NAMES, load, load_embedder, load_tokenizer

__all__ = ["NAMES", "faq", "load", "load_embedder", "load_tokenizer"]
