"""Bare `key=value` arguments of a command line: overrides of its pipelines, as with --set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence


def is_override(word: str) -> bool:
    """It has a `=`, and is neither an option, nor a file or folder, nor a pipeline as text."""
    text = word.lstrip().startswith("{") or "\n" in word
    return "=" in word and not word.startswith("-") and not text and not os.path.exists(word)


def take_overrides(namespace: argparse.Namespace, unparsed: Sequence[str]) -> list[str]:
    """Move bare overrides to those of --set, for a command that has it; returns what nobody takes.

    unparsed: what argparse left over, such as a bare argument behind an option.
    """
    if not hasattr(namespace, "overrides"):
        return list(unparsed)
    listed: Sequence[str] = getattr(namespace, "pipelines", None) or []
    namespace.overrides = [*namespace.overrides, *filter(is_override, [*listed, *unparsed])]
    if listed:
        namespace.pipelines = [word for word in listed if not is_override(word)]
    return [word for word in unparsed if not is_override(word)]
