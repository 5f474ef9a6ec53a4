"""Files that are there whole or not at all: a kill while writing leaves the old file or the new one."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


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
