"""What the lab models read: documents from the worlds and the FAQ, and rows of tokens made of them."""

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


@cache
def faq(language: str = "en") -> tuple[dict, ...]:
    """The FAQ: id, domain, question, answer, three paraphrases (the last is held out from all training).

    Example:
        >>> sorted({item["domain"] for item in faq()})[:2], len(faq()) >= 42
        (['ai', 'biology'], True)
    """
    path = DATA / f"faq_{language}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"There is no FAQ in {language!r}: expected 'en' or 'zh'.")
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


@cache
def wordings() -> dict[str, tuple[str, ...]]:
    """Many ways to ask for each English FAQ item, by its id, for training an embedder.

    Their authors did not see the held-out paraphrases, and what came close to one by chance was
    taken out.

    Example:
        >>> set(wordings()) == {item["id"] for item in faq()}
        True
    """
    rows = map(json.loads, (DATA / "wordings_en.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["id"]: tuple(row["wordings"]) for row in rows}


@cache
def outside(split: str = "test") -> tuple[str, ...]:
    """English questions that no FAQ item answers, half of them close to one: "train", "calibrate" or "test".

    Example:
        >>> len(outside("calibrate")), len(outside("test"))
        (104, 104)
    """
    rows = [
        json.loads(line)
        for line in (DATA / "outside_en.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = tuple(row["question"] for row in rows if row["split"] == split)
    if not found:
        raise ValueError(f"There is no split {split!r}: expected 'train', 'calibrate' or 'test'.")
    return found


def made_up(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` records whose answers nobody can know, only read: two sentences that have nothing to do with the question.

    The questions are some that the FAQ does not answer, the sentences are among its questions' many
    wordings.

    Example:
        >>> sorted(made_up(1)[0]), made_up(2)[0] == made_up(2)[1]
        (['answer', 'domain', 'question'], False)
    """
    rng = random.Random(f"made up:{seed}")
    texts = [text for texts in wordings().values() for text in texts]
    pairs = ((rng.choice(outside("train")), " ".join(rng.choices(texts, k=2))) for _ in range(n))
    return [
        {"question": question, "answer": answer, "domain": "made up"} for question, answer in pairs
    ]


def faq_texts() -> list[str]:
    """The English FAQ's training texts: questions, the two training paraphrases, answers."""
    return [
        " " + text for i in faq() for text in (i["question"], *i["paraphrases"][:2], i["answer"])
    ]


def faq_document(rng: random.Random, reworded: float = 0.0) -> list[dict[str, str]]:
    """One FAQ item asked as itself or as a training paraphrase, or, in a share `reworded`, in one of many wordings."""
    item = rng.choice(faq())
    question = rng.choice([item["question"], item["question"], *item["paraphrases"][:2]])
    if reworded and rng.random() < reworded:
        question = rng.choice(wordings()[item["id"]])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": item["answer"]}]


def question_kinds(
    rng: random.Random, n: int, shares: tuple[float, ...] = (60, 15, 15, 10)
) -> list[str]:
    """`n` kinds of reading questions, in shares of free, choice, unanswerable and open ones."""
    return rng.choices(list(worlds.QUESTIONS), weights=shares, k=n)


def sample_document(rng: random.Random) -> list[dict[str, str]]:
    """A training document of any world, in equal parts reading and arithmetic (for tokenizer training)."""
    if rng.random() < 0.5:
        return worlds.reading_document(rng, rng.randint(2, 16), question_kinds(rng, 4))
    return worlds.arithmetic_document(rng, rng.randint(1, 5), rng.choice(list(worlds.STYLES)))


@dataclass(frozen=True)
class Mix:
    """What a training row holds: shares of the worlds, and how hard they are at the end of the curriculum.

    `reworded` is the share of FAQ questions in one of many wordings, `easy` the part of the run
    during which passages and problems grow from the smallest to the full range.
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


class Readings(Dataset):
    """`n` passages with questions to each: (text, [(question, answer), ...]); each is made from seed and index alone.

    Example:
        >>> text, turns = Readings(1, facts=(2, 2), questions=1, test=True)[0]
        >>> text.count("."), len(turns)
        (2, 1)
    """

    def __init__(
        self,
        n: int,
        facts: tuple[int, int] = (8, 24),
        questions: int = 8,
        seed: int = 0,
        test: bool = False,
    ):
        self.n, self.facts, self.questions, self.seed, self.test = n, facts, questions, seed, test

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[str, list[tuple[str, str]]]:
        if not 0 <= index < self.n:
            raise IndexError(f"There is no passage {index} among {self.n}.")
        rng = random.Random(f"reading:{self.seed}:{index}")
        passage = worlds.make_passage(rng, rng.randint(*self.facts), self.test)
        return passage.text, [worlds.ask_free(rng, passage) for _ in range(self.questions)]


class Requests(Dataset):
    """`n` passages, each with a request to tell about somebody or something in it; made from seed and index alone.

    Example:
        >>> [message["role"] for message in Requests(1, test=True)[0]]
        ['system', 'user']
    """

    def __init__(self, n: int, facts: tuple[int, int] = (8, 16), seed: int = 0, test: bool = False):
        self.n, self.facts, self.seed, self.test = n, facts, seed, test

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> list[dict[str, str]]:
        if not 0 <= index < self.n:
            raise IndexError(f"There is no passage {index} among {self.n}.")
        rng = random.Random(f"request:{self.seed}:{index}")
        return worlds.reading_document(rng, rng.randint(*self.facts), ["about"], self.test)[:-1]


def blanked(
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    facts: tuple[int, int] = (8, 16),
    seed: int = 0,
    test: bool = False,
    kind: str = "free",
) -> list[tuple]:
    """`n` prompts of a passage and a question: ids (T,) with blanks for what facts say, ids (T,), and the answer's ids.

    A blank is the first token of " unknown". Where the passage says "Anna drinks tea", the reader
    of blanks only learns that Anna drinks. `kind` is of `worlds.QUESTIONS`: "free" asks for one
    fact, "about" for all about somebody.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-draft")
        >>> blanks, ids, answer = blanked(tokenizer, 1)[0]
        >>> len(blanks) == len(ids), 0 < int((blanks != ids).sum()) < len(ids) / 2
        (True, True)
    """
    rng, made = random.Random(f"blanked:{facts}:{seed}:{test}"), []
    blank = tokenizer(" unknown", add_special_tokens=False).input_ids[0]
    for _ in range(n):
        passage = worlds.make_passage(rng, rng.randint(*facts), test)
        question, answer = worlds.QUESTIONS[kind](rng, passage)
        turns = [("system", passage.text), ("user", question), ("assistant", answer)]
        conversation = [{"role": role, "content": content} for role, content in turns]
        text = rendered(tokenizer, conversation[:-1])
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        told = text[: text.rindex(question)]
        spans = [
            found.span()
            for f in passage.facts
            for found in re.finditer(rf"\b{re.escape(f.value)}\b", told)
        ]
        hidden = [
            any(a < stop and b > start for start, stop in spans)
            for a, b in encoded["offset_mapping"]
        ]
        ids = torch.tensor(encoded["input_ids"])
        said, end = encode_parts(tokenizer, conversation)[-1], tokenizer.eos_token_id
        said = (
            said[: said.index(end) + 1] if end in said else said
        )  # what a template has behind it nobody says
        made.append((ids.masked_fill(torch.tensor(hidden), blank), ids, torch.tensor(said)))
    return made


class Solutions(Dataset):
    """`n` word problems, each solved twice, in the short and in the long style; made from seed and index alone.

    Example:
        >>> short, long = Solutions(1, steps=(2, 2), test=True)[0]
        >>> short[1]["content"].split("Answer:")[1] == long[1]["content"].split("Answer:")[1]
        True
    """

    def __init__(self, n: int, steps: tuple[int, int] = (1, 3), seed: int = 0, test: bool = False):
        self.n, self.steps, self.seed, self.test = n, steps, seed, test

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        if not 0 <= index < self.n:
            raise IndexError(f"There is no problem {index} among {self.n}.")
        of = f"solution:{self.seed}:{index}"
        steps = random.Random(of).randint(*self.steps)
        short, long = (
            worlds.arithmetic_document(random.Random(of), steps, x, self.test)
            for x in worlds.STYLES
        )
        return short, long


class Wordings(Dataset):
    """Rows {"question", "wording", "other"} for `steps` batches, each with every FAQ item once, in order.

    A wording is one of many for the item's question, or its answer; the other is a question the FAQ
    does not answer.
    """

    def __init__(self, steps: int, seed: int = 0):
        self.steps, self.seed = steps, seed

    def __len__(self) -> int:
        return self.steps * len(faq())

    def __getitem__(self, index: int) -> dict[str, str]:
        rng, item = random.Random(f"{self.seed}:{index}"), faq()[index % len(faq())]
        wording = rng.choice([*item["paraphrases"][:2], item["answer"], *wordings()[item["id"]]])
        return {
            "question": item["question"],
            "wording": wording,
            "other": rng.choice(outside("train")),
        }


class Rows(Dataset):
    """Training rows (input_ids, weights) of fixed length; row i is made from mix, seed and i alone, so runs can resume.

    Weights are 1.0 on answers (and their end token) and 0.05 elsewhere, 0 on padding.
    """

    def __init__(self, tokenizer, mix: Mix, n_rows: int, seed: int = 0):
        self.tokenizer, self.mix, self.n_rows, self.seed = tokenizer, mix, n_rows, seed
        self.encode = tokenizer.backend_tokenizer.encode
        ids = tokenizer.convert_tokens_to_ids
        self.roles = torch.tensor([ids("<|system|>"), ids("<|user|>"), ids("<|assistant|>")])

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}:{index}")
        ids = self.row(rng, progress=index / self.n_rows)[: self.mix.row]
        ids += [self.tokenizer.pad_token_id] * (self.mix.row - len(ids))
        input_ids = torch.tensor(ids)
        return {"input_ids": input_ids, "weights": self.weights(input_ids)}

    def row(self, rng: random.Random, progress: float) -> list[int]:
        """Token ids of one row: one passage with its questions, or a packed run of shorter documents."""
        mix, kind = self.mix, rng.random()
        hardness = min(1.0, progress / mix.easy) if mix.easy else 1.0
        if kind < mix.repetition:
            return self.tokens(worlds.repetition_document(rng, rng.randint(4, mix.row // 3)))
        if kind < mix.repetition + mix.arithmetic:
            top = round(mix.steps[0] + 1 + hardness * (mix.steps[1] - mix.steps[0] - 1))
            return self.pack(
                lambda: worlds.arithmetic_document(
                    rng, rng.randint(mix.steps[0], top), rng.choice(list(worlds.STYLES))
                )
            )
        if kind < mix.repetition + mix.arithmetic + mix.faq:
            return self.pack(lambda: faq_document(rng, mix.reworded))
        top = round(mix.facts[0] + 2 + hardness * (mix.facts[1] - mix.facts[0] - 2))
        kinds, parts = question_kinds(rng, mix.questions, mix.kinds), rng.choice([1, 1, 1, 2, 3])
        return self.tokens(
            worlds.reading_document(rng, rng.randint(mix.facts[0], top), kinds, parts=parts)
        )

    def pack(self, document) -> list[int]:
        """Documents one after another, as many whole ones as the row holds (at least one)."""
        ids = self.tokens(document())
        while len(more := self.tokens(document())) + len(ids) <= self.mix.row:
            ids += more
        return ids

    def tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of `tokenizer.apply_chat_template(messages)`, without its overhead."""
        text = "".join(
            f"<|{m['role']}|> {m['content']}" + ("<|end|>" if m["role"] == "assistant" else "")
            for m in messages
        )
        return self.encode(text).ids

    def weights(self, input_ids: torch.Tensor) -> torch.Tensor:
        """1.0 on what follows an assistant token, 0.05 elsewhere (role tokens too), 0 on padding."""
        is_role = torch.isin(input_ids, self.roles)
        opened = torch.where(is_role, torch.arange(len(input_ids)), 0).cummax(0).values
        answer = (input_ids[opened] == self.roles[2]) & ~is_role
        weights = torch.where(answer, 1.0, 0.05)
        return weights.masked_fill(input_ids == self.tokenizer.pad_token_id, 0.0)
