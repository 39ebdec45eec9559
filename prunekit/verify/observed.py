"""What only a running model shows: which states its decoder loop changes, and what its prompts hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunekit.families.base import Modality, Parts
from prunekit.families.decoders import NotPlain, at_input_only
from prunekit.families.generic import no_coords
from prunekit.verify.precision import Float64Throughout


@dataclass(frozen=True)
class Observed:
    """What only a running model shows: see `Parts.logical_until`, `Parts.opaque`; whether layers can be cut inside.

    kinds: the visual inputs that its prompts held, `image`, `video`. shared_id: videos stand behind the id of images.
    coords: visual tokens are where the config lets expect them; of videos as far as of images.
    """

    logical_until: int = 0
    opaque: str | None = None
    cuts_inside: bool = True
    kinds: tuple[str, ...] = ("image", "video")
    shared_id: bool = False
    coords: bool = False

    def added_to(self, parts: Parts, recognised: bool = True) -> Parts:
        """The parts of a model, with what was observed of its decoder, but for what a family's file states.

        recognised: it has no family's file, so that its visual inputs are those that were observed, and no others.
        """
        if recognised:
            parts = replace(parts, modalities=self._seen(parts))
        if parts.opaque is not None:
            return parts
        if self.opaque is not None:
            kept = {name: getattr(parts, name) for name in ("family", "base", "modalities", "visual_tokens", "tower")}
            return Parts(**kept, **at_input_only(parts.text, self.opaque))
        until = max(parts.logical_until, self.logical_until)
        return replace(parts, logical_until=until, mlp_norm=parts.mlp_norm if self.cuts_inside else None)

    def _seen(self, parts: Parts) -> tuple[Modality, ...]:
        ids = parts.modalities[0].token_ids
        kept = [one for one in parts.modalities if one.name in self.kinds]
        if not self.coords:
            kept = [replace(one, coords=no_coords) for one in kept]
        return tuple(replace(one, token_ids=ids) if self.shared_id else one for one in kept)


@dataclass
class _Loop:
    """One prefill: what entered and left each layer that ran."""

    entered: list[Tensor]
    returned: list[Any]


@torch.no_grad()
def observe(twin: Any, parts: Parts, inputs: Mapping[str, Tensor]) -> Observed:
    """Record the decoder loop during one prefill: which states it changes between layers.

    A decoder whose loop no declaration of parts can express is cut at its input only.
    """
    if parts.opaque is not None:
        return Observed(cuts_inside=False)
    # In the arithmetic of the proof: kernels that round differently would look like a change of the states.
    with _recorded(parts.layers) as loop, Float64Throughout():
        twin(**inputs)
    try:
        return Observed(_changed_until(loop, parts))
    except NotPlain as other:
        return Observed(opaque=other.reason, cuts_inside=False)


def _changed_until(loop: _Loop, parts: Parts) -> int:
    """As `Parts.logical_until`. Raises NotPlain for a loop that no layer can be cut in."""
    text, layers = parts.text, parts.layers
    if len(loop.entered) != len(layers):
        raise NotPlain(text, f"its decoder called {len(loop.entered)} layers of {len(layers)} in one forward")
    if not all(isinstance(out, Tensor) for out in loop.returned):
        raise NotPlain(text, "its decoder layers return more than the hidden states")
    # Padding may hold NaN, which no token sees.
    same = [
        torch.equal(out.nan_to_num(), into.nan_to_num())
        for out, into in zip(loop.returned, loop.entered[1:], strict=False)
    ]
    touched = [number for number, unchanged in enumerate(same) if not unchanged]
    if touched and touched[-1] == len(layers) - 2:
        raise NotPlain(text, "its decoder changes hidden states between all layers")
    return touched[-1] + 1 if touched else 0


@contextmanager
def _recorded(layers: Sequence[Any]) -> Iterator[_Loop]:
    loop = _Loop([], [])

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loop.entered.append(args[0])

    def after(_: Any, args: Any, kwargs: Any, result: Any) -> None:
        loop.returned.append(result)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    try:
        yield loop
    finally:
        for handle in handles:
            handle.remove()
