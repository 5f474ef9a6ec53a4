"""Laws between files: one list of packages, one address, pairs in step, imports downward."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import jupytext
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = sorted({*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["dev"]})
CONSTRAINTS = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().split()
}
IGNORED = {
    ".git",
    "lab-runs",
    ".venv",
    "_build",
    "__pycache__",
    ".hypothesis",
    ".ipynb_checkpoints",
}
TEXTS = {
    ".py",
    ".md",
    ".toml",
    ".yml",
    ".yaml",
    ".txt",
    ".json",
    ".jsonl",
    ".ipynb",
    ".cff",
    ".bib",
    ".css",
    ".svg",
    "",
}


def files():
    """Yield the project's text files, without what git ignores."""
    for path in ROOT.rglob("*"):
        part = path.relative_to(ROOT).parts
        if (
            path.is_file()
            and path.suffix in TEXTS
            and not IGNORED & set(part)
            and not part[0].endswith("_cache")
        ):
            yield path


def test_environment_yml_lists_what_pyproject_lists():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = environment["dependencies"][-1]["pip"]
    assert sorted(item for item in listed if not item.startswith("-")) == REQUIREMENTS
    assert [item for item in listed if item.startswith("-")] == ["-c constraints.txt", "-e ."]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_constraints_satisfy_pyproject(requirement):
    wanted = Requirement(requirement)
    assert wanted.specifier.contains(CONSTRAINTS[canonicalize_name(wanted.name)])


def test_constraints_name_public_versions_only():
    assert CONSTRAINTS["torch"] == "2.13.0"
    assert not [name for name, version in CONSTRAINTS.items() if "+" in version or "@" in version]
    assert not [name for name in CONSTRAINTS if name.startswith(("nvidia", "triton", "kvlab"))]


def test_citation_agrees_with_pyproject():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]


def test_one_repository_address():
    owned = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    address = re.compile(
        r"(?:github\.com|githubusercontent\.com|research\.google\.com/github)/([\w.-]+/kvlab)\b"
    )
    names = {(path.name, name) for path in files() for name in address.findall(path.read_text())}
    assert {name for _, name in names} == {owned}, names


def test_notebook_pairs_are_in_sync():
    check = subprocess.run(
        [sys.executable, ROOT / "book/notebooks.py", "--check"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


def test_every_chapter_is_in_the_toc():
    chapters = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.py")}
    toc = (ROOT / "book/_toc.yml").read_text()
    assert chapters == set(re.findall(r"file: (notebooks/\S+)", toc))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MYST = """\
# Title

(here)=
## Heading

:::{note}
A {term}`KV cache`, {term}`many <KV cache>`, {cite:t}`su2021roformer`, {ref}`here`, {glue:text}`value:.2f`.
:::

```{admonition} Look
:class: tip
One {cite}`su2021roformer,hu2021lora`.
```

$$
x
$$ (eq-x)

```python
"{term}`stays`"
```
"""


def test_colab_text_has_no_myst():
    notebooks = load(ROOT / "book/notebooks.py")
    text = notebooks.plain(MYST, {"here": "Heading"})
    assert (
        "**Note**\n\nA KV cache, many, [Su et al. (2021)](https://arxiv.org/abs/2104.09864), Heading, `value`."
        in text
    )
    assert "**Look**\n\nOne ([Su et al., 2021](" in text
    assert text.count("<blockquote>") == text.count("</blockquote>") == 2
    assert '```python\n"{term}`stays`"\n```' in text
    assert "\\tag{eq-x} $$" in text
    assert "(here)=" not in text
    assert ":::" not in text
    with pytest.raises(SystemExit, match=r"directive \{list-table\} has no plain form"):
        notebooks.plain("```{list-table}\n```", {})


def test_colab_changes_one_cell_id_for_one_changed_cell(tmp_path):
    notebooks = load(ROOT / "book/notebooks.py")
    path = tmp_path / "00_x.py"
    cells = ["# # Title", f'"git+{notebooks.REPOSITORY}"', "2", "2"]
    ids = []
    for last in ("2", "3"):
        kinds = [" [markdown]", "", "", ""]
        path.write_text(
            "\n\n".join(
                f"# %%{kind}\n{cell}" for kind, cell in zip(kinds, [*cells[:3], last], strict=True)
            )
        )
        assert notebooks.colab(path) == notebooks.colab(path)
        ids.append(re.findall(r'"id": "(\w+)"', notebooks.colab(path)))
    assert len(set(ids[0])) == 4
    assert [one == other for one, other in zip(*ids, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize(("alt", "warnings"), [("A line that rises", 0), (" ", 1), (None, 1)])
def test_a_figure_without_alt_text_is_a_warning(alt, warnings, monkeypatch):
    from docutils import nodes

    extension = load(ROOT / "book/_ext/kvlab_book.py")
    messages = []
    monkeypatch.setattr(extension.logger, "warning", lambda *args, **kwargs: messages.append(args))
    image = nodes.image(uri="x.png") if alt is None else nodes.image(uri="x.png", alt=alt)
    document = nodes.document(None, None)
    document += image
    extension.warn_without_alt(None, document, "page")
    assert len(messages) == warnings


# the house

# Each module imports only from its own floor or from lower ones; chapters do not import each other.
CHAPTERS = "knowledge draft distill align fuse speculate"
FLOORS = (
    "files models losses answers results vocabularies lab.models lab.worlds",
    "ragged",
    "cache",
    "slots",
    "compress layers generation training evaluate records scale plots lab lab.corpora lab.tokenizers",
    "parallel",
    CHAPTERS,
    "lab.report lab.recipe lab.__main__ commands cli",
    "__main__",
)
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "kvlab").rglob("*.py"))
}
MODULES = sorted(set(PATHS) - {"kvlab"})


def floor(module):
    name = module.removeprefix("kvlab.")
    name = "commands" if name.startswith("commands.") else name
    levels = [level for level, names in enumerate(FLOORS) if name in names.split()]
    assert levels, f"{module} is on no floor; add it to FLOORS"
    return levels[0]


def imported(tree, in_functions=True):
    """Yield the modules that a syntax tree imports, without those for type checking only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (part if part in PATHS else node.module for part in parts)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif in_functions or not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from imported(node, in_functions)


@cache
def arrows(module):
    """The modules of kvlab that a module imports, with the packages they are in."""
    targets = set()
    for name in imported(ast.parse(PATHS[module].read_text())):
        while name != "kvlab" and name in PATHS and not f"{module}.".startswith(f"{name}."):
            targets.add(name)
            name = name.rpartition(".")[0]
    return targets


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    chapters = [f"kvlab.{name}" for name in CHAPTERS.split()]
    for target in arrows(module):
        assert floor(target) <= floor(module), f"{module} imports {target}, which is above it"
        assert not {module, target} <= {*chapters}, f"chapter {module} imports chapter {target}"


def test_only_the_top_and_scale_import_the_lab():
    users = [m for m in MODULES if any(t.startswith("kvlab.lab") for t in arrows(m))]
    below = [m for m in users if floor(m) < len(FLOORS) - 2 and not m.startswith("kvlab.lab")]
    assert below == ["kvlab.scale"]


def test_imports_have_no_circle():
    assert list(TopologicalSorter({module: arrows(module) for module in MODULES}).static_order())


def test_no_top_level_name_is_defined_twice():
    names = Counter()
    for path in PATHS.values():
        body = ast.parse(path.read_text()).body
        names.update(n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    twice = {name for name, count in names.items() if count > 1}
    assert not twice


def test_names_of_the_package_are_imported_when_used():
    import kvlab

    assert all(getattr(kvlab, name).__name__ == name for name in kvlab.__all__)
    run = "import kvlab, kvlab.results, sys; assert callable(kvlab.results)"
    run += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", run], check=True)
    with pytest.raises(AttributeError, match="no attribute 'rope'"):
        _ = kvlab.rope


# results


def test_results_have_figures_intervals_and_tables():
    import kvlab

    results = kvlab.results("distill")
    figure = results["em_full"]
    assert figure.low <= figure.value <= figure.high
    assert results.intervals({"em_full": "full"}) == {"full": figure.interval}
    with pytest.raises(ValueError, match="are the same: give each its own label"):
        results.intervals({"em_full": "full", "em_distill_25": "full"})
    table = results.table({"full": {"score": "em_full"}, "other": {"memory": "cache_mb_100"}})
    assert list(table.columns) == ["score (fraction)", "memory (MB)"]
    assert table.loc["full", "score (fraction)"] == f"{figure:.2f}"
    assert table.loc["other", "score (fraction)"] == ""
    with pytest.raises(ValueError, match="figures in fraction and in MB"):
        results.table({"a": {"x": "em_full"}, "b": {"x": "cache_mb_100"}})
    with pytest.raises(KeyError, match="no figure 'em_none'; expected one such as em_full"):
        results["em_none"]
    with pytest.raises(
        FileNotFoundError, match=r"expected one of align, .*run `python tests/bench"
    ):
        kvlab.results("nothing")


def test_every_result_is_read_and_ships():
    import kvlab

    files_ = sorted((ROOT / "kvlab/results").glob("*.json"))
    assert {path.stem for path in (ROOT / "tests/benchmarks").glob("[a-z]*.py")} == {
        path.stem for path in files_
    }
    assert all(kvlab.results(path.stem).device for path in files_)


# the book


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda path: path.stem
)
def test_the_book_has_run_this_chapter(path):
    """`make book` executes each chapter, and keeps in its cache those that ran to their end."""
    from jupyter_cache import get_cache

    folder = ROOT / "book/_build/.jupyter_cache"
    if not folder.exists():
        pytest.skip("there is no book: make book")
    chapter = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    try:
        get_cache(folder).match_cache_notebook(chapter)
    except KeyError:
        pytest.fail(
            f"{path.name} did not run to its end in the book: see the output of `make book`"
        )


def test_shipped_weights_are_small():
    weights = list((ROOT / "kvlab").rglob("*.safetensors"))
    assert weights
    assert sum(path.stat().st_size for path in weights) <= 12e6


def test_no_registry_host_and_no_machine_path():
    words = [f"/{folder}/" for folder in ("work", "root", "opt")] + [
        "pypi" + ".org",
        "files.python" + "hosted",
    ]
    uses = [(path.name, word) for path in files() for word in words if word in path.read_text()]
    assert not uses


def test_package_loads_no_code_from_files():
    # Published fusers are files of torch, of which only tensors are read.
    calls = r"\bpickle\.(?!UnpicklingError)|torch\.load\((?!.*weights_only=True)|torch\.save\("
    words = re.compile(rf"{calls}|trust_remote_code\s*=\s*True")
    assert not [
        path.name for path in (ROOT / "kvlab").rglob("*.py") if words.search(path.read_text())
    ]
