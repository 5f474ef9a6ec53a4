"""A parallel draft: its heads, their losses, and speculation with it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kvlab import lab
from kvlab.draft import DraftExample, generate_targets
from kvlab.evaluate import chi_square
from kvlab.parallel import (
    ParallelDraft,
    ParallelSettings,
    pad_parallel_batch,
    parallel_losses,
    train_parallel,
)
from kvlab.speculate import ParallelProposer, Runner, Sampling, decode, generate, summarize

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def noisy(target, guesses=3, seed=0):
    """A draft that guesses something else in each place."""
    torch.manual_seed(seed)
    draft = ParallelDraft(target.config.hidden_size, guesses)
    torch.nn.init.normal_(draft.output_proj, std=0.3)
    return draft.to(target.dtype)


@pytest.fixture(scope="module")
def target():
    return lab.models.make("lab-draft", 2)


@pytest.fixture(scope="module")
def examples(target):
    return generate_targets(target, lab.load_tokenizer("lab-draft"), PROMPTS, max_new_tokens=12)


# -- the heads


def test_the_formula_is_that_of_each_head_alone(target):
    draft = noisy(target)
    hidden, embeddings = torch.randn(2, 5, 128)
    states = draft(hidden, embeddings)
    normed = embeddings / (embeddings.square().mean(-1, keepdim=True)).sqrt()
    x = torch.cat((hidden, normed), -1)
    for k in range(3):
        rows = slice(k * 128, (k + 1) * 128)
        inner = F.silu(x @ draft.input_proj.weight[rows].T + draft.input_proj.bias[rows])
        assert torch.allclose(states[:, k], hidden + inner @ draft.output_proj[k], atol=1e-4)


def test_a_new_draft_guesses_what_the_target_chose(target):
    hidden = torch.randn(4, 128)
    states = ParallelDraft(128, 5)(hidden, torch.randn(4, 128))
    assert torch.equal(states, hidden[:, None].expand(4, 5, 128))


def test_a_draft_comes_back_bit_for_bit(target, tmp_path):
    draft = noisy(target)
    draft.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    again = ParallelDraft.from_pretrained(tmp_path)
    assert again.guesses == 3
    assert not again.training
    for a, b in zip(draft.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# -- training


def test_losses_are_a_loop_over_guesses_and_tokens(target, examples):
    draft = noisy(target)
    batch = pad_parallel_batch(examples)
    losses = parallel_losses(draft, target, batch, {"ce": 1.0, "kl": 0.5}, decay=0.5)
    head, embed = target.lm_head, target.model.embed_tokens
    totals = {"ce": 0.0, "kl": 0.0}
    for k in (1, 2, 3):
        ce, kl = [], []
        for example in examples:
            answer = example.input_ids[example.start :]
            for r in range(len(answer) - k):
                state = draft(example.hidden_states[r], embed(answer[r]))[k - 1]
                log_q = head(state).log_softmax(-1)
                log_p = head(example.hidden_states[r + k]).log_softmax(-1)
                ce.append(-log_q[answer[r + k]])
                kl.append((log_p.exp() * (log_p - log_q)).sum())
        weight = 0.5 ** (k - 1) / (1 + 0.5 + 0.25)
        totals["ce"] += weight * torch.stack(ce).mean()
        totals["kl"] += 0.5 * weight * torch.stack(kl).mean()
    for name, total in totals.items():
        assert torch.allclose(losses[name], total, atol=1e-4), name


def test_the_states_are_those_from_which_the_target_chose(target, examples):
    for example in examples:
        answer = example.input_ids[example.start :]
        assert torch.equal(target.lm_head(example.hidden_states).argmax(-1), answer)


def test_training_moves_the_heads_alone_and_comes_to_guess(target, examples):
    before = {name: p.clone() for name, p in target.named_parameters()}
    torch.manual_seed(0)
    draft = ParallelDraft(128, 2)
    options = {"epochs": 30, "batch_size": 3, "learning_rate": 1e-2}
    history = train_parallel(draft, target, examples, **options)
    assert history[-1]["ce"] < 0.5 * history[0]["ce"]
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())
    prompts = [torch.tensor(prompt) for prompt in PROMPTS]
    proposer = ParallelProposer(target, draft)
    made = generate(target, prompts, proposer, gamma=2, max_new_tokens=12)
    assert summarize(made.rounds).acceptance > 0.5


def test_texts_too_short_for_all_guesses_are_left_out(target, examples):
    short = [
        DraftExample(e.input_ids[: e.start + 2], e.start, e.hidden_states[:2]) for e in examples
    ]
    draft = ParallelDraft(128, 2)
    with pytest.raises(ValueError, match="0 answers of more than 2 tokens"):
        train_parallel(draft, target, short, batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"decay": -1.0}, "decay is -1"),
        ({"loss_weights": {"no": 1.0}}, "no loss"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ParallelSettings(**options)


# -- speculation


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_greedy_text_is_the_targets_whatever_is_guessed(target, gamma):
    prompts = [torch.tensor(prompt) for prompt in PROMPTS]
    plain = generate(target, prompts, max_new_tokens=20)
    made = generate(
        target, prompts, ParallelProposer(target, noisy(target)), gamma=gamma, max_new_tokens=20
    )
    for a, b in zip(plain.tokens, made.tokens, strict=True):
        assert a.tolist() == b.tolist()
    widths = {len(row) for r in made.rounds for row in r.drafted}
    assert max(widths) == min(gamma, 3)  # no more than there are heads


def test_guesses_come_from_the_states_of_the_last_accepted_token(target):
    """By hand: in each round the draft reads the state of a fresh forward over the whole text."""
    draft, seen = noisy(target), []

    def watched(states, embeddings):
        seen.append((states, embeddings))
        return draft(states, embeddings)

    prompt = torch.tensor(PROMPTS[0])
    texts, text = [], list(PROMPTS[0])
    for r in decode(
        target, [prompt], ParallelProposer(target, watched), gamma=3, max_new_tokens=16
    ):
        text = text + r.tokens[0]
        texts.append(list(text))
    # a round is prepared after the text of the round before it is complete
    for (states, embeddings), text in zip(seen, texts[2:], strict=False):
        with torch.inference_mode():
            hidden = target.model(torch.tensor([text[:-1]])).last_hidden_state[:, -1]
            assert torch.allclose(states, hidden, atol=1e-4)
            assert torch.equal(embeddings, target.model.embed_tokens(torch.tensor([text[-1]])))
    assert len(seen) > 3


def test_a_draft_that_knows_the_next_token_is_always_right():
    """A target whose next token depends on the last one alone, and heads that follow the chain."""
    torch.manual_seed(0)
    target = lab.models.make("lab-draft", 0)
    follow = target.model.embed_tokens.weight.clone()

    def oracle(states, embeddings):
        text = [int((follow - e).square().sum(-1).argmin()) for e in embeddings]
        rows = []
        for row, last in zip(texts, text, strict=True):
            assert row[-1] == last
            made = generate(target, [torch.tensor(row)], max_new_tokens=4).tokens[0]
            ids = torch.tensor([[*row, *made.tolist()]])
            rows.append(target.model(ids).last_hidden_state[0, len(row) - 1 : len(row) + 3])
        return torch.stack(rows)

    proposer = ParallelProposer(target, oracle)
    texts = []
    start = proposer.start
    proposer.start = lambda rows, *more: (texts.extend(rows), start(rows, *more))
    rows = [torch.tensor([5, 6, 7])]
    with torch.inference_mode():
        made = generate(target, rows, proposer, gamma=4, max_new_tokens=21, eos_token_id=[])
    rounds = [r for r in made.rounds if r.drafted[0]]
    assert summarize(rounds).acceptance == 1


def test_rows_of_a_batch_do_not_depend_on_each_other(target):
    draft = noisy(target)
    options = {"gamma": 3, "max_new_tokens": 14}
    rows = [torch.tensor(prompt) for prompt in PROMPTS]
    together = generate(target, rows, ParallelProposer(target, draft), **options)
    for i, row in enumerate(rows):
        alone = generate(target, [row], ParallelProposer(target, draft), **options)
        assert alone.tokens[0].tolist() == together.tokens[i].tolist()
        guesses = [r.drafted[0] for r in alone.rounds if r.drafted[0]]
        others = [r.drafted[i] for r in together.rounds if r.drafted[i]]
        # a row near its end may guess less in a batch of one
        assert guesses[0] == others[0]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampled_text_has_the_targets_law(tiny_model, temperature):
    target = tiny_model(vocab_size=5, seed=3)
    draft = noisy(target, guesses=2)
    prompt = torch.tensor([1, 2])
    generator = torch.Generator().manual_seed(1)
    sampling = Sampling(temperature, generator=generator)
    options = {"max_new_tokens": 4, "sampling": sampling, "eos_token_id": []}
    rows = [prompt] * 500
    counts = np.zeros(5**4)
    for _ in range(4):
        made = generate(target, rows, ParallelProposer(target, draft), gamma=2, **options)
        codes = torch.stack(made.tokens) @ torch.tensor([125, 25, 5, 1])
        counts += np.bincount(codes.numpy(), minlength=5**4)
    law = np.ones(1)
    texts = [[]]
    for _ in range(4):
        ids = torch.tensor([[1, 2, *text] for text in texts])
        p = (target(ids).logits[:, -1].double() / temperature).softmax(-1).detach().numpy()
        law = (law[:, None] * p).flatten()
        texts = [[*text, x] for text in texts for x in range(5)]
    assert chi_square(counts, law) > 1e-3


def test_q_is_the_law_that_guesses_are_drawn_from(target):
    draft = noisy(target)
    sampling = Sampling(1.3, top_k=8, top_p=0.95, generator=torch.Generator().manual_seed(0))
    proposer = ParallelProposer(target, draft)
    runner = Runner(target)
    rows = [torch.tensor(PROMPTS[0])] * 400
    stream = decode(runner, rows, proposer, gamma=3, max_new_tokens=9, sampling=sampling)
    with torch.inference_mode():
        next(stream), next(stream), next(stream)  # the prompt, the start, a round without guesses
        proposer.texts[:] = [list(proposer.texts[0]) for _ in rows]
        proposer.states = proposer.states[:1].expand(400, -1)
        drawn = [proposer.propose(3) for _ in range(10)]
    q = drawn[0].probabilities[0].double()
    tokens = torch.cat([proposal.tokens for proposal in drawn])
    for i in range(3):
        assert (q[i] > 0).sum() <= 8
        counts = np.bincount(tokens[:, i].numpy(), minlength=q.shape[1])
        assert not counts[q[i].numpy() == 0].any()
        assert chi_square(counts[q[i] > 0], (q[i][q[i] > 0]).numpy()) > 1e-3
        flat = draft_law_without_processors(proposer, i)
        assert chi_square(counts + 0.0, flat) < 1e-6  # raw probabilities are another law


def draft_law_without_processors(proposer, i):
    last = torch.tensor([proposer.texts[0][-1]])
    states = proposer.draft(proposer.states[:1], proposer.embed(last))
    return proposer.head(states)[0, i].double().softmax(-1).detach().numpy()


def test_the_target_may_be_compiled(target):
    prompts = [torch.tensor(PROMPTS[0])]
    draft = noisy(target)
    plain = generate(target, prompts, max_new_tokens=12)
    runner = Runner(target, compiled_room=32)
    made = generate(runner, prompts, ParallelProposer(target, draft), gamma=3, max_new_tokens=12)
    assert made.tokens[0].tolist() == plain.tokens[0].tolist()
    eager = generate(target, prompts, ParallelProposer(target, draft), gamma=3, max_new_tokens=12)
    drafts = [r.drafted[0] for r in made.rounds if r.drafted[0]]
    assert drafts[0] == next(r.drafted[0] for r in eager.rounds if r.drafted[0])
