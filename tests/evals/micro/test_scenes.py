from collections import Counter

import numpy as np
from prunekit_evals.micro.compose import CELL
from prunekit_evals.micro.lexicon import NOUNS, THEME_OF
from prunekit_evals.micro.scenes import FAMILIES, ask, patch_owner, questions, scene


def test_a_seed_is_a_scene():
    first, again, other = scene(7), scene(7), scene(8)
    assert first.objects == again.objects
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    assert questions(first, 3) == questions(again, 3)


def test_pictures_hold_distinct_things_each_in_its_own_cell():
    for seed in range(60):
        shown = scene(seed)
        assert shown.image.shape == (168, 168, 3)
        assert shown.image.dtype == np.uint8
        nouns = [t.noun for t in shown.objects]
        assert 3 <= len(nouns) == len(set(nouns)) <= 6
        cells = {(t.box[0] // CELL, t.box[1] // CELL) for t in shown.objects}
        assert len(cells) == len(nouns)
        for left, top, size in (t.box for t in shown.objects):
            assert left // CELL == (left + size - 1) // CELL
            assert top // CELL == (top + size - 1) // CELL


def test_every_thing_owns_patches_and_most_are_background():
    share = []
    for seed in range(60):
        shown = scene(seed)
        owner = patch_owner(shown)
        assert set(owner) == {-1, *range(len(shown.objects))}
        share.append((owner >= 0).mean())
    assert 0.1 < np.mean(share) < 0.4


def test_popular_nouns_lead_their_theme():
    seen = Counter(t.noun for seed in range(400) for t in scene(seed).objects)
    assert seen["dog"] > 2 * seen["whale"]
    assert set(seen) == set(NOUNS)


def test_yes_and_no_and_the_letters_are_balanced():
    answers: dict[str, Counter] = {name: Counter() for name in FAMILIES}
    for seed in range(400):
        shown, rng = scene(seed), np.random.default_rng(seed)
        for name in FAMILIES:
            question = ask(shown, rng, name)
            if question:
                answers[name][question.answer] += 1
    for name in ("existence", "verify_color", "verify_place"):
        assert abs(answers[name]["Yes"] - 200) < 50
    for name, counts in answers.items():
        if name.startswith(("choice", "hint")):
            assert set(counts) == set("ABCD")
            assert max(counts.values()) < 1.5 * sum(counts.values()) / 4


def test_answers_are_true_of_the_scene():
    for seed in range(100):
        shown, rng = scene(seed), np.random.default_rng(seed)
        things = {t.noun: t for t in shown.objects}
        existence = ask(shown, rng, "existence")
        noun = existence.text.split(" in ")[0].split()[-1]
        assert (noun in things) == (existence.answer == "Yes")
        color = ask(shown, rng, "color")
        assert things[color.text[:-1].split()[-1]].color == color.answer
        hint = ask(shown, rng, "hint_color")
        if hint:
            wanted = hint.hint[:-1].split()[-1]
            right = [t.noun for t in shown.objects if t.color == wanted]
            assert right == [hint.choices["ABCD".index(hint.answer)]]


def test_the_theme_question_needs_picture_and_context():
    for seed in range(80):
        shown = scene(seed)
        question = ask(shown, np.random.default_rng(seed), "hint_theme")
        if question is None:
            continue
        right = question.choices["ABCD".index(question.answer)]
        present = {t.noun for t in shown.objects}
        kin = [c for c in question.choices if THEME_OF[c] == THEME_OF[right]]
        assert len(kin) == 2
        assert [c for c in kin if c in present] == [right]
        assert any(c in present for c in question.choices if c != right)
