"""kvlab: ways of working with the key/value cache of a language model, each with its best implementation."""

from importlib import import_module

# A name, so that `kvlab.results(...)` is this function and not the package it comes from.
from kvlab.results import results

_MODULES = {
    "Fuser": "kvlab.fuse",
    "KVDistiller": "kvlab.compress",
    "KnowledgeCache": "kvlab.knowledge",
    "KnowledgeDraft": "kvlab.draft",
    "Scale": "kvlab.scale",
    "evict": "kvlab.compress",
    "generate": "kvlab.speculate",
}
__all__ = [*_MODULES, "results"]


def __getattr__(name: str) -> object:
    """Import the module of a name when the name is first used, so that `import kvlab` is fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'kvlab' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
