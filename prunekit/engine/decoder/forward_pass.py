"""What the layers of one forward pass of the decoder share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from prunekit.engine.decoder.mid import MidCuts
from prunekit.engine.decoder.state import BatchState
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.layout import Layout
from prunekit.engine.tokens.positions import Rotations
from prunekit.strategy.decisions import LayerAction


@dataclass(eq=False)
class ForwardPass(ABC):
    """One forward pass of the decoder: the prefill of a prompt batch, or new tokens on its cache.

    tokens: logical tokens that pass. kind: of the attention masks.
    left_out: the part of the running layer that does not run, SKIP_ATTENTION or SKIP_MLP; None: both run.
    mid: the cuts inside the running layer; None: there are none.
    passing: layers with which nothing is to be done but run them.
    layouts: in a prefill, the tokens that entered each layer so far, None: all. writers: as in `Handed`.
    """

    state: BatchState
    tokens: int
    kind: masks.Kind
    rotations: Rotations = field(default_factory=Rotations)
    left_out: LayerAction | None = None
    mid: MidCuts | None = None
    passing: Set[int] = frozenset()
    layouts: dict[int, Layout | None] = field(default_factory=dict)
    writers: dict[Any, int] = field(default_factory=dict)
    _memo: dict[tuple[int, ...], tuple[Any, object]] = field(default_factory=dict)

    is_prefill: ClassVar[bool]

    @abstractmethod
    def run_layer(self, number: int, original: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """Do what was decided for layer `number`: cut tokens around it, skip it, or run it on what is alive.

        kwargs: the arguments of its call, a dict of this call's own.
        """

    @property
    def gives_positions(self) -> bool:
        """Whether layers are given position ids with the gaps that cuts leave.

        With a batch of one, flash kernels take ids with gaps for packed sequences, whose borders they look for at the
        lowest id, or in older transformers at id 0, which may have been dropped. So they get none where the layers
        themselves rotate by `position_embeddings` alone.
        """
        return self.kind != "flat" or self.state.parts.reads_positions

    def localised(self, layout: Layout | None, kwargs: Mapping[str, Any]) -> Layout | None:
        """The layout with what its rotary positions moved by, where the pipeline renumbers positions.

        Some decoders have layers that rotate nothing among others.
        """
        rotary = kwargs.get("position_embeddings")
        if layout is None or self.state.bound.positions == "keep" or rotary is None:
            return layout
        shifted: Layout = self.once((layout, rotary, "shift"), lambda: self.rotations.shifted(rotary, layout))
        return shifted

    def once(self, of: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Layers that share a layout share its masks and rotations.

        Objects are told apart by identity, and kept beside the result: the address of a lost one is given out anew.
        """
        key = tuple(map(id, of))
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = make(), of
        return found[0]


@dataclass(frozen=True, repr=False)
class Here:
    """Where in a forward pass a cut is made: before, inside or after decoder layer `number`.

    kwargs: the arguments of that layer's call, logical.
    """

    forward_pass: ForwardPass
    number: int
    kwargs: Mapping[str, Any]


# The pass that runs in this thread. A field of what is attached to the model could not hold it: several threads may
# call one attached model at once.
CURRENT: ContextVar[ForwardPass | None] = ContextVar("prunekit_forward_pass", default=None)
