from collections import Counter

import numpy as np
from prunekit_evals.micro.compose import CLEAR, MARGIN
from prunekit_evals.micro.letters import ink
from prunekit_evals.micro.lexicon import NOUNS, SIGNS, THEME_OF
from prunekit_evals.micro.questions import HOPS
from prunekit_evals.micro.scenes import FAMILIES, ask, patch_owner, questions, scene


def test_a_seed_is_a_scene():
    first, again, other = scene(7), scene(7), scene(8)
    assert first.objects == again.objects
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    assert questions(first, 3) == questions(again, 3)


def test_pictures_hold_distinct_things_anywhere_but_never_over_each_other():
    lefts, widths = set(), set()
    for seed in range(150):
        shown = scene(seed)
        assert shown.image.shape == (168, 168, 3)
        assert shown.image.dtype == np.uint8
        assert 3 <= len(shown.objects) <= 5
        assert len(shown.signs) <= 2
        names = [t.noun for t in shown.things]
        assert len(names) == len(set(names))
        assert len({t.color for t in shown.signs}) == len(shown.signs)
        taken = np.zeros((168, 168), int)
        for left, top, width, height in (t.box for t in shown.things):
            assert left >= 0 and top >= 0 and left + width <= 168 and top + height <= 168
            taken[top : top + height, left : left + width] += 1
            lefts.add(left)
            widths.add(width)
        assert taken.max() == 1
    assert {left % 14 for left in lefts} == set(range(14))  # no lattice
    assert len(widths) > 10


def test_every_thing_owns_patches_and_most_are_background():
    share = []
    for seed in range(60):
        shown = scene(seed)
        owner = patch_owner(shown)
        assert set(owner) == {-1, *range(len(shown.things))}
        share.append((owner >= 0).mean())
    assert 0.2 < np.mean(share) < 0.45


def test_words_are_legible():
    """Letters stand dark on a plate: a word's own ink explains its plate better than any other word's does."""
    tried = 0
    for seed in range(80):
        shown = scene(seed)
        for sign in shown.signs:
            left, top, width, height = sign.box
            plate = shown.image[top : top + height, left : left + width].astype(float).mean(-1)
            inside = plate[MARGIN:-MARGIN, MARGIN:-MARGIN]
            fit = {w: np.corrcoef(inside.ravel(), -ink(w, height - 2 * MARGIN).ravel())[0, 1] for w in SIGNS}
            assert max(fit, key=fit.get) == sign.noun
            assert fit[sign.noun] > 0.95
            tried += 1
    assert tried > 40


def test_popular_nouns_lead_their_theme():
    seen = Counter(t.noun for seed in range(400) for t in scene(seed).objects)
    assert seen["dog"] > 2 * seen["elephant"]
    assert set(seen) == set(NOUNS)


def test_yes_and_no_and_the_letters_are_balanced():
    answers: dict[str, Counter] = {name: Counter() for name in FAMILIES}
    for seed in range(400):
        shown, rng = scene(seed), np.random.default_rng(seed)
        for name in FAMILIES:
            question = ask(shown, rng, name)
            if question:
                answers[name][question.answer] += 1
    for name in ("existence", "verify_color", "verify_place", "verify_word"):
        assert abs(answers[name]["Yes"] - answers[name].total() / 2) < 50
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


def test_questions_of_several_hops_have_one_true_answer():
    asked = Counter()
    for seed in range(150):
        shown, rng = scene(seed), np.random.default_rng(seed)
        things = {t.noun: t for t in shown.things}
        for family in HOPS:
            question = ask(shown, rng, family)
            if question is None:
                continue
            asked[family] += 1
            named = next((w for w in question.text[:-1].split() if w in things), None)
            if family == "kind_by_color":
                hue = question.text[:-1].split()[-1]
                right = [THEME_OF[t.noun] for t in shown.objects if t.color == hue]
            else:
                kin = [t for t in shown.things if t.color == things[named].color and t.noun != named]
                kin = [t for t in kin if (t in shown.signs) == (family == "read_like")]
                value = {"where_same": lambda t: t.place, "kind_same": lambda t: THEME_OF[t.noun]}
                right = [value.get(family, lambda t: t.noun)(t) for t in kin]
            assert right == [question.answer]
            assert question.answer not in question.text
    assert min(asked.values()) > 15


def test_places_are_asked_about_only_beyond_doubt():
    for seed in range(100):
        shown, rng = scene(seed), np.random.default_rng(seed)
        for family in ("where", "choice_where", "verify_place"):
            question = ask(shown, rng, family)
            if question is not None:
                thing = next(t for t in shown.objects if f" {t.noun}" in question.text)
                assert all(abs(m - 84) >= CLEAR for m in thing.middle)
