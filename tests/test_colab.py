"""A chapter alone in an empty folder, as in Colab: its first cell installs kvlab, all cells run."""

import ast
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import nbformat
import pytest
from test_project import PATHS, imported

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> Path:
    """Python with everything that is installed here except kvlab."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    # A path added by a .pth file is searched, but not its own .pth files (an editable kvlab).
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    for missing in (
        "torchmetrics",
        "jsonargparse",
        "jupytext",
        "myst_nb",
    ):  # what Colab does not have
        (Path(site) / f"{missing}.py").write_text(
            f"raise ModuleNotFoundError('No module named {missing}')\n"
        )
    (Path(site) / "runtime.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Two short chapters that import most of kvlab run as in Colab; the book runs them all.
ALONE = ["01_knowledge_caching.ipynb", "07_putting_it_together.ipynb"]
COLAB = """IPython accelerate datasets filelock huggingface_hub jinja2 matplotlib numpy packaging pandas
    peft requests safetensors scipy sentence_transformers sklearn tokenizers torch tqdm transformers
    xxhash yaml""".split()


def code_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def needed(names):
    """Top-level packages that these modules need, with what modules of kvlab import in turn."""
    packages, read, names = set(), set(), list(names)
    while names:
        name = names.pop()
        if name in PATHS and name not in read:
            read.add(name)
            names += imported(ast.parse(PATHS[name].read_text()), in_functions=False)
        packages.add(name.split(".")[0])
    return packages


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_colab_has_what_a_chapter_imports(path):
    code = code_of(path)
    modules = set(imported(ast.parse(code)))
    assert "pip" in code
    missing = needed(modules) - {*COLAB, *sys.stdlib_module_names, "kvlab"}
    assert not missing, f"{path.name} needs {missing}, which Colab does not have"
    for module in modules:
        assert not module.startswith("kvlab.") or module in PATHS, f"there is no {module}"


@pytest.mark.skipif(
    not (ROOT / ".git").exists(),
    reason="the notebook installs kvlab from this repository's commits",
)
@pytest.mark.parametrize("name", ALONE)
def test_a_chapter_runs_alone(runtime, tmp_path, name):
    subprocess.run([runtime, "-m", "pip", "uninstall", "-qy", "kvlab"], check=True)
    where = subprocess.run(
        [runtime, "-c", "import kvlab"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "ModuleNotFoundError" in where.stderr, "the runtime of this test must not have kvlab"
    (tmp_path / name).write_bytes((ROOT / "notebooks" / name).read_bytes())
    environment = os.environ | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
        "HF_HUB_OFFLINE": "1",
        "KVLAB_SCALE": "tiny",
    }
    options = f"-m nbconvert --to notebook --execute --output ran.ipynb {name}"
    done = subprocess.run(
        [runtime, *options.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(tmp_path / "ran.ipynb", as_version=4).cells
    assert all(c.execution_count for c in cells if c.cell_type == "code")
    installed = subprocess.run(
        [runtime, "-c", "import kvlab; print(kvlab.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(runtime.parents[1]) in installed.stdout, (
        f"kvlab came from {installed.stdout}, expected {sys.prefix}"
    )
