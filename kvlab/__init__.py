"""kvlab: ways of working with the key/value cache of a language model, each with its best implementation."""

from kvlab.scale import Scale

__all__ = ["Scale"]
