"""What this book adds to Sphinx: figures need alternative text, and a table of versions."""

import platform
from importlib.metadata import version

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

SHOWN = (
    "kvlab",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "sentence-transformers",
    "safetensors",
)
logger = logging.getLogger(__name__)


def warn_without_alt(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Warn of each image without alternative text; `-W` makes that an error."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt", "").strip():
            logger.warning(
                "The image %s has no alternative text; give `:alt:`, "
                'or mystnb={"image": {"alt": "..."}} on the cell.',
                image.get("uri"),
                location=docname,
            )


def skip_tuple_fields(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: dict
) -> bool | None:
    """Leave out the fields of named tuples, whose docstrings say "Alias for field number 0"."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def add_versions(app: Sphinx, config: Config) -> None:
    """Let `{{ versions }}` stand for a table of what this book was built with."""
    rows = [("python", platform.python_version()), *((name, version(name)) for name in SHOWN)]
    table = "\n".join(
        ["| package | version |", "|---|---|", *(f"| {name} | {number} |" for name, number in rows)]
    )
    config.myst_substitutions["versions"] = table


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions above to Sphinx's events."""
    app.connect("config-inited", add_versions)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("doctree-resolved", warn_without_alt)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
