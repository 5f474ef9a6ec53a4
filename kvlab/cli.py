"""`kvlab COMMAND`: a command is a function in kvlab/commands/, and its signature is its options.

The help comes from the Args of its docstring (Google style). Options that belong to the library are
not repeated: `def distill(output_dir: Path = ..., **options)` calls `train_distiller(...,
**options)`, and jsonargparse finds their names, types, defaults and help there. Defaults that
differ by scale are in kvlab/commands/SCALE.yaml, a section per command. What a results file keeps
as "settings" is `command_settings(...)`, the options that were parsed here.
"""

import re
import sys
from collections.abc import Sequence
from typing import get_args, get_origin

from jsonargparse import ArgumentParser, auto_parser

from kvlab.commands import shared
from kvlab.commands.align import compare_alignments, map_layers, train_aligned
from kvlab.commands.distill import distill, eval_compression
from kvlab.commands.draft import train_draft_command
from kvlab.commands.fuse import train_fuser_command
from kvlab.commands.knowledge import ask, build_cache
from kvlab.commands.lab import scale
from kvlab.commands.speculate import speculate
from kvlab.lab.__main__ import COMMANDS as LAB_COMMANDS

COMMANDS = {
    "scale": scale,
    "speculate": speculate,
    "build-cache": build_cache,
    "ask": ask,
    "train-draft": train_draft_command,
    "distill": distill,
    "eval-compression": eval_compression,
    "layer-map": map_layers,
    "train-aligned": train_aligned,
    "compare-alignments": compare_alignments,
    "train-fuser": train_fuser_command,
    "lab": {"_help": "Train and measure the lab models."} | LAB_COMMANDS,
}
_OPTION = re.compile(r"(?<=^--)\w[\w-]*(?==|$)")  # --per-domain is --per_domain


class _Parser(ArgumentParser):
    """The parser, where `--flag` alone means true and items follow each other: --names a b."""

    def add_argument(self, *names, **options):
        if options.get("type") is bool:
            options |= {"nargs": "?", "const": True}
        hint = getattr(options.get("action"), "_typehint", None)  # the only trace of a complex type
        item = _list_item(hint)
        if item:
            options = {key: options[key] for key in ("default", "help") if key in options}
            options |= {"type": item, "nargs": "+"}
            if isinstance(options.get("default"), tuple):
                options["default"] = list(options["default"])
            names = names[:1]
        return super().add_argument(*names, **options)


def _list_item(hint: object) -> type | None:
    """The type of the items of a list, a sequence or a tuple of fixed length (or None)."""
    choices = get_args(hint)
    if len(choices) == 2 and choices[1] is type(None):
        hint = choices[0]
    items = get_args(hint)
    if get_origin(hint) in (list, tuple, Sequence) and ... not in items:
        return items[0] if items[0] in (str, int, float) else None
    return None


def main(args: list[str] | None = None) -> None:
    """Run a command line; what the user can mend ends it with a sentence, not with a traceback.

    Example:
        >>> main(["scale"])  # doctest: +ELLIPSIS
        Scale ...
    """
    args = sys.argv[1:] if args is None else args
    args = [_OPTION.sub(lambda name: name[0].replace("-", "_"), arg) for arg in args]
    try:
        defaults = [str(shared.defaults_file())]
        parser = auto_parser(COMMANDS, parser_class=_Parser, default_config_files=defaults)
        command, options = COMMANDS, parser.parse_args(args)
        while isinstance(command, dict):
            name = options.subcommand
            command, options = command[name], options[name]
        options = options.as_dict()
        options.pop("config", None)
        shared.parsed_options.update(options)
        command(**options)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"kvlab: {error}") from error
    finally:
        shared.parsed_options.clear()


if __name__ == "__main__":
    main()
