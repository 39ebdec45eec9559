"""Intervals over images: against a naive resampling, on data without any variation, and by how often they hold."""

import math

import numpy as np
import pytest
from prunekit_evals.compare.clustered import Column, Seed, estimate
from scipy import stats


def column(scores, images, task="t", seed=None):
    """A column of questions, each with its score and its image."""
    images = np.asarray(images)
    return Column(task, np.bincount(images, scores), np.bincount(images).astype(float), seed)


def naive(scores, images, resamples, generator):
    """Quantiles of means, image by image and question by question."""
    by_image = {}
    for score, image in zip(scores, images, strict=True):
        by_image.setdefault(image, []).append(score)
    names, means = list(by_image), []
    for _ in range(resamples):
        drawn = [score for place in generator.integers(len(names), size=len(names)) for score in by_image[names[place]]]
        means.append(sum(drawn) / len(drawn))
    return np.quantile(means, [0.025, 0.975])


def test_against_a_naive_resampling_of_images():
    generator = np.random.default_rng(5)
    images = np.repeat(np.arange(80), generator.integers(1, 5, 80))
    scores = (generator.random(80)[images] < 0.6).astype(float)  # an image's questions are all right or all wrong
    found = estimate([column(scores, images)], np.ones((1, 1)), 4_000)
    (one,) = found.estimates
    low, high = naive(scores, images, 4_000, generator)
    assert (one.value, one.n) == (pytest.approx(scores.mean()), len(images))
    # The naive one is not bias-corrected; both lie within a fraction of the width of each other.
    assert (one.low, one.high) == (pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))
    alone = estimate([column(scores, np.arange(len(images)))], np.ones((1, 1)), 4_000).estimates[0]
    assert one.half > 1.4 * alone.half  # taking questions for draws pretends to know more


def test_one_mean_is_scipys_own_bca():
    scores = np.random.default_rng(6).random(60)
    (one,) = estimate([column(scores, range(60))], np.ones((1, 1)), 2_000).estimates
    plain = stats.bootstrap((scores,), np.mean, n_resamples=2_000, rng=0, vectorized=True, method="BCa")
    assert (one.low, one.high) == pytest.approx(tuple(plain.confidence_interval))


def test_a_difference_is_paired():
    generator = np.random.default_rng(7)
    theirs = (generator.random(400) < 0.7).astype(float)
    ours = np.where(generator.random(400) < 0.05, 1 - theirs, theirs)
    columns = [column(ours, range(400)), column(theirs, range(400))]
    own, other, difference = estimate(columns, np.array([[1, 0], [0, 1], [1, -1]]), 2_000).estimates
    assert difference.value == pytest.approx(ours.mean() - theirs.mean())
    assert difference.half < 0.6 * math.hypot(own.half, other.half)
    swapped = estimate(columns, np.array([[-1, 1]]), 2_000).estimates[0]
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low), abs=0.006)


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 0.6915, 1.0), (0.0, 0.0, 0.3085)])
def test_all_right_and_all_wrong_leave_what_an_exact_test_leaves(score, low, high):
    (one,) = estimate([column([score] * 20, np.arange(20) // 2)], np.ones((1, 1)), 500).estimates
    assert (one.value, one.low, one.high) == (score, pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert (low, high) == pytest.approx(
        tuple(stats.binomtest(int(10 * score), 10).proportion_ci(method="exact")), abs=1e-4
    )


def test_rows_that_never_differ_leave_doubt_to_both_sides():
    same = column([1, 0, 1, 1, 0] * 20, range(100))
    (one,) = estimate([same, column([1, 0, 1, 1, 0] * 20, range(100))], np.array([[1, -1]]), 500).estimates
    assert (one.value, one.low) == (0, -one.high)
    assert one.high == pytest.approx(stats.binomtest(0, 100).proportion_ci(method="exact").high)


def test_one_image_says_nothing():
    single, many = column([1, 1, 0, 1], [0, 0, 0, 0]), column([1, 0] * 20, range(40), "other")
    mixes = np.array([[1, 0], [0.5, 0.5], [1, 0]])
    alone, average, _ = estimate([single, many], mixes, 500).estimates
    assert (alone.value, alone.low, alone.high) == (0.75, 0, 1)
    assert (average.value, average.low, average.high) == (0.625, 0, 1)
    (only,) = estimate([single], np.ones((1, 1)), 500).estimates
    assert (only.value, only.low, only.high, only.n) == (0.75, 0, 1, 4)


def test_a_task_of_which_a_column_has_few_questions():
    """Some resamples have none of them."""
    few = Column("t", np.array([1.0, 0, 0, 0, 0, 0]), np.array([2.0, 0, 0, 0, 0, 1]))
    (one,) = estimate([few], np.ones((1, 1)), 500).estimates
    assert one.value == pytest.approx(1 / 3)
    assert 0 <= one.low <= one.value <= one.high <= 1


def test_seeds_are_drawn_too():
    generator = np.random.default_rng(9)
    base = (generator.random(300) < 0.5).astype(float)
    levels = [np.where(generator.random(300) < share, 1.0, base) for share in (0.0, 0.3, 0.6)]
    columns = [column(level, range(300), seed=Seed("p", place, 3)) for place, level in enumerate(levels)]
    fixed = [column(level, range(300)) for level in levels]
    mix = np.full((1, 3), 1 / 3)
    seeded, unseeded = estimate(columns, mix, 2_000).estimates[0], estimate(fixed, mix, 2_000).estimates[0]
    assert seeded.value == pytest.approx(unseeded.value) == np.mean(levels)
    assert seeded.half > 1.5 * unseeded.half


def test_a_column_without_questions_is_an_error():
    with pytest.raises(ValueError, match="without questions"):
        estimate([Column("t", np.zeros(3), np.zeros(3))], np.ones((1, 1)))


def test_it_covers():
    generator, held, rounds = np.random.default_rng(11), 0, 300
    images = np.arange(240) // 4
    for _ in range(rounds):
        ease = generator.beta(2, 1, 60)  # of mean 2/3
        scores = (generator.random(240) < ease[images]).astype(float)
        (one,) = estimate([column(scores, images)], np.ones((1, 1)), 499).estimates
        held += one.low <= 2 / 3 <= one.high
    assert held / rounds > 0.91  # four standard errors under 95 % would be 0.90
