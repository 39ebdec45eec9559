"""The card of prunekit-smol says what was measured."""

import json

import pytest
from prunekit_evals.bench.cpu import into
from prunekit_evals.micro.card_tables import percent
from prunekit_evals.studies.smol import card, card_tables, record


@pytest.fixture(scope="module")
def measured():
    return record.load(card.MEASURED)


def test_the_page_is_that_of_what_was_measured(measured):
    """Else: python -m prunekit_evals.studies.smol.card. Tables of many intervals take seconds; of these the means."""
    page, curve = card.PAGE.read_text(), card_tables.lines(card.CURVE)
    quick = {"accuracy": card_tables.accuracy(measured), "curve": card_tables.curve(curve),
             "stages": card_tables.stages(curve)}  # fmt: skip
    assert into(page, quick) == page
    for name, mean in means(measured.since(measured.calibration)).items():
        if ": " in name:
            assert f"| {name.removeprefix('skip ').replace(': ', ' | ')} | {percent(mean)} |" in page
    for name, mean in means(measured).items():
        if name.startswith("skip ") and ": " not in name:
            assert f"| {name.removeprefix('skip ')} | {percent(mean)} |" in page
        elif name.startswith("keep "):
            _, count, _, layer, how = name.split()
            assert f"| {layer} | {count} | {how} | {percent(mean)} |" in page


def means(one):
    return {name: (right.sum(1) / one.asked.sum(1)).mean() for name, right in one.right.items()}


def test_answers_are_read_back(measured):
    told = json.loads(card.MEASURED.read_text())["rows"]
    assert means(measured) == pytest.approx({name: row["mean"] for name, row in told.items()})


def test_differences_are_paired(measured):
    (none,) = measured.differences([("dense", "dense")])
    assert none.value == 0 and none.half < 0.03
    (cost,) = measured.differences([("skip 11", "dense")])
    assert cost.value == pytest.approx(means(measured)["skip 11"] - means(measured)["dense"])
    assert cost.low < cost.value < cost.high < -0.2


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="<!-- tokens -->"):
        into("nothing", {"tokens": ""})
