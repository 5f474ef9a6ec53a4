"""`kvlab …`: each subcommand is a function, and its options are the signature of that function."""

import re
import sys

from jsonargparse import ArgumentParser, auto_cli

from kvlab.commands.align import compare_alignments, map_layers, train_aligned
from kvlab.commands.distill import distill, eval_compression
from kvlab.commands.draft import train_draft_command
from kvlab.commands.fuse import train_fuser
from kvlab.commands.knowledge import ask, build_cache
from kvlab.commands.lab import scale
from kvlab.commands.speculate import speculate
from kvlab.lab.__main__ import report, train

_OPTION = re.compile(r"(?<=^--)\w[\w-]*(?==|$)")  # --per-domain is --per_domain


_LISTS = {list[str]: str, list[str] | None: str, list[float] | None: float}


class _Parser(ArgumentParser):
    """As jsonargparse has it, but `--flag` alone means true, and a list is texts side by side, not a YAML list."""

    def add_argument(self, *names, **options):
        if options.get("type") is bool:
            options |= {"nargs": "?", "const": True}
        hint = getattr(
            options.get("action"), "_typehint", None
        )  # jsonargparse leaves no other trace of it
        if hint in _LISTS:
            told = {name: options[name] for name in ("default", "help") if name in options}
            names, options = names[:1], told | {"type": _LISTS[hint], "nargs": "+"}
        return super().add_argument(*names, **options)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Example:
        >>> main(["scale"])  # doctest: +ELLIPSIS
        Scale ...
    """
    models = {"_help": "Make and measure the lab models.", "train": train, "report": report}
    commands = {"scale": scale, "speculate": speculate, "build-cache": build_cache, "ask": ask}
    commands |= {
        "train-draft": train_draft_command,
        "distill": distill,
        "eval-compression": eval_compression,
    }
    commands |= {
        "layer-map": map_layers,
        "train-aligned": train_aligned,
        "compare-alignments": compare_alignments,
    }
    commands |= {"train-fuser": train_fuser, "lab": models}
    args = sys.argv[1:] if args is None else args
    args = [_OPTION.sub(lambda name: name[0].replace("-", "_"), arg) for arg in args]
    try:
        auto_cli(commands, args, parser_class=_Parser)
    except (
        ValueError,
        OSError,
        FloatingPointError,
    ) as error:  # what the user can mend needs no traceback
        raise SystemExit(f"kvlab: {error}") from error


if __name__ == "__main__":
    main()
