"""A proposer with a mistake that benchmark and tests must find."""

from kvlab.speculate import ModelProposer, RowSampling


class RawSampling(RowSampling):
    """Samples by processed logits, but reports the probabilities of the raw ones."""

    def choose(self, logits, texts):
        return super().choose(logits, texts)[0], logits[:, 0].softmax(-1)


class RawProposer(ModelProposer):
    """Reports a law that it did not draw from; a test of q must find that."""

    def start(self, texts, target_cache, sampling, room):
        super().start(texts, target_cache, RawSampling(**vars(sampling)), room)
