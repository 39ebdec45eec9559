"""The part of the masked reference that lies inside a vision tower: patches that left are masked in the blocks after.

For plain towers: one row of the tower's batch is one picture, and one patch becomes one visual token. What a dropped
patch has become in the end never reaches the decoder: its visual token is masked there from the first layer on.

Shape letters: M pictures, D tokens of one picture inside the tower (with its CLS token, if any).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.families import find
from prunekit.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.report import RunReport, StageEvent


@contextmanager
def tower_cuts(model: PreTrainedModel, report: RunReport, visual: Sequence[Tensor]) -> Iterator[None]:
    """While open, the tower of `model` replays the events of `report` that lie inside it.

    visual: slots of the visual tokens of each row. Raises ValueError for events in a tower that is not plain.
    """
    events = {n: event for n, event in enumerate(report.events) if Site.parse(event.site).place == "vision"}
    with ExitStack() as stack:
        if events:
            tower: Any = find(model).tower
            if tower is None:
                raise ValueError("the report has events inside the tower, but the family declares none")
            for number, block in enumerate(tower.layers):
                here = {n: e for n, e in events.items() if _block(e) < number}
                if here:
                    handle = block.register_forward_pre_hook(_masking(here, visual, tower.leading), with_kwargs=True)
                    stack.callback(handle.remove)
        yield


def _block(event: StageEvent) -> int:
    """The last block in which the dropped patches still are seen: for `vision.3.mid` and `vision.3` it is block 3."""
    return int(Site.parse(event.site).layer or 0)


def _masking(events: Mapping[int, StageEvent], visual: Sequence[Tensor], leading: int) -> Any:
    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state = given[0]
        seen = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        each = state.shape[1] - leading
        bias = torch.zeros(state.shape[:2], dtype=state.dtype, device=state.device)
        for event in events.values():
            picture = 0
            for row, slots in enumerate(visual):
                pictures, rest = divmod(len(slots), each)
                if rest:
                    raise ValueError(f"{len(slots)} visual tokens are no whole number of pictures of {each} patches")
                keep = torch.zeros(pictures * each, dtype=torch.bool, device=state.device)
                keep[list(event.kept[row])] = True
                seen[picture : picture + pictures, leading:] &= keep.view(pictures, each)
                if event.sizes is not None:
                    sizes = torch.ones(pictures * each, dtype=state.dtype, device=state.device)
                    sizes[list(event.kept[row])] = torch.tensor(event.sizes[row], dtype=state.dtype)
                    bias[picture : picture + pictures, leading:] = sizes.view(pictures, each).log()
                picture += pictures
        columns = bias.masked_fill(~seen, torch.finfo(state.dtype).min)[:, None, None, :]
        mask = columns.expand(-1, 1, state.shape[1], -1)
        if len(given) > 1:
            return (state, mask, *given[2:]), named
        return given, named | {"attention_mask": mask}

    return hook
