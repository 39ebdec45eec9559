"""Intervals against textbook values, and by how often they hold."""

import math
import random

import pytest
from prunekit_evals.compare.stats import Estimate, average, paired, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 100, 0.0931, 0.2328), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_against_published_values(hits, n, low, high):
    estimate = wilson([1.0] * hits + [0.0] * (n - hits))
    assert estimate.value == pytest.approx(hits / n)
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_no_scores_is_an_error():
    with pytest.raises(ValueError, match="no scores"):
        wilson([])


def test_paired_takes_the_questions_that_both_answered():
    found = paired({1: 1.0, 2: 0.0, 3: 1.0, 9: 1.0}, {1: 0.0, 2: 0.0, 3: 0.0, 8: 1.0})
    assert (found.n, found.value) == (3, pytest.approx(2 / 3))
    assert paired({1: 1.0}, {2: 1.0}) is None


def test_equal_answers_still_leave_doubt():
    same = dict.fromkeys(range(50), 1.0)
    found = paired(same, same)
    assert found.value == 0
    assert 0.02 < found.high == -found.low < 0.1


def test_it_is_narrower_than_the_intervals_of_the_two():
    generator = random.Random(3)
    dense = {number: float(generator.random() < 0.8) for number in range(400)}
    ours = {number: score if generator.random() < 0.97 else 1 - score for number, score in dense.items()}
    assert paired(ours, dense).half < 0.6 * math.hypot(wilson(ours.values()).half, wilson(dense.values()).half)


@pytest.mark.parametrize(("n", "lost"), [(40, 0.02), (200, 0.05), (200, 0.3)])
def test_paired_covers(n, lost):
    generator = random.Random(n)
    gained, held, rounds = 0.02, 0, 600
    for _ in range(rounds):
        dense, ours = {}, {}
        for number in range(n):
            draw = generator.random()
            dense[number] = 1.0 if draw < lost else 0.0 if draw < lost + gained else float(generator.random() < 0.7)
            ours[number] = 0.0 if draw < lost else 1.0 if draw < lost + gained else dense[number]
        found = paired(ours, dense)
        held += found.low <= gained - lost <= found.high
    assert held / rounds > 0.925


def test_pairs_about_one_picture_count_once():
    dense = dict.fromkeys(range(200), 1.0)
    ours = {number: float(number // 2 % 4 > 0) for number in dense}  # both questions of every fourth picture are lost
    together = {number: str(number // 2) for number in dense}
    alone, grouped = paired(ours, dense), paired(ours, dense, together)
    assert grouped.value == alone.value == pytest.approx(-0.25)
    assert grouped.half == pytest.approx(alone.half * math.sqrt(2), rel=0.02)


def test_average_of_independent_tasks():
    found = average([Estimate(0.5, 0.4, 0.6, 100), Estimate(0.7, 0.6, 0.8, 50)])
    assert (found.value, found.n) == (pytest.approx(0.6), 150)
    assert found.half == pytest.approx(0.1 / math.sqrt(2))
    assert average([]) is None
