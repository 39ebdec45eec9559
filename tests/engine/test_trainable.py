"""Gradients of what a trainable strategy decides with: through the tokens that it keeps, and only where it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import prunekit
from prunekit import Selection, hookimpl, strategy
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.precision import Float64Throughout

GATE = torch.zeros((), dtype=torch.float64, requires_grad=True)


@strategy(trainable=True, keep="refused")
class Gated:
    """Keeps every second token, each times 1 + a weight that is learned."""

    @hookimpl
    def select_tokens(self, hidden: Tensor, valid: Tensor) -> Selection:
        """Bool (B, V), and the gate on the diagonal."""
        keep = valid & (torch.arange(valid.shape[1]) % 2 == 0)
        weights = torch.eye(valid.shape[1], dtype=hidden.dtype).expand(len(valid), -1, -1) * (1 + GATE)
        return Selection(keep, weights)


@strategy(trainable=False)
class Measured(Gated):
    """The same without a claim to be trained."""


def loss_at(value: float, site: str, strategy: type[Any] = Gated) -> Tensor:
    """The mean square of the logits of a ragged batch, with the gate at `value`."""
    registry = Registry()
    registry.strategy("gated", f"{__name__}:{strategy.__name__}", summary="for this test")
    with torch.no_grad():
        GATE.fill_(value)
    model, inputs = tiny_llava(), tiny_inputs((1, 2), (7, 9))
    pipeline = build({"stages": [{"use": "gated", "at": site}]}, registry=registry)
    with Float64Throughout(), prunekit.apply(model, pipeline):
        logits: Tensor = model(**inputs).logits[:, -1]
    return logits.square().mean()


@pytest.mark.parametrize("site", ["encoder", "2", "3.mid"])
def test_gradients_are_those_of_finite_differences(site: str) -> None:
    GATE.grad = None
    loss_at(0.3, site).backward()  # type: ignore[no-untyped-call]
    step = 1e-5
    expected = (loss_at(0.3 + step, site) - loss_at(0.3 - step, site)) / (2 * step)
    assert GATE.grad is not None and abs(expected) > 1e-6
    assert torch.allclose(GATE.grad, expected.detach(), rtol=1e-6)


def test_without_the_trait_nothing_is_recorded() -> None:
    assert not loss_at(0.3, "2", Measured).requires_grad
