"""4D alignment: what a teacher's KV cache would be with the student's tokens, layers, width and heads.

A teacher reads its own text of a problem, in its own tokens. Its keys and values are carried over
to the student, a step for each dimension: *rotation and head* (keys as before the teacher's rope,
KV heads side by side), *time* (inside prompt, reasoning and answer each, by linear interpolation),
*layer* (a weighted mean of teacher layers), *hidden* (a linear map to the student's width) and
*fusion* of several teachers. The result is a target for the student's own features, and by
`as_prefix` a cache that the student can continue.

Batches are padded on the left: row b of a batch is its last borders[b, 3] columns, and the longest
row has no padding. Every step carries gradients, and none reads padding.

>>> from kvlab import cache, lab
>>> from kvlab.layers import proportional
>>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
>>> problem = {"role": "user", "content": "Anna has 3 eggs. Anna buys 4. How many eggs does Anna have?"}
>>> text = segment(tokenizer, [problem, {"role": "assistant", "content": "3+4=7. Answer: 7"}])
>>> borders, ids = text.borders[None], text.input_ids[None]
>>> student = features(cache.prefill(model, ids))
>>> teacher = align_kv(student, plan_time(borders, borders), proportional(12, 12))
>>> torch.equal(teacher.keys, student.keys), torch.equal(teacher.values, student.values)
(True, True)
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlab.answers import extract_answer, same_answer
from kvlab.cache import Prefix, convert, from_tensor, rotate, to_tensor, unrotate
from kvlab.evaluate import figure
from kvlab.files import read_json, read_tensors, write_tensors, write_text
from kvlab.generation import answers, rendered
from kvlab.layers import (
    CKA,
    LayerMap,
    layer_map,
    load_layer_map,
    proportional,
    ridge,
    save_layer_map,
)
from kvlab.losses import columns_to_keep, cross_entropy, kl
from kvlab.models import position_limit, rotary_of
from kvlab.training import fit, require_least
from kvlab.vocabularies import agreed_tokens, shared_tokens

SEGMENTS = ("prompt", "reasoning", "answer")
# A bare "answer" or 答案 occurs inside reasoning too, so a colon or a verb must follow.
MARKER = (
    r"(?i:\b(?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\s+is\b|\s*[:：]))|####|\\boxed\b"
    r"|(?:(?:因此|所以|故)[,，]?)?(?:最终)?答案(?:应该|应)?\s*(?:是|为|為|[:：])"
)
STARTS = {"xavier": init.xavier_uniform_, "orthogonal": init.orthogonal_, "identity": init.eye_}
FEATURES_FORMAT = "seen 1"  # in the metadata of files of `save_teacher_features`
BATCH = 16  # texts that a model reads at once
PROBLEMS_PER_FILE = 256
LAYER_MAP_PROBLEMS = 100
SOLUTION_TOKENS = 512  # at most, of a solution that a teacher writes
LIKELIEST = 64  # tokens whose probabilities a student learns

Conversation = Sequence[Mapping[str, str]]
Loader = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


# -- segments


class Segmented(NamedTuple):
    """A conversation's token ids (T,), and the borders (4,): segment i is borders[i] <= t < borders[i + 1].

    begins : (T,), the character at which each token begins, counted from the solution's first.
    """

    input_ids: Tensor
    borders: Tensor
    begins: Tensor | None = None


Texts = Sequence[Segmented]


def segment(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, marker: str = MARKER
) -> Segmented:
    """Encode a conversation as `generation.encode` does, and find prompt, reasoning and answer from token offsets.

    The prompt ends where the assistant's content begins, the template's header included. The answer
    begins at the last marker in that content, and extends to the end of the text. Spaces before a
    border (but no line breaks) belong to what follows, as they do in words of most vocabularies. A
    token belongs to the segment in which it begins; all tokens of one character begin together.

    Args:
        conversation: {"role", "content"} messages, of which the last is the assistant's solution.
        marker: a regular expression for what opens the answer.

    Raises:
        ValueError: a segment is empty, the last message is not the assistant's, or the template
            changes the solution.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> messages = [{"role": "user", "content": "Add 1."}, {"role": "assistant", "content": "1+1=2. Answer: 2"}]
        >>> ids, borders, _ = segment(tokenizer, messages)
        >>> [tokenizer.decode(ids[a:b]) for a, b in zip(borders, borders[1:])]
        ['<|user|> Add 1.<|assistant|>', ' 1+1=2.', ' Answer: 2<|end|>']
    """
    role = conversation[-1]["role"]
    if role != "assistant":
        raise ValueError(f"The last message is by {role!r}: append the assistant's solution.")
    text = rendered(tokenizer, conversation)
    content = conversation[-1]["content"].strip()
    start = text.rfind(content)
    opening = repr(content[:60])
    if start < 0:
        hint = "use a tokenizer whose template leaves it, or none"
        raise ValueError(f"The chat template changes the assistant's text, {opening}...: {hint}.")
    matches = list(re.finditer(marker, content))
    sentence = f"is empty in a text that begins {opening}, where the marker {marker} was"
    if not matches:
        raise ValueError(f"The answer {sentence} not found: give {', '.join(SEGMENTS)}.")
    edges = [len(text[:edge].rstrip(" ")) for edge in (start, start + matches[-1].start())]
    special = not tokenizer.chat_template
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    # A special token that closes a text has offset 0: it begins where the token before it does.
    begins = np.maximum.accumulate([begin for begin, _ in encoded["offset_mapping"]])
    borders = [0, *np.searchsorted(begins, edges).tolist(), len(begins)]
    for i, name in enumerate(SEGMENTS):
        if borders[i] == borders[i + 1]:
            raise ValueError(f"The {name} {sentence} found: give {', '.join(SEGMENTS)}.")
    ids, begins = torch.tensor(encoded["input_ids"]), torch.tensor(begins)
    return Segmented(ids, torch.tensor(borders), begins - start)


# -- time


class TimePlan(NamedTuple):
    """The teacher tokens that each student token is made of, for left-padded batches: a sparse (B, T_s, T_t).

    tokens : (N,), b * T_s + i, ascending: the student token.
    columns : (N,), the teacher's column in row b.
    weights : (N,), float64; those of a token add up to 1.
    mask : (B, T_s), False for the student's padding, which has no entry.
    teacher_length : T_t.
    """

    tokens: Tensor
    columns: Tensor
    weights: Tensor
    mask: Tensor
    teacher_length: int


def plan_time(student: Tensor, teacher: Tensor) -> TimePlan:
    """Stretch each of the teacher's segments over the student's: u_i = i (T_t - 1) / (T_s - 1).

    Token i is (1 - f) x[floor(u)] + f x[floor(u) + 1] inside the segment, where f = u - floor(u).
    Both come from integer division, so first and last tokens map to first and last exactly, and no
    border is crossed. A student segment of one token takes the mean of the teacher's segment.

    Args:
        student, teacher: (B, 4), borders of the same problems, as `segment` finds them in each
            one's tokens.

    Example:
        >>> plan = plan_time(torch.tensor([[0, 3, 4, 6]]), torch.tensor([[0, 2, 5, 7]]))
        >>> resample(torch.arange(7.0).view(1, 1, 7, 1), plan).flatten()
        tensor([0.0000, 0.5000, 1.0000, 3.0000, 5.0000, 6.0000])
    """
    return _plan(student, teacher, _stretch)


def by_index(student: Tensor, teacher: Tensor) -> TimePlan:
    """Give student token i the teacher's token i, or its last, regardless of segments: the baseline.

    >>> by_index(torch.tensor([[0, 1, 2, 4]]), torch.tensor([[0, 1, 2, 3]])).columns
    tensor([0, 1, 2, 2])
    """
    return _plan(student[:, [0, 3]], teacher[:, [0, 3]], _same_index)


def _stretch(length: int, teacher_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (token, teacher token, weight) of one segment."""
    if length == 1:
        columns = torch.arange(teacher_length)
        weights = torch.full((teacher_length,), 1 / teacher_length, dtype=torch.float64)
        return torch.zeros_like(columns), columns, weights
    steps = torch.arange(length) * (teacher_length - 1)
    column = steps // (length - 1)
    f = (steps % (length - 1)).double() / (length - 1)
    tokens = torch.arange(length).repeat_interleave(2)
    columns = torch.stack([column, column + 1], 1).flatten()
    weights = torch.stack([1 - f, f], 1).flatten()
    used = weights > 0  # the last token has no right neighbour
    return tokens[used], columns[used], weights[used]


def _same_index(length: int, teacher_length: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.arange(length)
    return tokens, tokens.clamp(max=teacher_length - 1), torch.ones(length, dtype=torch.float64)


def _plan(student: Tensor, teacher: Tensor, entries: Callable) -> TimePlan:
    """Entries of all segments of all rows, on the CPU (some accelerators have no float64)."""
    width = int(student[:, -1].max())
    teacher_length = int(teacher[:, -1].max())
    parts = []
    for row, (to, of) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        token_start = (row + 1) * width - to[-1]
        column_start = teacher_length - of[-1]
        for i in range(len(to) - 1):
            tokens, columns, weights = entries(to[i + 1] - to[i], of[i + 1] - of[i])
            parts.append((token_start + to[i] + tokens, column_start + of[i] + columns, weights))
    mask = torch.arange(width) >= width - student[:, -1:].cpu()
    return TimePlan(*map(torch.cat, zip(*parts, strict=True)), mask, teacher_length)


def resample(x: Tensor, plan: TimePlan) -> Tensor:
    """Bring features (B, L, T_t, D) to the student's tokens, (B, L, T_s, D); its padding becomes 0.

    One pass, and no memory beyond the result: a token of a layer is a bag of teacher tokens.
    """
    rows, layers, length, _ = x.shape
    if (rows, length) != (len(plan.mask), plan.teacher_length):
        expected = f"expected {len(plan.mask)} of {plan.teacher_length}: pad both on the left"
        raise ValueError(f"The features have {rows} rows of {length} tokens, {expected}.")
    width = plan.mask.shape[1]
    layer = torch.arange(layers)[:, None]
    # (L, N), rows of (B L T_t, D), and (L, B T_s), where the bag of each token begins
    entries = (plan.tokens // width * layers + layer) * length + plan.columns
    bags = torch.searchsorted(plan.tokens, torch.arange(rows * width)) + layer * len(plan.tokens)
    indices = entries.flatten().to(x.device), x.flatten(0, 2), bags.flatten().to(x.device)
    weights = plan.weights.to(x.device, x.dtype).repeat(layers)
    out = F.embedding_bag(*indices, mode="sum", per_sample_weights=weights)
    return out.view(layers, rows, width, -1).transpose(0, 1)


# -- layer


def mix_layers(x: Tensor, layer_map: LayerMap) -> Tensor:
    """Make each student layer from the teacher layers it is mapped to: (B, L_t, T, D) -> (B, L_s, T, D).

    >>> mix_layers(torch.arange(3.0).view(1, 3, 1, 1), proportional(2, 3)).flatten()
    tensor([0., 2.])
    """
    indices, weights, layers = layer_map
    matrix = x.new_zeros(len(indices), layers).scatter_add(1, indices.to(x.device), weights.to(x))
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


# -- head and rotation


class KV(NamedTuple):
    """Keys, un-rotated, and values, both (B, L, T, H_kv * d): KV heads, not attention heads, side by side."""

    keys: Tensor
    values: Tensor


def features(prefix: Prefix) -> KV:
    """Take a model's cache apart into features that do not depend on the text's position, in float32 at least."""
    stored = to_tensor(prefix.cache)
    wide = from_tensor(stored.to(torch.promote_types(stored.dtype, torch.float32)))
    stacked = to_tensor(unrotate(wide, prefix.positions, prefix.rotary))  # (L, 2, B, H_kv, T, d)
    return KV(*stacked.permute(1, 2, 0, 4, 3, 5).flatten(4))


def as_prefix(kv: KV, positions: Tensor, model: PreTrainedModel) -> Prefix:
    """Make features a cache of this model: heads apart, keys rotated to positions (B, T) by its own rope."""
    heads = model.config.num_key_value_heads
    stacked = torch.stack(kv).unflatten(4, (heads, -1)).to(model.dtype)  # (2, B, L, T, H_kv, d)
    rotary = rotary_of(model)
    cache = rotate(from_tensor(stacked.permute(2, 0, 1, 4, 3, 5)), positions, rotary)
    return Prefix(cache, positions[:, -1] + 1, positions=positions, rotary=rotary)


def align_kv(kv: KV, plan: TimePlan, layer_map: LayerMap) -> KV:
    """Bring a teacher's features to the student's tokens and layers: (B, L_t, T_t, D_t) -> (B, L_s, T_s, D_t).

    A `Projector` then brings them to the student's width, and `fuse` takes the mean over teachers.
    """
    return KV(*(mix_layers(resample(x, plan), layer_map) for x in kv))


# -- hidden


class Projector(nn.Module):
    """W_K and W_V, which bring one teacher's features to the student's width; the same for all layers, no bias.

    Args:
        teacher_width, student_width: H_kv * d of each.
        start: "xavier" (uniform), "orthogonal", or "identity": the first features are copied. To a
            larger width they are scaled by sqrt(student_width / teacher_width), as the rest is 0,
            so that the mean square stays the same.

    Example:
        >>> Projector(512, 256).num_parameters(), Projector(1, 4, "identity").keys.weight.flatten().tolist()
        (262144, [2.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, teacher_width: int, student_width: int, start: str = "xavier"):
        super().__init__()
        self.keys = nn.Linear(teacher_width, student_width, bias=False)
        self.values = nn.Linear(teacher_width, student_width, bias=False)
        for weight in self.parameters():
            STARTS[start](weight)
            if start == "identity":
                weight.data *= max(1, student_width / teacher_width) ** 0.5

    def forward(self, kv: KV) -> KV:
        """Project (B, L, T, teacher_width) to (B, L, T, student_width), in the dtype of the weights."""
        dtype = self.keys.weight.dtype
        return KV(self.keys(kv.keys.to(dtype)), self.values(kv.values.to(dtype)))

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def fit_ridge(self, batches: Iterable[tuple[KV, KV]], strength: float = 1e-3) -> "Projector":
        """Set both maps to the least-squares ones from teacher to student features, in closed form. Returns itself.

        Args:
            batches: pairs of teacher and student features of the same tokens and layers, (...,
                width) each, without padding. They are read once; only X'X and X'Y are kept.
            strength: of the ridge, relative to the mean of the diagonal of X'X.
        """
        sums = {self.keys: (0, 0), self.values: (0, 0)}
        for teacher, student in batches:
            for linear, x, y in zip(sums, teacher, student, strict=True):
                x = x.flatten(0, -2).double()
                xx, xy = sums[linear]
                sums[linear] = (xx + x.T @ x, xy + x.T @ y.flatten(0, -2).double())
        for linear, (xx, xy) in sums.items():
            linear.weight.copy_(ridge(xx, xy, strength).T)
        return self

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write projector.safetensors and projector.json, which holds the widths. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "projector.safetensors", self.state_dict(), {"format": "pt"})
        width, teacher_width = self.keys.weight.shape
        content = {"version": 1, "teacher_width": teacher_width, "student_width": width}
        write_text(folder / "projector.json", json.dumps(content, indent=1) + "\n")
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Projector":
        """Read what `save_pretrained` wrote."""
        content = read_json(Path(folder) / "projector.json")
        if content.pop("version", None) != 1:
            raise ValueError(f"{folder} holds no projector of version 1.")
        weights = read_tensors(Path(folder) / "projector.safetensors")
        projector = cls(**content).to(weights["keys.weight"].dtype)
        projector.load_state_dict(weights)
        return projector


# -- fusion


def fuse(teachers: Sequence[KV], weights: Tensor | None = None) -> KV:
    """Return the weighted mean of the teachers' projected features, all (B, L, T, D).

    Args:
        weights: one for each, 0 or more; they are divided by their sum. Default: all the same. To
            learn them, give `logits.softmax(0)` with an `nn.Parameter` of logits.

    Example:
        >>> parts = KV(torch.zeros(2), torch.zeros(2)), KV(torch.ones(2), torch.ones(2))
        >>> fuse(parts, torch.tensor([1.0, 3.0])).keys
        tensor([0.7500, 0.7500])
    """
    weights = teachers[0].keys.new_ones(len(teachers)) if weights is None else weights
    weights = (weights / weights.sum()).to(teachers[0].keys)
    keys = sum(weight * kv.keys for weight, kv in zip(weights, teachers, strict=True))
    values = sum(weight * kv.values for weight, kv in zip(weights, teachers, strict=True))
    return KV(keys, values)


# -- teachers, read once


class TeacherFeatures(NamedTuple):
    """One teacher's keys, values and hidden states for one problem, resampled to the student's tokens and layers.

    keys, values : (L_s, T, H_kv * d), of the teacher's width. state : (L_s, d_t), hidden states
    of the token before its answer. A batch has B in front.
    """

    keys: Tensor
    values: Tensor
    state: Tensor


@torch.no_grad()
def encode_with_teacher(
    teacher: PreTrainedModel, others: Texts, texts: Texts, layer_map: LayerMap, plan=plan_time
) -> list[TeacherFeatures]:
    """Have a teacher read its own solutions of the student's problems, and align its features to the student.

    Everything except the projection, which may learn, happens here: a teacher is needed once, and
    only one at a time.

    Args:
        others: the same problems in the teacher's words, tokens and reasoning, as `segment` made them.
        texts: the student's, as `segment` made them.
        plan: `plan_time` or `by_index`.

    Returns:
        One `TeacherFeatures` per problem, in half precision, on the CPU.
    """
    result = []
    for start in tqdm(range(0, len(texts), BATCH), desc="teacher reads"):
        part = slice(start, start + BATCH)
        borders = torch.stack([text.borders for text in texts[part]])
        read, teacher_borders = _read_texts(teacher, others[part])
        time = plan(borders, teacher_borders)
        kv = align_kv(KV(read["keys"], read["values"]), time, layer_map)
        states = _before_answer(read["hidden"].unbind(1), teacher_borders)
        states = mix_layers(states[:, :, None], layer_map)[:, :, 0]
        for i, size in enumerate(borders[:, 3].tolist()):
            tensors = kv.keys[i, :, -size:], kv.values[i, :, -size:], states[i]
            result.append(TeacherFeatures(*(convert(x, torch.float16) for x in tensors)))
    return result


def _pad_texts(texts: Texts, device="cpu") -> tuple[dict[str, Tensor], Tensor]:
    """A model's inputs for a batch of texts, and their borders (B, 4), on the CPU."""
    mask = _pad_left([torch.ones_like(text.input_ids) for text in texts]).to(device)
    ids = _pad_left([text.input_ids for text in texts]).to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return inputs, torch.stack([text.borders for text in texts])


def _read_texts(model: PreTrainedModel, texts: Texts) -> tuple[dict[str, Tensor], Tensor]:
    """Each layer's output, un-rotated keys and values, (B, L, T, width), padded on the left; borders."""
    inputs, borders = _pad_texts(texts, model.device)
    out = model(**inputs, use_cache=True, output_hidden_states=True, logits_to_keep=1)
    positions = inputs["position_ids"]
    prefix = Prefix(out.past_key_values, 0, positions=positions, rotary=rotary_of(model))
    return {"hidden": torch.stack(out.hidden_states[1:], 1)} | features(prefix)._asdict(), borders


def _before_answer(layers: Sequence[Tensor], borders: Tensor) -> Tensor:
    """Outputs (B, T, d) of each layer at the token before the answer, (B, L, d)."""
    columns = borders[:, 2] - borders[:, 3] - 1  # from the end
    return torch.stack([x[torch.arange(len(x)), columns] for x in layers], 1)


def _pad_left(xs: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(xs, batch_first=True, padding_side="left")


def save_teacher_features(path: str | Path, problems: Sequence[TeacherFeatures]) -> Path:
    """Write features of problems as one safetensors file, tokens of all problems in a row."""
    tensors = {
        "keys": torch.cat([problem.keys for problem in problems], 1),
        "values": torch.cat([problem.values for problem in problems], 1),
        "states": torch.stack([problem.state for problem in problems]),
        "sizes": torch.tensor([problem.keys.shape[1] for problem in problems]),
    }
    return write_tensors(Path(path), tensors, {"kvlab": FEATURES_FORMAT})


class StoredTeacherFeatures(Dataset):
    """Reads a file of `save_teacher_features` problem by problem: it may be larger than memory."""

    def __init__(self, path: str | Path):
        self.file = safe_open(path, "pt")
        if (self.file.metadata() or {}).get("kvlab") != FEATURES_FORMAT:
            raise ValueError(f"{path} holds no teacher features: encode the problems again.")
        self.states = self.file.get_tensor("states")
        self.borders = [0, *self.file.get_tensor("sizes").cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> TeacherFeatures:
        tokens = slice(self.borders[index], self.borders[index + 1])
        keys = self.file.get_slice("keys")[:, tokens]
        values = self.file.get_slice("values")[:, tokens]
        return TeacherFeatures(keys, values, self.states[index])


# -- a teacher's text and probabilities, instead of its cache


class TeacherTokens(NamedTuple):
    """A teacher's probabilities of each of the student's tokens and of others in its place.

    ids : (T, k), the likeliest tokens that both vocabularies have, in the student's ids.
    probabilities : (T, k), of these; 0 where the two tokenizations differ. A batch has B in front.
    """

    ids: Tensor
    probabilities: Tensor


def write_solutions(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
) -> list[str]:
    """Have a teacher solve problems, greedily, whatever solutions the conversations have."""
    questions = [conversation[:-1] for conversation in conversations]
    return answers(teacher, tokenizer, questions, SOLUTION_TOKENS, label="teacher writes")


@torch.no_grad()
def predict_with_teacher(
    teacher: PreTrainedModel, others: Texts, texts: Texts, shared: Tensor
) -> list[TeacherTokens]:
    """Have a teacher predict the solutions of texts, token by token, for a student with another vocabulary.

    A prediction counts where both tokenizations have the same token in the same place.

    Args:
        others: the same solutions in the teacher's tokens, as `segment` made them.
        texts: in the student's.
        shared: (2, n), ids of `shared_tokens` of student and teacher.
    """
    common = dict(shared.T.tolist())
    result = []
    for start in tqdm(range(0, len(texts), BATCH), desc="teacher predicts"):
        part = slice(start, start + BATCH)
        inputs, _ = _pad_texts(others[part], teacher.device)
        logits = teacher(**inputs, use_cache=False).logits[..., shared[1].to(teacher.device)]
        for text, other, row in zip(texts[part], others[part], logits, strict=True):
            index, other_index = agreed_tokens(text.begins, other.begins)
            same = [common.get(i) for i in text.input_ids[index].tolist()]
            same = torch.tensor(same) == other.input_ids[other_index]
            same &= text.begins[index] >= 0
            index, other_index = index[same], other_index[same]
            # The logits of a column predict the token after it.
            columns = (other_index - 1 - len(other.input_ids)).to(row.device)
            best = row[columns].float().softmax(-1).topk(min(LIKELIEST, shared.shape[1]))
            ids = torch.zeros(len(text.input_ids), best.indices.shape[-1], dtype=torch.long)
            probabilities = torch.zeros(ids.shape)
            ids[index] = shared[0][best.indices.cpu()]
            probabilities[index] = best.values.cpu()
            result.append(TeacherTokens(ids, probabilities))
    return result


# -- losses


def own_features(model: PreTrainedModel, hidden_states: Sequence[Tensor]) -> KV:
    """Keys, un-rotated, and values of a model in training, (B, L, T, H_kv * d), computed again from its hidden states.

    There is no cache under gradient checkpointing, and hooks see detached tensors there.
    """
    keys, values = [], []
    # the last hidden state is the output
    for layer, states in zip(model.base_model.layers, hidden_states, strict=False):
        attention, x = layer.self_attn, layer.input_layernorm(states)
        k = attention.k_proj(x)
        if hasattr(attention, "k_norm"):
            k = attention.k_norm(k.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
        keys.append(k)
        values.append(attention.v_proj(x))
    return KV(torch.stack(keys, 1), torch.stack(values, 1))


def kv_loss(student: KV, target: KV, mask: Tensor, kind: str = "smooth_l1") -> Tensor:
    """Distance of the student's keys and values from their targets, in the student's standard deviations.

    Each layer's difference is divided by the deviation of the student's features in that layer
    (which gets no gradient: otherwise they would grow to make the loss small), and averaged over
    tokens, width, layers, and keys and values.

    Args:
        student, target: (B, L, T, D) each. The target's gradient reaches projectors.
        mask: (B, T), not 0 for tokens that count.
        kind: "smooth_l1", "l1" or "mse".

    Example:
        >>> x = torch.tensor([[-1.0, 1.0]]).view(1, 1, 2, 1)
        >>> kv_loss(KV(x, x), KV(x + 2, x), torch.ones(1, 2)).item()
        0.75
    """
    counted, total = mask.bool(), 0.0
    for x, y in zip(student, target, strict=True):
        x = x.transpose(1, 2)[counted]  # (N, L, D)
        y = y.transpose(1, 2)[counted]
        total = total + _distance(x, y, x, kind)
    return total / 2


def _distance(student: Tensor, target: Tensor, reference: Tensor, kind: str) -> Tensor:
    """The mean difference of (N, L, D) features, in each layer's standard deviation of the reference."""
    scale = reference.detach().float().std((0, 2), correction=0).clamp(min=1e-6)[:, None]
    return getattr(F, f"{kind}_loss")(student.float() / scale, target.float() / scale)


def codi_loss(student: Tensor, target: Tensor) -> Tensor:
    """Distance of hidden states at the token before the answer from their targets, (B, L, d) each.

    Smooth L1 of the difference over the target's deviation in its layer, averaged over layers,
    texts and width. Source: Shen et al. (2025), CODI, arXiv 2502.21074, section 3.2, where teacher
    and student are one model.

    Example:
        >>> codi_loss(torch.zeros(2, 1, 2), torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]])).item()
        0.5
    """
    return _distance(student, target, target, "smooth_l1")


def token_loss(logits: Tensor, target: TeacherTokens) -> Tensor:
    """KL of the student's next tokens from the teacher's, in nats, mean over the tokens that it predicts.

    The teacher's probabilities are divided by their sum, the student's are those among all of its
    tokens. Source: Hinton et al. (2015), arXiv 1503.02531.

    Args:
        logits: (B, T, V), the student's output at each position.
        target: (B, T, k); position t is predicted from t - 1.

    Example:
        >>> target = TeacherTokens(torch.tensor([[[0, 1], [0, 1]]]), torch.tensor([[[0, 0], [0.5, 0.5]]]))
        >>> token_loss(torch.zeros(1, 2, 2), target).item()
        0.0
    """
    counted = target.probabilities[:, 1:].sum(-1) > 0
    p = target.probabilities[:, 1:][counted]
    p = p / p.sum(-1, keepdim=True)
    log_q = logits[:, :-1][counted].float().log_softmax(-1).gather(-1, target.ids[:, 1:][counted])
    return kl(log_q, p.log()).sum() / counted.sum().clamp(min=1)


# -- training


class AlignedStudent(nn.Module):
    """Student plus alignment loss; `forward` returns the named losses of a batch: "ce", "kv", "codi" and "kl".

    Args:
        projectors: one per teacher; `requires_grad_(False)` keeps them as they are. Without them
            there is cross-entropy alone.
        states: one linear map per teacher, from its hidden states to the student's, for CODI;
            without them there is no CODI.
    """

    def __init__(self, student: PreTrainedModel, projectors=(), states=()):
        super().__init__()
        self.student = student
        self.projectors = nn.ModuleList(projectors)
        self.states = nn.ModuleList(states)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `pad_problems`."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        aligned = len(self.projectors) > 0
        last = columns_to_keep(batch["weights"])
        inputs |= {"use_cache": False, "logits_to_keep": last}
        out = self.student(**inputs, output_hidden_states=aligned)
        ids, weights = batch["input_ids"][:, -last:], batch["weights"][:, -last:]
        losses = {"ce": cross_entropy(out.logits, ids, weights)}
        if aligned:
            teachers = []
            for i, projector in enumerate(self.projectors):
                teachers.append(projector(KV(batch[f"keys_{i}"], batch[f"values_{i}"])))
            kv = own_features(self.student, out.hidden_states)
            losses["kv"] = kv_loss(kv, fuse(teachers), batch["attention_mask"])
        if self.states:
            states = _before_answer(out.hidden_states[1:], batch["borders"])
            targets = [linear(batch[f"state_{i}"]) for i, linear in enumerate(self.states)]
            losses["codi"] = codi_loss(states, sum(targets) / len(targets))
        if "probabilities" in batch:
            target = batch["ids"][:, -last:], batch["probabilities"][:, -last:]
            losses["kl"] = token_loss(out.logits, TeacherTokens(*target))
        return losses


def pad_problems(problems: Sequence[tuple]) -> dict[str, Tensor]:
    """A batch, padded on the left: token ids, weights of cross-entropy (1 in the solution), and teachers' features.

    Args:
        problems: tuples of a `Segmented` text and the `TeacherFeatures` of each teacher, or the
            `TeacherTokens` of one.
    """
    texts, *teachers = zip(*problems, strict=True)
    batch, borders = _pad_texts(texts)
    solution = batch["position_ids"] >= borders[:, 1:2]
    batch["weights"] = (solution & (batch["attention_mask"] > 0)).float()
    batch["borders"] = borders
    for i, teacher in enumerate(teachers):
        if isinstance(teacher[0], TeacherTokens):
            columns = zip(TeacherTokens._fields, zip(*teacher, strict=True), strict=True)
            batch |= {name: _pad_left(rows) for name, rows in columns}
            continue
        for name in ("keys", "values"):
            tokens = [getattr(x, name).float().transpose(0, 1) for x in teacher]
            batch[f"{name}_{i}"] = _pad_left(tokens).transpose(1, 2)
        batch[f"state_{i}"] = torch.stack([x.state.float() for x in teacher])
    return batch


@dataclass(frozen=True, kw_only=True)
class AlignmentSettings:
    """How a student is trained.

    Args:
        kv_weight: weight of the difference of keys and values.
        codi_weight: weight of the difference of hidden states before the answer.
        kv_warmup: steps over which both weights rise from 0.
        kv_end: fraction of the steps after which both have faded to 0; 0: they do not fade.
        start: of the projectors, xavier, orthogonal or identity.
        freeze_projectors: train the student alone.
        epochs: times that each problem is read.
        batch_size: problems per batch.
        learning_rate: of AdamW.
        accumulate: batches per optimizer step.
        fp16: mixed precision.
    """

    kv_weight: float = 1.0
    codi_weight: float = 0.5
    kv_warmup: int = 1000
    kv_end: float = 0.0
    start: Literal[tuple(STARTS)] = "xavier"
    freeze_projectors: bool = False
    epochs: int = 2
    batch_size: int = 8
    learning_rate: float = 2e-5
    accumulate: int = 1
    fp16: bool = False

    def __post_init__(self):
        require_least(self, epochs=1, batch_size=1, accumulate=1, learning_rate=0)
        require_least(self, kv_weight=0, codi_weight=0, kv_warmup=0)
        if not 0 <= self.kv_end <= 1:
            raise ValueError(f"kv_end is {self.kv_end}, expected a fraction from 0 to 1.")

    def steps(self, problems: int) -> int:
        """Optimizer steps for a number of problems."""
        batch = self.batch_size * self.accumulate
        if problems < batch:
            raise ValueError(f"{problems} problems are less than a batch of {batch}: give more.")
        return self.epochs * (problems // batch)


def train_student(
    student: AlignedStudent, problems: Sequence[tuple], settings: AlignmentSettings, **options
) -> list[dict[str, float]]:
    """Train a student on solutions, and toward keys and values like its teachers'.

    The loss is CE + kv_weight KV + codi_weight CODI.

    Args:
        problems: tuples of a text and the features of each teacher, `list(zip(texts, features))`,
            or a data set of these.
        options: of `kvlab.training.fit`: checkpoint, seed, shares_every, ...
    """
    steps = settings.steps(len(problems))
    weights = {"kv": settings.kv_weight} if student.projectors else {}
    if student.states:
        weights["codi"] = settings.codi_weight

    def schedule(step: int) -> dict[str, float]:
        factor = min(1.0, step / settings.kv_warmup) if settings.kv_warmup else 1.0
        if settings.kv_end:
            factor *= max(0.0, 1 - (step - 1) / (settings.kv_end * steps))
        return {name: weight * factor for name, weight in weights.items()}

    batches = {"batch_size": settings.batch_size, "shuffle": True, "drop_last": True}
    options |= {"steps": steps, "precision": "fp16" if settings.fp16 else "no"}
    options |= {"accumulate": settings.accumulate, "learning_rate": settings.learning_rate}
    options |= {"loss_weight_schedule": schedule}
    options |= {"weight": lambda batch: batch["weights"][:, 1:].sum()}
    loader = DataLoader(problems, collate_fn=pad_problems, **batches)
    return fit(student, loader, lambda model, batch: model(batch), **options)


# -- which layers are alike


@torch.no_grad()
def similar_layers(
    student: PreTrainedModel, texts: Texts, teacher: PreTrainedModel, others: Texts, what="hidden"
) -> Tensor:
    """CKA of every student layer with every teacher layer, (K, L), on tokens of prompt and reasoning.

    CKA compares token by token, so the teacher's features are resampled to the student's tokens
    first, by `plan_time`.

    Args:
        texts, others: the same problems, as `segment` made them of the student's and the teacher's
            words; about 100.
        what: "hidden" (outputs of layers, the last one's after the final norm), "keys"
            (un-rotated) or "values".
    """
    cka = CKA()
    for start in tqdm(range(0, len(texts), BATCH), desc="CKA"):
        part = slice(start, start + BATCH)
        layers, borders = _read_texts(student, texts[part])
        teacher_layers, teacher_borders = _read_texts(teacher, others[part])
        plan = plan_time(borders, teacher_borders)
        columns = torch.arange(-plan.mask.shape[1], 0)  # from the end
        counted = plan.mask & (columns < borders[:, 2:3] - borders[:, 3:])  # without the answer
        pair = layers[what], resample(teacher_layers[what], plan)
        cka.update(*(x.transpose(0, 1)[:, counted] for x in pair))
    return cka.matrix()


# -- the arms and their controls


class Arm(NamedTuple):
    """What a student learns from its teacher, and how its cache is aligned.

    Attributes:
        layers: teacher layers for each student layer by CKA; 0: the one in proportion.
        segments: time by segments, or else by index.
        control: what should teach nothing.
        without: an ablation, in the spirit of those of KaVa (Kuzina et al. 2025, arXiv 2510.02312):
            without the KV loss, or with features that are copied as far as they go, not projected.
        learn: the teacher's cache, or else the solutions that it writes in place of the given ones
            (Kim and Rush 2016, arXiv 1606.07947), and with "probabilities" those of their tokens,
            too.
    """

    layers: int = 0
    segments: bool = False
    control: Literal["", "another problem", "random weights"] = ""
    without: Literal["", "KV loss", "projector"] = ""
    learn: Literal["cache", "text", "probabilities"] = "cache"


ARMS = {
    "ce_only": None,
    "baseline": Arm(),
    "cka": Arm(layers=2),
    "segment": Arm(segments=True),
    "full": Arm(layers=2, segments=True),
    "full_one_layer": Arm(layers=1, segments=True),
    "no_kv_loss": Arm(segments=True, without="KV loss"),
    "no_projector": Arm(segments=True, without="projector"),
    "text_distillation": Arm(learn="text"),
    "logit_distillation": Arm(learn="probabilities"),
    "shuffled": Arm(layers=2, segments=True, control="another problem"),
    "shuffled_segment": Arm(segments=True, control="another problem"),
    "random_teacher": Arm(layers=2, segments=True, control="random weights"),
}


class Problems(NamedTuple):
    """Problems to learn from, with the student's and the teachers' solutions, and questions of others with their answers.

    student, teacher : conversations. questions : conversations that end with the question. answers :
    of each question the accepted ones. kind : of `extract_answer`.
    """

    student: list[Conversation]
    teacher: list[Conversation]
    questions: list[Conversation]
    answers: list[tuple[str, ...]]
    kind: str


def train_arm(
    arm: Arm | None,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    teachers: Sequence[Loader],
    settings: AlignmentSettings,
    folder: Path,
    layer_maps: Sequence[str | Path] = (),
    seed: int = 0,
    **options,
) -> tuple[list[dict[str, float]], AlignedStudent]:
    """Train a student by one of the `ARMS`; a run that was stopped continues from its folder.

    Args:
        teachers: functions that load each with its tokenizer. They are called one after another,
            and only if their features are not in the folder yet. Distillation of text and
            probabilities has the first teacher only.
        folder: of this run, for checkpoint and teacher features.
        layer_maps: of each teacher, the file of its layer map. Default: made by CKA where needed.
        seed: of the projectors, and of the order.
        options: of `kvlab.training.fit`: evaluate, every, ...

    Returns:
        The history of `fit`, and the student with its projectors.
    """
    texts = [segment(tokenizer, conversation) for conversation in problems.student]
    if arm and arm.without == "KV loss":
        settings = replace(settings, kv_weight=0.0)
    stored, aligned = [], AlignedStudent(student)
    torch.manual_seed(seed)
    if arm and arm.learn != "cache":
        limit = position_limit(student)
        texts, stored = _distilled(arm, limit, tokenizer, problems, teachers[0], folder)
    elif arm and (settings.kv_weight or settings.codi_weight):
        for i, load in enumerate(teachers):
            path = Path(layer_maps[i]) if layer_maps else folder / f"teacher_{i}/layer_map.json"
            home = folder / f"teacher_{i}"
            stored.append(_encoded(arm, student, texts, problems.teacher, load, path, home))
        torch.manual_seed(seed)
        aligned = _aligned_student(arm, student, stored, settings)
    options |= {"checkpoint": folder / "checkpoint.safetensors", "seed": seed}
    options["shares_every"] = max(1, settings.steps(len(texts)) // 20)
    return train_student(aligned, StackDataset(texts, *stored), settings, **options), aligned


def _aligned_student(arm: Arm, student: PreTrainedModel, stored, settings) -> AlignedStudent:
    """The student with a projector, and for CODI a linear map, from each teacher."""
    width = student.base_model.layers[0].self_attn.k_proj.out_features
    start = "identity" if arm.without == "projector" else settings.start
    projectors = [Projector(x[0].keys.shape[-1], width, start) for x in stored]
    width = student.config.hidden_size
    states = [nn.Linear(x[0].state.shape[-1], width, bias=False) for x in stored]
    aligned = AlignedStudent(student, projectors, states if settings.codi_weight else ())
    frozen = settings.freeze_projectors
    aligned.projectors.requires_grad_(not frozen and arm.without != "projector")
    aligned.states.requires_grad_(not frozen)
    return aligned


def _distilled(
    arm: Arm, limit: int, tokenizer, problems: Problems, load: Loader, folder: Path
) -> tuple[Texts, list[list[TeacherTokens]]]:
    """The solutions that a teacher writes, in the student's tokens, and what it predicts in them.

    One without an answer, or with more tokens than the limit, is replaced by the given one.
    """
    path, (teacher, words) = folder / "solutions.json", load()
    with PartialState().main_process_first():
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            solutions = write_solutions(teacher, words, problems.teacher)
            write_text(path, json.dumps(solutions))
    texts, conversations = [], []
    for solution, (*question, given) in zip(read_json(path), problems.student, strict=True):
        conversation = [*question, {"role": "assistant", "content": solution}]
        try:
            text = segment(tokenizer, conversation)
        except ValueError:
            text = None
        if text is None or len(text.input_ids) > limit:
            conversation = [*question, given]
            text = segment(tokenizer, conversation)
        texts.append(text)
        conversations.append(conversation)
    if arm.learn == "text":
        return texts, []
    others = [segment(words, conversation) for conversation in conversations]
    return texts, [predict_with_teacher(teacher, others, texts, shared_tokens(tokenizer, words))]


def _encoded(
    arm: Arm, student: PreTrainedModel, texts: Texts, conversations, load: Loader, path, home: Path
) -> ConcatDataset:
    """A teacher's features, which are written to files first if they are not there."""
    files = [home / f"{n:06}.safetensors" for n in range(0, len(texts), PROBLEMS_PER_FILE)]
    with PartialState().main_process_first():
        if not all(file.is_file() for file in files):
            home.mkdir(parents=True, exist_ok=True)
            _encode_to_files(arm, student, texts, conversations, load, path, files)
    return ConcatDataset([StoredTeacherFeatures(file) for file in files])


def _encode_to_files(
    arm: Arm, student: PreTrainedModel, texts: Texts, conversations, load: Loader, path: Path, files
) -> None:
    """Write teacher features, some problems per file, and a layer map if it has to be made."""
    teacher, tokenizer = load()
    if arm.control == "random weights":
        teacher = type(teacher)(teacher.config).to(teacher.device, teacher.dtype).eval()
    others = [segment(tokenizer, conversation) for conversation in conversations]
    layers = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    if arm.layers and not path.is_file():
        part = slice(LAYER_MAP_PROBLEMS)
        matrix = similar_layers(student, texts[part], teacher, others[part])
        chosen = layer_map(matrix, min(arm.layers, layers[1]))
        names = student.config.name_or_path, teacher.config.name_or_path
        save_layer_map(path, chosen, *names, len(texts[part]))
    chosen = load_layer_map(path, *layers) if arm.layers else proportional(*layers)
    if arm.control == "another problem":
        half = len(others) // 2
        others = [*others[half:], *others[:half]]
    plan = plan_time if arm.segments else by_index
    for i, file in enumerate(files):
        if not file.is_file():
            part = slice(i * PROBLEMS_PER_FILE, (i + 1) * PROBLEMS_PER_FILE)
            problems = encode_with_teacher(teacher, others[part], texts[part], chosen, plan)
            save_teacher_features(file, problems)


def solved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Problems, max_tokens: int
) -> np.ndarray:
    """1 for each question whose greedy answer is an accepted one, else 0."""
    texts = answers(model, tokenizer, problems.questions, max_tokens, label="problems")
    correct = []
    for text, accepted in zip(texts, problems.answers, strict=True):
        answer = extract_answer(problems.kind, text)
        correct.append(any(same_answer(problems.kind, answer, other) for other in accepted))
    return np.array(correct, float)


def alignment_figures(runs: pd.DataFrame) -> list[dict]:
    """Figures of runs with arm, seed, accuracy, seconds and perhaps GB; intervals (95 %) are over seeds.

    `gain_ARM` is its accuracy minus that of ce_only, seed by seed.

    Example:
        >>> rows = [["ce_only", 0, 0.5, 9.0], ["full", 0, 0.75, 10.0]]
        >>> figures = alignment_figures(pd.DataFrame(rows, columns=["arm", "seed", "accuracy", "seconds"]))
        >>> [(f["name"], f["value"]) for f in figures if "accuracy" in f["name"] or "gain" in f["name"]]
        [('accuracy_ce_only', 0.5), ('accuracy_full', 0.75), ('gain_full', 0.25)]
    """
    figures, table = [], runs.pivot(index="seed", columns="arm")
    arms = runs["arm"].unique()
    for score, unit in {"accuracy": "fraction", "seconds": "seconds", "GB": "GB"}.items():
        if score in runs:
            for arm in arms:
                figures.append(
                    figure(f"{score}_{arm}", table[score][arm].dropna(), unit, "n is seeds")
                )
    accuracy = table["accuracy"]
    for arm in arms:
        if "ce_only" in accuracy and arm != "ce_only":
            gain = (accuracy[arm] - accuracy["ce_only"]).dropna()
            conditions = f"accuracy of {arm} minus that of ce_only, seed by seed; n is seeds"
            figures.append(figure(f"gain_{arm}", gain, "difference", conditions))
    return figures
