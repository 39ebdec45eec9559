"""The promise of a budget of risk: the threshold by hand, and how often made-up calibrations break it."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prunekit.pipeline import risk

SHARES = st.floats(0.005, 0.6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), SHARES, st.floats(0.5, 0.99))
def test_how_many_hits_are_allowed(prompts, share, confidence):
    """By scipy: fewer than k hits are too rare to have come from a larger share."""
    tails = stats.binom.cdf(numpy.arange(prompts), prompts, share)  # of at most 0, 1, ... hits
    wanted = int((tails <= 1 - confidence).sum())
    found = risk.allowed(prompts, share, confidence)
    assert found == wanted or min(abs(tails - (1 - confidence))) < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.5, math.inf]), min_size=1, max_size=80), SHARES, st.floats(0.5, 0.95))
def test_the_threshold_is_the_largest_with_a_sound_upper_bound(harms, share, confidence):
    """The naive rule: of all thresholds the largest up to which every Clopper-Pearson bound stays within the risk."""
    critical = sorted(harms)

    def bound(limit):
        hits = sum(one < limit for one in critical)
        return 1.0 if hits == len(critical) else stats.beta.ppf(confidence, hits + 1, len(critical) - hits)

    sound = 0.0
    for limit in sorted(set(critical)):
        if bound(limit) > share:
            break
        sound = limit
    found = risk.threshold(critical, share, confidence)
    # Of equal harms all or none are below a threshold, so that equal ones allow no other.
    assert found == sound or abs(bound(max(found, sound)) - share) < 1e-9


def test_the_fewest_prompts():
    assert risk.least_prompts(0.02, 0.9) == 114
    for share, confidence in ((0.02, 0.9), (0.1, 0.9), (0.05, 0.95), (0.5, 0.5)):
        least = risk.least_prompts(share, confidence)
        assert risk.allowed(least, share, confidence) >= 1 > risk.allowed(least - 1, share, confidence)
        assert risk.threshold([0.3] * least, share, confidence) == 0.3
        assert risk.threshold([0.3] * (least - 1), share, confidence) == 0


class World:
    """Prompts with a difficulty, which harms show more or less well; answers may come right again on a later rung."""

    def __init__(self, noise: float, rungs: int = 5) -> None:
        self.noise, self.rungs = noise, rungs

    def draw(self, generator: numpy.random.Generator, many: int, hard: float = 1.0):
        """Harms (many, rungs), rising, and whether the answer differs on each rung."""
        difficulty = generator.beta(1, 4 / hard, (many, 1))
        depth = numpy.linspace(0.1, 1, self.rungs)
        harms = numpy.clip(difficulty * depth + self.noise * generator.normal(size=(many, self.rungs)), 0, 1)
        harms = numpy.maximum.accumulate(numpy.round(harms, 2), axis=1)  # rounded: with ties
        return harms, generator.random((many, self.rungs)) < difficulty * depth * hard

    @staticmethod
    def critical(harms, differs):
        first = numpy.where(differs.any(1), differs.argmax(1), harms.shape[1] - 1)
        return numpy.where(differs.any(1), harms[numpy.arange(len(harms)), first], math.inf)

    @staticmethod
    def risk(harms, differs, limit):
        rung = (harms < limit).sum(1)
        padded = numpy.concatenate([numpy.zeros((len(harms), 1), bool), differs], 1)
        return padded[numpy.arange(len(harms)), rung].mean()


SPLITS, CONFIDENCE = 300, 0.9


def violations(world, share, shift=1.0) -> float:
    """Of many calibrations the part whose risk on fresh prompts, drawn `shift` times as hard, exceeds the promise."""
    generator = numpy.random.default_rng(7)
    fresh = world.draw(generator, 40_000, shift)
    over = 0
    for _ in range(SPLITS):
        critical = numpy.sort(world.critical(*world.draw(generator, 200)))
        over += world.risk(*fresh, risk.threshold(critical.tolist(), share, CONFIDENCE)) > share
    return over / SPLITS


@pytest.mark.parametrize("noise", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_promise_holds_on_exchangeable_prompts(noise, share):
    """Whatever the harms are worth. Beyond the allowed tenth of the splits only by the chance of so few of them."""
    assert violations(World(noise), share) <= stats.binom.ppf(0.999, SPLITS, 1 - CONFIDENCE) / SPLITS


def test_it_is_no_empty_promise():
    """Sharp harms let much be pruned, and useless ones little; with a threshold above the promised one it breaks."""
    generator = numpy.random.default_rng(3)
    rungs = {}
    for noise in (0.02, 10.0):
        world = World(noise)
        harms, differs = world.draw(generator, 4000)
        limit = risk.threshold(numpy.sort(world.critical(harms, differs)).tolist(), 0.05, CONFIDENCE)
        rungs[noise] = (harms < limit).sum(1).mean()
        assert world.risk(harms, differs, 2.0) > 0.05
    assert rungs[0.02] > rungs[10.0] + 0.2


def test_prompts_that_are_not_exchangeable_break_it():
    """Nothing is promised where prompts are harder than those of the calibration and the harms do not show it."""
    assert violations(World(0.1), 0.05, shift=3.0) > 0.5
