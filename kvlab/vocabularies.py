"""Two vocabularies: the tokens that both have, and where two tokenizations of one text agree."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def shared_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> Tensor:
    """Ids of the tokens that two vocabularies spell alike, (2, n), ascending in the first.

    Example:
        >>> from kvlab import lab
        >>> tokenizers = lab.load_tokenizer("lab-target"), lab.load_tokenizer("lab-teacher")
        >>> ids = shared_tokens(*tokenizers)
        >>> [len(tokenizer) for tokenizer in tokenizers], ids.shape[1]
        ([1536, 640], 628)
    """
    vocabulary, other_vocabulary = tokenizer.get_vocab(), other.get_vocab()
    both = vocabulary.keys() & other_vocabulary.keys()
    pairs = sorted((vocabulary[token], other_vocabulary[token]) for token in both)
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T


def agreed_tokens(begins: Tensor, other_begins: Tensor) -> Tensor:
    """Indices of the tokens that have the same extent in two tokenizations of one text, (2, n).

    Args:
        begins: (T,), the character at which each token begins, ascending.
        other_begins: (T_o,), the same of the other tokenization.

    Example:
        >>> agreed_tokens(torch.tensor([0, 3, 5, 9]), torch.tensor([0, 3, 4, 5, 9]))
        tensor([[0, 2, 3],
                [0, 3, 4]])
    """
    spans, other_spans = (
        {span: index for index, span in enumerate(zip(x, [*x[1:], None], strict=True))}
        for x in (begins.tolist(), other_begins.tolist())
    )
    pairs = [(index, other_spans[span]) for span, index in spans.items() if span in other_spans]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
