"""The texts of the lab models: documents from the worlds and the FAQ, and rows of their tokens."""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from kvlab.generation import encode_parts, rendered
from kvlab.lab import worlds

DATA = Path(__file__).parent / "data"


def _json_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


@cache
def faq(language: str = "en") -> tuple[dict, ...]:
    """The FAQ: id, domain, question, answer, three paraphrases (no training uses the last one).

    Example:
        >>> sorted({item["domain"] for item in faq()})[:2], len(faq()) >= 42
        (['ai', 'biology'], True)
    """
    if language not in ("en", "zh"):
        raise ValueError(f"There is no FAQ in {language!r}: expected 'en' or 'zh'.")
    return tuple(_json_lines(f"faq_{language}.jsonl"))


@cache
def wordings() -> dict[str, tuple[str, ...]]:
    """Many ways to ask for each English FAQ item, by its id, for training an embedder.

    Their authors did not see the held-out paraphrases; wordings that came close to one by chance
    were removed.

    Example:
        >>> set(wordings()) == {item["id"] for item in faq()}
        True
    """
    return {row["id"]: tuple(row["wordings"]) for row in _json_lines("wordings_en.jsonl")}


@cache
def outside(split: str = "test") -> tuple[str, ...]:
    """English questions that no FAQ item answers, half of them close to one.

    Args:
        split: "train", "calibrate" or "test".

    Example:
        >>> len(outside("calibrate")), len(outside("test"))
        (104, 104)
    """
    if split not in ("train", "calibrate", "test"):
        raise ValueError(f"There is no split {split!r}: expected 'train', 'calibrate' or 'test'.")
    rows = _json_lines("outside_en.jsonl")
    return tuple(row["question"] for row in rows if row["split"] == split)


def made_up(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` records whose answers can only be read, not known.

    A question is one that the FAQ does not answer; its answer is two sentences that have nothing to
    do with it, from the many wordings of the FAQ's questions.

    Example:
        >>> sorted(made_up(1)[0]), made_up(2)[0] == made_up(2)[1]
        (['answer', 'domain', 'question'], False)
    """
    rng = random.Random(f"made up:{seed}")
    texts = [text for item_texts in wordings().values() for text in item_texts]
    records = []
    for _ in range(n):
        question = rng.choice(outside("train"))
        answer = " ".join(rng.choices(texts, k=2))
        records.append({"question": question, "answer": answer, "domain": "made up"})
    return records


def faq_texts() -> list[str]:
    """The English FAQ's training texts: questions, the two training paraphrases, answers."""
    texts = []
    for item in faq():
        texts += [item["question"], *item["paraphrases"][:2], item["answer"]]
    return [f" {text}" for text in texts]


def faq_document(rng: random.Random, reworded: float = 0.0) -> list[dict[str, str]]:
    """One FAQ item, asked as itself or a paraphrase; a fraction `reworded` in a wording."""
    item = rng.choice(faq())
    question = rng.choice([item["question"], item["question"], *item["paraphrases"][:2]])
    if reworded and rng.random() < reworded:
        question = rng.choice(wordings()[item["id"]])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": item["answer"]}]


def sample_document(rng: random.Random) -> list[dict[str, str]]:
    """A training document, in equal parts reading and arithmetic (for tokenizer training)."""
    if rng.random() >= 0.5:
        return _problem(rng, 1, 5)
    n_facts = rng.randint(2, 16)
    kinds = rng.choices(list(worlds.QUESTIONS), weights=Mix.kinds, k=4)
    return worlds.reading_document(rng, n_facts, kinds)


def _problem(rng: random.Random, fewest: int, most: int) -> list[dict[str, str]]:
    n_steps = rng.randint(fewest, most)
    return worlds.arithmetic_document(rng, n_steps, rng.choice(list(worlds.STYLES)))


@dataclass(frozen=True)
class Mix:
    """Content of the training rows: fractions of the worlds, and the final difficulty.

    Args:
        row: tokens of a row.
        repetition, arithmetic, faq: fractions of the rows; the rest is reading.
        reworded: fraction of the FAQ questions in one of many wordings.
        facts, steps: smallest and largest number of facts of a passage, and of steps of a problem.
        questions: number of questions about a passage.
        kinds: weights of free, choice, unanswerable and open questions.
        easy: fraction of the run in which passages and problems grow from the smallest to the
            largest.
    """

    row: int = 128
    repetition: float = 0.25
    arithmetic: float = 0.15
    faq: float = 0.0
    reworded: float = 0.0
    facts: tuple[int, int] = (2, 16)
    steps: tuple[int, int] = (1, 5)
    questions: int = 6
    kinds: tuple[float, ...] = (60, 15, 15, 10)
    easy: float = 0.5


class IndexedItems(Dataset):
    """`n` items, each made from seed and index alone."""

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):  # a loop over the items ends by the IndexError
            raise IndexError(f"There is no item {index} among {len(self)}.")
        return self.make(index)


@dataclass(eq=False)
class Readings(IndexedItems):
    """`n` passages with questions about each: (text, [(question, answer), ...]).

    Example:
        >>> text, turns = Readings(1, facts=(2, 2), questions=1, test=True)[0]
        >>> text.count("."), len(turns)
        (2, 1)
    """

    n: int
    facts: tuple[int, int] = (8, 24)
    questions: int = 8
    seed: int = 0
    test: bool = False

    def make(self, index: int) -> tuple[str, list[tuple[str, str]]]:
        rng = random.Random(f"reading:{self.seed}:{index}")
        passage = worlds.make_passage(rng, rng.randint(*self.facts), self.test)
        return passage.text, [worlds.ask_free(rng, passage) for _ in range(self.questions)]


@dataclass(eq=False)
class Requests(IndexedItems):
    """`n` passages, each with a request to describe somebody or something in it.

    Example:
        >>> [message["role"] for message in Requests(1, test=True)[0]]
        ['system', 'user']
    """

    n: int
    facts: tuple[int, int] = (8, 16)
    seed: int = 0
    test: bool = False

    def make(self, index: int) -> list[dict[str, str]]:
        rng = random.Random(f"request:{self.seed}:{index}")
        return worlds.reading_document(rng, rng.randint(*self.facts), ["about"], self.test)[:-1]


@dataclass(eq=False)
class Solutions(IndexedItems):
    """`n` word problems, each solved twice, in the short and in the long style.

    Example:
        >>> short, long = Solutions(1, steps=(2, 2), test=True)[0]
        >>> short[1]["content"].split("Answer:")[1] == long[1]["content"].split("Answer:")[1]
        True
    """

    n: int
    steps: tuple[int, int] = (1, 3)
    seed: int = 0
    test: bool = False

    def make(self, index: int) -> tuple[list[dict[str, str]], ...]:
        key = f"solution:{self.seed}:{index}"
        n_steps = random.Random(key).randint(*self.steps)
        solutions = []
        for style in worlds.STYLES:
            rng = random.Random(key)
            solutions.append(worlds.arithmetic_document(rng, n_steps, style, self.test))
        return tuple(solutions)


@dataclass(eq=False)
class Wordings(IndexedItems):
    """Rows {"question", "wording", "other"} for `steps` batches, each with every FAQ item once.

    A wording is one of many for the item's question, or its answer; the other is a question the FAQ
    does not answer.
    """

    steps: int
    seed: int = 0

    def __len__(self) -> int:
        return self.steps * len(faq())

    def make(self, index: int) -> dict[str, str]:
        rng = random.Random(f"{self.seed}:{index}")
        item = faq()[index % len(faq())]
        wording = rng.choice([*item["paraphrases"][:2], item["answer"], *wordings()[item["id"]]])
        other = rng.choice(outside("train"))
        return {"question": item["question"], "wording": wording, "other": other}


def blanked(
    tokenizer: PreTrainedTokenizerBase, n: int, facts=(8, 16), seed=0, test=False, kind="free"
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`n` prompts of a passage and a question: ids (T,) with blanks, ids (T,), the answer's ids.

    A blank, the first token of " unknown", replaces each token of a fact's value. Where the passage
    has "Anna drinks tea", a reader of blanks only learns that Anna drinks.

    Args:
        facts: smallest and largest number of facts of a passage.
        kind: one of `worlds.QUESTIONS`: "free" asks for one fact, "about" for all about somebody.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-draft")
        >>> blanks, ids, answer = blanked(tokenizer, 1)[0]
        >>> len(blanks) == len(ids), 0 < int((blanks != ids).sum()) < len(ids) / 2
        (True, True)
    """
    rng = random.Random(f"blanked:{facts}:{seed}:{test}")
    prompts = []
    blank = tokenizer(" unknown", add_special_tokens=False).input_ids[0]
    for _ in range(n):
        passage = worlds.make_passage(rng, rng.randint(*facts), test)
        question, answer = worlds.QUESTIONS[kind](rng, passage)
        conversation = [
            {"role": "system", "content": passage.text},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        text = rendered(tokenizer, conversation[:-1])
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        blanks = ids.clone()
        starts, stops = torch.tensor(encoded["offset_mapping"]).T
        values = "|".join(re.escape(fact.value) for fact in passage.facts)
        for value in re.finditer(rf"\b(?:{values})\b", text[: text.rindex(question)]):
            blanks[(starts < value.end()) & (stops > value.start())] = blank
        answer_ids = encode_parts(tokenizer, conversation)[-1]
        if tokenizer.eos_token_id in answer_ids:  # the model does not generate what follows it
            answer_ids = answer_ids[: answer_ids.index(tokenizer.eos_token_id) + 1]
        prompts.append((blanks, ids, torch.tensor(answer_ids)))
    return prompts


class Rows(IndexedItems):
    """`n` training rows {"input_ids", "weights"} of fixed length.

    A row depends on mix, seed and index alone, so an interrupted run can resume at any row.

    Weights are 1.0 on answers (and their end token) and 0.05 elsewhere, 0 on padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mix: Mix, n: int, seed: int = 0):
        self.tokenizer, self.mix, self.n, self.seed = tokenizer, mix, n, seed
        roles = ["<|system|>", "<|user|>", "<|assistant|>"]
        self.roles = torch.tensor(tokenizer.convert_tokens_to_ids(roles))

    def make(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}:{index}")
        ids = self.row(rng, progress=index / self.n)[: self.mix.row]
        ids += [self.tokenizer.pad_token_id] * (self.mix.row - len(ids))
        input_ids = torch.tensor(ids)
        return {"input_ids": input_ids, "weights": self.weights(input_ids)}

    def row(self, rng: random.Random, progress: float) -> list[int]:
        """Token ids of one row: a passage with its questions, or several shorter documents."""
        mix, kind = self.mix, rng.random()
        hardness = min(1.0, progress / mix.easy) if mix.easy else 1.0
        if kind < mix.repetition:
            return self.tokens(worlds.repetition_document(rng, rng.randint(4, mix.row // 3)))
        if kind < mix.repetition + mix.arithmetic:
            easiest, hardest = mix.steps
            top = round(easiest + 1 + hardness * (hardest - easiest - 1))
            return self.pack(lambda: _problem(rng, easiest, top))
        if kind < mix.repetition + mix.arithmetic + mix.faq:
            return self.pack(lambda: faq_document(rng, mix.reworded))
        fewest, most = mix.facts
        top = round(fewest + 2 + hardness * (most - fewest - 2))
        kinds = rng.choices(list(worlds.QUESTIONS), weights=mix.kinds, k=mix.questions)
        parts = rng.choice([1, 1, 1, 2, 3])
        n_facts = rng.randint(fewest, top)
        return self.tokens(worlds.reading_document(rng, n_facts, kinds, parts=parts))

    def pack(self, document) -> list[int]:
        """Documents one after another, as many whole ones as the row holds (at least one)."""
        ids = self.tokens(document())
        while len(more := self.tokens(document())) + len(ids) <= self.mix.row:
            ids += more
        return ids

    def tokens(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return self.tokenizer.backend_tokenizer.encode(text).ids

    def weights(self, input_ids: torch.Tensor) -> torch.Tensor:
        """1.0 after an assistant token, 0.05 elsewhere (role tokens too), 0 on padding."""
        is_role = torch.isin(input_ids, self.roles)
        opened = torch.where(is_role, torch.arange(len(input_ids)), 0).cummax(0).values
        answer = (input_ids[opened] == self.roles[2]) & ~is_role
        weights = torch.where(answer, 1.0, 0.05)
        return weights.masked_fill(input_ids == self.tokenizer.pad_token_id, 0.0)
