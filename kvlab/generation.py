"""Conversations as token ids, where texts end, and greedy answers in batches.

What a text is, is decided here for the whole package: `rendered` writes turns, `Ending` says where a
text ends, and `processors_of` gives what the model's generation config changes in each step.
`continuations` here and `kvlab.speculate.decode` use all three, so they give the same text.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Self

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from kvlab.cache import from_layers, prefill
from kvlab.models import position_limit
from kvlab.slots import Slots, step

Conversation = Sequence[dict[str, str]]
Stop = str | Sequence[str]
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # in place of a message, to find what surrounds it
THOUGHT = ("<think>", "</think>")
# Fields of a generation config that would change the text in ways that no step here follows,
# with the values that change nothing.
UNSUPPORTED = {"num_beams": 1, "guidance_scale": 1, "watermarking_config": None, "max_time": None}
UNSUPPORTED |= {"token_healing": False, "dola_layers": None, "penalty_alpha": None}
UNSUPPORTED |= {"constraints": None, "force_words_ids": None}


# -- generation


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    label: str = "answers",
    stop: Stop = (),
    enable_thinking: bool = False,
) -> list[str]:
    r"""Return greedy answers to conversations that end with a user message, as `answer_text` does.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer, whose chat template renders the conversations.
        conversations: Lists of {"role", "content"} messages.
        max_new_tokens: Longest answer.
        batch_size: Conversations per batch; batches have similar lengths.
        label: Of the progress bar.
        stop: Strings that end an answer, such as ["\nQuestion:"]; they are cut off.
        enable_thinking: Let the model think first, if its template has this option.

    Example:
        >>> from kvlab import lab
        >>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
        >>> text = "Anna lives in Rome. Where does Anna live?"
        >>> answers(model, tokenizer, [[{"role": "user", "content": text}]])
        ['Rome']
    """
    prompts = [encode(tokenizer, c, enable_thinking) for c in conversations]
    rows = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, label, stop)
    stop = Ending.of(model, tokenizer, stop).stop
    texts = []
    for conversation, ids in zip(conversations, rows, strict=True):
        opened = rendered(tokenizer, conversation, enable_thinking).rstrip().endswith(THOUGHT[0])
        texts.append(answer_text(tokenizer, ids, stop, opened))
    return texts


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    label: str = "answers",
    stop: Stop = (),
) -> list[list[int]]:
    """Return the token ids of a greedy continuation of each prompt, up to and including its end.

    They are those of `kvlab.speculate.decode`; see there.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ending = Ending.of(model, tokenizer, stop)
    require_masks(model)
    left = [tokens_left(model, len(prompt), max_new_tokens) for prompt in prompts]
    texts: list[list[int]] = [[]] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc=label, delay=2, leave=False):
        batch = order[start : start + batch_size]
        rows = _continue(model, [prompts[i] for i in batch], [left[i] for i in batch], ending)
        for i, row in zip(batch, rows, strict=True):
            texts[i] = row
    return texts


def _continue(model, prompts: list[list[int]], left: list[int], ending: "Ending"):
    """Greedy continuations of one batch, of at most left[b] tokens."""
    rows: list[list[int]] = [[] for _ in prompts]
    processors = []
    for prompt, count in zip(prompts, left, strict=True):
        processors.append(processors_of(model, prompt, ending, count))
    padding = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], **padding)
    mask = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], **padding)
    prefix = prefill(model, ids.to(model.device), attention_mask=mask.to(model.device))
    slots = Slots(model, len(prompts), ids.shape[1] + max(left))
    for row, prompt in enumerate(prompts):
        own = (slice(row, row + 1), slice(None), slice(ids.shape[1] - len(prompt), None))
        layers = [(layer.keys[own], layer.values[own]) for layer in prefix.cache.layers]
        slots.put(row, from_layers(layers), len(prompt))
    logits = prefix.logits[:, None]
    unfinished = set(range(len(prompts)))
    while True:
        if any(processors):
            texts = [[*prompt, *row] for prompt, row in zip(prompts, rows, strict=True)]
            logits = process(widened(logits), texts, processors)
        tokens = logits[:, -1].argmax(-1)
        new = tokens.tolist()
        for row in tuple(unfinished):
            rows[row].append(new[row])
            if len(rows[row]) == left[row] or ending.reached(rows[row]):
                unfinished.remove(row)
        if not unfinished:
            return rows
        columns = slots.set_write_positions(slots.lengths, 1)
        logits = step(model, slots, tokens[:, None], columns)
        slots.lengths = [n + 1 for n in slots.lengths]


def require_masks(model: PreTrainedModel) -> None:
    """Refuse attention that takes no mask of its own for each row."""
    attention = model.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"attn_implementation is {attention!r}, expected 'sdpa' or 'eager'.")


def tokens_left(model: PreTrainedModel, position: int, max_new_tokens: int) -> int:
    """Return how many tokens a text may gain: as many as asked for, or as the model can read.

    Raises:
        ValueError: the text is already longer than the model reads.
    """
    limit = position_limit(model)
    if position > limit:
        reads = f"The prompt has {position} tokens, the model reads up to {limit}"
        raise ValueError(f"{reads}: give a shorter one.")
    return min(max_new_tokens, limit - position + 1)


# -- where a text ends, and what decides its tokens


@dataclass(frozen=True)
class Ending:
    r"""Where a text ends: with an end token, or with the token that completes a stop string.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> ending = Ending.of(lab.load("lab-target"), tokenizer, "Rome")
        >>> [ending.reached(tokenizer(text).input_ids) for text in ("In", "In Rome", "In<|end|>")]
        [False, True, True]
    """

    ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop: Stop = (),
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Self:
        """Collect the end tokens and stop strings of the generation config and of the arguments.

        Args:
            model: Its generation config may have `eos_token_id` and `stop_strings`.
            tokenizer: Adds its end token; stop strings need it.
            stop: Strings.
            eos_token_id: Instead of the end tokens of model and tokenizer.
        """
        ids = end_tokens(model, tokenizer) if eos_token_id is None else _flat(eos_token_id)
        stop = (*_strings(stop), *_strings(model.generation_config.stop_strings))
        if stop and tokenizer is None:
            raise ValueError(f"Stop strings {stop} are found in text: give the tokenizer, too.")
        if "" in stop:
            raise ValueError("A stop string is empty, so no text could begin: leave it out.")
        return cls(tuple(ids), tuple(dict.fromkeys(stop)), tokenizer)

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the new tokens of a text, of which only the last may end it, are complete."""
        if tokens[-1] in self.ids:
            return True
        text = self.tokenizer.decode(tokens) if self.stop else ""
        return any(string in text for string in self.stop)


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[int, ...]:
    """Return the end tokens of a model's generation config, and of its tokenizer."""
    ids = _flat(model.generation_config.eos_token_id)
    ids += _flat(tokenizer.eos_token_id) if tokenizer is not None else []
    return tuple(dict.fromkeys(ids))


def _flat(ids) -> list[int]:
    """Token ids, of which there may be none, one or several, as numbers, lists or tensors."""
    return [] if ids is None else np.atleast_1d(np.asarray(ids, dtype=np.int64)).tolist()


def _strings(stop: Stop | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def processors_of(
    model: PreTrainedModel,
    text: Sequence[int],
    ending: Ending,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    logits_processor: Iterable = (),
) -> LogitsProcessorList:
    """Return the logits processors that `model.generate` would apply to the continuation of a text.

    Sampling is left to `kvlab.speculate.Sampling`: do_sample, temperature, repetition_penalty and
    the like in the generation config are not used.

    Args:
        model: With its generation config.
        text: Token ids of prefix and prompt.
        ending: The end tokens, which `min_new_tokens` forbids.
        max_new_tokens: Largest number of new tokens.
        min_new_tokens: Smallest number of new tokens; 0: that of the generation config.
        repetition_penalty: Above 1.0 makes tokens of the context less probable.
        logits_processor: More processors, after those of the generation config.

    Raises:
        ValueError: the generation config has a field that cannot be followed.
    """
    config = copy.deepcopy(model.generation_config)
    for field, neutral in UNSUPPORTED.items():
        value = getattr(config, field, None)
        if value not in (None, neutral):
            hint = f"set model.generation_config.{field} = {neutral}"
            raise ValueError(f"The generation config has {field}={value!r}, not followed: {hint}.")
    config.do_sample = False
    config.repetition_penalty = repetition_penalty
    config.min_new_tokens = min_new_tokens or config.min_new_tokens
    config.max_length = len(text) + max_new_tokens  # where an end token may be forced
    ends = torch.tensor(ending.ids, device=model.device) if ending.ids else None
    config._eos_token_tensor = ends  # where transformers keeps them during `generate`
    return model._get_logits_processor(
        config,
        input_ids_seq_length=len(text),
        encoder_input_ids=torch.tensor([text], device=model.device),
        logits_processor=LogitsProcessorList(logits_processor),
        device=model.device,
    )


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 or wider, in which they are processed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def process(
    logits: Tensor,
    texts: Sequence[list[int]],
    processors: Sequence[LogitsProcessorList],
    vocab_size: int | None = None,
) -> Tensor:
    """Apply the processors of each row at each position.

    Args:
        logits: (B, k, V). The last of the k follows texts[b], the others its beginning.
        texts: Token ids of each row.
        processors: Of each row.
        vocab_size: That the processors are made for; V can differ, if a draft is processed.
    """
    count, width = logits.shape[1:]
    size = vocab_size or width
    lowest = torch.finfo(logits.dtype).min
    scores = pad(logits, (0, size - width), value=lowest).clone()
    for row, text in enumerate(texts):
        ids = torch.tensor([text], device=logits.device).clamp(max=size - 1)
        for i in range(count if processors[row] else 0):
            context = ids[:, : len(text) - count + 1 + i]
            scores[row, i] = processors[row](context, scores[row, i][None])[0]
    # A row in which a smaller draft may choose nothing has no distribution: all are equal.
    return scores if size == width else pad(scores, (0, width - size), value=lowest).clamp(lowest)


# -- turns


def encode(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, enable_thinking: bool = False
) -> list[int]:
    """Return the token ids of a conversation; if a user speaks last, with the opening of the answer.

    Without a chat template each message is a line, the last one left open.

    >>> from kvlab import lab
    >>> tokenizer = lab.load_tokenizer("lab-target")
    >>> tokenizer.decode(encode(tokenizer, [{"role": "user", "content": "Who?"}]))
    '<|user|> Who?<|assistant|>'
    """
    text = rendered(tokenizer, conversation, enable_thinking)
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, answer: str
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt, as `encode` gives them, and of an answer with its end.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> ids = encode_answer(tokenizer, [{"role": "user", "content": "Who?"}], "Ben")
        >>> list(map(tokenizer.decode, ids))
        ['<|user|> Who?<|assistant|>', ' Ben<|end|>']
    """
    prompt = encode(tokenizer, conversation)
    whole = encode(tokenizer, [*conversation, {"role": "assistant", "content": answer}])
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    text = _answer(tokenizer, conversation, answer)
    return prompt, tokenizer(text, add_special_tokens=False)["input_ids"]


def _answer(tokenizer, conversation: Conversation, answer: str) -> str:
    """The text of an answer and its end, after a prompt that the template may open otherwise."""
    opening = rendered(tokenizer, conversation)
    whole, marked = (
        rendered(tokenizer, [*conversation, {"role": "assistant", "content": content}])
        for content in (answer, MARK)
    )
    same = takewhile(lambda pair: pair[0] == pair[1], zip(opening, marked, strict=False))
    header = opening[: len(list(same))]
    if whole.startswith(header):
        return whole[len(header) :]
    return answer + closing(tokenizer)


def encode_parts(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[list[int]]:
    """Return the token ids of each message; a user's end with the opening of the answer.

    Joined they are what `encode` returns, wherever tokens do not reach across messages, and the
    template does not open answers otherwise than it renders them.

    Raises:
        ValueError: the template writes a message differently once another follows it.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> roles = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Where?"}]
        >>> [tokenizer.decode(ids) for ids in encode_parts(tokenizer, roles)]
        ['<|system|> Hi.', '<|user|> Where?<|assistant|>']
    """
    parts, before = [], ""
    for i, message in enumerate(conversation):
        text = rendered(tokenizer, conversation[: i + 1])
        part = text[len(before) :]
        if not text.startswith(before):
            asked = i and conversation[i - 1]["role"] == "user"
            if not asked or not text.startswith(_unopened(tokenizer, conversation[:i])):
                role = conversation[i - 1]["role"]
                raise ValueError(
                    f"The chat template changes a {role} message when another follows it, so a "
                    f"text cannot continue it with {message['role']}: use a tokenizer whose "
                    "template leaves it, or none (chat_template=None)."
                )
            part = _answer(tokenizer, conversation[:i], message["content"])
        special = not tokenizer.chat_template and not i
        parts.append(tokenizer(part, add_special_tokens=special)["input_ids"])
        before = text
    return parts


def _unopened(tokenizer, conversation: Conversation) -> str:
    return _apply(tokenizer, conversation, add_generation_prompt=False)


def closing(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that ends an assistant's message, before another turn.

    >>> from kvlab import lab
    >>> closing(lab.load_tokenizer("lab-target"))
    '<|end|>'
    """
    if not tokenizer.chat_template:
        return "\n"
    turns = [{"role": role, "content": MARK} for role in ("user", "assistant")]
    return rendered(tokenizer, turns).rpartition(MARK)[2]


def close_turn(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], end_ids: Sequence[int] = ()
) -> list[int]:
    """Return the ids of a conversation with its last answer closed, so that a turn can follow.

    An answer that was cut off gets the whole closing, one that ended by itself the rest of it.

    Args:
        tokenizer: With its chat template.
        ids: Token ids that end with an answer.
        end_ids: End tokens of the model; one that does not belong to the closing is left out.
    """
    ids = list(ids)
    end = tokenizer(closing(tokenizer), add_special_tokens=False)["input_ids"]
    overlaps = [n for n in range(len(end) + 1) if ids[len(ids) - n :] == end[:n]]
    if overlaps[-1] == 0 and ids and ids[-1] in end_ids:
        ids.pop()
    return ids + end[overlaps[-1] :]


def rendered(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, enable_thinking: bool = False
) -> str:
    """Return the text of a conversation, as `encode` encodes it.

    Raises:
        ValueError: the template refuses the conversation, such as one with a system message.

    >>> from kvlab import lab
    >>> rendered(lab.load_tokenizer("lab-target"), [{"role": "user", "content": "Who?"}])
    '<|user|> Who?<|assistant|>'
    """
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in conversation)
    asks = conversation[-1]["role"] == "user"
    thinks = enable_thinking or getattr(tokenizer, "enable_thinking", False)  # of a `Scale`
    options = {"add_generation_prompt": asks, "enable_thinking": thinks}
    return _apply(tokenizer, conversation, **options)


def _apply(tokenizer, conversation: Conversation, **options) -> str:
    try:
        return tokenizer.apply_chat_template(list(conversation), tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in conversation)
        refused = f"The chat template refuses a conversation of {roles} ({error})"
        hint = "use a tokenizer whose template takes these, or none (chat_template=None)"
        raise ValueError(f"{refused}: {hint}.") from error


def answer_text(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Stop = (), opened: bool = False
) -> str:
    """Return the text of new tokens without special tokens, stop strings and thoughts.

    Args:
        tokenizer: Of the model.
        ids: The new tokens.
        stop: The text ends before the first of these strings.
        opened: The prompt has begun a thought. A thought that does not end leaves no answer.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> ids = tokenizer("<think> Who? </think> Ben. Question: Where?").input_ids
        >>> answer_text(tokenizer, ids, stop=" Question:")
        'Ben.'
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for string in _strings(stop):
        text = text.partition(string)[0]
    return without_thoughts(THOUGHT[0] * opened + text)


def without_thoughts(text: str) -> str:
    """Return a text without what it says between <think> and </think>.

    Example:
        >>> without_thoughts("<think>6 or 7?</think> It is 7."), without_thoughts("<think>6 or")
        ('It is 7.', '')
    """
    begin, end = THOUGHT
    return text.rpartition(end)[2].partition(begin)[0].strip()
