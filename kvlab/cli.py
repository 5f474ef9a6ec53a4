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
from functools import wraps
from itertools import pairwise
from os.path import expanduser
from pathlib import Path
from typing import get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, auto_parser, get_loader, set_loader
from torch import OutOfMemoryError

from kvlab.commands import align, distill, draft, fuse, knowledge, lab, parallel, shared, speculate
from kvlab.files import naming
from kvlab.lab.__main__ import COMMANDS as LAB_COMMANDS

COMMANDS = {
    "scale": lab.scale,
    "speculate": speculate.speculate,
    "build-cache": knowledge.build_cache,
    "ask": knowledge.ask,
    "train-draft": draft.train_draft_command,
    "train-parallel": parallel.train_parallel_command,
    "distill": distill.distill,
    "eval-compression": distill.eval_compression,
    "layer-map": align.map_layers,
    "train-aligned": align.train_aligned,
    "compare-alignments": align.compare_alignments,
    "train-fuser": fuse.train_fuser_command,
    "lab": {"_help": "Train and measure the lab models."} | LAB_COMMANDS,
}
_OPTION = re.compile(r"(?<=^--)\w[\w-]*(?==|$)")  # --per-domain is --per_domain


_load_in_c = get_loader("yaml")


def _load_yaml(text: str) -> object:
    """Load YAML; what is nested too deeply is a RecursionError, and does not end the process."""
    yaml.compose(text, yaml.SafeLoader)  # recurses in Python
    return _load_in_c(text)


set_loader("yaml", _load_yaml, (yaml.YAMLError,))


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
        action = super().add_argument(*names, **options)
        if item:  # a configuration may give one value as it is, as the command line does
            check = action._check_type
            action._check_type = wraps(check)(lambda value, **more: check(_as_list(value), **more))
        return action


def _as_list(value: object) -> list | None:
    return value if value is None or isinstance(value, list) else [value]


def _list_item(hint: object) -> type | None:
    """The type of the items of a list, a sequence or a tuple of fixed length (or None)."""
    choices = get_args(hint)
    if choices[1:] == (type(None),):
        hint = choices[0]
    item, *others = get_args(hint) or [None]
    sequence = get_origin(hint) in (list, tuple, Sequence) and ... not in others
    return item if sequence and item in (str, int, float, Path) else None


def _without_tilde(name: str, value: object) -> object:
    """The value of an option, with the user's folder for "~" where a path can be."""
    if isinstance(value, list):
        return [_without_tilde(name, item) for item in value]
    if isinstance(value, Path):
        return Path(expanduser(value))
    is_text = isinstance(value, str) and name not in ("prompts", "questions")
    return expanduser(value) if is_text and value.startswith("~/") else value


def main(args: list[str] | None = None) -> None:
    """Run a command line; what the user can mend ends it with a sentence, not with a traceback.

    After Ctrl-C the exit code is 130.

    Example:
        >>> main(["scale"])  # doctest: +ELLIPSIS
        Scale ...
    """
    args = sys.argv[1:] if args is None else args
    args = [_OPTION.sub(lambda name: name[0].replace("-", "_"), arg) for arg in args]
    try:
        for arg in args:
            with naming(repr(arg)):
                arg.encode()  # refuses bytes that are not UTF-8
        defaults = [str(shared.defaults_file())]
        parser = auto_parser(COMMANDS, parser_class=_Parser, default_config_files=defaults)
        files = [file for flag, file in pairwise(args) if flag == "--config"]
        with naming(" ".join(["--config", *files]) if files else "The command line"):
            options = parser.parse_args(args)
        command = COMMANDS
        while isinstance(command, dict):
            command = command[options.subcommand]
            options = options[options.subcommand]
        options = options.as_dict()
        options.pop("config", None)
        options = {name: _without_tilde(name, value) for name, value in options.items()}
        shared.require_ranges(options)
        shared.parsed_options.update(options)
        # Null in a configuration is the default.
        command(**{name: value for name, value in options.items() if value is not None})
    except (ValueError, OSError, FloatingPointError, OutOfMemoryError) as error:
        raise SystemExit(f"kvlab: {error}") from error
    except KeyboardInterrupt as error:
        progress = f" ({error})" if str(error) else ""
        hint = "Files that were written stay, and the same command goes on from those it can use."
        print(f"\nkvlab: interrupted{progress}. {hint}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        shared.parsed_options.clear()


if __name__ == "__main__":
    main()
