"""Every registered strategy meets the contract of `prunekit.testing.contract`, built-in or not."""

from __future__ import annotations

import pytest
from strategy_options import OPTIONS, options_for

import prunekit
from prunekit import PREFILL_END, Selection, Site, Sites, hookimpl, plugins, strategy
from prunekit.families import shape_of
from prunekit.testing.contract import KeepContract, LayerContract, StrategyContract, contract
from prunekit.testing.tiny import tiny_llava

AT_MOST = {"pool"}
NAMES = [entry.name for entry in plugins.registry().strategies()]

globals().update({f"Test_{name}": contract(name, OPTIONS.get(name), at_most=name in AT_MOST) for name in NAMES})


@pytest.fixture(autouse=True, scope="module")
def _with_files(tmp_path_factory):
    """Strategies that need a calibration get one of the contract's model; others the CLIP model of its tower."""
    for name, options in options_for(shape_of(tiny_llava()), tmp_path_factory.mktemp("files")).items():
        globals()[f"Test_{name}"].options = options


def test_the_strategies_of_this_version_are_all_here():
    assert {"downsample", "pixelprune", "evs"} <= set(NAMES)
    assert {"dense", "blind", "random", "stride", "pool", "fastv", "divprune", "vtw", "skip_layers"} <= set(NAMES)


# The contract has teeth: a strategy that breaks one of its rules fails the test of that rule.


@strategy()
class Batchwise:
    """A baseline gone wrong: a row's choice depends on the rows beside it."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.sum(-1) * hidden.sum((1, 2)).argsort().argsort()[:, None] * (-1) ** len(hidden)


@strategy()
class Reading:
    """A baseline that reads: what it keeps depends on the words of the question."""

    @hookimpl
    def score_tokens(self, hidden, question):
        import torch

        signs = torch.tensor([1.0 if len(words) % 2 else -1.0 for words in question])
        return hidden.sum(-1) * signs[:, None]


@strategy(sites=Sites(decoder=False), extras=("cls",))
class Appending:
    """A baseline that appends CLS at the decoder input: each CLS token takes the slot of the last kept tokens."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.norm(dim=-1)

    @hookimpl
    def merge_tokens(self, hidden, keep, extras_valid):
        import torch

        slots = torch.eye(keep.shape[1], keep.shape[1] + extras_valid.shape[1]).repeat(len(keep), 1, 1)
        for row, (kept, real) in enumerate(zip(keep, extras_valid, strict=True)):
            for extra, slot in zip(real.nonzero()[:, 0], kept.nonzero()[:, 0].flip(0), strict=False):
                slots[row, slot] = 0
                slots[row, slot, keep.shape[1] + extra] = 1
        return slots.to(hidden.dtype)


@strategy()
class Forgetful:
    """A baseline gone wrong: another draw at every call."""

    @hookimpl
    def score_tokens(self, hidden):
        import torch

        return torch.rand(hidden.shape[:2])


@strategy()
class Greedy:
    """A baseline gone wrong: keeps one token more than it was told to."""

    @hookimpl
    def select_tokens(self, valid, count):
        import torch

        order = torch.arange(valid.shape[1])
        return valid & (order < torch.tensor(count)[:, None] + 1)


@strategy(per_sample=True)
class Blurred:
    """A baseline gone wrong: merges even when everything is kept."""

    @hookimpl
    def select_tokens(self, hidden, count):
        import torch

        keep = torch.arange(len(hidden)) < count
        return Selection(keep, torch.full((len(hidden), len(hidden)), 1 / len(hidden), dtype=hidden.dtype))


@strategy()
class Remembers:
    """Nothing said about where it comes from, and it counts its calls behind the back of its frozen fields."""

    calls: int = 0

    @hookimpl
    def score_tokens(self, hidden):
        object.__setattr__(self, "calls", self.calls + 1)
        return hidden.sum(-1)


@strategy(sites=Sites(tower=True, encoder=False, decoder=False, default=Site.parse("vision.0")))
class InTower:
    """A baseline that cuts inside the vision tower alone."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.norm(dim=-1)


@strategy(sites=Sites(end=True, encoder=False, decoder=False, default=PREFILL_END))
class AtEnd:
    """A baseline that cuts what the prefill left in the cache alone."""

    @hookimpl
    def score_tokens(self, valid):
        return valid.cumsum(-1).float()


WHOLE = {"reading": Reading, "appending": Appending, "in-tower": InTower, "at-end": AtEnd}
BROKEN = {
    "batchwise": (Batchwise, ["test_rows_do_not_depend_on_each_other"]),
    "forgetful": (Forgetful, ["test_the_same_run_gives_the_same_result", "test_rows_do_not_depend_on_each_other"]),
    "greedy": (Greedy, ["test_it_keeps_what_it_is_told_to"]),
    "blurred": (Blurred, ["test_keeping_everything_is_dense"]),
    "remembers": (Remembers, ["test_is_frozen_configuration", "test_says_where_it_comes_from"]),
}


class BrokenPlugin:
    """Registers the strategies above."""

    @hookimpl
    def prunekit_register(self, registry):
        for name, cls in {**WHOLE, **{name: cls for name, (cls, _) in BROKEN.items()}}.items():
            registry.strategy(name, f"{cls.__module__}:{cls.__name__}")


@pytest.fixture
def broken():
    plugins.register(BrokenPlugin(), name="broken")
    yield
    plugins.unregister("broken")


@pytest.mark.parametrize("name", BROKEN)
def test_a_strategy_that_breaks_a_rule_fails_its_test(broken, name):
    made = contract(name)
    for rule in BROKEN[name][1]:
        with pytest.raises((AssertionError, prunekit.PrunekitError)):
            getattr(made(), rule)()


def test_a_rule_that_is_kept_passes_for_the_broken_too(broken):
    """The failures above are about their own rules, not about how strategies are registered here."""
    contract("greedy")().test_rows_do_not_depend_on_each_other()
    contract("blurred")().test_equals_the_masked_reference()
    contract("forgetful")().test_it_keeps_what_it_is_told_to()


@pytest.mark.parametrize("name", WHOLE)
def test_strategies_of_other_inputs_meet_the_contract(broken, name):
    made = contract(name)
    for rule in [one for one in dir(made) if one.startswith("test_") and "says_where" not in one]:
        getattr(made(), rule)()


def test_the_class_fits_the_strategy():
    assert issubclass(contract("fastv"), KeepContract)
    assert issubclass(contract("skip_layers", {"layers": [0]}), LayerContract)
    with pytest.raises(LookupError, match="fastv"):
        contract("fastw")
    assert issubclass(contract("blind"), StrategyContract)
