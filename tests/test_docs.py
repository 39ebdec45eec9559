"""The documentation cannot go stale: its code runs, its output is what the program prints, its tables are complete.

In README.md and every page of docs/: `python` blocks run in order in one namespace per file, and a `text` block after
one is what it prints; `yaml` blocks with `stages:` build; in `console` blocks the lines `$ prunekit ...`,
`$ pytest ...` and `$ python ...` run, and what follows is what they print (`...` stands for anything). A comment before
a block changes that: `<!-- file: NAME -->` writes it to a file that later blocks see, `<!-- not run: WHY -->` leaves it
out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import doctest
import inspect
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import reference_pages
import yaml
from PIL import Image

import prunekit
from prunekit import loading, plugins
from prunekit.cli import main
from prunekit.errors import SpecError
from prunekit.spec import schema
from prunekit.strategy import declare

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = {"worked-examples.md": pytest.mark.slow}  # three whole contracts; the tutorial has one
REFERENCE = ROOT / "docs" / "reference"
ORDER = r"(?:<!-- (?P<order>file|not run): (?P<value>.*?) -->\s*\n)?"
BLOCK = re.compile(ORDER + r"^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.M | re.S)
CHECKPOINT = "llava-hf/llava-1.5-7b-hf"  # in examples; the bundled model takes its part
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:|#)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """One fenced block. order: `file`, `not run` or None, with its value."""

    kind: str
    text: str
    order: str | None
    value: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["kind"], m["text"], m["order"], m["value"], text[: m.start("text")].count("\n") + 1)
        for m in BLOCK.finditer(text)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with the checkout's docs/ in sight; plugins are as before afterwards."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    plugins.reset()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [pytest.param(page, marks=LONG.get(page.name, ())) for page in PAGES], ids=name_of)
def test_blocks(page: Path, desk: Path) -> None:
    space: dict[str, Any] = {"__name__": "__docs__"}
    if page.name == "README.md":  # shows pieces, for a reader's own image
        Image.new("RGB", (640, 480), "red").save(desk / "cat.png")
    said: io.StringIO | None = None
    for block in blocks(page):
        place = f"{name_of(page)}:{block.line}"
        if block.order == "file":
            file = desk / str(block.value)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        if block.order is not None:
            continue
        if block.kind == "python":
            text = block.text.replace(CHECKPOINT, str(loading.resolve("micro")))
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile("\n" * block.line + text, str(page), "exec"), space)
        elif block.kind == "text" and said is not None:
            check_equal(place, "the block before", block.text, said.getvalue())
        elif block.kind == "yaml" and "stages:" in block.text:
            prunekit.load(block.text + "\n")
        elif block.kind == "console":
            for command, expected in commands(block.text):
                check_output(place, command, expected)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The `$ ` lines of a console block and what follows each."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def check_output(place: str, command: str, expected: str) -> None:
    words = shlex.split(command, comments=True)
    runners = {"prunekit": printed_by_prunekit, "pytest": printed_by_pytest, "python": printed_by_python}
    assert words[0] in runners, f"{place}: put <!-- not run: WHY --> before the block"
    check_equal(place, command, expected, runners[words[0]](words[1:]))


def check_equal(place: str, command: str, expected: str, said: str) -> None:
    checker, options = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert checker.check_output(expected, said, options), f"{place}: `{command}` prints\n{said}"


def printed_by_prunekit(arguments: list[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main.main(arguments)
    return said.getvalue()


def printed_by_pytest(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def printed_by_python(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    contents = (index, index.parent / "strategies" / "index.md")
    linked = {
        (one.parent / target).resolve() for one in contents for target in LINK.findall(one.read_text(encoding="utf-8"))
    }
    pages = set(index.parent.rglob("*.md")) - {index}
    assert {name_of(page) for page in pages - linked if page.parent.name != "decisions"} == set()


def test_the_page_of_hooks_is_that_of_the_code() -> None:
    """Else: python tests/reference_pages.py."""
    assert (REFERENCE / "hooks.md").read_text(encoding="utf-8") == reference_pages.written()


def test_every_hook_follows_one_grammar() -> None:
    """What it decides, its arguments if it has any, what it returns, what stops the loop."""
    for group in reference_pages.GROUPS.values():
        assert group.__doc__ and group.__doc__.startswith("Implemented by ")
        for name, function in vars(group).items():
            if hasattr(function, "prunekit_spec"):
                text = inspect.getdoc(function) or ""
                parts = re.findall(r"^(Arguments|Returns): ", text, flags=re.M)
                takes = function.__code__.co_argcount > 1 or (name in declare.HOOKS and declare.HOOKS[name])
                assert parts == (["Arguments", "Returns"] if takes else ["Returns"]), name
                assert re.search(r"Stops at the first|Every \w+ is\s+called|Returns: None", text), name


def test_every_strategy_is_documented_with_its_fields() -> None:
    text = (REFERENCE / "strategies.md").read_text(encoding="utf-8")
    rows = {m[1]: m[2] for m in re.finditer(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|", text, flags=re.M)}
    registry = plugins.registry()
    expected = {}
    for entry in registry.strategies():
        fields = dataclasses.fields(registry.get_strategy(entry.name))
        told = (f.name if f.default is dataclasses.MISSING else f"{f.name}: {_yaml(f.default)}" for f in fields)
        expected[entry.name] = ", ".join(f"`{one}`" for one in told) or "none"
    assert {name: cell.strip() for name, cell in rows.items()} == expected


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]


def test_every_key_of_a_pipeline_file_is_documented() -> None:
    text = (REFERENCE / "pipeline-file.md").read_text(encoding="utf-8")
    keys = re.findall(r"^\| `(\w+)` \|", text.partition("## Sites")[0], flags=re.M)
    assert keys == [*schema.TOP_KEYS, *schema.STAGE_KEYS]


def test_every_public_name_is_documented() -> None:
    text = (REFERENCE / "python.md").read_text(encoding="utf-8")
    names = re.findall(r"^### `(\w+)", text, flags=re.M)
    assert sorted(names) == sorted(prunekit.__all__)


def test_every_keyword_of_a_declaration_is_documented() -> None:
    text = (REFERENCE / "python.md").read_text(encoding="utf-8").partition("### `strategy`")[2].partition("\n### ")[0]
    keywords = re.findall(r"^\| `(\w+)` \|", text, flags=re.M)
    assert keywords == [one.name for one in dataclasses.fields(declare.Declaration)]


def test_every_command_and_option_is_documented() -> None:
    text = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    sections = {m[1]: m[2] for m in re.finditer(r"^## `prunekit (\w+)`\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)}
    (subparsers,) = (a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert sorted(sections) == sorted(subparsers.choices)
    for name, command in subparsers.choices.items():
        shown = [action for action in command._actions if action.option_strings and action.help != argparse.SUPPRESS]
        options = {max(action.option_strings, key=len) for action in shown} - {"--help"}
        assert set(re.findall(r"`(--[\w-]+)", sections[name])) == options, f"prunekit {name}"


def test_the_check_of_output_can_fail(desk: Path) -> None:
    with pytest.raises(AssertionError):
        check_output("here", "prunekit --version", "prunekit 0.0.0-never\n")
    (desk / "bad.yaml").write_text("stages: []\n")
    with pytest.raises(SpecError):
        prunekit.load(desk / "bad.yaml")
