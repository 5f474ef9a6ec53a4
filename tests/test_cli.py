"""The command line: subcommands are functions, options their signatures, and a mistake gets a sentence."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kvlab import draft as drafts
from kvlab import lab, training
from kvlab.cli import ask, build_cache, main, speculate, train_draft
from kvlab.draft import KnowledgeDraft
from kvlab.evaluate import encode
from kvlab.knowledge import KnowledgeCache
from kvlab.lab import corpora
from kvlab.scale import PRESETS, Scale


def test_scale_prints_every_chapter(capsys, monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    main(["scale"])
    printed = capsys.readouterr().out
    assert printed.startswith("Scale tiny on cpu")
    assert all(chapter in printed for chapter in PRESETS["tiny"]["needs"])


def test_report_prints_what_the_function_returns(capsys):
    main(["lab", "report", "--names", "[lab-draft]", "--questions", "2", "--as_json", "true"])
    figures = json.loads(capsys.readouterr().out)
    assert {"draft_reading", "draft_faq_heldout"} <= {figure["name"] for figure in figures}


def test_help_lists_options_of_the_signature(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["lab", "train", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--names", "--work", "--out"))


def test_an_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["scale", "--colour", "3"])
    assert stop.value.code == 2
    assert "colour" in capsys.readouterr().err


def test_an_unknown_model_is_a_sentence():
    with pytest.raises(SystemExit, match=r"no lab model 'lab-giant'; expected one of lab-target"):
        main(["lab", "report", "--names", "[lab-giant]"])


def test_scale_comes_from_the_variable(monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    assert Scale.current().target == "lab-target"


# -- speculate

SOURCE = {
    "prompts": None,
    "max_new_tokens": 256,
    "gamma": 4,
    "base_model": None,
    "teacher_model": None,
    "fuser_checkpoint": None,
    "skip_standard": False,
    "no_prefill_fusion": False,
    "no_decode_fusion": False,
    "save_results": False,
}
FEW = ["speculate", "--max_new_tokens", "12", "--save_results"]


def result(folder, capsys):
    """What the one result file says, and what was printed."""
    (path,) = folder.iterdir()
    printed = capsys.readouterr().out
    assert str(path) in printed
    return json.loads(path.read_text(), parse_constant=pytest.fail), printed


def test_speculate_has_the_options_and_defaults_of_the_system_it_follows(capsys):
    parameters = inspect.signature(speculate).parameters
    assert {name: parameters[name].default for name in SOURCE} == SOURCE
    with pytest.raises(SystemExit):
        main(["speculate", "--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in [*parameters, "config"])
    told = inspect.getdoc(speculate).split("Args:")[1]
    assert all(f"{name}: " in told for name in parameters)


def test_speculate_writes_all_it_found(tmp_path, capsys):
    prompts = ["Anna has 3 apples. How many?", "Anna lives in [Rome]."]
    main([*FEW, "--prompts", *prompts, "--output_dir", str(tmp_path), "--gamma", "2"])
    found, printed = result(tmp_path, capsys)
    assert re.fullmatch(r"speculate_\d{8}_\d{6}\.json", next(tmp_path.iterdir()).name)
    assert [p["prompt"] for p in found["prompts"]] == prompts
    assert found["settings"] | {"gamma": 2, "max_new_tokens": 12, "teacher_model": "lab-target"} == found["settings"]
    assert {"device", "versions", "commit"} <= set(found)
    for prompt in found["prompts"]:
        assert prompt["plain"]["token_ids"] == prompt["speculative"]["token_ids"]
        assert prompt["plain"]["text"] == prompt["speculative"]["text"] != ""
    summary = found["summary"]
    assert summary["equal_texts"] is True
    assert summary["predicted_speedup"] > 0
    assert summary["speculative"]["draft_calls"] == 2 * summary["speculative"]["target_calls"]
    shown = "latency first_token_seconds tokens_per_second acceptance tokens_per_call draft_calls target_calls"
    assert all(name in printed for name in f"{shown} c v predicted_speedup measured_speedup best_gamma".split())


def test_speculate_reads_a_config_file(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(
        f"prompts: [Anna has 3 apples.]\nmax_new_tokens: 5\nskip_standard: true\noutput_dir: {tmp_path}/out\n"
    )
    main(["speculate", "--config", str(tmp_path / "options.yaml"), "--save_results", "true"])
    found, _ = result(tmp_path / "out", capsys)
    assert found["settings"] | {"max_new_tokens": 5, "skip_standard": True} == found["settings"]
    assert "plain" not in found["prompts"][0]
    assert set(found["summary"]) == {"speculative"}


@pytest.mark.parametrize("flags", [["--skip_standard"], ["--skip_standard", "true"]])
def test_a_flag_needs_no_value(flags, tmp_path, capsys):
    main([*FEW, *flags, "--no_prefill_fusion", "--no_decode_fusion", "--output_dir", str(tmp_path)])
    found, _ = result(tmp_path, capsys)
    assert all(found["settings"][name] for name in ("skip_standard", "no_prefill_fusion", "no_decode_fusion"))
    assert len(found["prompts"]) == 3  # the default ones


def test_a_seed_repeats_what_was_drawn(tmp_path, capsys):
    texts = []
    for name in "ab":
        main([*FEW, "--temperature", "1.5", "--seed", "7", "--output_dir", str(tmp_path / name)])
        found, _ = result(tmp_path / name, capsys)
        assert "equal_texts" not in found["summary"]
        texts.append([prompt["speculative"]["text"] for prompt in found["prompts"]])
    assert texts[0] == texts[1]


def test_one_token_leaves_nothing_to_compare(tmp_path, capsys):
    main([*FEW, "--max_new_tokens", "1", "--output_dir", str(tmp_path)])
    found, _ = result(tmp_path, capsys)
    assert "c" not in found["summary"]
    assert found["summary"]["equal_texts"] is True


def test_compiled_memory_has_room_for_the_longest_prompt(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    prompts = ["Anna has 3 apples. " * 6, "Hello."]
    main([*FEW, "--prompts", *prompts, "--compiled", "--output_dir", str(tmp_path)])
    found, _ = result(tmp_path, capsys)
    assert found["settings"]["compiled"] is True
    assert found["summary"]["equal_texts"] is True


def test_a_fuser_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=r"'fuser.pt', but kvlab has no cache fuser yet: leave it out"):
        main(["speculate", "--fuser_checkpoint", "fuser.pt"])


def test_models_with_other_tokenizers_are_refused(monkeypatch):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=r"tokenizers differ .lab-target has \d+ tokens, lab-teacher \d+"):
        main(["speculate", "--base_model", "lab-teacher"])


def test_an_empty_prompt_file_is_a_sentence(tmp_path):
    (tmp_path / "prompts").write_text("\n")
    with pytest.raises(SystemExit, match=r"is empty, expected one prompt a line"):
        main(["speculate", "--prompt_file", str(tmp_path / "prompts")])


# -- build-cache and ask

RECORDS = [
    {"question": "Where does Anna live?", "answer": "Anna lives in Rome.", "domain": "people"},
    {"question": "Who has a dog?", "answer": "Ben has a dog.", "domain": "pets"},
]


def write(path, records=RECORDS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def opened(folder, with_embedder=True):
    embedder = lab.load_embedder() if with_embedder else None
    return KnowledgeCache.load(folder, lab.load("lab-draft"), lab.load_tokenizer("lab-draft"), embedder)


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
        found = [[line.strip() for line in part.splitlines() if line.startswith("    ") and "ms" not in line]
                 for part in parts]  # fmt: skip
        rows = []
        for part in parts:
            numbers, texts = columns.findall(part), dict(re.findall(r"^([a-z][a-z ]+): ?(.*)$", part, re.MULTILINE))
            assert [way for way, *_ in numbers] == list(texts)
            rows.append({way: (float(ms), int(read), float(mb), texts[way]) for way, ms, read, mb in numbers})
        return list(zip(found, rows, strict=True))

    return run


@pytest.mark.parametrize(
    ("name", "command"), [("build-cache", build_cache), ("ask", ask), ("train-draft", train_draft)]
)
def test_help_of_a_command_tells_every_option(name, command, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"\n    {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed, told = capsys.readouterr().out, inspect.getdoc(command).split("Args:")[1]
    options = list(inspect.signature(command).parameters)
    assert all(f"{option}: " in told for option in options)
    assert all(f"--{option}" in printed for option in options if option != "questions")


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
    assert sorted(item.id for part in parts for item in part.items) == sorted(item.id for item in whole.items)


def test_building_again_adds_what_is_new_also_to_the_domains(build, tmp_path):
    more = {"question": "Who sings?", "answer": "Clara sings.", "domain": "people"}
    assert "2 items are new, 0 were there" in build(RECORDS, "--per-domain")
    manifest = tmp_path / "knowledge-pets" / "manifest.json"
    before = manifest.stat()
    assert "0 items are new, 2 were there" in build(RECORDS, "--per-domain")
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
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
    said = re.match(r"knowledge has 0 items. Of 2 records, .* will take ([\d.]+) MB", printed)
    store = opened(tmp_path / "knowledge")
    assert (store.keep, str(store.dtype)) == (("kv", "hidden"), "torch.float16")
    taken = float(store.summary().loc["all", "size (MB)"])
    assert float(said[1]) == pytest.approx(taken, abs=0.06)
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
    assert {item.domain for folder in folders for item in opened(folder, False).items} == set(domains)
    assert len(folders) == len(domains)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"knowledge", *(f.name for f in folders)}


def test_a_folder_in_the_way_is_left_alone(build, tmp_path):
    folder = tmp_path / "knowledge-pets"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"^kvlab: .*knowledge-pets holds \['notes.txt'\] and no store"):
        build(RECORDS, "--per-domain")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_items_that_a_domain_has_already_stay(build, tmp_path):
    build(RECORDS, "--per-domain")
    opened(tmp_path / "knowledge-pets").add([{"question": "Who has a cat?", "answer": "Dora.", "domain": "pets"}])
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
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kvlab.cli"]
    setting = os.environ | {"KVLAB_SCALE": "tiny", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], cwd=tmp_path, env=setting, capture_output=True, text=True, timeout=200)
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
    ("options", "said"),
    [
        (["--dtype", "float12"], "dtype is 'float12', expected the name of one, such as float16"),
        (["--dtype", "nn"], "dtype is 'nn', expected the name of one"),
        (["--dtype", "int8"], "dtype is torch.int8, expected a floating one"),
        (["--keep", "keys"], r"keep is \['keys'\], expected a list of one or both"),
        (["--records", "none.jsonl"], "There is no file or folder none.jsonl"),
        (["--language", "fr"], "There is no FAQ in 'fr': expected 'en' or 'zh'"),
    ],
)
def test_a_mistake_in_building_is_a_sentence(options, said, monkeypatch, tmp_path):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main(["build-cache", "--base_model", "lab-draft", *options])
    assert not (tmp_path / "knowledge").exists()


def test_records_without_answers_need_the_model_to_answer(build):
    with pytest.raises(SystemExit, match=r"^kvlab: Record 0 has 'answer' = None, expected a text"):
        build([{"question": "Who?"}])


def test_a_stored_question_is_answered_from_one_token(answered, built):
    item = lab.faq()[0]
    ((found, rows),) = answered(built, item["question"])
    assert found == [f"found: {item['question']} (domain {item['domain']}, score 1.00)"]
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
    assert texts["knowledge from the store"] == texts["knowledge as text"]  # one item: no arm approximates
    assert all(ms > 0 for ms, *_ in rows.values())


@pytest.mark.parametrize("arm", ["full", "prefix", "recompute", "concat", "shift"])
def test_tokens_read_are_those_the_model_reads(arm, answered, built, monkeypatch):
    seen, load = [], Scale.load

    def watched(scale, role):
        model = load(scale, role)
        model.base_model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        return model

    monkeypatch.setattr(Scale, "load", watched)
    options = ["--k", "2", "--threshold", "-1", "--max_new_tokens", "1"]
    ((found, rows),) = answered(built, lab.faq()[0]["question"], "--arm", arm, *options)
    read = {way: tokens for way, (_, tokens, _, _) in rows.items()}
    first, second = (len(item.input_ids) for item in _items(built, found))
    again = round(0.15 * second) if arm == "recompute" else 0  # these go through the first layers twice
    assert sum(seen) == 5 * (sum(read.values()) + again)  # 4 runs for the time, and one for the answer
    assert read["knowledge as text"] == first + second + read["question alone"]


def _items(folder, found):
    store = KnowledgeCache.load(folder, lab.load("lab-target"), lab.load_tokenizer("lab-target"))
    return [next(item for item in store.items if f" {item.question} (" in line) for line in found]


def test_a_miss_is_told_and_gets_one_row(answered, built):
    known = lab.faq()[0]["question"]
    (found, rows), (_, more) = answered(built, "qq zz?", known, "--threshold", "0.999", "--max_new_tokens", "2")
    assert found == ["not in the store: nothing scores 0.999"]
    assert list(rows) == ["question alone"]
    assert len(more) == 4
    ((found, rows),) = answered(built, "qq zz?", "--exact", "--max_new_tokens", "2")
    assert found == ["not in the store: no item has this question"]
    assert list(rows) == ["question alone"]


def test_exact_needs_no_embedder(answered, built, monkeypatch):
    monkeypatch.setattr(Scale, "load_embedder", lambda *_: pytest.fail("loaded"))
    item = lab.faq()[0]
    ((found, _),) = answered(built, f"  {item['question'].upper()}", "--exact", "--max_new_tokens", "1")
    assert found == [f"found: {item['question']} (domain {item['domain']}, score 1.00)"]


def test_asking_without_a_store_says_how_to_build_one(monkeypatch, tmp_path):
    monkeypatch.setattr(Scale, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=r"^kvlab: There is no store in .*: build one with `kvlab build-cache --store"):
        main(["ask", "Who?", "--store", str(tmp_path / "none")])


def test_a_mistake_in_asking_is_a_sentence(built, build, tmp_path):
    build(RECORDS, "--keep", "hidden", "--store", "hidden")
    with pytest.raises(SystemExit, match=r"^kvlab: The store in .* keeps no keys and values"):
        main(["ask", "Who?", "--store", str(tmp_path / "hidden"), "--base_model", "lab-draft"])
    for options, said in (
        (["--domain", "art"], "There is no domain 'art' in .*: .*'ai', 'biology'"),
        (["--k", "0"], "k is 0, expected a whole number from 1"),
        (["--base_model", "lab-draft"], "The store in .* was built with another model"),
    ):
        with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
            main(["ask", "Who?", "--store", str(built), *options])


# -- train-draft

FACTS = [
    {"question": f"{who} what?", "answer": f"{who} has a {thing} and lives in {city}.", "domain": "people"}
    for who, thing, city in [
        ("Anna", "dog", "Rome"), ("Ben", "cat", "Paris"), ("Clara", "horse", "Oslo"),
        ("Dora", "fish", "Bern"), ("Emil", "bird", "Wien"), ("Fritz", "mouse", "Prag"),
    ]
]  # fmt: skip
QUICK = ["--base_model", "lab-draft", "--layers", "first:1", "--epochs", "2", "--batch_size", "4", "--max_new_tokens"]
QUICK += ["12", "--made_up", "4"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Return the folder of a small store that keeps both keys and values and hidden states."""
    folder = tmp_path_factory.mktemp("facts")
    path = write(folder / "records.jsonl", FACTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLAB_SCALE", "tiny")
        keep = ["--keep", "kv", "hidden"]
        main(["build-cache", "--records", path, "--base_model", "lab-draft", "--store", str(folder / "both"), *keep])
        main(["build-cache", "--records", path, "--base_model", "lab-draft", "--store", str(folder / "kv")])
    return folder / "both"


@pytest.fixture
def learn(facts, tmp_path, monkeypatch, capsys):
    """Return a function that runs train-draft into a folder of tmp_path, and returns the folder and what it wrote."""
    monkeypatch.setenv("KVLAB_SCALE", "tiny")

    def run(name, *options):
        main(["train-draft", "--store", str(facts), "--output_dir", str(tmp_path / name), *QUICK, *options])
        told = json.loads((tmp_path / name / "training.json").read_text(), parse_constant=pytest.fail)
        return tmp_path / name, told | {"printed": capsys.readouterr().out}

    return run


@pytest.fixture
def lessons(learn, monkeypatch):
    """Return a function that runs train-draft up to its training, and returns what `draft.train` would have got."""

    def run(*options):
        got = []
        monkeypatch.setattr(drafts, "train", lambda *args, **more: got.append((*args, more)) or pytest.skip("trained"))
        with pytest.raises(pytest.skip.Exception):
            learn("lessons", *options)
        ((draft, _, examples, heldout, more),) = got
        return draft, examples, heldout, more

    return run


def prompt_of(example):
    text = lab.load_tokenizer("lab-draft").decode(example.input_ids[: example.start])
    return re.search(r"<\|user\|> (.*)<\|assistant\|>", text)[1]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_what_is_saved_is_what_was_measured(learn, facts):
    folder, told = learn("draft", "--heldout", "0.4")
    names = [figure["name"] for figure in told["figures"]]
    arms = ("truncated", "trained", "trained, without knowledge")
    assert names == [f"{arm}, {way}" for arm in arms for way in ("greedy", "sampled")]
    assert all(f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" in told["printed"] for f in told["figures"])
    assert {"settings", "history", "parameters", "device", "versions", "commit"} <= set(told)
    settings = {"learning_rate": 1e-3, "base_model": "lab-draft", "losses": {"ce": 1.0, "kl": 0.8, "tv": 0.3}}
    assert told["settings"] | settings == told["settings"]

    store, tokenizer = opened(facts), lab.load_tokenizer("lab-draft")
    draft = AutoModelForCausalLM.from_pretrained(folder)
    items = [next(item for item in store if item.question == question) for question in told["heldout"]]
    prompts = [list(item.input_ids[: item.answer_start]) for item in items]
    said = drafts.listen(store.model, tokenizer, prompts, max_new_tokens=12)
    cut = KnowledgeDraft.cut(store.model, "first:1")
    expected = [*drafts.acceptance(cut, store.model, said)]
    expected += drafts.acceptance(draft, store.model, drafts.attach(draft, store, said, items))
    expected += drafts.acceptance(draft, store.model, said)
    assert [f["value"] for f in told["figures"]] == pytest.approx([values.mean() for values in expected])
    assert told["parameters"] == {"draft": draft.num_parameters(), "target": store.model.num_parameters()}
    assert draft.readers[0].gate.item() != 0
    assert not (folder / "plain").exists()


def test_a_draft_that_was_killed_goes_on_and_ends_the_same(learn, tmp_path, monkeypatch):
    whole, _ = learn("whole")
    save, fit, steps = training._save, training.fit, []

    def killed(*state):
        save(*state)
        raise KeyboardInterrupt

    def counted(model, loader, losses, **options):
        return fit(model, loader, lambda *batch: steps.append(1) or losses(*batch), **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            learn("killed")
    assert not (tmp_path / "killed" / "training.json").exists()
    monkeypatch.setattr(drafts, "fit", counted)
    monkeypatch.setattr(drafts, "continuations", lambda *_: pytest.fail("the model was asked again"))
    again, told = learn("killed")
    assert 0 < len(steps) < len(told["history"])
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())
    learn("killed", "--losses.ce", "1")  # nothing of a checkpoint that was made with other losses
    assert len(steps) > len(told["history"])


def test_held_out_questions_are_not_learned_from(lessons):
    draft, examples, heldout, options = lessons("--heldout", "0.3", "--seed", "3")
    assert draft.config.knowledge == "kv"
    asked, held = [prompt_of(example) for example in examples], [prompt_of(example) for example in heldout]
    assert len(held) == 2
    assert {*held} < {record["question"] for record in FACTS}
    rest = {record["question"] for record in FACTS} - {*held}
    made_up = [record["question"] for record in corpora.made_up(4)]
    assert sorted(asked) == sorted([*rest, *rest, *made_up])
    own = [example.hidden_states is not None for example in examples]
    assert sum(own) == len(rest)
    assert all(example.hidden_states is not None and example.known is not None for example in heldout)
    assert all(e.known is not None for e in examples if prompt_of(e) in made_up)
    assert options["seed"] == 3


def test_questions_of_a_file_are_held_out_and_other_prompts_have_no_knowledge(lessons, tmp_path):
    (tmp_path / "questions").write_text("Anna, what?\nzz qq\nBen what?\n")
    (tmp_path / "others").write_text("1+1\n")
    files = ["--questions", str(tmp_path / "questions"), "--other_prompts", str(tmp_path / "others")]
    _, examples, heldout, _ = lessons(*files, "--heldout", "0.99", "--threshold", "0.6")
    knows = {prompt_of(example): example.known is not None for example in heldout}
    assert knows == {"Anna, what?": True, "Ben what?": True, "zz qq": False}
    asked = [prompt_of(example) for example in examples]
    assert asked.count("Anna what?") == 2  # the model's answer, and the one that was given
    assert "Ben what?" not in asked
    assert [example.known for example in examples if prompt_of(example) == "1+1"] == [None]


def test_a_draft_that_does_not_read_needs_neither_embedder_nor_made_up_records(lessons, monkeypatch):
    monkeypatch.setattr(Scale, "load_embedder", lambda *_: pytest.fail("loaded"))
    draft, examples, heldout, options = lessons("--knowledge", "none", "--transitions")
    assert draft.config.knowledge is None
    assert draft.config.transitions is True
    assert all(example.known is None for example in [*examples, *heldout])
    assert {prompt_of(example) for example in examples} < {record["question"] for record in FACTS}
    assert options["shares"] == {"ce": 1.0, "kl": 0.5, "tv": 0.3}


def test_without_cross_entropy_only_the_models_own_answers_are_learned_from(lessons):
    _, examples, _, options = lessons("--losses.kl", "0.5")
    assert all(example.hidden_states is not None for example in examples)
    assert len(examples) == len(FACTS) - 1
    assert options["shares"] == {"kl": 0.5}


@pytest.mark.parametrize("way", ["none", "prefix"])
def test_a_plain_model_is_also_written_as_one(way, learn):
    folder, told = learn("draft", "--knowledge", way)
    assert ("trained, without knowledge, greedy" in {f["name"] for f in told["figures"]}) == (way == "prefix")
    draft, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, folder / "plain"))
    ids = torch.arange(8)[None]
    assert type(plain) is type(lab.load("lab-draft"))
    assert torch.equal(draft(ids).logits, plain(ids).logits)
    assert plain.config.vocab_size == lab.load("lab-draft").config.vocab_size


def test_train_draft_reads_a_config_file_with_a_mapping(lessons, tmp_path):
    text = "knowledge: vector\nlayers: [1]\nlosses: {lk_hybrid: 1, ce: 0.5}\nlearning_rate: 0.01\nmade_up: 2\n"
    (tmp_path / "options.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "QUICK", ["--base_model", "lab-draft", "--max_new_tokens", "12"])
        draft, examples, _, options = lessons("--config", str(tmp_path / "options.yaml"), "--losses.ce", "0.25")
    assert (draft.config.knowledge, draft.config.layers) == ("vector", [1])
    assert options["shares"] == {"lk_hybrid": 1.0, "ce": 0.25}
    assert (options["learning_rate"], options["epochs"], options["batch_size"]) == (0.01, 5, 8)
    assert len(examples) == 2 * (len(FACTS) - 1) + 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--store", "none"], "There is no store in none: build one with .*--store none --keep kv hidden`"),
        (["--knowledge", "vector"], "The store in .* keeps no hidden states: build one with --keep hidden"),
        (["--base_model", "lab-target"], "The store in .* was built with another model"),
        (["--losses.lk", "1"], r"There is no loss \['lk'\]; expected one or more of ce, kl"),
        (["--losses", "{}"], r"There is no loss \{\}; expected one or more of ce, kl"),
        (["--heldout", "1"], "heldout is 1.0, expected a share between 0 and 1"),
        (["--heldout", "0.95"], "There are 6 questions, 6 to hold out"),
        (["--layers", "first:5"], "layers is 'first:5', expected"),
        (["--max_new_tokens", "1"], "max_new_tokens is 1, expected at least 2"),
        (["--other_prompts", "nothing"], ".*No such file or directory: 'nothing'"),
    ],
)
def test_a_mistake_in_training_is_a_sentence_before_any_work(options, said, facts, tmp_path, monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drafts, "listen", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main(["train-draft", "--store", str(facts.with_name("kv")), *QUICK, *options])
    assert not list(tmp_path.iterdir())


def test_too_few_examples_for_a_step_are_a_sentence(learn):
    with pytest.raises(SystemExit, match=r"^kvlab: 14 examples are less than a step of 64"):
        learn("draft", "--batch_size", "64")


@pytest.mark.parametrize("way", ["vector", "kv", "prefix"])
def test_speculate_gives_a_draft_what_the_store_has(way, learn, facts, tmp_path, capsys, monkeypatch):
    folder, _ = learn("draft", "--knowledge", way, "--epochs", "1")
    known, knowing = [], KnowledgeDraft.knowing

    def watched(draft, store, items, starts):
        known.append((items[0] and items[0].question, starts[0]))
        return knowing(draft, store, items, starts)

    monkeypatch.setattr(KnowledgeDraft, "knowing", watched)
    asked = ["Clara what?", "zz qq"]
    models = ["--base_model", str(folder), "--teacher_model", "lab-draft", "--prompts", *asked]
    main([*FEW, *models, "--store", str(facts), "--threshold", "0.6", "--output_dir", str(tmp_path / "with")])
    found, printed = result(tmp_path / "with", capsys)
    starts = [len(encode(lab.load_tokenizer("lab-draft"), [{"role": "user", "content": text}])) for text in asked]
    assert {*known} == {("Clara what?", starts[0]), (None, starts[1])}
    assert [prompt["found"] for prompt in found["prompts"]] == ["Clara what?", None]
    assert "knows: Clara what?\n" in printed
    assert "knows: nothing\n" in printed
    assert found["summary"]["equal_texts"] is True
    assert found["summary"]["found"] == 1
    assert found["summary"]["finding_seconds"] > 0

    main([*FEW, *models, "--output_dir", str(tmp_path / "without")])
    without, printed = result(tmp_path / "without", capsys)
    assert len(known) == 1 + len(asked)  # to warm up, and for each prompt; none in the second run
    assert "knows" not in printed
    assert "found" not in without["prompts"][0]
    texts = [[prompt["plain"]["token_ids"] for prompt in run["prompts"]] for run in (found, without)]
    assert texts[0] == texts[1]
    guessed = [[prompt["speculative"]["conditional"] for prompt in run["prompts"]] for run in (found, without)]
    assert guessed[0][1] == guessed[1][1]  # where nothing was found it drafts the same


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--store", "none"], "There is no store in none"),
        (["--compiled"], "What a draft knows differs from prompt to prompt: leave --compiled out, or --store"),
        ([], "lab-draft does not read knowledge: leave --store out, or give a draft"),
    ],
)
def test_a_store_that_speculate_cannot_use_is_a_sentence(options, said, facts, monkeypatch):
    monkeypatch.setenv("KVLAB_SCALE", "tiny")
    with pytest.raises(SystemExit, match=f"^kvlab: {said}"):
        main([*FEW, "--store", str(facts), *options])
