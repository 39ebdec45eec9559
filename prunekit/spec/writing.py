"""Data as YAML that the reader of pipeline files reads back as the same data."""

from __future__ import annotations

from typing import Any

import yaml

from prunekit.spec import places


def to_yaml(data: dict[str, Any]) -> str:
    """YAML of plain data, keys in their order. Text that looks like something else is quoted, `${` in it escaped."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer follows YAML 1.1, where `1e3` and `08` are text."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = isinstance(places.scalar(value), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", places.escape(value), style=None if plain else "'")


_Dumper.add_representer(str, _text)
