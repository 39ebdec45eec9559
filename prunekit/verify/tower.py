"""The part of the masked reference that lies inside a vision tower: dropped patches are masked in later blocks.

A visual token leaves with its patches. What a dropped patch has become in the end never reaches the decoder: its visual
token is masked there from the first layer on. Patches of which no visual token is made stay.

Shape letters: V visual tokens, p patches that become one visual token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prunekit.families import find
from prunekit.strategy.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.records import RunReport, StageEvent


@contextmanager
def tower_cuts(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], report: RunReport, visual: Sequence[Tensor]
) -> Iterator[None]:
    """While open, the tower of `model` replays the events of `report` that lie inside it.

    visual: slots of the visual tokens of each row. Raises ValueError for prompts with videos, and for families that
    declare no tower.
    """
    events = {n: event for n, event in enumerate(report.events) if Site.parse(event.site).place == "vision"}
    with ExitStack() as stack:
        if events:
            tower: Any = find(model).tower
            if tower is None or "pixel_values_videos" in inputs:
                raise ValueError("the masked reference cuts towers of families that declare one, and for images only")
            packed = stack.enter_context(_packed(tower))
            for number, block in enumerate(tower.layers):
                # Dropped patches still are seen in block 3 by `vision.3.mid` and `vision.3` alike.
                earlier = [event for event in events.values() if int(Site.parse(event.site).layer or 0) < number]
                attention = getattr(block, tower.attention)
                hook = _masking(tower, inputs, earlier, visual, packed)
                stack.callback(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _masking(
    tower: Any, inputs: Mapping[str, Tensor], events: Sequence[StageEvent], visual: Sequence[Tensor], packed: Packed
) -> Any:
    """A hook that masks in one attention what `events` have dropped."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        state = args[0] if args else kwargs["hidden_states"]
        bare = state.ndim == 2  # all images as one sequence, and no mask at all
        rows, length = (1, state.shape[0]) if bare else state.shape[:2]
        patches = length - tower.leading
        bias = torch.zeros(rows, length, dtype=state.dtype, device=state.device)
        groups = _patch_groups(tower, inputs, rows, patches)
        for event in events:
            bias[:, tower.leading :] += _bias(event, groups, visual, rows * patches).view(rows, patches).to(bias)
        if bare:
            packed[module] = bias[0]
            return args, kwargs
        columns = bias[:, None, None, :].expand(-1, 1, length, -1)
        if len(args) > 1:
            return (state, _both(args[1], columns), *args[2:]), kwargs
        return args, kwargs | {"attention_mask": _both(kwargs.get("attention_mask"), columns)}

    return hook


# What is still to be added to the logits of each patch in the attentions of a packed tower, in the order of its chunks.
Packed = dict[nn.Module, Tensor]
KERNEL = "prunekit-reference"


@contextmanager
def _packed(tower: Any) -> Iterator[Packed]:
    """While open, a tower without masks attends by a plain kernel that adds what the dictionary holds."""
    waiting: Packed = {}

    def kernel(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        columns: Tensor = attention_mask
        if module in waiting:
            many = key.shape[2]
            columns, waiting[module] = waiting[module][:many], waiting[module][many:]
        logits = query @ key.transpose(2, 3) * scaling + columns.clamp(min=torch.finfo(columns.dtype).min)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    config = getattr(getattr(tower.layers[0], tower.attention), "config", None)
    if not tower.packed or config is None:
        yield waiting
        return
    before = config._attn_implementation
    AttentionInterface.register(KERNEL, kernel)
    config._attn_implementation = KERNEL
    try:
        yield waiting
    finally:
        config._attn_implementation = before
        del AttentionInterface._global_mapping[KERNEL]


def _both(mask: Tensor | None, columns: Tensor) -> Tensor:
    """The tower's own mask and ours as one that is added."""
    if mask is not None:
        own = torch.zeros_like(columns).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        columns = columns + own
    return columns.clamp(min=torch.finfo(columns.dtype).min)


def _patch_groups(tower: Any, inputs: Mapping[str, Tensor], rows: int, patches: int) -> Tensor:
    """The patches of every visual token of the batch in the order of the prompts, int64 (V, p); -1 stands for none."""
    if tower.patch_groups is None:
        return torch.arange(rows * patches)[:, None]
    return torch.cat(list(tower.patch_groups("image", inputs, rows, patches)))


def _bias(event: StageEvent, groups: Tensor, visual: Sequence[Tensor], patches: int) -> Tensor:
    """What one event adds to the logits of each patch, float64: -inf if dropped, else the log of its new size."""
    bias = torch.zeros(patches, dtype=torch.float64)
    first = 0
    for row, slots in enumerate(visual):
        mine = groups[first : first + len(slots)]
        kept = torch.zeros(len(slots), dtype=torch.bool)
        kept[list(event.kept[row])] = True
        stay = mine[kept].flatten()
        gone = mine[~kept].flatten()
        bias[gone[(gone >= 0) & ~torch.isin(gone, stay)]] = -torch.inf
        if event.sizes is not None:
            sizes = torch.tensor(event.sizes[row], dtype=bias.dtype)[:, None].expand(-1, mine.shape[1]).flatten()
            bias[stay] = sizes.log()
        first += len(slots)
    if first != len(groups):
        raise ValueError(f"the prompts have {first} visual tokens, the tower makes {len(groups)}")
    return bias
