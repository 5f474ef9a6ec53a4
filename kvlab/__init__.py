"""kvlab: five ways of working with the key/value cache of a language model."""

from kvlab.scale import Scale

__all__ = ["Scale"]
