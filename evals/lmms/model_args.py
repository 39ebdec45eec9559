"""Values of `--model_args`, which lmms-eval hands on as text, numbers or booleans, whatever they look like."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from prunekit.errors import InputError

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def texts(**values: object) -> None:
    """Raise InputError for what lmms-eval read as true or false."""
    for name, value in values.items():
        if isinstance(value, bool):
            raise InputError(f"{name} must be text, not '{value}'")


def flag(name: str, value: object) -> bool:
    """Yes or no. Raises InputError for anything else."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise InputError(f"{name} must be true or false, not '{value}'")
    return words[str(value).lower()]


def device_map(text: str | Mapping[str, Any], device: str) -> str | Mapping[str, Any] | None:
    """A device map as transformers takes it. Raises InputError for what is none, or stands beside what excludes it."""
    if text in ("", "none"):
        return None
    if device:
        raise InputError(f"device={device} and device_map exclude one another; a device map says where parts are")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("device_map is for one process; of several each has its own device (leave it out)")
    if isinstance(text, str) and text.startswith("{"):
        try:
            text = json.loads(text)
        except ValueError as error:
            raise InputError(f"device_map is no JSON mapping: {error}") from error
    elif text not in MAPS:
        raise InputError(f"device_map={text!r} is not one of {', '.join(MAPS)}, nor a mapping as JSON text")
    return text


def number(name: str, value: object) -> float:
    """A number. Raises InputError for what is none."""
    try:
        return float(str(value))
    except ValueError:
        raise InputError(f"{name} must be a number, not '{value}'") from None


def count(name: str, value: object) -> int:
    """A whole number of at least 1. Raises InputError for anything else."""
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"{name} must be a whole number of at least 1, not '{value}' (it is part of a result)")
    return number
