"""What holds between the project's files: one list of packages, one address, pairs in step, nothing out of place."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
    found = {(path.name, name) for path in files() for name in address.findall(path.read_text())}
    assert {name for _, name in found} == {owned}, found


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
    said = []
    monkeypatch.setattr(extension.logger, "warning", lambda *args, **kwargs: said.append(args))
    image = nodes.image(uri="x.png") if alt is None else nodes.image(uri="x.png", alt=alt)
    document = nodes.document(None, None)
    document += image
    extension.warn_without_alt(None, document, "page")
    assert len(said) == warnings


def test_shipped_weights_are_small():
    weights = list((ROOT / "kvlab").rglob("*.safetensors"))
    assert weights
    assert sum(path.stat().st_size for path in weights) <= 12e6


def test_no_registry_host_and_no_machine_path():
    words = [f"/{folder}/" for folder in ("work", "root", "opt")] + [
        "pypi" + ".org",
        "files.python" + "hosted",
    ]
    found = [(path.name, word) for path in files() for word in words if word in path.read_text()]
    assert not found


def test_package_loads_no_code_from_files():
    words = re.compile(r"\bpickle\b|torch\.load\(|torch\.save\(|trust_remote_code\s*=\s*True")
    assert not [
        path.name for path in (ROOT / "kvlab").rglob("*.py") if words.search(path.read_text())
    ]
