"""The site in docs/: its code runs, its commands parse, every public name has an entry, every figure its lines."""

import ast
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import jaxbptt as bptt
from jaxbptt import __main__ as command_line

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.rst"))
ENTRY = re.compile(r"^\.\. auto(?:function|class|data|exception):: jaxbptt\.([\w.]+)$", re.MULTILINE)


def blocks(page):
    """Language and content of every block of code."""
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    return [(token.info, token.content) for token in tokens if token.type == "fence"]


PROGRAMS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (language, code) in enumerate(blocks(page))
    if language == "python" and ">>>" not in code
]
LINES = [
    pytest.param(line, id=f"{page.stem}: {line}")
    for page in [*PAGES, ROOT / "README.md"]
    for language, code in blocks(page)
    if language == ""
    for line in code.splitlines()
    if line
]


@pytest.mark.parametrize("code", PROGRAMS)
def test_program_runs(code):
    exec(compile(code, "a block of docs/", "exec"), {})


def test_no_other_blocks():
    """pytest collects doctests from the pages themselves, the build runs cells, and other directives show no new code."""
    allowed = {"python", "", "{code-cell} python", "{toctree}", "{literalinclude} ../examples/recurrent_ppo.py"}
    assert {language for page in [*PAGES, ROOT / "README.md"] for language, _ in blocks(page)} <= allowed
    assert all(">>>" in code for language, code in blocks(ROOT / "README.md") if language == "python")


@pytest.mark.parametrize("line", LINES)
def test_command_is_one_there_is(line):
    """`jaxbptt` as its own parser reads it, scripts that exist, extras that are declared."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for program, *words in (shlex.split(command) for command in line.split(" && ")):
        if program.endswith("python"):
            if words[:2] == ["-m", "jaxbptt"]:
                command_line._parser().parse_args(words[2:])
            elif words[0] == "-m":
                assert words[1] in ("pytest", "sphinx")
            else:
                assert (ROOT / words[0]).is_file()
        elif program == "jaxbptt":
            command_line._parser().parse_args(words)
        elif program.endswith("pip"):
            assert {extra for word in words for extra in re.findall(r"[\w-]+", word.partition("[")[2])} <= set(extras)
        else:
            assert (program, words) == ("python3", ["-m", "venv", ".venv"])


# What a user imports. Of a module, its own functions and classes; of all, names imported under the same name.
NAMESPACES = {
    "": bptt,
    **{name: getattr(bptt, name) for name in ("analysis", "scans", "training", "interop", "models", "tasks", "plots")},
    **{name: getattr(bptt, name) for name in ("streams", "losses", "checkpoints", "hooks", "regularizers")},
    **{name: getattr(bptt, name) for name in ("sharding", "initializers")},
}


def public(module):
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.asname == alias.name]
        else:
            names = []
        yield from (name for name in names if name[0] != "_" and not inspect.ismodule(getattr(module, name)))


def test_every_public_name_is_in_the_reference():
    entries = [entry for page in REFERENCE for entry in ENTRY.findall(page.read_text("utf-8"))]
    assert len(entries) == len(set(entries)) > 100
    there = {}
    for entry in entries:
        value = bptt
        for name in entry.split("."):
            value = getattr(value, name)
        there[id(value)] = value
    missing = {
        f"{space}.{name}".lstrip(".")
        for space, module in NAMESPACES.items()
        for name in public(module)
        if id(getattr(module, name)) not in there
    }
    assert missing == set()


def test_every_figure_is_in_the_gallery():
    """Each is drawn by a cell that ends with it, and so shows it."""
    cells = [code for language, code in blocks(ROOT / "docs/gallery.md") if language.startswith("{code-cell}")]
    drawn = [ast.unparse(last.value.func) for last in (ast.parse(cell).body[-1] for cell in cells[1:])]
    figures = [name for name in public(bptt.plots) if name.startswith("plot_")]
    assert sorted(drawn) == sorted(f"plots.{name}" for name in figures)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Sphinx follows links between pages; those into the repository are checked here."""
    text = page.read_text("utf-8")
    into = re.findall(r"https://github\.com/jaxbptt/jaxbptt/(?:blob|tree)/main/([^)#\s]+)", text)
    assert [path for path in into if not (ROOT / path).exists()] == []


def test_readme_is_short_and_leads_to_the_pages():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 120
    pages = set(re.findall(r"\(docs/(\w+)\.md\)", readme))
    assert pages <= {page.stem for page in PAGES}
    assert {
        "index",
        "strategies",
        "diagnose",
        "train",
        "reinforcement",
        "commands",
        "gallery",
        "limits",
        "speed",
    } <= pages
