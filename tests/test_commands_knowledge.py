"""The command line: build-cache and ask."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import yaml
from command_helpers import RECORDS, opened, write

from kvlab import lab
from kvlab.cli import COMMANDS, main
from kvlab.generation import encode_answer
from kvlab.knowledge import ARMS, KnowledgeCache
from kvlab.models import require_supported
from kvlab.scale import Scale


@pytest.fixture
def build(tmp_path, monkeypatch, capsys):
    """Return a function that runs build-cache on records, for the small lab model, and returns what it printed."""
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)

    def run(records, *options):
        path = write(tmp_path / "records.jsonl", records)
        main(["build-cache", "--records", path, "--base_model", "lab-draft", *options])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder of a store of the lab's FAQ, read by its target, with a store a domain beside it."""
    folder = tmp_path_factory.mktemp("built") / "knowledge"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLAB_SCALE", "tiny")
        main(["build-cache", "--store", str(folder), "--per-domain"])
    return folder


@pytest.fixture
def answered(monkeypatch, capsys):
    """Return a function that runs ask and returns, for each question, what was found and the rows of its table."""
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    columns = re.compile(r"^([a-z ]+?) +([\d.]+) +(\d+) +([\d.]+)$", re.MULTILINE)

    def run(folder, *arguments):
        main(["ask", *arguments, "--store", str(folder)])
        parts = capsys.readouterr().out.strip().split("\n\n")
        found = [[line.strip() for line in part.splitlines() if line.startswith("    ") and "(ms)" not in line]
                 for part in parts]  # fmt: skip
        rows = []
        for part in parts:
            numbers, texts = (
                columns.findall(part),
                dict(re.findall(r"^([a-z][a-z ]+): ?(.*)$", part, re.MULTILINE)),
            )
            assert [way for way, *_ in numbers] == list(texts)
            rows.append(
                {
                    way: (float(ms), int(read), float(mb), texts[way])
                    for way, ms, read, mb in numbers
                }
            )
        return list(zip(found, rows, strict=True))

    return run


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lab"])
def test_help_of_a_command_shows_every_option(name, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"\n    {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = capsys.readouterr().out
    documentation = inspect.getdoc(COMMANDS[name]).partition("Args:")[2]
    for option, parameter in inspect.signature(COMMANDS[name]).parameters.items():
        if parameter.kind != parameter.VAR_KEYWORD:
            assert f"{option}:" in documentation
            assert f"--{option}" in printed or option == "questions"


def test_the_lab_has_seven_domains_and_eight_stores(built):
    stores = sorted(path.name for path in built.parent.iterdir())
    domains = {item["domain"] for item in lab.faq()}
    assert stores == ["knowledge", *(f"knowledge-{name}" for name in sorted(domains))]
    assert len(stores) == 8
    model, tokenizer = lab.load("lab-target"), lab.load_tokenizer("lab-target")
    whole, *parts = (KnowledgeCache.load(built.parent / name, model, tokenizer) for name in stores)
    assert len(whole) == len(lab.faq())
    assert {part.folder.name: {item.domain for item in part.items} for part in parts} == {
        f"knowledge-{name}": {name} for name in domains
    }
    assert sorted(item.id for part in parts for item in part.items) == sorted(
        item.id for item in whole.items
    )


def test_building_again_adds_what_is_new_also_to_the_domains(build, tmp_path):
    more = {"question": "Who sings?", "answer": "Clara sings.", "domain": "people"}
    assert "2 items are new, 0 were there" in build(RECORDS, "--per-domain")
    manifest = tmp_path / "knowledge-pets" / "manifest.json"
    before = manifest.stat()
    assert "0 items are new, 2 were there" in build(RECORDS, "--per-domain")
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )
    printed = build([*RECORDS, more], "--per-domain")
    assert "1 items are new, 2 were there" in printed
    assert "knowledge-people: 2 items" in printed
    assert "knowledge-pets: 1 items" in printed
    assert [item.question for item in opened(tmp_path / "knowledge-people").items] == [
        "Where does Anna live?",
        "Who sings?",
    ]


def test_the_estimate_is_printed_before_and_is_what_it_takes(build, tmp_path):
    printed = build(RECORDS, "--keep", "kv", "hidden", "--dtype", "float16")
    message = re.match(r"knowledge has 0 items. Of 2 records, .* will take ([\d.]+) MB", printed)
    store = opened(tmp_path / "knowledge")
    assert (store.keep, str(store.dtype)) == (("kv", "hidden"), "torch.float16")
    taken = float(store.summary().loc["all", "size (MB)"])
    assert float(message[1]) == pytest.approx(taken, abs=0.06)
    assert taken > 0.01


def test_a_domain_of_any_text_gets_a_folder_of_its_own(build, tmp_path):
    domains = ["../a", "..%2Fa", "a b", "人", ""]
    records = [
        {"question": f"Q{n}?", "answer": "A.", **({"domain": domain} if domain else {})}
        for n, domain in enumerate(domains)
    ]
    build(records, "--per-domain")
    build(records, "--per-domain")
    folders = list(tmp_path.glob("knowledge-*"))
    assert {item.domain for folder in folders for item in opened(folder, False).items} == set(
        domains
    )
    assert len(folders) == len(domains)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "knowledge",
        *(f.name for f in folders),
    }


def test_a_folder_in_the_way_is_left_alone(build, tmp_path):
    folder = tmp_path / "knowledge-pets"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        SystemExit, match=r"^kvlab: .*knowledge-pets holds \['notes.txt'\] and no store"
    ):
        build(RECORDS, "--per-domain")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_items_that_a_domain_has_already_stay(build, tmp_path):
    build(RECORDS, "--per-domain")
    opened(tmp_path / "knowledge-pets").add(
        [{"question": "Who has a cat?", "answer": "Dora.", "domain": "pets"}]
    )
    assert "knowledge-pets: 2 items" in build(RECORDS, "--per-domain")


def test_generated_answers_are_the_models_own(build, tmp_path):
    questions = [{"question": record["question"]} for record in RECORDS]
    printed = build(questions, "--generate-answers", "--max_new_tokens", "5")
    assert "will take at most" in printed
    items = opened(tmp_path / "knowledge").items
    assert [item.generated for item in items] == [True, True]
    assert all(len(item.input_ids) - item.answer_start <= 5 for item in items)
    assert "0 items are new, 2 were there" in build(questions, "--generate_answers")


def test_of_two_processes_one_prints(tmp_path):
    path = write(tmp_path / "records.jsonl", RECORDS)
    command = ["build-cache", "--records", path, "--base_model", "lab-draft", "--per-domain"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "kvlab.cli",
    ]
    setting = os.environ | {"KVLAB_SCALE": "tiny", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command], cwd=tmp_path, env=setting, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 items are new, 0 were there") == 1
    assert done.stdout.count("knowledge-pets: 1 items") == 1
    assert len(opened(tmp_path / "knowledge")) == 2


def test_records_of_the_chatterbot_corpus(build, tmp_path):
    corpus = {"categories": ["bingo"], "conversations": [["Two little ducks?", "22", "Quack."]]}
    (tmp_path / "bingo.yml").write_text(yaml.safe_dump(corpus))
    main(["build-cache", "--records", str(tmp_path / "bingo.yml"), "--base_model", "lab-draft"])
    assert [(i.domain, i.answer) for i in opened(tmp_path / "knowledge").items] == [
        ("bingo", "22"),
        ("bingo", "Quack."),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "keys"], r"keep is \['keys'\], expected a list of one or both"),
        (["--records", "none.jsonl"], "There is no file none.jsonl"),
        (["--language", "fr"], "There is no FAQ in 'fr': expected 'en' or 'zh'"),
    ],
)
def test_a_mistake_in_building_is_a_sentence(options, message, monkeypatch, tmp_path):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^kvlab: {message}"):
        main(["build-cache", "--base_model", "lab-draft", *options])
    assert not (tmp_path / "knowledge").exists()


def test_a_type_that_cannot_be_stored_is_a_wrong_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["build-cache", "--dtype", "int8"])
    assert stop.value.code == 2
    assert "bfloat16" in capsys.readouterr().err


def test_records_without_answers_need_the_model_to_answer(build):
    with pytest.raises(SystemExit, match=r"^kvlab: Record 0 has 'answer' = None, expected a text"):
        build([{"question": "Who?"}])


def test_a_stored_question_is_answered_from_one_token(answered, built):
    item = lab.faq()[0]
    ((found, rows),) = answered(built, item["question"])
    assert found == [_told(item)]
    assert list(rows) == [
        "question alone",
        "knowledge as text",
        "knowledge from the store",
        "the stored question itself",
    ]
    read = {way: tokens for way, (_, tokens, _, _) in rows.items()}
    loaded = {way: size for way, (_, _, size, _) in rows.items()}
    assert read["the stored question itself"] == 1
    assert read["knowledge from the store"] == read["question alone"] < read["knowledge as text"]
    assert loaded["question alone"] == loaded["knowledge as text"] == 0
    assert loaded["knowledge from the store"] == loaded["the stored question itself"] > 0
    texts = {way: text for way, (*_, text) in rows.items()}
    assert texts["the stored question itself"] == texts["question alone"] == item["answer"]
    assert (
        texts["knowledge from the store"] == texts["knowledge as text"]
    )  # one item: no arm approximates
    assert all(ms > 0 for ms, *_ in rows.values())


@pytest.mark.parametrize("arm", ARMS)
def test_tokens_read_are_those_the_model_reads(arm, answered, built, monkeypatch):
    seen, load = [], Scale.load

    def watched(scale, role):
        model = load(scale, role)
        require_supported(model)  # its trial reads tokens, too
        model.base_model.layers[0].register_forward_pre_hook(
            lambda _, given: seen.append(given[0].shape[1])
        )
        return model

    monkeypatch.setattr(Scale, "load", watched)
    options = ["--k", "2", "--threshold", "-1", "--max_new_tokens", "1"]
    ((found, rows),) = answered(built, lab.faq()[0]["question"], "--arm", arm, *options)
    read = {way: tokens for way, (_, tokens, _, _) in rows.items()}
    first, second = (len(item.input_ids) for item in _items(built, found))
    # 4 runs for the time, and one for the answer.
    assert sum(seen) == 5 * sum(read.values())
    assert read["knowledge as text"] == first + second + read["question alone"]


def _told(item):
    where = f"(domain {item['domain']}, score 1.00)"
    return f"found: {item['question']} {where}, stored answer: {item['answer']}"


def _items(folder, found):
    store = KnowledgeCache.load(folder, lab.load("lab-target"), lab.load_tokenizer("lab-target"))
    return [next(item for item in store.items if f" {item.question} (" in line) for line in found]


def test_a_miss_is_told_and_gets_one_row(answered, built):
    known = lab.faq()[0]["question"]
    (found, rows), (_, more) = answered(
        built, "qq zz?", known, "--threshold", "0.999", "--max_new_tokens", "2"
    )
    assert found == ["not in the store: nothing scores 0.999"]
    assert list(rows) == ["question alone"]
    assert len(more) == 4
    ((found, rows),) = answered(built, "qq zz?", "--exact", "--max_new_tokens", "2")
    assert found == ["not in the store: no item has this question"]
    assert list(rows) == ["question alone"]


def test_exact_needs_no_embedder(answered, built, monkeypatch):
    monkeypatch.setattr(Scale, "load_embedder", lambda *_: pytest.fail("loaded"))
    item = lab.faq()[0]
    ((found, _),) = answered(
        built, f"  {item['question'].upper()}", "--exact", "--max_new_tokens", "1"
    )
    assert found == [_told(item)]


def test_asking_without_a_store_says_how_to_build_one(monkeypatch, tmp_path):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(
        SystemExit,
        match=r"^kvlab: There is no store in .*: build one with `kvlab build-cache --store",
    ):
        main(["ask", "Who?", "--store", str(tmp_path / "none")])


def test_a_mistake_in_asking_is_a_sentence(built, build, tmp_path):
    build(RECORDS, "--keep", "hidden", "--store", "hidden")
    with pytest.raises(SystemExit, match=r"^kvlab: The store in .* keeps no keys and values"):
        main(["ask", "Who?", "--store", str(tmp_path / "hidden"), "--base_model", "lab-draft"])
    for options, message in (
        (["--domain", "art"], "There is no domain 'art' in .*: .*'ai', 'biology'"),
        (["--k", "0"], "k is 0, expected a positive integer"),
        (["--base_model", "lab-draft"], "The store in .* was built with another model"),
    ):
        with pytest.raises(SystemExit, match=f"^kvlab: {message}"):
            main(["ask", "Who?", "--store", str(built), *options])


def test_a_stop_string_ends_generated_answers_and_is_not_stored(build, tmp_path):
    questions = [{"question": record["question"]} for record in RECORDS]
    options = ["--generate_answers", "--max_new_tokens", "12", "--store"]
    build(questions, *options, "whole")
    whole = [item.answer for item in opened(tmp_path / "whole").items]
    stop = whole[0][3:6]
    build(questions, *options, "cut", "--stop", "nowhere", stop)
    items = opened(tmp_path / "cut").items
    assert [item.answer for item in items] == [text.partition(stop)[0].strip() for text in whole]
    tokenizer = lab.load_tokenizer("lab-draft")
    for item in items:  # a closed turn, as an answer that ended by itself
        turn = [{"role": "user", "content": item.question}]
        prompt, answer = encode_answer(tokenizer, turn, item.answer)
        assert list(item.input_ids) == prompt + answer


def test_a_stop_string_of_the_models_own_is_not_stored_either(build, tmp_path, monkeypatch):
    question = [{"question": RECORDS[0]["question"]}]
    options = ["--generate_answers", "--max_new_tokens", "12", "--store"]
    build(question, *options, "whole")
    (whole,) = opened(tmp_path / "whole").items
    load, stop = Scale.load, whole.answer[3:6]

    def stopping(scale, role):
        model = load(scale, role)
        model.generation_config.stop_strings = [stop]
        return model

    monkeypatch.setattr(Scale, "load", stopping)
    build(question, *options, "cut")
    (item,) = opened(tmp_path / "cut").items
    assert item.answer == whole.answer.partition(stop)[0].strip()


def test_a_stop_string_ends_every_answer_of_ask(answered, built):
    question = lab.faq()[0]["question"]
    ((_, whole),) = answered(built, question)
    stop = whole["question alone"][-1][4:7]
    ((_, cut),) = answered(built, question, "--stop", "nowhere", stop)
    for way, (*_, text) in whole.items():
        assert cut[way][-1] == text.partition(stop)[0].strip() != text
