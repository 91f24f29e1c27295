"""What an index and a user's environment see of the package: its page, its version, the command that installs an extra."""

import os
import platform
import re
import shlex
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from markdown_it import MarkdownIt

import jaxbptt as bptt
from jaxbptt import words
from jaxbptt.__main__ import main

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REPOSITORY = CONFIG["project"]["urls"]["Homepage"]


def links_of(text):
    """Addresses of links and of images, and the text of code, as a parser of Markdown sees them."""
    links, images, code = [], [], []
    for block in MarkdownIt().enable("table").parse(text):
        code += [block.content] if block.type == "fence" else []
        for token in block.children or []:
            links += [token.attrs["href"]] if token.type == "link_open" else []
            images += [token.attrs["src"]] if token.type == "image" else []
            code += [token.content] if token.type == "code_inline" else []
    return links, images, code


def test_links_of_the_page_are_absolute():
    """README's links are relative; the build makes them absolute, each to a file that there is."""
    readme = (ROOT / "README.md").read_text("utf-8")
    page = readme
    for one in CONFIG["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(one["pattern"], one["replacement"], page)
    links, images, code = links_of(readme)
    assert len(links) > 10
    assert len(images) > 0
    absolute = lambda address: re.match(r"https?:|#", address)
    missing = [one for one in links + images if not absolute(one) and not (ROOT / one.partition("#")[0]).exists()]
    assert missing == []
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
    assert links_of(page) == (
        [one if absolute(one) else f"{REPOSITORY}/blob/main/{one}" for one in links],
        [one if absolute(one) else f"{raw}/main/{one}" for one in images],
        code,
    )


def test_one_repository():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert set(re.findall(r"github(?:usercontent)?\.com/([^/#\"']+/[^/#\"']+)", text)) == {REPOSITORY.split(".com/")[1]}


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    expected = f"jaxbptt {bptt.__version__}, jax {jax.__version__}, Python {platform.python_version()}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("project", "inside", "own_pip", "expected"),
    [
        ('name = "jaxbptt"', False, True, "pip install -e 'ROOT[train]'"),
        ('name = "jaxbptt"', True, True, "pip install -e '.[train]'"),
        ('name = "jaxbptt"', False, False, "PYTHON -m pip install -e 'ROOT[train]'"),
        (None, False, True, "pip install 'jaxbptt[train]'"),
        ('name = "other"', False, True, "pip install 'jaxbptt[train]'"),  # a copy inside another project
        (None, False, False, "PYTHON -m pip install 'jaxbptt[train]'"),
    ],
)
@pytest.mark.parametrize("folder", ["plain", "it's a folder"])
def test_how_an_extra_is_installed(tmp_path, monkeypatch, folder, project, inside, own_pip, expected):
    root, mine, other = (tmp_path / folder / name for name in ("checkout", "venv", "bin"))
    for one in (root, mine, other):
        one.mkdir(parents=True)
    for one in (mine, other):
        (one / "pip").touch(0o755)
    if project is not None:
        (root / "pyproject.toml").write_text(f"[project]\n{project}\n")
    monkeypatch.setattr(words, "_ROOT", root)
    monkeypatch.setattr(sys, "executable", str(mine / "python"))
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, (mine, other) if own_pip else (other, mine))))
    monkeypatch.chdir(root if inside else tmp_path)
    command = words.install_command("train")
    assert shlex.split(command) == [
        word.replace("ROOT", str(root)).replace("PYTHON", str(mine / "python")) for word in shlex.split(expected)
    ]
    assert "[train]'" in command  # a shell takes brackets for a pattern


def test_no_message_has_a_command_of_its_own():
    files = [file for file in (ROOT / "jaxbptt").rglob("*.py") if file.name != "words.py"]
    assert [file.name for file in files if "pip install" in file.read_text("utf-8")] == []


def test_a_table_without_pandas(monkeypatch, tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,4\n")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(bptt.tasks.InputError) as error:
        bptt.tasks.read_table(tmp_path / "a.csv")
    assert str(error.value) == f"pandas is not installed: {words.install_command('tables')}"
