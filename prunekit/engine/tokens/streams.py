"""Hidden states of several streams: some decoders give their layers (streams, B, K, H), where others give (B, K, H).

Inside the engine batch and tokens come first, (B, K, streams, H), so that whatever is done to tokens is done to all of
their streams.
"""

from __future__ import annotations

from torch import Tensor


def tokens_first(hidden: Tensor) -> Tensor:
    """What a layer takes and gives, as the engine has it."""
    return hidden.movedim(0, 2) if hidden.ndim == 4 else hidden


def as_layers_take(hidden: Tensor) -> Tensor:
    """What the engine has, as a layer takes it."""
    return hidden.movedim(2, 0) if hidden.ndim == 4 else hidden


def main_stream(hidden: Tensor, stream: int | None) -> Tensor:
    """The stream, (B, K, H), that strategies see, with its number; None: there is one."""
    return hidden if hidden.ndim == 3 or stream is None else hidden[:, :, stream]
