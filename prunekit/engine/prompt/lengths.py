"""Prompts that are too long for what a decoder counts by itself."""

from __future__ import annotations

from typing import Any

from prunekit.errors import Unsupported
from prunekit.families.base import Parts


def window_of(parts: Parts) -> int | None:
    """The smallest sliding window of the decoder's layers; None: there is none."""
    windows = [getattr(parts.mixing(number), "sliding_window", None) for number in range(len(parts.layers))]
    return min((window for window in windows if window), default=None)


def check_window(window: int | None, tokens: int, cache: Any) -> None:
    """Flash kernels count a sliding window in the tokens they get, not in those of the prompt.

    window: None: other kernels run, or no layer has one. tokens: of this call; those of `cache` come before them.
    """
    if window is None:
        return
    length = tokens + (0 if cache is None else cache.get_seq_length())
    if length > window:
        raise Unsupported(
            f"{length} tokens are more than the sliding window of {window}, which flash attention would "
            "count in kept tokens; load the model with attn_implementation='sdpa'"
        )


def check_counted(parts: Parts | None, tokens: int, cache: Any) -> None:
    """Some layers count the tokens that they get, behind those of the cache, to which they already belong.

    parts: None: nothing is pruned.
    """
    if parts is None or parts.counts_to is None:
        return
    least = parts.counts_to
    if 2 * tokens + (0 if cache is None else int(cache.get_seq_length())) >= least:
        raise Unsupported(
            f"the layers of {parts.family} count positions by themselves, which is exact for prompts of less "
            f"than {least // 2} tokens, and of less than {least} with the answer; shorten the prompt"
        )
