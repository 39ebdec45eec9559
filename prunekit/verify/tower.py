"""The part of the masked reference that lies inside a vision tower: dropped patches are masked in later blocks.

A visual token leaves with its patches. What a dropped patch has become in the end never reaches the decoder: its visual
token is masked there from the first layer on. Patches of which no visual token is made stay. A merge sums visual tokens
of one image patch by patch: their first patches with each other, their second ones, and so on. Patches that leave
before the tower are masked in all of its blocks; of an image that was made smaller the stock model encodes the smaller
one, and its features are put where the report says that their tokens stand.

Shape letters: V visual tokens of all prompts, p patches that become one visual token, W width of the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from prunekit.families import find
from prunekit.families.images import PIXELS
from prunekit.families.tower_parts import Tower
from prunekit.records import RunReport, StageEvent
from prunekit.strategy.sites import Site
from prunekit.upstream import Encoder
from prunekit.verify.muting import without


@contextmanager
def tower_cuts(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    report: RunReport,
    visual: Sequence[Tensor],
    merges: Mapping[int, Sequence[Tensor]],
) -> Iterator[None]:
    """While open, the tower of `model` replays the events of `report` that lie inside it.

    visual: slots of the visual tokens of each row. merges: of events in the tower, by number, for each image float
    (entered, entered): row i says how the tokens that entered are summed into token i, if that is kept.
    Raises ValueError for prompts with images and videos, and for families that declare no tower.
    """
    events = {n: event for n, event in enumerate(report.events) if Site.parse(event.site).in_tower}
    resizing = next((event for event in events.values() if event.resized is not None), None)
    cuts = {n: event for n, event in events.items() if event is not resizing}
    with ExitStack() as stack:
        if not events:
            yield
            return
        tower = find(model).tower
        if tower is None or {"pixel_values", "pixel_values_videos"} <= inputs.keys():
            raise ValueError(
                "the masked reference cuts towers of families that declare one, of images or of videos, not of both"
            )
        counts, places = tuple(map(len, visual)), torch.ones(sum(map(len, visual)), dtype=torch.bool)
        if resizing is not None:
            places = _kept(resizing, counts)
            inputs = stack.enter_context(smaller_images(model, inputs, resizing, places))
        if cuts:
            packed = stack.enter_context(_packed(tower))
            replay = _Replay(tower, inputs, counts, places, cuts, merges, packed)
            for number, block in enumerate(tower.layers):
                replay.install(number, block, stack)
        yield


@contextmanager
def smaller_images(
    model: Any, inputs: Mapping[str, Tensor], event: StageEvent, places: Tensor
) -> Iterator[Mapping[str, Tensor]]:
    """While open, the stock model encodes its images as small as `event` says; gives `inputs` with the smaller ones.

    places: bool, of the visual tokens of all prompts those in whose places the smaller images' tokens stand.
    """
    holder = find(model).tower.images  # type: ignore[union-attr]
    assert holder is not None and event.resized is not None
    sizes = iter([size for row in event.resized for size in row])
    images = holder.unpack(kind := _kind(inputs), inputs)
    # Entries of rows without images are zeros, which no report tells of.
    small = [_at_size(image, next(sizes)) if bool(image.any()) else image for image in images]
    if holder.cell is None:  # seen through fewer pixels, but at the size that the tower takes
        small = [_at_size(one, tuple(image.shape[-2:])) for one, image in zip(small, images, strict=True)]
    shown = holder.pack(kind, inputs, small)
    base, method = model.model, f"get_{kind}_features"
    original = getattr(base, method)
    names = [name for name in inputs if shown[name] is not inputs[name]]

    encoder = Encoder(original, PIXELS[kind])

    def encode(*args: Any, **kwargs: Any) -> Any:
        output = encoder(encoder.arguments(args, kwargs) | {name: shown[name] for name in names})
        if holder.cell is not None:
            output.pooler_output = [_in_places(list(output.pooler_output), places)]
            if (stacks := getattr(output, "deepstack_features", None)) is not None:
                output.deepstack_features = [[_in_places(list(features), places)] for features in stacks]
        return output

    base.__dict__[method] = encode
    try:
        yield shown
    finally:
        del base.__dict__[method]


def _at_size(image: Tensor, size: Sequence[int]) -> Tensor:
    """Float (..., H, W) at another size, by the matrices of the two axes."""
    down, across = (_averages(many, few).to(image) for many, few in zip(image.shape[-2:], size, strict=True))
    return down @ image @ across.T


def _averages(many: int, few: int) -> Tensor:
    """How `many` pixels in a line become `few`, float64 (few, many): by a triangle as wide as the pixels it covers."""
    width = max(many / few, 1.0)
    middles = (torch.arange(few, dtype=torch.float64)[:, None] + 0.5) * many / few
    distance = (torch.arange(many, dtype=torch.float64) + 0.5 - middles).abs() / width
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _in_places(features: Sequence[Tensor], places: Tensor) -> Tensor:
    """The features of all images, in order, in those places of all visual tokens; zeros elsewhere."""
    found = torch.cat(list(features))
    every = found.new_zeros(len(places), found.shape[-1])
    every[places] = found
    return every


def _kept(event: StageEvent, counts: Sequence[int]) -> Tensor:
    """Visual tokens of all prompts that an event keeps, bool (V,)."""
    kept = [torch.zeros(count, dtype=torch.bool) for count in counts]
    for row, numbers in zip(kept, event.kept, strict=True):
        row[list(numbers)] = True
    return torch.cat(kept)


@dataclass(frozen=True)
class _Replay:
    """What the hooks on one tower do. counts: visual tokens of each prompt. places: of all of them, those of the images
    that the tower gets, bool. muted: parts of blocks that add nothing.
    """

    tower: Tower
    inputs: Mapping[str, Tensor]
    counts: tuple[int, ...]
    places: Tensor
    events: Mapping[int, StageEvent]
    merges: Mapping[int, Sequence[Tensor]]
    packed: Packed
    muted: set[str] = field(default_factory=set)

    def install(self, number: int, block: nn.Module, stack: ExitStack) -> None:
        """Put hooks on one block, until `stack` is closed."""
        attention, mlp = getattr(block, self.tower.attention), getattr(block, self.tower.mlp)
        stack.callback(attention.register_forward_pre_hook(self._masking(number), with_kwargs=True).remove)
        if any(_site(self.events[event]).layer == number for event in self.merges):
            stack.callback(attention.register_forward_hook(self._mutable("attention")).remove)
            stack.callback(mlp.register_forward_hook(self._mutable("mlp")).remove)
            # Not a hook: transformers notes the states of blocks before hooks see them.
            block.__dict__["forward"] = self._merging(number, block.forward)
            stack.callback(block.__dict__.pop, "forward")

    def _masking(self, number: int) -> Callable[..., Any]:
        """A hook that masks in one attention what earlier blocks have dropped."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            state = args[0] if args else kwargs["hidden_states"]
            bare = state.ndim == 2  # all images as one sequence, and no mask at all
            rows, length = (1, state.shape[0]) if bare else state.shape[:2]
            patches = length - self.tower.leading
            bias = torch.zeros(rows, length, dtype=state.dtype, device=state.device)
            bias[:, self.tower.leading :] = self._bias(number, rows, patches).view(rows, patches).to(bias)
            if bare:
                self.packed[module] = bias[0]
                return args, kwargs
            columns = bias[:, None, None, :].expand(-1, 1, length, -1)
            if len(args) > 1:
                return (state, _both(args[1], columns), *args[2:]), kwargs
            return args, kwargs | {"attention_mask": _both(kwargs.get("attention_mask"), columns)}

        return hook

    def _bias(self, number: int, rows: int, patches: int) -> Tensor:
        """What is added to the logits of each patch in a block, float64: -inf if dropped, else the log of its size."""
        groups = torch.cat(self._groups(rows, patches))
        size = torch.ones(rows * patches, dtype=torch.float64)
        dropped = torch.zeros(rows * patches, dtype=torch.bool)
        for event in self.events.values():
            # Dropped patches still are seen in block 3 by `vision.3.mid` and `vision.3` alike.
            if _block(event) >= number:
                continue
            kept = self._kept(event)
            stay, gone = groups[kept], groups[~kept]
            dropped[gone[(gone >= 0) & ~torch.isin(gone, stay)]] = True
            if event.sizes is not None:
                values = torch.tensor([one for row in event.sizes for one in row], dtype=size.dtype)
                size[stay[stay >= 0]] = values[:, None].expand_as(stay)[stay >= 0]
        return size.log().masked_fill(dropped, -torch.inf)

    def _merging(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a block, with what is merged inside and behind it."""
        here = [event for event in self.merges if _site(self.events[event]).layer == number]
        inside = [event for event in here if _site(self.events[event]).point == "mid"]
        behind = [event for event in here if event not in inside]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not inside:
                result = original(*args, **kwargs)
            else:
                # The block once without its MLP, then the merge, then once without its attention.
                with without(self.muted, "mlp"):
                    state = self._merged(inside, _first(original(*args, **kwargs)))
                if args:
                    args = (state, *args[1:])
                else:
                    kwargs["hidden_states"] = state
                with without(self.muted, "attention"):
                    result = original(*args, **kwargs)
            output = self._merged(behind, _first(result))
            return (output, *result[1:]) if isinstance(result, tuple) else output

        return forward

    def _merged(self, numbers: Sequence[int], state: Tensor) -> Tensor:
        """The states of a block, float (rows, tokens, W) or (tokens, W), after these events have merged."""
        rows, length = (1, state.shape[0]) if state.ndim == 2 else state.shape[:2]
        whole = state.reshape(rows, length, -1).clone()
        groups = self._groups(rows, length - self.tower.leading)
        for number in numbers:
            flat = whole[:, self.tower.leading :].flatten(0, 1).clone()  # of one row it would be a part of `whole`
            alive, kept = self._before(number), self._kept(self.events[number])
            sizes = list(map(len, groups))
            decided = zip(torch.split(alive, sizes), torch.split(kept, sizes), strict=True)
            for table, (entered, stay), weights in zip(groups, decided, self.merges[number], strict=True):
                entered = entered & (table >= 0).all(-1)
                cells, chosen = table[entered], stay[entered]
                sums = weights[chosen].to(flat.dtype) @ flat[cells].flatten(1)
                flat[cells[chosen]] = sums.view(*cells[chosen].shape, flat.shape[-1])
            whole[:, self.tower.leading :] = flat.view(rows, -1, flat.shape[-1])
        return whole.view_as(state)

    def _before(self, number: int) -> Tensor:
        """Visual tokens that enter an event, bool (V,)."""
        earlier = [event for other, event in self.events.items() if other < number]
        return self._kept(earlier[-1]) if earlier else torch.ones(int(self.places.sum()), dtype=torch.bool)

    def _kept(self, event: StageEvent) -> Tensor:
        """Visual tokens of the images that the tower gets that an event keeps, bool (V,)."""
        return _kept(event, self.counts)[self.places]

    def _groups(self, rows: int, patches: int) -> list[Tensor]:
        """For each image of the prompts the patches of its visual tokens, int64 (tokens, p); -1 stands for none."""
        if self.tower.patch_groups is None:
            return list(torch.arange(rows * patches).view(rows, patches, 1))
        tables = list(self.tower.patch_groups(_kind(self.inputs), self.inputs, rows, patches))
        if (made := sum(map(len, tables))) != int(self.places.sum()):
            raise ValueError(f"the prompts have {int(self.places.sum())} visual tokens, the tower makes {made}")
        return tables

    def _mutable(self, part: str) -> Callable[..., Any]:
        """A hook on attention or MLP, which then adds nothing to the residual while it is muted."""

        def hook(_: nn.Module, args: Any, result: Any) -> Any:
            if part not in self.muted:
                return result
            zeros = torch.zeros_like(_first(result))
            return (zeros, *result[1:]) if isinstance(result, tuple) else zeros

        return hook


def _site(event: StageEvent) -> Site:
    return Site.parse(event.site)


def _kind(inputs: Mapping[str, Tensor]) -> str:
    return "video" if "pixel_values_videos" in inputs else "image"


def _block(event: StageEvent) -> int:
    """The block in or behind which tokens leave; -1: before all."""
    layer = _site(event).layer
    return -1 if layer is None else layer


def _first(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


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
