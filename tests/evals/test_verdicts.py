"""Which differences hold: tests and corrections beside naive twins, and how often equal rows are called unequal."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prunekit_evals.compare import judging, verdicts
from prunekit_evals.compare.judging import Comparison, Contender, judge, sentences
from prunekit_evals.compare.stats import Estimate
from prunekit_evals.compare.verdicts import confidence_set, discordant, holm, mcnemar


def naive_holm(values):
    """Rank by rank: each p times the hypotheses not yet rejected, never below one that is smaller."""
    fixed, so_far = [None] * len(values), 0.0
    left = list(enumerate(values))
    while left:
        place, p = min(left, key=lambda one: one[1])
        so_far = max(so_far, min(1.0, p * len(left)))
        fixed[place] = so_far
        left.remove((place, p))
    return fixed


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_against_a_naive_twin(values):
    assert holm(values) == pytest.approx(naive_holm(values))


def test_holm_against_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_against_the_sum_of_binomials(wins, losses):
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert mcnemar(wins, losses) == pytest.approx(min(1.0, 2 * tail))


def test_discordant_images():
    assert discordant(np.array([1.0, -2.0, 0.0, 0.5, 1e-12])) == (2, 1)


def test_the_best_rows():
    generator = np.random.default_rng(2)
    noise = generator.normal(0, 0.01, (4, 4_000))
    values = [0.80, 0.79, 0.60, 0.795]
    assert confidence_set(values, np.array(values)[:, None] + noise) == [0, 1, 3]
    assert confidence_set([0.8], noise[:1]) == [0]


def test_the_best_of_rows_that_do_not_vary():
    still = np.tile(np.array([[0.5], [0.5], [0.4]]), 100)
    assert confidence_set([0.5, 0.5, 0.4], still) == [0, 1]
    assert confidence_set([0.5, 0.5], still[:2]) == [0, 1]


def test_the_best_is_rarely_left_out():
    """All rows are equally good, so each is a best one: the set should lack none of them in 95 % of all tables."""
    generator, rounds = np.random.default_rng(4), 400
    whole = 0
    for _ in range(rounds):
        values = generator.normal(0, 0.01, 6)
        whole += len(confidence_set(values, values[:, None] + generator.normal(0, 0.01, (6, 500)))) == 6
    assert 0.91 < whole / rounds < 0.99


# Tables of equal rows: 60 images with six questions each, which an image makes right or wrong together.
IMAGES, ASKED, ROWS, TABLES = 60, 6, 4, 1_000


def equal_rows(generator):
    """Scores (rows, images, questions): how well a row sees an image is its own luck, alike for all its questions."""
    luck = generator.beta(0.7, 0.4, (ROWS, IMAGES, 1))
    return (generator.random((ROWS, IMAGES, ASKED)) < luck).astype(float)


def false_wins(scores):
    """How many tables name a winner when images are drawn, and when each question is taken for a draw of its own."""
    by_image = scores.sum(2)
    flat = scores.reshape(ROWS, -1)
    corrected = [holm([mcnemar(*discordant(one - all_[0])) for one in all_[1:]]) for all_ in (by_image, flat)]
    return [min(values) <= verdicts.ALPHA for values in corrected]


def test_equal_rows_are_rarely_called_unequal():
    generator = np.random.default_rng(13)
    clustered, question_by_question = np.mean([false_wins(equal_rows(generator)) for _ in range(TABLES)], 0)
    assert clustered <= 0.05
    assert question_by_question > 0.2  # what the clusters would do to a test that does not know of them


def contender(name, scores, dense=False, random=False, flops=0.25):
    levels = tuple({number: float(score) for number, score in enumerate(level.ravel())} for level in scores)
    return Contender(name, dense, random, 1.0 if dense else flops, {"t": levels})


def test_the_whole_way_rarely_calls_equal_rows_unequal(monkeypatch):
    """Intervals, seeds and all, in 100 tables."""
    monkeypatch.setattr(judging.clustered, "RESAMPLES", 499)
    generator = np.random.default_rng(17)
    images = {"t": {number: str(number // ASKED) for number in range(IMAGES * ASKED)}}
    named = 0
    for _ in range(100):
        drawn = equal_rows(generator)
        rows = [contender("dense", drawn[:1], dense=True), contender("random", drawn[1:3], random=True)]
        found, _ = judge([*rows, contender("p", drawn[3:])], ["t"], images)
        compared = [one for row in found.values() for one in (row.to_dense, row.to_random) if one]
        assert len(compared) == 3
        named += any(one.holds for one in compared)
    assert named <= 8  # 5 are expected at most, and more than 8 would come up in 6 % of such hundreds


def test_a_row_that_is_better_is_called_so():
    generator = np.random.default_rng(19)
    base = generator.random((1, 200)) < 0.5
    better = base | (generator.random((1, 200)) < 0.3)
    images = {"t": {number: str(number) for number in range(200)}}
    rows = [contender("dense", better, dense=True), contender("random", base, random=True), contender("p", better)]
    found, best = judge(rows, ["t"], images)
    assert found["p"].to_random.holds == 1 and found["p"].to_random.other == "random"
    assert found["p"].to_dense.holds == 0 and found["p"].to_dense.p == 1
    assert found["random"].to_dense.holds == -1 and found["random"].to_random is None
    assert sentences(found, best) == (
        "dense beats random; p beats random (5 %, after Holm's correction over 3 comparisons)",
        "only p can be the best pruned row (95 % model confidence set)",
    )


def test_random_counts_only_at_the_same_cost():
    scores = np.ones((1, 20))
    images = {"t": {number: str(number) for number in range(20)}}
    rows = [contender("cheap", scores, random=True, flops=0.1), contender("near", scores, random=True, flops=0.251)]
    rows += [contender("p", scores), contender("q", scores, flops=0.5), contender("r", scores, flops=None)]
    found, best = judge(rows, ["t"], images)
    assert found["p"].to_random.other == "near"
    assert found["q"].to_random is found["r"].to_random is found["p"].to_dense is None
    assert best == ("cheap", "near", "p", "q", "r")
    assert "no row beats another (5 %, in the one comparison)" in sentences(found, best)


def test_seeds_that_contradict_each_other_show_nothing():
    up, down = np.ones(100), np.zeros(100)
    half = np.arange(100) % 2
    images = {"t": {number: str(number) for number in range(100)}}
    rows = [contender("dense", half[None], dense=True), contender("p", np.stack([up, down]))]
    found, _ = judge(rows, ["t"], images)
    assert found["p"].seeds == (1.0, 0.0)
    assert found["p"].to_dense.p == 1 and found["p"].to_dense.holds == 0
    rows[1] = contender("p", np.stack([up, up]))
    assert judge(rows, ["t"], images)[0]["p"].to_dense.holds == 1


def test_questions_that_one_row_lacks_are_in_no_difference():
    images = {"t": {number: str(number) for number in range(40)}}
    dense = contender("dense", np.ones((1, 40)), dense=True)
    part = Contender("p", False, False, 0.25, {"t": (dict.fromkeys(range(30), 0.0),)})
    nothing = Contender("q", False, False, 0.25, {})
    found, _ = judge([dense, part], ["t"], images)
    assert (found["p"].to_dense.difference.n, found["p"].to_dense.losses) == (30, 30)
    assert (found["dense"].average.n, found["p"].average.n) == (40, 30)
    found, best = judge([dense, part, nothing], [], images)
    assert (found["q"].average, found["q"].to_dense, found["q"].tasks, best) == (None, None, {}, ())


@pytest.mark.parametrize(
    ("corrected", "low", "high", "wins", "losses", "holds"),
    [
        (0.01, 0.1, 0.3, 20, 3, 1),
        (0.01, -0.3, -0.1, 3, 20, -1),
        (0.06, 0.1, 0.3, 20, 3, 0),  # not after correction
        (0.01, -0.1, 0.3, 20, 3, 0),  # the interval does not agree
        (0.01, 0.1, 0.3, 3, 20, 0),  # more images are lost, though more questions are won
    ],
)
def test_test_and_interval_must_agree(corrected, low, high, wins, losses, holds):
    one = Comparison("dense", Estimate((low + high) / 2, low, high, 100), wins, losses, 0.001, corrected)
    assert one.holds == holds


def test_one_row_against_any_others_is_corrected_over_these_alone():
    ours, worse = np.arange(60)[None] % 10 > 0, np.arange(60)[None] % 4 > 1
    rows = [contender("ours", ours), contender("worse", worse), contender("same", ours)]
    images = {"t": {number: str(number) for number in range(60)}}
    found, _ = judge([contender("worse", worse, dense=True), rows[0]], ["t"], images)
    (alone,) = judging.against(rows[0], rows[1:2], ["t"], images)
    assert alone == found["ours"].to_dense and alone.holds == 1
    both = judging.against(rows[0], rows[1:], ["t"], images)
    assert [one.other for one in both] == ["worse", "same"] and [one.holds for one in both] == [1, 0]
    assert [one.corrected for one in both] == holm([one.p for one in both]) and both[0].corrected > alone.corrected
    assert both[1].difference.value == 0 and both[1].difference.low < 0 < both[1].difference.high
