"""Files are there whole or not at all."""

import pytest
import torch
from safetensors.torch import load_file

from kvlab import files


@pytest.mark.parametrize("writer", ["write_text", "write_tensors"])
def test_a_kill_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, writer):
    path, write = tmp_path / "file", getattr(files, writer)
    old, new = (
        ("old", "new") if writer == "write_text" else ({"x": torch.zeros(3)}, {"x": torch.ones(3)})
    )
    write(path, old)
    before = path.read_bytes()

    def dies(part, target):
        assert part.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_replace", dies)
    with pytest.raises(KeyboardInterrupt):
        write(path, new)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write(path, new)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_come_back_bit_for_bit_whatever_their_layout(tmp_path, dtype):
    rows = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {"turned": rows.T, "part": rows[1:3, ::2], "empty": rows[:0], "scalar": rows[0, 0]}
    files.write_tensors(tmp_path / "a.safetensors", tensors, {"note": "ä"})
    back = load_file(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)


def test_bytes_are_those_of_the_values_in_order():
    rows = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert bytes(files.as_bytes(rows.T)) == rows.T.contiguous().numpy().tobytes()
    assert (
        bytes(files.as_bytes(rows.bfloat16()))
        == rows.bfloat16().view(torch.int16).numpy().tobytes()
    )
