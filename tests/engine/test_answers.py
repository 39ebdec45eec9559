"""Answers of strategies that cannot be carried out are refused in words of stage and hook; budgets that are not met are
told.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from tower_cases import ANYWHERE, piped

import prunekit
from prunekit import (
    EncoderKeys,
    EncoderRows,
    EncoderValues,
    Features,
    Owners,
    Rows,
    Selection,
    Sites,
    hookimpl,
    strategy,
)
from prunekit.engine.asking import decide
from prunekit.errors import PluginError
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.precision import Float64Throughout

model_of = cache(tiny_llava)
RAGGED = ((1, 2, 1), (14, 6, 9))


@strategy(sites=ANYWHERE)
class Scores:
    """Scores that are `what`, at valid tokens or at padding."""

    what: str = ""

    @hookimpl
    def score_tokens(self, hidden, valid):
        scores = hidden.norm(dim=-1)
        first = torch.arange(valid.shape[-1]) == 1
        if self.what == "integers":
            return (scores * 100).long()
        if self.what == "bools":
            return scores > 0
        if self.what == "nothing":
            return None
        if self.what == "meta":
            return scores.to("meta")
        if self.what == "nan on padding":
            return scores.masked_fill(~valid, torch.nan)
        return scores.masked_fill(first, float(self.what)) if self.what else scores


@strategy(sites=ANYWHERE, per_sample=True)
class ScoresOne(Scores):
    """The same, a sample at a time."""


@strategy(sites=ANYWHERE, keep="refused")
class Answers:
    """Keeps the first three tokens, with one thing wrong."""

    what: str = ""

    def _owners(self, keep, valid):
        owner = torch.where(keep, torch.arange(valid.shape[-1]), torch.where(valid, 0, 99))
        wrong = {"beyond": 77, "below": -2, "dropped": 5}
        if self.what in wrong:
            owner[..., 4] = wrong[self.what]
        if self.what == "not itself":
            owner[..., 2] = 1
        if self.what == "float owner":
            owner = owner.float()
        amounts = torch.full(valid.shape, torch.nan) if self.what == "amounts" else None
        return Owners(owner, "mean" if amounts is None else "sum", amounts)

    def _likenesses(self, valid):
        """Rows for all tokens, as a softmax gives them."""
        many = valid.shape[-1]
        rows = torch.arange(many * many).reshape(many, many) % 7 + 1.0
        return (rows * valid[..., None, :]) / 100

    @hookimpl
    def select_tokens(self, valid):
        keep = valid & (valid.cumsum(-1) <= 3)
        ones = torch.ones(valid.shape)
        width = valid.shape[-1]
        square = torch.eye(width).expand(*valid.shape, width)
        return {
            "nothing": lambda: None,
            "a list": lambda: [True] * width,
            "numbers": lambda: keep.long(),
            "meta": lambda: keep.to("meta"),
            "crop": lambda: Selection(keep, crop="yes"),
            "size nan": lambda: Selection(keep, sizes=ones * torch.nan),
            "size 0": lambda: Selection(keep, sizes=ones * 0),
            "size below 0": lambda: Selection(keep, sizes=-ones),
            "size integers": lambda: Selection(keep, sizes=ones.long()),
            "weights nan": lambda: Selection(keep, square * torch.nan),
            "weights integers": lambda: Selection(keep, square.long()),
            "by their cells": lambda: Selection(keep, self._likenesses(valid)),
            "only dropped": lambda: Selection(keep, square.masked_fill(~keep[..., None], torch.nan), ones / keep),
        }.get(self.what, lambda: Selection(keep, self._owners(keep, valid)))()


@strategy(sites=ANYWHERE, keep="refused", per_sample=True)
class AnswersOne(Answers):
    """The same, a sample at a time."""


SCORES = {
    "nan": "score_tokens returned NaN or infinity",
    "inf": "score_tokens returned NaN or infinity",
    "-inf": "score_tokens returned NaN or infinity",
    "integers": "score_tokens must return float, not torch.int64; convert it with .float()",
    "bools": "score_tokens must return float, not torch.bool",
    "nothing": "score_tokens must return a tensor of shape",
    "meta": "score_tokens returned a tensor on the meta device, which holds no data",
}
ANSWERS = {
    "nothing": "select_tokens must return a tensor of shape",
    "a list": "select_tokens must return a tensor of shape",
    "numbers": "select_tokens must return bool, not torch.int64",
    "meta": "select_tokens returned a tensor on the meta device",
    "crop": "select_tokens (crop) must be True or False, not 'yes'",
    "size nan": "select_tokens (sizes) must be finite and above 0 for every kept token",
    "size 0": "select_tokens (sizes) must be finite and above 0",
    "size below 0": "select_tokens (sizes) must be finite and above 0",
    "size integers": "select_tokens (sizes) must return float, not torch.int64",
    "weights nan": "select_tokens (weights) gave NaN or infinity to a kept token",
    "weights integers": "select_tokens (weights) must return float",
    "beyond": "select_tokens (owner) must name tokens 0 to",
    "below": "select_tokens (owner) must name tokens 0 to",
    "dropped": "select_tokens (owner) names a token that is not kept",
    "not itself": "select_tokens (owner): a kept token must own itself",
    "float owner": "select_tokens (owner) must be int64, not torch.float32",
    "amounts": "select_tokens (amounts) returned NaN or infinity",
}
CASES = [(cls, what, SCORES[what]) for cls in (Scores, ScoresOne) for what in SCORES]
CASES += [(cls, what, ANSWERS[what]) for cls in (Answers, AnswersOne) for what in ANSWERS]


@pytest.mark.parametrize("at", ["vision.0", "encoder", 2])
@pytest.mark.parametrize(("cls", "what", "message"), CASES)
def test_answers_that_cannot_be_carried_out(cls, what, message, at):
    keep = {"keep": 0.5} if issubclass(cls, Scores) else {}
    pipeline = piped((cls, {"at": at, "what": what, **keep}))
    with prunekit.apply(model_of(), pipeline), pytest.raises(PluginError, match=re.escape("stages[0] s0")) as caught:
        model_of()(**tiny_inputs(*RAGGED))
    assert message in str(caught.value)
    assert "NoneType" not in str(caught.value) and "int64_t" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "what"),
    [(Scores, "nan on padding"), (Answers, "only dropped"), (Answers, ""),
     (Answers, "by their cells"), (AnswersOne, "by their cells")],
)  # fmt: skip
def test_what_stands_on_padding_and_dropped_tokens_does_not_matter(cls, what):
    keep = {"keep": 0.5} if issubclass(cls, Scores) else {}
    with prunekit.apply(model_of(), piped((cls, {"at": 2, "what": what, **keep}))) as run:
        logits = model_of()(**tiny_inputs(*RAGGED)).logits
    assert torch.isfinite(logits).all()
    assert [len(row) for row in run.report.events[0].kept] == ([8, 16, 8] if keep else [3, 3, 3])


def test_the_conditions_of_a_stage_are_read_back_at_once(monkeypatch):
    """A stage that scores, sizes and merges by owners asks its device once, also sample by sample."""
    from prunekit.engine import asking

    reads = []
    stack = torch.stack
    monkeypatch.setattr(asking.torch, "stack", lambda parts, *rest: reads.append(len(parts)) or stack(parts, *rest))
    stage = piped((ScoresOne, {"keep": 0.5})).stages[0]
    view = type("View", (), {"valid": torch.ones(3, 4, dtype=torch.bool), "counts": (4, 2, 3), "count": (2, 1, 1)})()
    view.sizes = torch.ones(3, 4)
    rows = {"hidden": torch.rand(3, 4, 2), "valid": view.valid, "count": view.count}
    view.of_sample = lambda name, b: rows[name][b] if name == "count" else rows[name][b, : view.counts[b]]
    assert decide(stage, view).selection.keep.sum(1).tolist() == [2, 1, 1]
    assert reads == [3], "one flag for each sample, in one read"


SHAPES: list = []
OF_TOWER = {
    "encoder_attention": (EncoderRows(0), EncoderRows(0, heads="none")),
    "encoder_keys": (EncoderKeys(0), EncoderKeys(0, of="cls")),
    "encoder_values": (EncoderValues(0, of="cls"),),
    "features": (Features(0), Features(0, of="cls")),
}


@strategy(sites=Sites(tower=True), inputs=OF_TOWER, keep="refused", per_sample=True)
class Tuples:
    """Asks for tuples of inputs, and records the shapes that it gets."""

    @hookimpl
    def select_tokens(self, encoder_attention, encoder_keys, encoder_values, features, valid):
        asked = (encoder_attention, encoder_keys, encoder_values, features)
        assert all(isinstance(value, tuple) for value in asked)
        SHAPES.append(((len(valid),), [tuple(x.shape) for value in asked for x in value]))
        return valid & (torch.arange(len(valid)) % 2 == 0)


OF_DECODER = {"attention": (Rows(queries="text", over="none"), Rows(), Rows(heads="none", over="none"))}


@strategy(sites=Sites(lowest=1), inputs=OF_DECODER, keep="refused", per_sample=True)
class DecoderTuples:
    """The same of the decoder, with rows of every query."""

    @hookimpl
    def select_tokens(self, attention, valid):
        SHAPES.append([tuple(x.shape) for x in attention])
        return valid


@pytest.mark.parametrize("at", ["vision.0", "encoder", 2])
def test_tuples_of_inputs_of_the_tower_sample_by_sample(at):
    SHAPES.clear()
    with Float64Throughout(), torch.no_grad(), prunekit.apply(model_of(), piped((Tuples, {"at": at}))):
        model_of()(**tiny_inputs(*RAGGED))
    assert len(SHAPES) == (4 if at == "vision.0" else 3)
    for ((count,), shapes), crops in zip(SHAPES, (1, 2, 1), strict=False):
        crops = 1 if at == "vision.0" else crops
        assert [shape[0] for shape in shapes] == [count, count, count, crops, crops, count, crops]


def test_tuples_of_inputs_of_the_decoder_sample_by_sample():
    SHAPES.clear()
    with Float64Throughout(), torch.no_grad(), prunekit.apply(model_of(), piped((DecoderTuples, {"at": 2}))):
        model_of()(**tiny_inputs(*RAGGED))
    assert [shapes[1] for shapes in SHAPES] == [(16,), (32,), (16,)]
    assert len({shapes[0][-1] for shapes in SHAPES}) == 3, "as many rows as the sample has text tokens"
    assert all(len(shapes[2]) == 3 for shapes in SHAPES)


@strategy(sites=ANYWHERE)
class Less:
    """Keeps one token less than asked for."""

    @hookimpl
    def select_tokens(self, valid, count):
        numbers = torch.tensor(count)[:, None]
        return valid & (valid.cumsum(-1) < numbers)


@pytest.mark.parametrize("at", ["vision.0", "encoder", 2])
def test_another_number_than_asked_for_is_told(at):
    with prunekit.apply(model_of(), piped((Less, {"at": at, "keep_tokens": 5}))) as run:
        model_of()(**tiny_inputs(*RAGGED))
    event = run.report.events[0]
    images = (1, 2, 1) if at == "vision.0" else (1, 1, 1)
    assert event.asked == tuple(5 * number for number in images)
    assert tuple(map(len, event.kept)) == tuple(4 * number for number in images)
    numbers = "4/8/4, asked for 5/10/5" if at == "vision.0" else "4, asked for 5"
    assert f"-> {numbers}" in str(run.report)


def test_what_was_asked_for_is_not_repeated():
    with prunekit.apply(model_of(), piped((Scores, {"at": 2, "keep_tokens": 5}), (Answers, {"at": 3}))) as run:
        model_of()(**tiny_inputs(*RAGGED))
    assert [event.asked for event in run.report.events] == [(5, 5, 5), None]
    assert "asked" not in str(run.report)
