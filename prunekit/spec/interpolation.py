"""`${...}` in a pipeline, resolved by OmegaConf; every fault is told, at the place of its `${...}`.

https://omegaconf.readthedocs.io/en/latest/usage.html#variable-interpolation

OmegaConf stops at the first fault, and resolves what a text refers to anew each time, so that thirty lines can ask for
more text than a machine holds. Here a text is resolved once all that it refers to is, and then written back as plain
data: until then OmegaConf sees in its place an interpolation that nobody can resolve.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prunekit.errors import Fault, did_you_mean
from prunekit.spec.places import Node, escaped, join
from prunekit.spec.python_data import from_data

MAX_TEXTS = 250  # texts with `${...}` in one pipeline
MAX_TEXT = 1000  # characters of such a text
MAX_REFERENCES = 32  # `${` in it
MAX_CHAIN = 16  # texts that lead from one to the next
MAX_RESOLVED = 1 << 16  # characters of all that they resolve to

WAITING, FAILED = "_waiting_in_prunekit_", "_failed_in_prunekit_"  # as resolvers, which nobody registers
OWN_RESOLVERS = ("oc.env", "oc.select", "oc.decode", "oc.create", "oc.dict.keys", "oc.dict.values")
LITERAL = "write \\${ for the characters themselves"

Steps = tuple[str | int, ...]


@dataclass(frozen=True)
class Resolution:
    """What became of values that are not simply written in the file, by key path.

    unread: those that could not be read. texts: of each value that `${...}` gave, the text that gave it.
    """

    unread: frozenset[str] = frozenset()
    texts: Mapping[str, str] = field(default_factory=dict)

    def judge(self, faults: Iterable[Fault]) -> list[Fault]:
        """The faults, but for those of values that could not be read, which are told already.

        A fault of a value that `${...}` gave says so.
        """
        return [self._with_origin(fault) for fault in faults if fault.key not in self.unread]

    def _with_origin(self, fault: Fault) -> Fault:
        if fault.key not in self.texts:
            return fault
        text = self.texts[fault.key]
        if "${oc.env:" in text:
            return replace(fault, hint=f"it comes from '{text}', which is text; ${{oc.decode:{text}}} reads it as YAML")
        return replace(fault, hint="; ".join(part for part in (fault.hint, f"it comes from '{text}'") if part))


def resolve(tree: Node, faults: list[Fault]) -> tuple[Node, Resolution]:
    """The tree with the value of every `${...}`. Adds what is wrong to `faults`, which holds what is wrong already.

    A text that refers to a value with a fault adds nothing: it has no fault of its own.
    """
    unread = frozenset(fault.key for fault in faults if fault.key)
    texts = [(steps, node) for steps, node in _walk(tree, (), faults) if _is_text(node)]
    if not texts:
        return tree, Resolution(unread)
    resolver = _Resolver(tree, texts, unread, faults)
    resolver.run()
    origins = {key_path(steps): str(node.data) for steps, node in texts if steps in resolver.values}
    return _replaced(tree, (), resolver.values), Resolution(unread | {*map(key_path, resolver.failed)}, origins)


def key_path(steps: Steps) -> str:
    """`stages[0].keep` for its steps."""
    path = ""
    for step in steps:
        path = join(path, step)
    return path


class _Resolver:
    """values: of the texts that are resolved, by their steps. failed: steps of those that have no value.

    nodes: everything in the tree, resolved as far as it is by now, by key path.
    """

    def __init__(
        self, tree: Node, texts: list[tuple[Steps, Node]], unread: frozenset[str], faults: list[Fault]
    ) -> None:
        from omegaconf import OmegaConf

        self.root = OmegaConf.create(_hidden(tree, "", unread))
        self.waiting = texts
        self.faults = faults
        self.nodes = {key_path(steps): node for steps, node in _walk(tree, (), []) if steps}
        self.values: dict[Steps, Node] = {}
        self.failed: list[Steps] = []
        self.room = MAX_RESOLVED

    def run(self) -> None:
        self._refuse_many()
        for _ in range(MAX_CHAIN):
            before = len(self.waiting)
            self.waiting = [(steps, node) for steps, node in self.waiting if not self._settled(steps, node)]
            if len(self.waiting) == before:
                message, hint = "leads back to itself, in a cycle", "break the cycle"
                break
        else:
            message, hint = f"leads through more than {MAX_CHAIN} other texts", "refer to the value itself"
        for steps, node in self.waiting:
            self._fail(steps, node, message, hint)

    def _refuse_many(self) -> None:
        if len(self.waiting) > MAX_TEXTS:
            steps, node = self.waiting[MAX_TEXTS]
            self._fail(steps, node, f"is one of more than {MAX_TEXTS} texts with ${{...}}", "write values out")
            self.room = -1
        for steps, node in self.waiting:
            text = str(node.data)
            if len(text) > MAX_TEXT or text.count("${") > MAX_REFERENCES:
                most = f"at most {MAX_TEXT} characters and {MAX_REFERENCES} ${{...}}"
                self._fail(steps, node, f"is too long: a text with ${{...}} has {most}", LITERAL)
        self.waiting = [(steps, node) for steps, node in self.waiting if steps not in self.failed]

    def _settled(self, steps: Steps, node: Node) -> bool:
        """The text has its value now, or a fault; False while something that it refers to has neither."""
        from omegaconf import errors

        if self.room < 0:  # told once
            self.failed.append(steps)
            return True
        try:
            value = self._value(steps, str(node.data))
        except Exception as error:  # resolvers run the code of whoever registered them
            reason = str(error).partition("\n")[0]
            if WAITING in reason:
                return False
            consequence = errors.InterpolationToMissingValueError, errors.MissingMandatoryValue
            if FAILED in reason or isinstance(error, consequence):
                self._set(steps, f"${{{FAILED}:}}")
                self.failed.append(steps)
            else:
                self._fail(steps, node, *self._explained(error, reason))
            return True
        before = len(self.faults)
        result = from_data(value, key_path(steps), self.faults, node)
        self.room -= _size(result)
        if self.room < 0:
            self._fail(steps, node, f"makes all ${{...}} together longer than {MAX_RESOLVED} characters", "")
        elif len(self.faults) > before:
            self.failed.append(steps)
            self._set(steps, f"${{{FAILED}:}}")
        else:
            self.values[steps] = self.nodes[key_path(steps)] = self._with_origin(result, str(node.data))
            self._set(steps, escaped(result.plain()))
        return True

    def _value(self, steps: Steps, text: str) -> Any:
        """What OmegaConf makes of `text` at its place, as plain data. Raises what it raises."""
        from omegaconf import OmegaConf

        try:
            self._set(steps, text)
            value = self._parent(steps)[steps[-1]]
        finally:  # also, a mapping that holds this very text must not be read through it
            self._set(steps, f"${{{WAITING}:}}")
        if OmegaConf.is_config(value):
            return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        if isinstance(value, str) and (WAITING in value or FAILED in value):  # a mapping inside a text
            raise LookupError(value)
        return value

    def _with_origin(self, value: Node, text: str) -> Node:
        """The value of `text`; if it is another one as a whole, also where that is written."""
        match = re.fullmatch(r"\$\{([\w.\[\]]+)\}", text)
        origin = self.nodes.get(match[1]) if match else None
        return replace(value, written=origin.written or origin.where) if origin else value

    def _set(self, steps: Steps, value: Any) -> None:
        self._parent(steps)[steps[-1]] = value

    def _parent(self, steps: Steps) -> Any:
        container: Any = self.root
        for step in steps[:-1]:
            container = container[step]
        return container

    def _fail(self, steps: Steps, node: Node, message: str, hint: str) -> None:
        self.faults.append(Fault(node.where, key_path(steps), f"{node} {message}", hint))
        self.failed.append(steps)
        self._set(steps, f"${{{FAILED}:}}")

    def _explained(self, error: Exception, reason: str) -> tuple[str, str]:
        """What is wrong with a text, and what to do."""
        from omegaconf.errors import GrammarParseError

        if isinstance(error, RecursionError) or "RecursionError" in reason or "Recursive" in reason:
            return "leads back to itself, in a cycle, or is nested too deep", "refer to the value itself"
        if isinstance(error, GrammarParseError):
            return f"is not an interpolation: {reason}", f"close each ${{ with }}; {LITERAL}"
        if match := re.search(r"Environment variable '(.+)' not found", reason):
            name = match[1]
            return f"needs the environment variable '{name}'", f"set it, or give a default: ${{oc.env:{name},default}}"
        if match := re.search(r"(?:Interpolation|Error resolving) key '(.+)'", reason):
            hint = did_you_mean(match[1], self.nodes).strip() or "values for ${...} go under `vars`"
            return f"refers to '{match[1]}', which does not exist", hint
        if match := re.search(r"Unsupported interpolation type (\S+)", reason):
            hint = f"{did_you_mean(match[1], OWN_RESOLVERS)}resolvers of your own are registered with OmegaConf first"
            return f"needs the resolver '{match[1]}', which does not exist", hint
        return f"does not resolve: {reason.rpartition('resolving interpolation: ')[2]}", ""


def _walk(node: Node, steps: Steps, faults: list[Fault]) -> Iterator[tuple[Steps, Node]]:
    """Every node with its steps; adds to `faults` keys that look as if they were resolved."""
    yield steps, node
    if isinstance(node.data, dict):
        for key, child in node.data.items():
            if "${" in key:
                message = "${...} is resolved in values, not in keys"
                faults.append(Fault(child.key, join(key_path(steps), key), message, "write the key out"))
            yield from _walk(child, (*steps, key), faults)
    elif isinstance(node.data, list):
        for index, child in enumerate(node.data):
            yield from _walk(child, (*steps, index), faults)


def _is_text(node: Node) -> bool:
    return isinstance(node.data, str) and "${" in node.data


def _hidden(node: Node, path: str, unread: frozenset[str]) -> Any:
    """Plain data in which texts with `${...}` wait, and values that could not be read have failed."""
    if path in unread:
        return f"${{{FAILED}:}}"
    if isinstance(node.data, dict):
        return {key: _hidden(child, join(path, key), unread) for key, child in node.data.items()}
    if isinstance(node.data, list):
        return [_hidden(child, join(path, index), unread) for index, child in enumerate(node.data)]
    return f"${{{WAITING}:}}" if _is_text(node) else node.data


def _replaced(node: Node, steps: Steps, values: dict[Steps, Node]) -> Node:
    if isinstance(node.data, dict):
        data = {key: _replaced(child, (*steps, key), values) for key, child in node.data.items()}
        return Node(data, node.where, node.key)
    if isinstance(node.data, list):
        items = [_replaced(child, (*steps, index), values) for index, child in enumerate(node.data)]
        return Node(items, node.where, node.key)
    return values.get(steps, node)


def _size(node: Node) -> int:
    """Characters of a value, with sixteen for each entry of a container, which OmegaConf makes an object of."""
    if isinstance(node.data, dict):
        return sum(16 + len(key) + _size(child) for key, child in node.data.items())
    if isinstance(node.data, list):
        return sum(16 + _size(child) for child in node.data)
    return len(str(node.data))
