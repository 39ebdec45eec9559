"""Calibration and held-out questions: disjoint by image over all tasks, whole images, drawn by the seed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prunekit_evals.search.split import levels_of, rungs, split

from prunekit.errors import InputError

QUESTIONS = st.lists(st.frozensets(st.sampled_from("abcdefghijkl"), max_size=2), min_size=1, max_size=30)


@given(st.dictionaries(st.sampled_from(("pope", "gqa")), QUESTIONS, min_size=1), st.integers(1, 6), st.integers(1, 6),
       st.integers(0, 3))  # fmt: skip
def test_no_image_is_on_both_sides(shown, calibration, held_out, seed):
    try:
        made = split(shown, calibration, held_out, seed)
    except InputError as error:
        assert "ask for fewer" in str(error)
        return
    seen = []
    for side, least in ((made.calibration, calibration), (made.held_out, held_out)):
        numbers = {task: [number for image in part for number in image] for task, part in side.items()}
        assert all(len(set(ours)) == len(ours) >= least for ours in numbers.values())
        seen.append({image for task, ours in numbers.items() for number in ours for image in shown[task][number]})
        for task, ours in numbers.items():  # an image comes with all its questions about this task
            images = {image for number in ours for image in shown[task][number]}
            assert {number for number, of in enumerate(shown[task]) if of & images} <= set(ours)
    assert not seen[0] & seen[1]
    assert split(shown, calibration, held_out, seed) == made


def test_the_seed_draws_the_images():
    shown = {"pope": [frozenset({f"image {number // 2}"}) for number in range(60)]}
    parts = {seed: split(shown, 10, 10, seed) for seed in range(4)}
    assert len({str(part) for part in parts.values()}) == 4
    assert {len(image) for image in parts[0].calibration["pope"]} == {2}


def test_too_few_questions_are_told_with_their_numbers():
    shown = {"pope": [frozenset({"one"})] * 9 + [frozenset({"two"})] * 3}
    with pytest.raises(
        InputError, match=r"'pope' has 12 questions about 2 images: .*(9|12) can be.*(3|0) held out, not 5 and 5"
    ):
        for seed in range(8):  # whichever image comes first
            split(shown, 5, 5, seed)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=60), st.integers(2, 4))
def test_rungs_grow_by_the_factor_and_split_no_image(sizes, factor):
    numbers = iter(range(sum(sizes)))
    part = tuple(tuple(next(numbers) for _ in range(size)) for size in sizes)
    levels = levels_of(sum(sizes), factor)
    added = rungs(part, levels, factor)
    assert [number for rung in added for number in rung] == list(range(sum(sizes)))
    asked = 0
    for level, rung in enumerate(added):
        asked += len(rung)
        wanted = sum(sizes) / factor ** (levels - 1 - level)
        assert wanted <= asked < wanted + 1 + max(sizes)
    ends = {sum(sizes[:count]) for count in range(len(sizes) + 1)}
    assert {sum(map(len, added[: level + 1])) for level in range(levels)} <= ends
    assert levels == 1 or len(added[0]) >= 10
