"""Options that commands share, and bare `key=value` arguments: overrides of their pipelines, as with --set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def add_common(command: argparse.ArgumentParser, model: bool = False) -> None:
    """Options that commands on a pipeline share; `model`: whether --model must be given."""
    command.add_argument(
        "--model", metavar="M", required=model, help="a short name such as micro, a model folder or a hub id"
    )
    command.add_argument("--download", action="store_true", help="a model that is not here may be fetched from the hub")
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="change one value, such as stages[0].keep=0.3; may be repeated; a bare KEY=VALUE does the same",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="machine-readable on stdout; messages stay on stderr")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def add_loading(command: argparse.ArgumentParser) -> None:
    """Options that say how a model is loaded."""
    command.add_argument("--dtype", metavar="T", help="of the model: float32, bfloat16; default: float32 on the CPU")
    command.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    command.add_argument("--attn", metavar="A", help="attention implementation of the model: sdpa, eager")


def load(namespace: argparse.Namespace, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """The model of --model as `add_loading` says, and its processor, without transformers' progress bars and advice.

    device: goes before --device; None: that. Raises InputError as `prunekit.loading.load`.
    """
    from transformers.utils import logging as transformers_logging

    from prunekit import loading

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return loading.load(
        namespace.model, namespace.dtype, device or namespace.device, namespace.attn, namespace.download
    )


def add_data(command: argparse.ArgumentParser) -> None:
    """The prompts that a command runs on."""
    command.add_argument("--data", required=True, metavar="D", help="a registered source, or a .jsonl file with images")


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
