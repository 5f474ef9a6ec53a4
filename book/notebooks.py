"""Make notebooks/*.ipynb, which Colab opens, from the percent files beside them, written in MyST.

    python book/notebooks.py            write each .ipynb that differs from its source
    python book/notebooks.py --check    write nothing; exit 1 and name the files that differ

Colab shows MyST as raw text. Here directives become quotes, folds and pictures, and roles become
words and links. Outputs are left out. A cell's id is made from its own text, so that editing one
cell changes one id.
"""

import hashlib
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
OWNED = REPOSITORY.removeprefix("https://github.com/")
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({})"
COLAB = f"https://colab.research.google.com/github/{OWNED}/blob/main/notebooks/"
RAW = f"https://raw.githubusercontent.com/{OWNED}/main/"
PAPERS = parse_file(ROOT / "book/references.bib").entries

OPEN = re.compile(r"(`{3,}|:{3,})(?:\{([\w:-]+)\} *(.*))?")
OPTION = re.compile(r":([\w-]+): *(.*)")
ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")
HEADING = re.compile(r"^\(([\w-]+)\)=\n+#+ (.+)", re.M)
EXERCISE = re.compile(r"\{exercise(?:-start)?\} *(.*)\n:label: (\S+)")
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def citation(key: str, textual: bool) -> str:
    if key not in PAPERS:
        sys.exit(
            f"The paper {key} is cited, but is not in book/references.bib; "
            f"it has {', '.join(PAPERS)}."
        )
    people, fields = PAPERS[key].persons["author"], PAPERS[key].fields
    names = [" ".join(person.last_names).strip("{}") for person in people]
    who = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
    address = fields.get("url") or f"https://arxiv.org/abs/{fields['eprint']}"
    return (
        f"[{who} ({fields['year']})]({address})"
        if textual
        else f"[{who}, {fields['year']}]({address})"
    )


def role(name: str, text: str, titles: dict[str, str]) -> str:
    shown = re.sub(r"\s*<[^>]*>$", "", text)
    if name in {"cite", "cite:p"}:
        return f"({'; '.join(citation(key.strip(), False) for key in text.split(','))})"
    if name == "cite:t":
        return ", ".join(citation(key.strip(), True) for key in text.split(","))
    if name.startswith("glue"):
        return f"`{text.split(':')[0]}`"
    if name in {"ref", "numref"} and shown == text:
        return (
            titles[text]
            if text in titles
            else sys.exit(f"{{ref}}`{text}` needs words: {{ref}}`words <{text}>`.")
        )
    if name in {"term", "doc", "ref", "numref"}:
        return shown
    if name == "eq":
        return f"({text})"
    if name in {"func", "class", "meth", "mod", "data", "attr"}:
        return f"`{shown.removeprefix('~')}`"
    return sys.exit(
        f"The role {{{name}}} has no plain form; use another, or give it one in book/notebooks.py."
    )


def directive(name: str, title: str, options: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the lines that replace a directive's opening and its end."""
    words = {"admonition": "", "seealso": "See also"}.get(name, name.capitalize())
    if name in {"exercise-end", "solution-start", "solution-end"}:
        return [], []
    if name == "exercise-start":
        return [f"**Exercise: {title}**", ""], []
    if name in {"dropdown", "solution"} or "dropdown" in options.get("class", ""):
        return [
            "<details>",
            f"<summary>{words if name == 'solution' else title or words}</summary>",
            "",
        ], ["", "</details>"]
    if name in {
        "note",
        "tip",
        "hint",
        "important",
        "warning",
        "caution",
        "seealso",
        "admonition",
        "exercise",
    }:
        heading = f"**{': '.join(filter(None, [words, title]))}**"
        return ["<blockquote>", "", heading, ""], ["", "</blockquote>"]
    if name == "figure":
        return [f"![{options.get('alt', '')}]({RAW}{title.removeprefix('../')})", ""], []
    return sys.exit(
        f"The directive {{{name}}} has no plain form; use another, "
        "or give it one in book/notebooks.py."
    )


def plain(text: str, titles: dict[str, str]) -> str:
    """Return one text cell without MyST."""
    lines, out, ends = text.split("\n"), [], []
    while lines:
        line = lines.pop(0)
        opening = OPEN.match(line)
        if ends and line.rstrip() == ends[-1][0]:
            out += ends.pop()[1]
        elif ends and ends[-1][1] == ["```"]:
            out.append(line)
        elif opening and opening[2]:
            options = {}
            while lines and (option := OPTION.match(lines[0])):
                options[option[1]] = option[2]
                lines.pop(0)
            begin, end = directive(opening[2], opening[3], options)
            out, ends = out + begin, [*ends, (opening[1], end)]
        elif opening:
            out, ends = [*out, line], [*ends, (opening[1], ["```"])]
        else:
            line = re.sub(r"^\([\w-]+\)=$", "", line)
            line = re.sub(r"\$\$ *\(([\w-]+)\)$", r"\\tag{\1} $$", line)
            out.append(ROLE.sub(lambda match: role(match[1], match[2], titles), line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def colab(path: Path) -> str:
    """Return the text of the .ipynb that belongs to a percent file."""
    source = jupytext.read(path).cells
    text = "\n".join(cell.source for cell in source if cell.cell_type == "markdown")
    titles = dict(HEADING.findall(text)) | {
        label: f"exercise “{name}”" for name, label in EXERCISE.findall(text)
    }
    first = next(cell.source for cell in source if cell.cell_type == "code")
    if not re.search(rf"^[^#\n]*git\+{re.escape(REPOSITORY)}\b", first, re.M):
        sys.exit(
            f"{path.name}: its first code cell must install kvlab from git+{REPOSITORY}, "
            "and not in a comment."
        )
    cells, repeats, solving = [], Counter(), False
    for cell in source:
        inside, text = solving or "{solution-start}" in cell.source, cell.source
        solving = inside and "{solution-end}" not in cell.source
        if cell.cell_type == "markdown":
            text = plain(text, titles)
            if text and inside:
                text = f"<details>\n<summary>Solution</summary>\n\n{text}\n\n</details>"
            if not cells:
                title, _, rest = text.partition("\n")
                badge = BADGE.format(COLAB + path.with_suffix(".ipynb").name)
                text = f"{title}\n\n{badge}\n{rest}".strip()
        elif inside:
            text = f"# @title Solution\n{text}"
            cell.metadata.update(cellView="form", jupyter={"source_hidden": True})
        repeats[text] += 1
        name = hashlib.sha256(f"{cell.cell_type}{repeats[text]}{text}".encode()).hexdigest()[:8]
        empty = {"execution_count": None, "outputs": []} if cell.cell_type == "code" else {}
        if text:
            cells.append(
                {"cell_type": cell.cell_type, "id": name, "metadata": cell.metadata, "source": text}
                | empty
            )
    notebook = nbformat.from_dict(
        {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    )
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main(check: bool) -> None:
    texts = {
        path.with_suffix(".ipynb"): colab(path)
        for path in sorted((ROOT / "notebooks").glob("*.py"))
    }
    differ = [pair for pair, text in texts.items() if not pair.exists() or pair.read_text() != text]
    if check and differ:
        names = ", ".join(pair.name for pair in differ)
        sys.exit(
            f"{names}: not made from the .py beside it; run `make notebooks` and commit the result."
        )
    for pair in differ:
        pair.write_text(texts[pair])
        print(f"wrote {pair.relative_to(ROOT)}")


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
