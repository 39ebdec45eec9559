"""The study of budgets of risk: splits by hand, and a page that holds what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from prunekit_evals.studies.risk import __main__ as command
from prunekit_evals.studies.risk import replay

from prunekit.pipeline import risk


def prompts(many: int, seed: int = 0) -> replay.Prompts:
    """Three rungs below the dense one; harder prompts have larger harms and differ sooner."""
    generator = np.random.default_rng(seed)
    hard = generator.random(many)
    harms = np.stack([np.zeros(many), *(hard * depth for depth in (0.3, 0.6, 1.0))], 1)
    differs = np.stack([np.zeros(many, bool), *(generator.random(many) < hard**4 * d for d in (0.1, 0.4, 0.8))], 1)
    return replay.Prompts(harms, differs, np.tile([1.0, 0.7, 0.5, 0.3], (many, 1)))


def test_a_split_by_hand():
    made, everything = prompts(200), prompts(60, seed=1)
    (split,) = replay.replay(made, 0.1, everything, splits=1)
    drawn = np.random.default_rng(0).permutation(200)
    one, other = drawn[:100], drawn[100:]

    def first(row):
        return next((made.harms[row, rung] for rung in range(4) if made.differs[row, rung]), np.inf)

    limit = risk.threshold(sorted(map(first, one)), 0.1, replay.CONFIDENCE)
    taken = [max(rung for rung in range(4) if rung == 0 or made.harms[row, rung] < limit) for row in other]
    assert split.differ == pytest.approx(made.differs[other, taken].mean())
    assert split.flops == pytest.approx(np.mean([[1.0, 0.7, 0.5, 0.3][rung] for rung in taken]))
    assert split.rungs == pytest.approx([taken.count(rung) / 100 for rung in range(4)])
    certified = 0
    for rung in range(1, 4):
        if sum(made.differs[row, : rung + 1].any() for row in one) < risk.allowed(100, 0.1, replay.CONFIDENCE):
            certified = rung
    assert split.fixed_flops == pytest.approx([1.0, 0.7, 0.5, 0.3][certified])
    assert split.fixed_differ == pytest.approx(made.differs[other, certified].mean())


def test_fixed_budgets_of_equal_agreement():
    """Between two rungs, shared out by chance; the cheapest of all that agree as often."""
    differs = np.zeros((10, 3), bool)
    differs[:2, 1], differs[:6, 2] = True, True
    made = replay.Prompts(np.zeros((10, 3)), differs, np.tile([1.0, 0.6, 0.4], (10, 1)))
    assert replay._equal(made, 0.0) == 1.0
    assert replay._equal(made, 0.2) == pytest.approx(0.6)
    assert replay._equal(made, 0.1) == pytest.approx(0.8)
    assert replay._equal(made, 0.4) == pytest.approx(0.5)
    assert replay._equal(made, 0.9) == pytest.approx(0.4)


def test_the_page_holds_what_was_measured():
    """`python -m prunekit_evals.studies.risk write` changes nothing."""
    page = (command.DOCS / "risk.md").read_text(encoding="utf-8")
    assert command.files() and command.written(page, command.files()) == page


def test_a_page_without_the_place_is_told(tmp_path):
    with pytest.raises(ValueError, match="the page has no <!-- x -->"):
        command.written("nothing", {"x": tmp_path})
