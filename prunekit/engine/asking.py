"""Asking a token stage: its hooks are called with what they name, and their answers are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from prunekit.engine.tokens.merges import matrices_together
from prunekit.errors import PluginError, PrunekitError
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import Owners, Selection
from prunekit.strategy.declare import HOOKS
from prunekit.strategy.inputs import IMAGE_HOOK

# Inputs that the model does not compute: what stages said, and what the user gave.
NOT_OF_MODEL = frozenset({"sizes", "patches"})
WIDER = "load it in bfloat16 or float32"


class View(Protocol):
    """The visual tokens that reach a stage, in the decoder or in the vision tower: what asking needs to know of them.

    valid: bool (B, V), False on padding. counts: visual tokens of each sample. sizes: float (B, V), how many original
    tokens each stands for.
    """

    @property
    def valid(self) -> Tensor: ...
    @property
    def counts(self) -> tuple[int, ...]: ...
    @property
    def sizes(self) -> Tensor: ...

    def get(self, name: str) -> Any:
        """The input of hooks with this name, for the batch."""

    def of_sample(self, name: str, b: int) -> Any:
        """The same of sample b: without padding and without the batch axis."""


class Given:
    """Inputs of hooks by name: of a batch, or of one sample without the batch axis. Knows which samples are unsound:
    the model itself computed NaN or infinity for them, so that what a strategy makes of that is not its fault.

    traced: what strategies score is kept, as `scores`; None: nothing was.
    """

    def __init__(self, get: Callable[[str], Any], valid: Tensor, traced: bool = False) -> None:
        self._get, self._batched, self._device, self.traced = get, valid.ndim > 1, valid.device, traced
        self._rows = valid.shape[:1] if self._batched else valid.shape[:0]
        self._found: dict[str, Tensor] = {}
        self.scores: Tensor | None = None

    def __call__(self, name: str) -> Any:
        value = self._get(name)
        if name not in NOT_OF_MODEL and name not in self._found:
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, Tensor) and one.is_floating_point():
                    wrong = self.by_row(~torch.isfinite(one.detach())).to(self._device)
                    self._found[name] = self._found[name] | wrong if name in self._found else wrong
        return value

    def by_row(self, wrong: Tensor) -> Tensor:
        """Whether anything of a sample is wrong: bool (B,), or () of one sample."""
        return wrong.flatten(1).any(1) if self._batched else wrong.any()

    @property
    def unsound(self) -> Tensor:
        """The samples for which something that hooks were given is not finite: bool (B,), or () of one sample."""
        found = torch.zeros(self._rows, dtype=torch.bool, device=self._device)
        for wrong in self._found.values():
            found = found | wrong
        return found

    def blame(self) -> str:
        """What to add to a message where the model's own numbers are not finite. Reads them back from their device."""
        names = [name for name, wrong in self._found.items() if bool(wrong.any())]
        return f" (the model computed NaN or infinity: its {', '.join(names)}; {WIDER})" if names else ""


class Refusals:
    """What makes an answer unusable: the conditions of a stage's tensors, read back from their device all at once."""

    def __init__(self) -> None:
        self._listed: list[tuple[Tensor, str, Given | None]] = []

    def add(self, wrong: Tensor, message: str, given: Given | None = None) -> None:
        """Refuse with `message` if any entry of bool `wrong` is True, of samples that are sound by what was `given`."""
        self._listed.append((wrong.any() if given is None else given.by_row(wrong), message, given))

    def settle(self) -> None:
        """Raise PluginError with the first message whose condition holds."""
        conditions = [
            wrong if given is None else (wrong & ~given.unsound.to(wrong.device)).any()
            for wrong, _, given in self._listed
        ]
        if conditions and bool(torch.stack(conditions).any()):
            raise PluginError(next(one[1] for wrong, one in zip(conditions, self._listed, strict=True) if wrong))


@dataclass(frozen=True)
class Answer:
    """What a stage decided about the visual tokens of a `View`.

    selection: with shapes (B, V) as there. unsound: bool (B,), samples of which something that the stage was given, and
    the model computed, is NaN or infinite; None: that has been told already. scores: float (B, V), by which it decided,
    meaningless on padding; None: the strategy does not score, or nobody wants to know.
    """

    selection: Selection
    unsound: Tensor | None
    scores: Tensor | None = None


# The input `count` of sample b by its scores, float (V,); None: of all, (B, V).
ByScores = Callable[[int | None, Tensor], Any]


def decide(stage: Stage, view: View, traced: bool = False, budget: ByScores | None = None) -> Answer:
    """What the stage keeps of the visual tokens in `view`. traced: its scores are wanted, too.

    budget: says how many tokens each sample keeps; None: the view knows that.

    Hooks run without gradients, unless the strategy says that it is `trainable`. Raises PluginError, naming stage and
    hook, for an answer that cannot be carried out; of unsound samples NaN is taken for the lowest score.
    """
    refusals = Refusals()
    with torch.set_grad_enabled(torch.is_grad_enabled() and stage.trainable):
        if stage.per_sample:
            given = {
                b: Given(partial(view.of_sample, b=b), view.valid[b, :length], traced)
                for b, length in enumerate(view.counts)
                if length
            }
            answers = {
                b: _decide(stage, view.valid[b, : view.counts[b]], one, refusals, budget and partial(budget, b))
                for b, one in given.items()
            }
            selection = _together(stage, view, answers)
            unsound = torch.zeros(len(view.counts), dtype=torch.bool, device=view.valid.device)
            for b, one in given.items():
                unsound[b] = one.unsound
            scored = _scores_together(view, given)
        else:
            batch = Given(view.get, view.valid, traced)
            of_all = budget and partial(budget, None)
            selection, unsound = _decide(stage, view.valid, batch, refusals, of_all), batch.unsound
            scored = batch.scores
    refusals.settle()
    return Answer(selection, unsound, scored)


def _scores_together(view: View, given: Mapping[int, Given]) -> Tensor | None:
    """Scores of single samples as float (B, V), NaN where a sample has none; None: no sample has."""
    found = {b: one.scores for b, one in given.items() if one.scores is not None}
    if not found:
        return None
    table = torch.full(view.valid.shape, torch.nan, device=view.valid.device, dtype=next(iter(found.values())).dtype)
    for b, row in found.items():
        table[b, : len(row)] = row
    return table


def factors(stage: Stage, get: Callable[[str], Any], images: int) -> list[float]:
    """By how much the stage makes each of so many images smaller, in (0, 1]; read back from their device.

    Raises PluginError, naming stage and hook, for an answer that cannot be carried out.
    """
    with torch.no_grad():
        scales = _floats(stage, IMAGE_HOOK, call(stage, IMAGE_HOOK, get, {}), (images,))
    refusals = Refusals()
    refusals.add(~((scales > 0) & (scales <= 1)), f"{stage.label}: {IMAGE_HOOK} must be above 0 and at most 1")
    refusals.settle()
    return [float(scale) for scale in scales.tolist()]


def _decide(
    stage: Stage, valid: Tensor, get: Given, refusals: Refusals, budget: Callable[[Tensor], Any] | None = None
) -> Selection:
    """budget: the input `count` by the scores; None: it is among what the stage can get."""
    extra: dict[str, Any] = {}
    if "scores" in stage.requests("select_tokens"):
        extra["scores"] = scores(stage, "score_tokens", call(stage, "score_tokens", get, extra), valid, refusals, get)
        if budget is not None:
            extra["count"] = budget(extra["scores"])
        if get.traced:
            get.scores = extra["scores"].detach().clone()  # a hook may write to what it gets
    answer = call(stage, "select_tokens", get, extra)
    selection = answer if isinstance(answer, Selection) else Selection(answer)
    keep = checked(stage, "select_tokens", selection.keep, valid.shape)
    if keep.dtype != torch.bool:
        raise PluginError(f"{stage.label}: select_tokens must return bool, not {keep.dtype}")
    if not isinstance(selection.crop, bool):
        raise PluginError(f"{stage.label}: select_tokens (crop) must be True or False, not {selection.crop!r}")
    if selection.crop and not stage.declaration.crops:
        raise PluginError(f"{stage.label}: select_tokens (crop) needs @strategy(crops=True), for forecasts of cost")
    keep = keep.to(valid.device) & valid
    weights, sizes, merging = selection.weights, selection.sizes, "select_tokens"
    if weights is None and stage.hook.merge_tokens.get_hookimpls():
        weights, merging = call(stage, "merge_tokens", get, {"keep": keep.clone()}), "merge_tokens"
    if isinstance(weights, Owners):
        weights = _owners(stage, merging, weights, keep, valid, refusals, get)
    elif weights is not None:
        count = _extras(stage, get) if selection.extras is None else _own_extras(stage, selection.extras, refusals, get)
        weights = _matrix(stage, merging, weights, keep, valid, count, refusals, get)
    if selection.extras is not None and not isinstance(weights, Tensor):
        raise PluginError(f"{stage.label}: select_tokens (extras) needs weights, a matrix whose last columns take them")
    if sizes is not None:
        hook = "select_tokens (sizes)"
        sizes = _floats(stage, hook, sizes, valid.shape).to(valid.device)
        wrong = keep & ~(torch.isfinite(sizes) & (sizes > 0))
        refusals.add(wrong, f"{stage.label}: {hook} must be finite and above 0 for every kept token")
    return Selection(keep, weights, sizes, selection.crop, selection.extras)


def _own_extras(stage: Stage, extras: Any, refusals: Refusals, given: Given) -> int:
    """How many extras a strategy brings itself, (..., E, H)."""
    hook = "select_tokens (extras)"
    if not isinstance(extras, Tensor) or extras.ndim != (2 if stage.per_sample else 3):
        got = tuple(extras.shape) if isinstance(extras, Tensor) else type(extras).__name__
        raise PluginError(
            f"{stage.label}: {hook} must be states, {'(E, H)' if stage.per_sample else '(B, E, H)'}, not {got}"
        )
    floats = _floats(stage, hook, extras, extras.shape)
    refusals.add(~torch.isfinite(floats), f"{stage.label}: {hook} holds NaN or infinity", given)
    return int(floats.shape[-2])


def _owners(
    stage: Stage, hook: str, owners: Owners, keep: Tensor, valid: Tensor, refusals: Refusals, given: Given
) -> Owners:
    """Owners whose entries on padding go nowhere. hook: the one that returned them."""
    told = f"{stage.label}: {hook} (owner)"
    owner = checked(stage, f"{hook} (owner)", owners.owner, valid.shape).to(valid.device)
    if owner.dtype != torch.int64:
        raise PluginError(f"{told} must be int64, not {owner.dtype}")
    owner = owner.masked_fill(~valid, -1)
    width = valid.shape[-1]
    refusals.add(
        (owner < -1) | (owner >= width),
        f"{told} must name tokens 0 to {width - 1}, or -1 for a token that goes nowhere",
    )
    itself = torch.arange(width, device=owner.device)
    refusals.add(keep & (owner != itself), f"{told}: a kept token must own itself")
    joined = keep.gather(-1, owner.clamp(0, width - 1))
    refusals.add((owner >= 0) & ~joined, f"{told} names a token that is not kept")
    amounts = owners.amounts
    if amounts is not None:
        amounts = scores(stage, f"{hook} (amounts)", amounts, valid, refusals, given)
    return Owners(owner, owners.mode, amounts)


def _matrix(
    stage: Stage, hook: str, weights: Any, keep: Tensor, valid: Tensor, extras: int, refusals: Refusals, given: Given
) -> Tensor:
    """A dense merge, float (B, V, V + E), finite in the rows of kept tokens. hook: the one that returned it."""
    hook = f"{hook} (weights)"
    shape = (*keep.shape, keep.shape[-1] + extras)
    matrix = _floats(stage, hook, weights, shape)
    wrong = keep.to(matrix.device)[..., None] & ~torch.isfinite(matrix)
    refusals.add(wrong.any(-1).to(keep.device), f"{stage.label}: {hook} gave NaN or infinity to a kept token", given)
    taken = (matrix[..., keep.shape[-1] :].nan_to_num() != 0).any(-1)  # NaN is an average of none
    refusals.add(
        valid & ~keep & taken.to(keep.device),
        f"{stage.label}: {hook} puts an extra into the slot of a token that leaves, where nothing is: keep that token",
        given,
    )
    return matrix


def _extras(stage: Stage, get: Callable[[str], Any]) -> int:
    """How many declared extras stand after the visual tokens."""
    return int(get("extras").shape[-2]) if stage.extras else 0


def _together(stage: Stage, view: View, answers: dict[int, Selection]) -> Selection:
    """Selections of single samples as one of the batch."""
    keep = torch.zeros_like(view.valid)
    for b, one in answers.items():
        keep[b, : view.counts[b]] = one.keep
    crops = {one.crop for one in answers.values()}
    if len(crops) > 1:
        raise PluginError(f"{stage.label}: `crop` must be the same for all samples of a batch")
    weights = {b: one.weights for b, one in answers.items() if one.weights is not None}
    owners = {b: one for b, one in weights.items() if isinstance(one, Owners)}
    matrices = {b: one for b, one in weights.items() if isinstance(one, Tensor)}
    if len({one.mode for one in owners.values()}) + bool(matrices) > 1:
        raise PluginError(f"{stage.label}: merges must be of one kind and mode for all samples of a batch")
    merge = _owners_together(keep, owners) if owners else matrices_together(keep, matrices) if matrices else None
    sizes = None
    if any(one.sizes is not None for one in answers.values()):
        sizes = view.sizes.clone()
        for b, one in answers.items():
            if one.sizes is not None:
                sizes[b, : view.counts[b]] = one.sizes.to(sizes)
    own = {b: one.extras for b, one in answers.items() if one.extras is not None}
    return Selection(keep, merge, sizes, crops.pop() if crops else False, _extras_together(len(keep), own))


def _extras_together(rows: int, own: dict[int, Tensor]) -> Tensor | None:
    """Extras of single samples, (E, H) each, as (B, E, H) with zeros behind."""
    if not own:
        return None
    some = next(iter(own.values()))
    listed = [own.get(b, some[:0]) for b in range(rows)]
    return torch.nn.utils.rnn.pad_sequence(listed, batch_first=True)


def _owners_together(keep: Tensor, owners: dict[int, Owners]) -> Owners:
    """Samples that merge nothing have groups of one token."""
    width = keep.shape[1]
    owner = torch.arange(width, device=keep.device).expand_as(keep).masked_fill(~keep, -1)
    rows = [owner[b] if b not in owners else _longer(owners[b].owner, width, -1) for b in range(len(keep))]
    some = next(iter(owners.values()))
    if some.amounts is None:
        return Owners(torch.stack(rows), some.mode)
    amounts = {b: one.amounts for b, one in owners.items() if one.amounts is not None}
    ones = some.amounts.new_ones(width)
    factors = [_longer(amounts[b].to(ones), width, 1) if b in amounts else ones for b in range(len(keep))]
    return Owners(torch.stack(rows), some.mode, torch.stack(factors))


def _longer(x: Tensor, width: int, padding: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - len(x)), value=padding)


def call(stage: Stage, hook: str, get: Callable[[str], Any], extra: dict[str, Any]) -> Any:
    """Call one hook with the arguments that somebody on the stage names; the others are None and never computed."""
    wanted = stage.requests(hook)
    arguments = {name: extra[name] if name in extra else get(name) if name in wanted else None for name in HOOKS[hook]}
    try:
        return getattr(stage.hook, hook)(**arguments)
    except PrunekitError:
        raise
    except Exception as error:
        blame = get.blame() if isinstance(get, Given) else ""
        raise PluginError(f"{stage.label}: {hook} failed with {type(error).__name__}: {error}{blame}") from error


def checked(stage: Stage, hook: str, value: Any, shape: Sequence[int]) -> Tensor:
    """`value`, if it is a tensor of this shape with data; raises PluginError naming the stage and hook if not."""
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        got = "nothing" if value is None else got
        raise PluginError(f"{stage.label}: {hook} must return a tensor of shape {tuple(shape)}, not {got}")
    if value.is_meta:
        raise PluginError(f"{stage.label}: {hook} returned a tensor on the meta device, which holds no data")
    return value


def _floats(stage: Stage, hook: str, value: Any, shape: Sequence[int]) -> Tensor:
    floats = checked(stage, hook, value, shape)
    if not floats.is_floating_point():
        raise PluginError(f"{stage.label}: {hook} must return float, not {floats.dtype}; convert it with .float()")
    return floats


def scores(stage: Stage, hook: str, value: Any, valid: Tensor, refusals: Refusals, given: Given) -> Tensor:
    """`value`, if it is float, of the shape of bool `valid`, and finite there; on the device of `valid`."""
    floats = _floats(stage, hook, value, valid.shape).to(valid.device)
    refusals.add(valid & ~torch.isfinite(floats), f"{stage.label}: {hook} returned NaN or infinity", given)
    return floats


def finite(stage: Stage, hook: str, value: Any, valid: Tensor, unsound: Tensor) -> Tensor:
    """The same of a batch, read back from the device at once. unsound: bool (B,), samples of which it is not asked."""
    refusals = Refusals()
    floats = _floats(stage, hook, value, valid.shape).to(valid.device)
    wrong = valid & ~torch.isfinite(floats) & ~unsound.to(valid.device)[:, None]
    refusals.add(wrong, f"{stage.label}: {hook} returned NaN or infinity")
    refusals.settle()
    return floats
