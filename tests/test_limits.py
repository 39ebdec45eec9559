"""Every refusal of prunekit is listed in docs/limits.md and provoked by a test, both by the same words.

A refusal is a `raise Unsupported(...)`, or the message of a `Problem` that a function returns. Tables of docs/limits.md
have a column "it says" with a piece of its message in backquotes; the piece must belong to one refusal alone, and must
stand in a string of some test. Where the reason is a name that the function, or a table of its module, gives several
texts, each of them is a refusal of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "limits.md"
COLUMN = "it says"
# Shorter pieces would be found by accident; shorter frames say nothing by themselves.
SHORTEST, FRAME, WHOLE = 12, 24, 20


@dataclass(frozen=True)
class Refusal:
    """One message, without what is filled in. place: `file.py:line`."""

    place: str
    parts: tuple[str, ...]

    def says(self, piece: str) -> bool:
        return any(piece in part for part in self.parts)


def refusals(files: Iterable[tuple[str, str]]) -> list[Refusal]:
    """All refusals of some source files, (name, text) each."""
    trees = [(name, ast.parse(text)) for name, text in files]
    return [one for name, tree in trees for one in (*_of_module(name, tree), *_of_problems(name, tree))]


def _of_problems(name: str, tree: ast.Module) -> Iterator[Refusal]:
    """What functions that return a `Problem`, a message and a hint, have as messages."""
    for function in ast.walk(tree):
        returns = getattr(function, "returns", None)
        if returns is None or "Problem" not in ast.unparse(returns):
            continue
        for node in ast.walk(function):
            message = None
            if isinstance(node, ast.Assign) and {ast.unparse(one) for one in node.targets} <= {"message", "reason"}:
                message = node.value
            elif isinstance(node, ast.Tuple) and len(node.elts) == 2:
                message = node.elts[0]
            parts = () if message is None else texts(message)
            if max(map(len, parts), default=0) >= WHOLE:
                yield Refusal(f"{name}:{node.lineno}", parts)


def _of_module(name: str, tree: ast.Module) -> Iterator[Refusal]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    makers = {one.name for one in functions if isinstance(one.returns, ast.Name) and one.returns.id == "Unsupported"}
    for function in functions:
        for node in _own(function):
            made = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(made, ast.Name):
                assert made.id != "Unsupported", f"{name}:{node.lineno}: a refusal says why"
            if (
                isinstance(made, ast.Call)
                and isinstance(made.func, ast.Name)
                and made.func.id in {"Unsupported", "NotPlain", *makers}
            ):
                yield from _of_raise(f"{name}:{made.lineno}", made, function, tree)


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)


def _of_raise(place: str, made: ast.Call, function: ast.FunctionDef, tree: ast.Module) -> Iterator[Refusal]:
    parts = tuple(part for argument in made.args for part in texts(argument))
    filled = {node.id for argument in made.args for node in ast.walk(argument) if isinstance(node, ast.Name)}
    every = [reason for name in sorted(filled) for reason in _reasons(name, function, tree)]
    reasons = [reason for reason in dict.fromkeys(every) if max(map(len, reason)) >= SHORTEST]
    if not reasons or max(map(len, parts), default=0) >= FRAME:
        yield Refusal(place, parts)
    yield from (Refusal(place, reason) for reason in reasons)


def _reasons(name: str, function: ast.FunctionDef, tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """The texts that `name` is given in a function, by assignment or by a loop over a table of the module."""
    for node in _own(function):
        if isinstance(node, ast.Assign) and name in {one.id for one in node.targets if isinstance(one, ast.Name)}:
            chosen = node.value
            for value in (chosen.body, chosen.orelse) if isinstance(chosen, ast.IfExp) else (chosen,):
                if isinstance(value, (ast.Constant, ast.JoinedStr)) and (found := texts(value)):
                    yield found
        if isinstance(node, ast.For) and name in {one.id for one in ast.walk(node.target) if isinstance(one, ast.Name)}:
            table = next((one.id for one in ast.walk(node.iter) if isinstance(one, ast.Name)), "")
            for held in tree.body:
                if isinstance(held, ast.Assign) and isinstance(held.value, ast.Dict) and _named(held) == table:
                    yield from ((found) for value in held.value.values if (found := texts(value)))


def _named(node: ast.Assign) -> str:
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""


def texts(node: ast.AST) -> tuple[str, ...]:
    """The constant pieces of a text, in order; what is filled in stands between them."""
    if isinstance(node, ast.Constant):
        return (node.value,) if isinstance(node.value, str) else ()
    if isinstance(node, ast.BinOp):
        return (*texts(node.left), *texts(node.right))
    if isinstance(node, ast.JoinedStr):
        return tuple(piece for value in node.values for piece in texts(value))
    return ()


def listed(page: str) -> list[str]:
    """The pieces of messages that a page quotes."""
    found: list[str] = []
    column = None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if COLUMN in cells:
            column = cells.index(COLUMN)
        elif not cells:
            column = None
        elif column is not None and not set(cells[column]) <= set("- "):
            found += re.findall(r"`([^`]+)`", cells[column])
    return found


def strings(files: Iterable[str]) -> list[str]:
    """All strings of some source files but docstrings; patterns without their backslashes."""
    found = []
    for text in files:
        tree = ast.parse(text)
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                found.append(node.value.replace("\\", ""))
    return found


def complaints(found: list[Refusal], page: str, tests: list[str]) -> list[str]:
    """Everything that is wrong."""
    told, pieces = [], listed(page)
    for piece in pieces:
        owners = [refusal.place for refusal in found if refusal.says(piece)]
        if len(piece) < SHORTEST:
            told.append(f"too short to be found by: `{piece}`")
        elif not owners:
            told.append(f"stale, nothing says it: `{piece}`")
        elif len(owners) > 1:
            told.append(f"said by several, {', '.join(owners)}: `{piece}`")
        elif not any(piece in text for text in tests):
            told.append(f"not tested, {owners[0]}: `{piece}`")
    told += [
        f"not listed, {refusal.place}: {' ... '.join(refusal.parts)}"
        for refusal in found
        if not any(refusal.says(piece) for piece in pieces)
    ]
    return told


def read(folder: str) -> list[tuple[str, str]]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in paths]


SOURCES = read("prunekit")
TESTS = strings(text for name, text in read("tests") if name != "tests/test_limits.py")
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_refusal_is_listed_and_tested() -> None:
    found = refusals(SOURCES)
    assert len(found) > 80
    told = complaints(found, TEXT, TESTS)
    assert not told, "\n".join(told)


def test_no_refusal_is_made_in_a_way_that_is_not_seen() -> None:
    """Each call of `Unsupported` stands in a raise of its own or in a function that says so."""
    made = sum(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Unsupported"
        for _, text in SOURCES
        for node in ast.walk(ast.parse(text))
    )
    raised = {refusal.place for refusal in refusals(SOURCES)}
    direct = sum(
        "Unsupported(" in text.splitlines()[int(line) - 1] for name, text in SOURCES for line in _lines(name, raised)
    )
    makers = sum(len(re.findall(r"-> Unsupported:", text)) for _, text in SOURCES)
    assert made == direct + makers


def _lines(name: str, places: Iterable[str]) -> list[str]:
    return [place.rpartition(":")[2] for place in places if place.rpartition(":")[0] == name]


MUTANT = """
def check(model, kind):
    if model:
        raise Unsupported(f"{model} is a mutant of {kind}; leave it out")
    reason = "mutants have no heads" if kind else f"mutants have no tails of {kind}"
    raise Unsupported(f"{model}: {reason}")
"""
ROW = "\n| refused | it says | why |\n| - | - | - |\n"


@pytest.mark.parametrize(
    ("quoted", "tests", "wrong"),
    [
        ([], [], ["not listed"] * 3),
        (["is a mutant of", "have no heads", "have no tails"], [], ["not tested"] * 3),
        (["is a mutant of", "have no heads", "have no tails"], ["it is a mutant of x, mutants have no heads"],
         ["not tested"]),
        (["is a mutant of", "mutants have no"], ["is a mutant of", "mutants have no"], ["said by several"]),
        (["is a mutant of", "have no heads", "have no tails", "have no wings"],
         ["is a mutant of", "have no heads", "have no tails", "have no wings"], ["stale"]),
        (["is a mutant of", "have no heads", "have no tails"], ["x is a mutant of y", "have no heads", "have no tails"],
         []),
    ],
)  # fmt: skip
def test_the_check_itself(quoted: list[str], tests: list[str], wrong: list[str]) -> None:
    """A refusal that nobody listed or tested is noticed; so are rows that are stale or fit two refusals."""
    files = [*SOURCES, ("mutant.py", MUTANT)]
    page = TEXT + ROW + "".join(f"| mutants | `{piece}` | |\n" for piece in quoted)
    usual = set(complaints(refusals(SOURCES), TEXT, TESTS))
    told = [one for one in complaints(refusals(files), page, TESTS + tests) if one not in usual]
    assert [one.partition(",")[0] for one in told] == wrong


def test_each_row_counts() -> None:
    """Without its row or its test a refusal is told of."""
    piece = listed(TEXT)[0]
    found = refusals(SOURCES)
    assert any(one.startswith("not listed") for one in complaints(found, TEXT.replace(f"`{piece}`", ""), TESTS))
    without = [text for text in TESTS if piece not in text]
    assert f"`{piece}`" in "".join(complaints(found, TEXT, without))
