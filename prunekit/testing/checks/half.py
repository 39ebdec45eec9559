"""Numbers: finite ones from whatever a model may compute, and in half precision the choices of float32."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.strategy.decisions import Owners, Route, Selection
from prunekit.testing.check import check, expect, shown
from prunekit.testing.hook_calls import watched
from prunekit.testing.subject import Subject

HALVES = (torch.float16, torch.bfloat16)
LONG = 5e4  # of the largest number of image features: just below what float16 holds


@check(
    "What it gives is finite, also of images in which all tokens are alike, and of features that are all zero, as of a "
    "blank image or a padded crop.",
    "a division by a spread, a norm or a maximum that may be 0; a logarithm of 0; cosine similarity written by hand "
    "(`torch.nn.functional.normalize` and `cosine_similarity` have an eps).",
    lambda traits: traits.kind != "layer",
)
def finite(subject: Subject) -> None:
    for name, constants in (("all tokens are alike", True), ("all features are zero", False)):
        model = _dull(subject.model, constants)
        for batch in ("one", "ragged"):
            try:
                report, logits = subject.apply(subject.build(), subject.batch(batch), model)
            except Exception as error:
                expect(False, f"where {name}: {type(error).__name__}: {error}")
            expect(not report.unsound and logits.isfinite().all(), f"where {name}, logits are not finite")


def _dull(model: Any, constants: bool) -> Any:
    """A copy whose image features depend on nothing: its tower and projector have weights of 0. constants: biases
    stay, so that they are not zero.
    """
    dull = copy.deepcopy(model)
    words = (dull.get_decoder(), dull.get_input_embeddings(), dull.get_output_embeddings())
    of_text = {id(weight) for part in words for weight in part.parameters()}
    with torch.no_grad():
        for name, weight in dull.named_parameters():
            if id(weight) not in of_text and not (constants and name.endswith("bias")):
                weight.zero_()
    return dull


@check(
    "In float16 and bfloat16 every hook chooses what it would choose of the same values in float32.",
    "norms, products and sums in half precision, which overflow at 65504 and round to 3 digits: begin with `.float()`. "
    "The model stays in half precision; what it gives to hooks costs little to widen.",
    lambda traits: traits.kind in ("token", "router"),
)
def half_precision(subject: Subject) -> None:
    for dtype in HALVES:
        model, batch = _with_long_features(subject, dtype)
        differ: dict[str, None] = {}
        pipeline = subject.build()
        strategy = pipeline.stages[0].strategy
        exact: list[Any] = []

        def before(hook: str, given: dict[str, Any], strategy: Any = strategy, exact: Any = exact) -> None:
            own = getattr(strategy, hook, None)
            names = [] if own is None else list(inspect.signature(own).parameters)
            wide = {name: _wide(given.get(name), dtype) for name in names}  # noqa: B023
            exact.append(None if own is None else own(**wide))

        def after(hook: str, _: dict[str, Any], answer: Any, exact: Any = exact, differ: Any = differ) -> None:
            wanted = exact.pop()
            if wanted is not None and not _same(wanted, answer):
                differ[f"{hook} in {dtype}"] = None  # noqa: B023

        with watched(pipeline, before, after):
            subject.apply(pipeline, batch, model)
        expect(not differ, f"another choice than of float32 by {shown(differ)}")


def _with_long_features(subject: Subject, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """The model and a batch in half precision, with image features whose norms overflow float16."""
    model = copy.deepcopy(subject.model).to(dtype)
    batch = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in subject.batch("ragged").items()
    }
    tower = subject.parts.tower
    last = None if tower is None else _last_product(model, subject)
    if last is not None:
        seen: list[float] = []
        handle = last.register_forward_hook(lambda _, args, output: seen.append(float(output.abs().max())))
        with torch.no_grad():
            model(**batch)
            handle.remove()
            if last.bias is not None:
                last.bias.zero_()
            last.weight.mul_(LONG / max(seen))
    return model, batch


def _last_product(model: nn.Module, subject: Subject) -> Any:
    """The last matrix product outside of the decoder that makes features of the decoder's width."""
    decoder = {id(part) for part in model.get_decoder().modules()}  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = [
        part
        for part in model.modules()
        if isinstance(part, nn.Linear) and id(part) not in decoder and part is not head
        and part.out_features == subject.shape.hidden
    ]  # fmt: skip
    return found[-1] if found else None


def _wide(value: Any, dtype: torch.dtype) -> Any:
    """float32 copies of what is in half precision; functions of the model get and give them as well."""
    if isinstance(value, tuple):
        return tuple(_wide(one, dtype) for one in value)
    if isinstance(value, Tensor):
        return value.float().clone() if value.dtype == dtype else value.clone()
    if isinstance(value, dict):
        return {name: _wide(one, dtype) for name, one in value.items()}
    if inspect.isfunction(value) or isinstance(value, nn.Module):
        return lambda states: value(states.to(dtype)).float()
    return value


def _same(wanted: Any, answer: Any) -> bool:
    """Two answers choose the same."""
    if isinstance(wanted, Selection) and isinstance(answer, Selection):
        return torch.equal(wanted.keep, answer.keep) and _same_owners(wanted.weights, answer.weights)
    if isinstance(wanted, Route) and isinstance(answer, Route):
        pairs = ((wanted.tokens, answer.tokens), (wanted.layers, answer.layers))
        scores = [one is None or torch.equal(_order(one), _order(other)) for one, other in pairs if other is not None]
        return all(scores) and wanted.plans == answer.plans
    if isinstance(wanted, Tensor) and isinstance(answer, Tensor):
        return (
            torch.equal(wanted, answer) if wanted.dtype == torch.bool else torch.equal(_order(wanted), _order(answer))
        )
    return _same_owners(wanted, answer)


def _same_owners(wanted: Any, answer: Any) -> bool:
    if isinstance(wanted, Owners) and isinstance(answer, Owners):
        return torch.equal(wanted.owner, answer.owner)
    return True  # weights of a dense merge are rounded, and choose nothing


def _order(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True)
