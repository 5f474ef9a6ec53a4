"""What tests of several commands share."""

import json
from pathlib import Path

import pytest
import torch

from kvlab import lab
from kvlab.knowledge import KnowledgeCache

FEW = ["speculate", "--max_new_tokens", "12", "--save_results"]


def result(folder, capsys):
    """What the one result file says, and what was printed."""
    (path,) = folder.iterdir()
    printed = capsys.readouterr().out
    assert str(path) in printed
    return json.loads(path.read_text(), parse_constant=pytest.fail), printed


RECORDS = [
    {"question": "Where does Anna live?", "answer": "Anna lives in Rome.", "domain": "people"},
    {"question": "Who has a dog?", "answer": "Ben has a dog.", "domain": "pets"},
]


def write(path, records=RECORDS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def opened(folder, with_embedder=True):
    embedder = lab.load_embedder() if with_embedder else None
    return KnowledgeCache.load(
        folder, lab.load("lab-draft"), lab.load_tokenizer("lab-draft"), embedder
    )


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


PUBLISHED = Path(__file__).parents[2] / "shared/data"


FACTS = [
    {"question": f"{who} what?", "answer": f"{who} has a {thing} and lives in {city}.", "domain": "people"}
    for who, thing, city in [
        ("Anna", "dog", "Rome"), ("Ben", "cat", "Paris"), ("Clara", "horse", "Oslo"),
        ("Dora", "fish", "Bern"), ("Emil", "bird", "Wien"), ("Fritz", "mouse", "Prag"),
    ]
]  # fmt: skip


PEOPLE = {
    "Anna": "Rome",
    "Ben": "Paris",
    "Clara": "Oslo",
    "Dora": "Bern",
    "Emil": "Wien",
    "Fritz": "Prag",
}


QUICK = "--base_model lab-draft --layers first:1 --epochs 2 --batch_size 4".split()
QUICK += ["--max_new_tokens", "12", "--made_up", "4"]
