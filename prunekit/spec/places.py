"""YAML text to a tree whose every node knows file, line and column. Plain data only: no tags, no anchors.

Scalars follow YAML 1.2 (`yes` and `010` are text and a decimal number). Faults are collected, not raised, so that a
reader of a file sees all of them at once.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prunekit.errors import Fault, Where
from prunekit.spec import broken

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
INT_LIMIT = 1 << 63  # what a tensor or a seed can hold
MISSING = "???"  # OmegaConf's mark of a value that must be set elsewhere

Scalar = str | int | float | bool | None

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
# A word in one of the three casings of YAML's core schema: lower, Capital, UPPER.
_CORE = {form(word): value for word, value in _WORDS.items() for form in (str, str.capitalize, str.upper)}


@dataclass(frozen=True)
class Node:
    """One value, and where it stands; places are None for data from a dict.

    key: the place of its key, for a list item its own. written: where `${...}` took it from, None when that is `where`.
    """

    data: Scalar | list[Node] | dict[str, Node]
    where: Where | None = None
    key: Where | None = None
    written: Where | None = None

    def __str__(self) -> str:
        """The value as messages show it, shortened."""
        if self.data is None:
            return "nothing"
        if isinstance(self.data, dict | list):
            return "a mapping" if isinstance(self.data, dict) else "a list"
        shown = str(self.data).lower() if isinstance(self.data, bool) else repr(self.data)
        return shown if len(shown) <= 60 else shown[:57] + "..."

    def plain(self) -> Any:
        """The value as plain dicts, lists and scalars."""
        if isinstance(self.data, dict):
            return {key: node.plain() for key, node in self.data.items()}
        if isinstance(self.data, list):
            return [node.plain() for node in self.data]
        return self.data

    @property
    def folder(self) -> Path:
        """Where a relative path that it holds starts from: beside the file in which it is written, if there is one."""
        place = self.written or self.where
        return Path(place.file).parent if place else Path()

    def table(self, path: str) -> dict[str, Node]:
        """This node and everything in it, by key path below `path`."""
        nodes = {path: self}
        if isinstance(self.data, dict):
            for key, node in self.data.items():
                nodes |= node.table(join(path, key))
        elif isinstance(self.data, list):
            for index, node in enumerate(self.data):
                nodes |= node.table(join(path, index))
        return nodes


def read_file(path: Path, at: Fault, faults: list[Fault]) -> str | None:
    """The text of a pipeline file, or None after adding to `faults`: `at` with the reason as its message."""
    try:
        if path.is_dir():
            return _no(at, f"'{path}' is a directory", "name a pipeline file in it", faults)
        if not path.exists():
            return _no(at, f"no such file: '{path}'", _near(path), faults)
        if not path.is_file():
            return _no(at, f"'{path}' is not a regular file", "", faults)
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        return _no(at, f"cannot read '{path}': {getattr(error, 'strerror', None) or error}", "", faults)
    start = Where(str(path), 1, 1)
    if len(raw) > MAX_BYTES:
        return _no(Fault(start, "", ""), f"is larger than {MAX_BYTES} bytes", "is this a pipeline file?", faults)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        place = Where(str(path), line, error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1)
        return _no(Fault(place, "", ""), "is binary or not UTF-8 text", "a pipeline is a YAML text file", faults)


def parse(text: str, file: str, faults: list[Fault]) -> Node | None:
    """The tree of YAML or JSON `text`, or None when it has none; adds what is wrong with it to `faults`."""
    try:
        reader = _Reader(text, file, faults)
        root = reader.get_single_node()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Where(file, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
        faults.append(Fault(place, "", f"character {ord(text[error.position]):#06x} cannot stand in a YAML file"))
        return None
    except yaml.MarkedYAMLError as error:
        unfinished = (error.context or "").endswith("simple key")  # which begins where the context does
        mark = (unfinished and error.context_mark) or error.problem_mark or error.context_mark
        place = Where(file, mark.line + 1, mark.column + 1) if mark else Where(file, 1, 1)
        parts = " ".join(part for part in (error.context, error.problem) if part)
        faults.append(Fault(place, "", f"not YAML: {parts}", broken.hint(parts, text, place)))
        return None
    except (ValueError, OverflowError) as error:  # PyYAML lets both out of bad escapes and directives
        faults.append(Fault(Where(file, 1, 1), "", f"not YAML: {error}"))
        return None
    return _convert(root, file, "", faults) if root else None


class _Reader(yaml.SafeLoader):
    """Composes nodes, refusing what could name Python objects (tags) or blow up (anchors, depth)."""

    def __init__(self, text: str, file: str, faults: list[Fault]) -> None:
        super().__init__(text)
        self.file, self.faults, self.depth = file, faults, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        place = Where(self.file, event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self.faults.append(Fault(place, "", f"alias '*{event.anchor}' is not allowed", "write the value out"))
            start: Any = event.start_mark
            return yaml.ScalarNode("", "", start, start)
        if event.anchor is not None:
            self.faults.append(Fault(place, "", f"anchor '&{event.anchor}' is not allowed", "remove it"))
            event.anchor = None
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.faults.append(Fault(place, "", f"tag '{tag}' is not allowed", "pipeline files hold plain data"))
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested over {MAX_DEPTH} levels deep", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _convert(node: Any, file: str, path: str, faults: list[Fault], key: Where | None = None) -> Node:
    where = Where(file, node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(child, file, f"{path}[{i}]", faults) for i, child in enumerate(node.value)]
        return Node(items, where, key or where)
    if isinstance(node, yaml.MappingNode):
        return Node(_entries(node, file, path, faults), where, key or where)
    value = scalar(node.value) if node.style is None else node.value
    return Node(value if check_int(value, where, path, faults) else 0, where, key or where)


def _entries(node: yaml.MappingNode, file: str, path: str, faults: list[Fault]) -> dict[str, Node]:
    entries: dict[str, Node] = {}
    for name, child in node.value:
        place = Where(file, name.start_mark.line + 1, name.start_mark.column + 1)
        if not isinstance(name, yaml.ScalarNode):
            faults.append(Fault(place, path, "a key must be a name, not a list or a mapping"))
            continue
        if name.value == "<<" and name.style is None:
            faults.append(
                Fault(
                    place,
                    join(path, "<<"),
                    "merge keys (`<<`) are not supported",
                    "use `extends`, or `vars` and ${...}",
                )
            )
            continue
        value = _convert(child, file, join(path, name.value), faults, place)
        if name.value in entries:
            first = entries[name.value].key
            hint = f"first on line {first.line}; keep one of them" if first else ""
            faults.append(Fault(place, join(path, name.value), "this key stands here twice", hint))
        entries.setdefault(name.value, value)
    return entries


def scalar(text: str) -> Scalar:
    """The value of plain, unquoted text."""
    if text in _CORE:
        return _CORE[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 30 else INT_LIMIT
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan").replace(".I", "I").replace(".N", "N"))
    return text


def check_int(value: object, where: Where | None, path: str, faults: list[Fault]) -> bool:
    """Whether a value is no whole number, or one that fits into 64 bits; else a fault."""
    if isinstance(value, int) and not -INT_LIMIT <= value < INT_LIMIT:
        faults.append(Fault(where, path, "the number does not fit into 64 bits"))
        return False
    return True


def join(path: str, step: str | int) -> str:
    """The key path of an entry: `stages` and 0 are `stages[0]`, that and `keep` are `stages[0].keep`."""
    if isinstance(step, int):
        return f"{path}[{step}]"
    return f"{path}.{step}" if path else step


def escape(text: str) -> str:
    """The text that OmegaConf reads as `text` itself: no `${` in it is resolved."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def escaped(data: Any) -> Any:
    """Plain data, dicts and lists of it, in which every text is escaped."""
    if isinstance(data, dict):
        return {key: escaped(value) for key, value in data.items()}
    if isinstance(data, list):
        return [escaped(value) for value in data]
    return escape(data) if isinstance(data, str) else data


def _no(at: Fault, message: str, hint: str, faults: list[Fault]) -> str | None:
    faults.append(Fault(at.where, at.key, message, hint))
    return None


def _near(path: Path) -> str:
    """Files beside a missing one that may have been meant."""
    if not path.parent.is_dir():
        return f"there is no directory '{path.parent}'"
    beside = [other.name for other in path.parent.iterdir() if other.suffix in (".yaml", ".yml", ".json")]
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5) or difflib.get_close_matches(
        path.name + ".yaml", beside, n=1, cutoff=0.5
    )
    return f"did you mean '{path.parent / close[0]}'?" if close else "see `prunekit list pipelines`"
