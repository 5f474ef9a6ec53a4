"""Files that are there whole or not at all, and sentences about files that cannot be read or written.

A kill while writing leaves the old file or the new one. Whatever is wrong with a file that a user
gives, `naming` makes it a ValueError that begins with the file's name.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_UNREADABLE = (AttributeError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError)
_UNREADABLE += (csv.Error, yaml.YAMLError, SafetensorError)


@contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Turn an error of reading, parsing or understanding into a sentence that begins with the place.

    Example:
        >>> with naming("notes.json"):
        ...     json.loads("[1, ")
        Traceback (most recent call last):
        ValueError: notes.json does not fit: Expecting value: line 1 column 5 (char 4).
    """
    try:
        yield
    except _UNREADABLE as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"There is no file {error.filename or place}.") from error
        reason = " ".join(str(error).split()).removesuffix(".")
        if isinstance(error, UnicodeDecodeError):
            reason = f"byte {error.start} is not UTF-8, save it as UTF-8"
        elif isinstance(error, UnicodeEncodeError):
            reason = f"it has half a character, {error.object[error.start]!r}"
        elif isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, KeyError):
            reason = f"there is no {error}"
        elif isinstance(error, SafetensorError):
            reason = f"it is damaged or no safetensors file ({error})"
        raise ValueError(f"{place} does not fit: {reason}.") from error


def read_text(path: Path) -> str:
    """Read a text file in UTF-8 that is not empty, without byte-order marks where lines begin."""
    with naming(path):
        text = re.sub("^\ufeff+", "", path.read_text("utf-8"), flags=re.MULTILINE)
        if not text.strip():
            raise ValueError("it is empty")
        return text


def read_json(path: Path) -> object:
    """Read one JSON value."""
    text = read_text(path)
    with naming(path):
        return json.loads(text)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, onto the CPU."""
    with naming(path):
        return load_file(path)


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it shall hold.

    It need not be there yet, nor its folder: a file is made and removed in the nearest one that is.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        part = _beside(folder / "kvlab")
        part.touch()
        part.unlink()
    except OSError as error:
        text = f"{path} cannot be written ({error.strerror}): give another place for the output."
        raise ValueError(text) from error


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8, atomically. Returns the path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder) / "result.json", "{}").read_text()
        '{}'
    """
    part = _beside(path)
    try:
        part.write_text(text, "utf-8")
        return _replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file, atomically, from tensors on any device. Returns the path.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tensors(Path(folder) / "a.safetensors", {"x": torch.zeros(2)}, {"made": "here"}).name
        'a.safetensors'
    """
    part = _beside(path)
    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, metadata
        )
        return _replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, for a checksum.

    Example:
        >>> as_bytes(torch.ones(2, dtype=torch.int16)).tolist()
        [1, 0, 1, 0]
    """
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")


def _replace(part: Path, path: Path) -> Path:
    with open(part, "rb+") as file:
        os.fsync(file.fileno())  # else a power cut could leave the new name on empty pages
    part.replace(path)
    if hasattr(os, "O_DIRECTORY"):  # where a folder is a file, which can be lost as well
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    return path
