"""Records all that plugins implement and name, so that a change of it is a diff that somebody reads.

    python tests/hook_snapshot.py            # after a change: count up SPEC_VERSION in prunekit/hookspecs.py first

A minor version adds; a major one takes away or changes, after a minor one has marked it as deprecated.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from pathlib import Path
from typing import Any

import pluggy

from prunekit import hookspecs, records
from prunekit.strategy import decisions, declare, decoder_requests, inputs, options, sites, tower_requests

FILE = Path(__file__).with_name("hookspecs.json")
GROUPS = (
    hookspecs.TokenHooks, hookspecs.ImageHooks, hookspecs.LayerHooks, hookspecs.RouterHooks, hookspecs.StatementHooks,
    hookspecs.HostHooks, hookspecs.ObserverHooks,
)  # fmt: skip
# What hooks return, request and are told, by their fields.
CLASSES = (
    decisions.Selection, decisions.Owners, decisions.Route, decisions.LayerPlan, decisions.ModelShape, sites.Sites,
    decoder_requests.Rows, decoder_requests.Keys, decoder_requests.Values, tower_requests.EncoderRows,
    tower_requests.EncoderKeys, tower_requests.EncoderValues, tower_requests.EncoderQueries, tower_requests.Features,
    records.StageEvent, records.RunReport,
)  # fmt: skip


def now() -> dict[str, Any]:
    """Everything of today."""
    return {
        "version": list(hookspecs.SPEC_VERSION),
        "hooks": {f"{group.__name__}.{name}": hook for group in GROUPS for name, hook in _hooks(group).items()},
        "inputs": {f"{one.name} of {', '.join(one.hooks)}": _input(one) for one in inputs.INPUTS},
        "strategy": _fields(declare.Declaration),
        "stage keys": list(options.STAGE_KEYS),
        "layer actions": [one.name for one in decisions.LayerAction],
        "classes": {one.__name__: _fields(one) for one in CLASSES},
    }


def _hooks(group: type[Any]) -> dict[str, Any]:
    manager = pluggy.PluginManager("prunekit")
    manager.add_hookspecs(group)
    found = {}
    for name, caller in vars(manager.hook).items():
        spec = caller.spec
        found[name] = {
            "arguments": list(spec.argnames),
            "stops at the first result": bool(spec.opts.get("firstresult")),
            "deprecated": str(spec.warn_on_impl or ""),
            "deprecated arguments": sorted(spec.warn_on_impl_args or {}),
        }
    return found


def _input(one: inputs.Input) -> dict[str, Any]:
    return {
        "is": one.shape, "where": list(one.regions), "request": one.request.__name__ if one.request else "",
        "deprecated": one.deprecated,
    }  # fmt: skip


def _fields(cls: type[Any]) -> dict[str, str]:
    """Names of fields, with their defaults; `...` for one without."""
    return {one.name: _default(one) for one in dataclasses.fields(cls)}


def _default(one: dataclasses.Field[Any]) -> str:
    if one.default_factory is not dataclasses.MISSING:
        return repr(one.default_factory())
    if one.default is dataclasses.MISSING:
        return "..."
    return str(one.default) if isinstance(one.default, enum.Enum) else repr(one.default)


def changes(old: Any, new: Any, path: str = "") -> list[str]:
    """What is another, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f"{path}{name}: gone" for name in old if name not in new]
        found += [f"{path}{name}: new" for name in new if name not in old]
        both = [name for name in old if name in new]
        return found + [line for name in both for line in changes(old[name], new[name], f"{path}{name} > ")]
    return [] if old == new else [f"{path.removesuffix(' > ')}: was {old}, is {new}"]


def recorded() -> dict[str, Any]:
    """What is in the file."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Write the file. Refuses where something is another under the same version."""
    new = now()
    if FILE.exists():
        old = recorded()
        lines = [line for line in changes(old, new) if not line.startswith("version")]
        print("\n".join(lines) or "nothing has changed")
        if lines and new["version"] <= old["version"]:
            sys.exit("count up SPEC_VERSION in prunekit/hookspecs.py: minor for what is new, major for the rest")
    FILE.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
