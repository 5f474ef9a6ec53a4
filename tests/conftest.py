"""Small random models, stores and commands that the tests share."""

import functools
import json

import command_helpers
import pytest
import torch
import transformers
from command_helpers import FACTS, PEOPLE, write

from kvlab.cli import main

torch.set_num_threads(1)

FAMILIES = ("Qwen3", "Qwen2", "Llama", "Mistral")
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@functools.cache
def _tiny_model(family="Qwen3", rope="default", dtype=torch.float32, seed=0, **changes):
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
             "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
    if family == "Mistral":
        sizes["sliding_window"] = None
    config = getattr(transformers, f"{family}Config")(
        **sizes | {"rope_parameters": dict(ROPES[rope])} | changes
    )
    torch.manual_seed(seed)
    return (
        getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)
    )


@pytest.fixture(scope="session")
def tiny_model():
    """Return a factory tiny_model(family, rope, dtype, seed, **config): 3 layers, 4 heads, 2 KV heads, 97 tokens.

    Models are built once and shared: a test that changes one must copy it.
    """
    return _tiny_model


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def squad(tiny):
    """Return a file in SQuAD's form: six contexts, with one to three questions, of several answers."""
    paragraphs = []
    for n, (who, city) in enumerate(PEOPLE.items()):
        asked = [
            (f"Where does {who} live?", [f"in {city}", city]),
            (f"Who has {n} dogs?", [who]),
            ("Who?", [who]),
        ]
        qas = [
            {"question": q, "answers": [{"text": text} for text in texts]}
            for q, texts in asked[: n % 3 + 1]
        ]
        paragraphs.append({"context": f"{who} lives in {city}. {who} has {n} dogs.", "qas": qas})
    (tiny / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return "squad.json"


@pytest.fixture
def trained(tiny, capsys):
    """Return a function that runs a command that trains into a folder, and returns what it wrote and printed."""

    def run(command, name, *options):
        main([*command, "--output_dir", name, *options])
        told = json.loads((tiny / name / "training.json").read_text(), parse_constant=pytest.fail)
        return told | {"printed": capsys.readouterr().out}

    return run


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    """Return the folder of a small store that keeps both keys and values and hidden states."""
    folder = tmp_path_factory.mktemp("facts")
    path = write(folder / "records.jsonl", FACTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLAB_SCALE", "tiny")
        build = ["build-cache", "--records", path, "--base_model", "lab-draft", "--store"]
        main([*build, str(folder / "both"), "--keep", "kv", "hidden"])
        main([*build, str(folder / "kv")])
    return folder / "both"


@pytest.fixture
def learn(facts, tmp_path, monkeypatch, capsys):
    """Return a function that runs train-draft into a folder of tmp_path, and returns the folder and what it wrote."""
    monkeypatch.setenv("KVLAB_SCALE", "tiny")

    def run(name, *options):
        main(
            [
                "train-draft",
                "--store",
                str(facts),
                "--output_dir",
                str(tmp_path / name),
                *command_helpers.QUICK,
                *options,
            ]
        )
        told = json.loads(
            (tmp_path / name / "training.json").read_text(), parse_constant=pytest.fail
        )
        return tmp_path / name, told | {"printed": capsys.readouterr().out}

    return run
