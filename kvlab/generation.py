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
    """Greedy answers to conversations that end with a user message, in batches of similar length.

    Args:
        conversations: each a list of {"role", "content"} messages, rendered by the tokenizer's chat
            template.
        label: of the progress bar, which only shows when the work takes more than a second or two.

    Returns:
        One text a conversation, without special tokens and outer white space.

    Example:
        >>> from kvlab import lab
        >>> passage = {"role": "system", "content": "Anna lives in Rome. Ben has a dog."}
        >>> ask = [passage, {"role": "user", "content": "Where does Anna live?"}]
        >>> answers(lab.load("lab-target"), lab.load_tokenizer("lab-target"), [ask])
        ['Rome']
    """
    prompts = [encode(tokenizer, c) for c in conversations]
    made = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, label)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    label: str = "answers",
) -> list[list[int]]:
    """The token ids that greedy decoding puts behind each prompt, the end token included if it was reached."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # else the model's own generation settings fill in
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    made: list[list[int]] = [[]] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc=label, delay=2, leave=False):
        batch = order[start : start + batch_size]
        padded = tokenizer.pad(
            {"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt"
        )
        output = model.generate(**padded.to(model.device), generation_config=config)
        for i, ids in zip(batch, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            end = (
                ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            )
            made[i] = ids[:end]
    return made


def encode(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, and of what opens the answer if a user speaks last; no thinking is asked for.

    Without a chat template the messages stand a line each, and the last line is left open.

    Example:
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
    """Token ids of each message of a conversation; one by a user ends with what opens the answer.

    Joined they are what `encode` gives, wherever tokens do not reach across messages, which chat
    templates see to. Raises ValueError for a template that writes a message differently once
    another follows it.

    Example:
        >>> from kvlab import lab
        >>> tokenizer = lab.load_tokenizer("lab-target")
        >>> messages = [{"role": "system", "content": "Anna lives in Rome."}, {"role": "user", "content": "Where?"}]
        >>> [tokenizer.decode(ids) for ids in encode_parts(tokenizer, messages)]
        ['<|system|> Anna lives in Rome.', '<|user|> Where?<|assistant|>']
    """
    texts = [rendered(tokenizer, conversation[: i + 1]) for i in range(len(conversation))]
    for role, before, after in zip(
        (m["role"] for m in conversation), texts, texts[1:], strict=False
    ):
        if not after.startswith(before):
            raise ValueError(
                f"The chat template changes a {role} message when another follows it, so a text cannot go on behind "
                "it: use a tokenizer whose template leaves it, or none (chat_template=None)."
            )
    starts, special = [0, *map(len, texts)], not tokenizer.chat_template
    parts = [text[start:] for start, text in zip(starts, texts, strict=False)]
    return [
        tokenizer(part, add_special_tokens=special and not i)["input_ids"]
        for i, part in enumerate(parts)
    ]


def rendered(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, str]]) -> str:
    """The text of a conversation, as `encode` encodes it.

    >>> from kvlab import lab
    >>> rendered(lab.load_tokenizer("lab-target"), [{"role": "user", "content": "Who?"}])
    '<|user|> Who?<|assistant|>'
    """
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in conversation)
    options = {
        "add_generation_prompt": conversation[-1]["role"] == "user",
        "enable_thinking": False,
    }
    return tokenizer.apply_chat_template(list(conversation), tokenize=False, **options)
