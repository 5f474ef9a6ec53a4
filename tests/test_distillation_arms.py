"""A teacher's text and probabilities instead of its cache: shared tokens, agreed tokens, the loss and the arms."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kvlab import align, lab
from kvlab.align import (
    ARMS,
    AlignedStudent,
    AlignmentSettings,
    Problems,
    TeacherTokens,
    pad_problems,
    predict_with_teacher,
    segment,
    token_loss,
    train_arm,
    train_student,
)
from kvlab.lab.corpora import Solutions
from kvlab.vocabularies import agreed_tokens, shared_tokens

TOKENIZER, WORDS = lab.load_tokenizer("lab-draft"), lab.load_tokenizer("lab-teacher")
PAIRS = [*Solutions(6, seed=4)]
SETTINGS = AlignmentSettings(epochs=1, batch_size=4, learning_rate=1e-3, kv_warmup=0)


def texts_of(tokenizer, style=1):
    return [segment(tokenizer, pair[style]) for pair in PAIRS]


def problems(n=4):
    student, teacher = zip(*Solutions(n, seed=5), strict=True)
    return Problems([*student], [*teacher], [], [], "number")


def arm_of(name, folder, answers=None, monkeypatch=None, student=None, **options):
    """The lessons that an arm trains with."""
    lessons = []
    if answers is not None:
        monkeypatch.setattr(align, "answers", lambda *_, **__: answers)
    monkeypatch.setattr(
        align, "train_student", lambda model, rows, *_, **__: lessons.extend(rows) or []
    )
    student = student or lab.models.make("lab-draft", 0)
    loaders = [lambda: (lab.load("lab-teacher"), WORDS)]
    train_arm(ARMS[name], student, TOKENIZER, problems(), loaders, SETTINGS, folder, **options)
    return lessons


# -- two vocabularies


def test_shared_tokens_are_spelled_alike_and_there_are_no_others():
    ids, other_ids = shared_tokens(TOKENIZER, WORDS).tolist()
    spelled = TOKENIZER.convert_ids_to_tokens(ids)
    assert spelled == WORDS.convert_ids_to_tokens(other_ids)
    assert set(spelled) == set(TOKENIZER.get_vocab()) & set(WORDS.get_vocab())
    assert len(set(ids)) == len(set(other_ids)) == len(ids) == 628
    assert ids == sorted(ids)
    same = shared_tokens(TOKENIZER, TOKENIZER)
    assert same.tolist() == [[*range(1536)]] * 2


def test_vocabularies_may_have_nothing_in_common():
    class Other:
        def get_vocab(self):
            return {"☃": 0}

    assert shared_tokens(TOKENIZER, Other()).shape == (2, 0)


@given(st.lists(st.integers(1, 9), max_size=8), st.lists(st.integers(1, 9), max_size=8))
@settings(max_examples=60, deadline=None)
def test_agreed_tokens_have_both_borders_in_common(one, two):
    # both texts end with a token at character 30
    begins, others = ([*np.cumsum([0, *gaps]).tolist()] for gaps in (one, two))
    begins, others = ([b for b in x if b < 30] + [30] for x in (begins, others))
    ends, other_ends = ([*x[1:], 99] for x in (begins, others))
    want = [
        [i, j]
        for i in range(len(begins))
        for j in range(len(others))
        if (begins[i], ends[i]) == (others[j], other_ends[j])
    ]
    assert agreed_tokens(torch.tensor(begins), torch.tensor(others)).T.tolist() == want


def test_begins_count_from_the_solution():
    for tokenizer in (TOKENIZER, WORDS):
        for pair in PAIRS:
            text = segment(tokenizer, pair[1])
            content = pair[1][1]["content"]
            assert text.begins.shape == text.input_ids.shape
            assert text.begins.tolist() == sorted(text.begins.tolist())
            start = int((text.begins >= 0).nonzero()[0])
            rows = zip(text.input_ids[start:-1], text.begins[start:-1], strict=True)
            for token, begin in rows:
                piece = tokenizer.decode(token)
                assert content[begin : begin + len(piece)] == piece
            assert int(text.begins[-1]) == len(content)  # the end token


# -- what a teacher predicts


def test_a_teacher_with_the_students_vocabulary_predicts_every_token():
    teacher, texts = lab.load("lab-draft"), texts_of(TOKENIZER)
    shared = shared_tokens(TOKENIZER, TOKENIZER)
    for text, tokens in zip(
        texts, predict_with_teacher(teacher, texts, texts, shared), strict=True
    ):
        p = teacher(text.input_ids[None]).logits[0].float().softmax(-1)
        start = int((text.begins >= 0).nonzero()[0])
        assert not tokens.probabilities[:start].any()
        for t in range(start, len(text.input_ids)):
            best = p[t - 1].topk(align.LIKELIEST)
            assert torch.allclose(tokens.probabilities[t], best.values, atol=1e-5)
            of_ids = p[t - 1][tokens.ids[t]]
            assert torch.allclose(of_ids, tokens.probabilities[t], atol=1e-5)


def test_another_vocabulary_is_predicted_where_both_have_the_token(monkeypatch):
    monkeypatch.setattr(align, "BATCH", 4)  # rows are padded
    teacher = lab.load("lab-teacher")
    texts, others = texts_of(TOKENIZER), texts_of(WORDS)
    shared = shared_tokens(TOKENIZER, WORDS)
    assert any(len(a.input_ids) != len(b.input_ids) for a, b in zip(texts, others, strict=True))
    predicted = predict_with_teacher(teacher, others, texts, shared)
    for (_, (_, solution)), text, other, tokens in zip(
        PAIRS, texts, others, predicted, strict=True
    ):
        p = teacher(other.input_ids[None]).logits[0][:, shared[1]].float().softmax(-1)
        # by hand, from pieces of text
        spans = []
        for tokenizer, one in ((TOKENIZER, text), (WORDS, other)):
            pieces = {}
            for t, (token, begin) in enumerate(zip(one.input_ids, one.begins, strict=True)):
                if begin >= 0:
                    pieces[int(begin), tokenizer.convert_ids_to_tokens(int(token))] = t
            spans.append(pieces)
        both = {spans[0][key]: spans[1][key] for key in spans[0].keys() & spans[1].keys()}
        assert len(both) > 0.7 * len(spans[0])
        assert tokens.probabilities.sum(-1).bool().nonzero().flatten().tolist() == sorted(both)
        for t, s in both.items():
            best = p[s - 1].topk(align.LIKELIEST)
            assert torch.allclose(tokens.probabilities[t], best.values, atol=1e-5)
            names = WORDS.convert_ids_to_tokens(shared[1][best.indices].tolist())
            mine = dict(zip(TOKENIZER.convert_ids_to_tokens(tokens.ids[t].tolist()), best.values))
            assert mine.keys() == set(names)
        assert solution["content"]


def test_the_loss_is_its_formula_token_by_token():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 9, requires_grad=True)
    ids = torch.stack([torch.randperm(9)[:3] for _ in range(10)]).view(2, 5, 3)
    p = torch.rand(2, 5, 3) * 0.3
    p[0, 2] = 0  # no prediction
    p[1, :2] = 0  # padding
    loss = token_loss(logits, TeacherTokens(ids, p))
    total, count = 0.0, 0
    for b in range(2):
        for t in range(1, 5):
            if p[b, t].sum() == 0:
                continue
            log_q = logits[b, t - 1].double().log_softmax(-1)
            teacher = (p[b, t] / p[b, t].sum()).double()
            for x, probability in zip(ids[b, t], teacher, strict=True):
                total = total + probability * (probability.log() - log_q[x])
            count += 1
    assert torch.allclose(loss.double(), total / count, atol=1e-6)
    loss.backward()
    assert not logits.grad[0, 1].any()  # what would predict the third token
    assert not logits.grad[:, -1].any()
    assert logits.grad[0, 0].any()
    nothing = TeacherTokens(ids, torch.zeros_like(p))
    assert token_loss(logits, nothing) == 0


def test_a_teacher_that_is_the_student_has_nothing_to_teach():
    student, texts = lab.load("lab-draft"), texts_of(TOKENIZER)
    tokens = predict_with_teacher(student, texts, texts, shared_tokens(TOKENIZER, TOKENIZER))
    losses = AlignedStudent(student)(pad_problems([*zip(texts, tokens, strict=True)]))
    assert 0 <= losses["kl"] < 0.02  # nearly all of the probability is in the likeliest
    other = lab.models.make("lab-draft", 1)
    assert AlignedStudent(other)(pad_problems([*zip(texts, tokens, strict=True)]))["kl"] > 3


def test_padding_adds_nothing():
    student, texts = lab.load("lab-draft"), texts_of(TOKENIZER)
    others, shared = texts_of(WORDS), shared_tokens(TOKENIZER, WORDS)
    tokens = predict_with_teacher(lab.load("lab-teacher"), others, texts, shared)
    rows = [*zip(texts, tokens, strict=True)]
    model = AlignedStudent(student)
    counts = torch.tensor([(t.probabilities.sum(-1) > 0).sum() for t in tokens]).float()
    alone = torch.stack([model(pad_problems([row]))["kl"] for row in rows])
    together = model(pad_problems(rows))["kl"]
    assert torch.allclose(together, (alone * counts).sum() / counts.sum(), atol=1e-5)


# -- the arms


def test_text_distillation_learns_what_the_teacher_writes(tmp_path, monkeypatch):
    written = [pair[1]["content"].replace("Answer", "So the answer") for pair in problems().teacher]
    lessons = arm_of("text_distillation", tmp_path, written, monkeypatch)
    assert all(len(lesson) == 1 for lesson in lessons)
    for (text,), words, (question, _) in zip(lessons, written, problems().student, strict=True):
        turns = [question, {"role": "assistant", "content": words}]
        assert torch.equal(text.input_ids, segment(TOKENIZER, turns).input_ids)


def test_where_a_teacher_gives_no_answer_the_given_solution_stays(tmp_path, monkeypatch):
    written = ["", "It goes on and on", problems().teacher[2][1]["content"], "3. Answer: 3" * 999]
    lessons = arm_of("text_distillation", tmp_path, written, monkeypatch)
    students = [segment(TOKENIZER, conversation) for conversation in problems().student]
    same = [torch.equal(a.input_ids, b.input_ids) for (a,), b in zip(lessons, students)]
    assert same == [True, True, False, True]


def test_what_a_teacher_wrote_is_kept(tmp_path, monkeypatch):
    written = [pair[1]["content"] for pair in problems().teacher]
    first = arm_of("text_distillation", tmp_path, written, monkeypatch)
    assert json.loads((tmp_path / "solutions.json").read_text()) == written
    again = arm_of("text_distillation", tmp_path, ["not asked"] * 4, monkeypatch)
    assert all(torch.equal(a.input_ids, b.input_ids) for (a,), (b,) in zip(first, again))


def test_logit_distillation_learns_the_same_text_with_probabilities(tmp_path, monkeypatch):
    text = arm_of("text_distillation", tmp_path / "a", None, monkeypatch)
    both = arm_of("logit_distillation", tmp_path / "b", None, monkeypatch)
    assert all(torch.equal(a.input_ids, b.input_ids) for (a,), (b, _) in zip(text, both))
    assert all(isinstance(tokens, TeacherTokens) for _, tokens in both)
    # a lab teacher is sure of most tokens that it wrote itself, and they are the likeliest
    for text, tokens in both:
        counted = tokens.probabilities.sum(-1) > 0
        likeliest = tokens.ids[counted, 0] == text.input_ids[counted]
        assert likeliest.float().mean() > 0.9


@pytest.mark.parametrize("arm", ["text_distillation", "logit_distillation"])
def test_students_come_to_predict_as_their_teachers(arm, tmp_path):
    student = lab.models.make("lab-draft", 0)
    loaders = [lambda: (lab.load("lab-teacher"), WORDS)]
    settings = replace(SETTINGS, epochs=8, learning_rate=5e-3)
    rows = problems(8)
    history, _ = train_arm(
        ARMS[arm], student, TOKENIZER, rows, loaders, settings, tmp_path, warmup=1
    )
    names = {"ce", "kl"} if arm == "logit_distillation" else {"ce"}
    assert {"ce", "kl"} & history[0].keys() == names
    for name in names:
        assert history[-1][name] < 0.7 * history[0][name]
    if "kl" in names:
        assert any(entry.get("share_kl", 0) > 0.1 for entry in history)


def test_no_kv_loss_leaves_codi_alone_and_no_projector_copies(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(
        align, "train_student", lambda model, rows, settings, **_: found.update(
            {arm: (model, settings)}) or []
    )  # fmt: skip
    loaders = [lambda: (lab.load("lab-teacher"), WORDS)]
    for arm in ("segment", "no_kv_loss", "no_projector"):
        student = lab.models.make("lab-draft", 0)
        run = TOKENIZER, problems(), loaders, SETTINGS, tmp_path / arm
        train_arm(ARMS[arm], student, *run)
    model, weights = found["no_kv_loss"]
    assert (weights.kv_weight, weights.codi_weight, len(model.states)) == (0, 0.5, 1)
    assert found["segment"][1].kv_weight == 1
    (projector,) = found["no_projector"][0].projectors
    assert torch.equal(projector.values.weight, torch.eye(64, 160))
    kv = align.KV(*torch.randn(2, 1, 2, 3, 160))
    assert torch.equal(projector(kv).keys, F.linear(kv.keys, torch.eye(64, 160)))
    assert not any(p.requires_grad for p in projector.parameters())
    assert all(p.requires_grad for p in found["no_projector"][0].states.parameters())
    assert all(p.requires_grad for p in found["segment"][0].projectors.parameters())


def test_no_kv_loss_moves_no_key_by_itself():
    student, texts = lab.models.make("lab-draft", 0), texts_of(TOKENIZER)
    teacher = lab.load("lab-teacher")
    layers = align.proportional(2, 6)
    features = align.encode_with_teacher(teacher, texts_of(WORDS), texts, layers)
    aligned = AlignedStudent(student, [align.Projector(160, 64)])
    rows = [*zip(texts, features, strict=True)][:4]
    history = train_student(aligned, rows, replace(SETTINGS, kv_weight=0.0), shares_every=1)
    assert history[0]["kv"] == 0
    assert history[0]["share_kv"] == 0
