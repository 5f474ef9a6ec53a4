"""Chat templates, token ids of conversations, and greedy answers in batches."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    label: str = "answers",
) -> list[str]:
    """Return greedy answers to conversations that end with a user message, without special tokens.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer, whose chat template renders the conversations.
        conversations: Lists of {"role", "content"} messages.
        max_new_tokens: Longest answer.
        batch_size: Conversations per batch; batches have similar lengths.
        label: Of the progress bar.

    Example:
        >>> from kvlab import lab
        >>> model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
        >>> text = "Anna lives in Rome. Where does Anna live?"
        >>> answers(model, tokenizer, [[{"role": "user", "content": text}]])
        ['Rome']
    """
    prompts = [encode(tokenizer, c) for c in conversations]
    rows = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, label)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    label: str = "answers",
) -> list[list[int]]:
    """Return the token ids of a greedy continuation of each prompt, up to and including the end token."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    end = tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # else the model's own generation settings fill in
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts: list[list[int]] = [[]] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc=label, delay=2, leave=False):
        batch = order[start : start + batch_size]
        ids = {"input_ids": [prompts[i] for i in batch]}
        padded = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**padded, generation_config=config)
        for i, row in zip(batch, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            texts[i] = row[: row.index(end) + 1] if end in row else row
    return texts


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, str]]) -> list[int]:
    """Return the token ids of a conversation; if a user speaks last, with the opening of the answer.

    No thinking is asked for. Without a chat template each message is a line, the last one left open.

    >>> from kvlab import lab
    >>> tokenizer = lab.load_tokenizer("lab-target")
    >>> tokenizer.decode(encode(tokenizer, [{"role": "user", "content": "Who?"}]))
    '<|user|> Who?<|assistant|>'
    """
    text = rendered(tokenizer, conversation)
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def encode_parts(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, str]]
) -> list[list[int]]:
    """Return the token ids of each message; a user's end with the opening of the answer.

    Joined they are what `encode` returns, wherever tokens do not reach across messages.

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
        if not text.startswith(before):
            role = conversation[i - 1]["role"]
            raise ValueError(
                f"The chat template changes a {role} message when another follows it, so a text cannot "
                f"continue it with {message['role']}: use a tokenizer whose template leaves it, or none "
                "(chat_template=None)."
            )
        special = not tokenizer.chat_template and not i
        parts.append(tokenizer(text[len(before) :], add_special_tokens=special)["input_ids"])
        before = text
    return parts


def rendered(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, str]]) -> str:
    """Return the text of a conversation, as `encode` encodes it.

    >>> from kvlab import lab
    >>> rendered(lab.load_tokenizer("lab-target"), [{"role": "user", "content": "Who?"}])
    '<|user|> Who?<|assistant|>'
    """
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in conversation)
    opens_answer = conversation[-1]["role"] == "user"
    return tokenizer.apply_chat_template(
        list(conversation),
        tokenize=False,
        add_generation_prompt=opens_answer,
        enable_thinking=False,
    )
