"""What people type in place of numbers and sites, what they are told to write, and that it is right."""

from __future__ import annotations

from pathlib import Path

import pytest

import prunekit
from prunekit.errors import SpecError

STAGE = "stages:\n  - use: fastv\n    at: 2\n    keep: 0.5\n"


def told(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        prunekit.load(path)
    return str(caught.value).replace(str(path), "F")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("50%", "(write 0.5)"), ("12.5 %", "(write 0.125)"), ("0,5", "(write 0.5)"), ("1/3", "(write 0.3333)"),
        ('"0.5"', "(remove the quotes)"), ('".5"', "(remove the quotes)"), ("50", "divide by 100"), ("0%", None),
        ("150%", None), ("1/0", None), ("3/2", None), ("half", None), ("2,5", None),
    ],
)  # fmt: skip
def test_fractions(tmp_path: Path, typed: str, hint: str | None) -> None:
    said = told(tmp_path, STAGE.replace("0.5", typed))
    assert "F:4:11: stages[0].keep: must be a fraction in (0, 1], not " in said
    assert hint in said if hint else "(write" not in said and "quotes" not in said


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("layer_2", "(write 2)"), ("layer 12", "(write 12)"), ("layers.2", "(write 2)"), ("L2", "(write 2)"),
        ('"[2]"', "(write 2)"), ("before layer 2", "(write 2)"), ("-2", "of 32 layers -2 is 30"), ("-40", None),
        ("true", None), ("layer", None), ("encodr", "did you mean 'encoder'?"),
    ],
)  # fmt: skip
def test_sites(tmp_path: Path, typed: str, hint: str | None) -> None:
    said = told(tmp_path, STAGE.replace("at: 2", f"at: {typed}"))
    assert "F:3:9: stages[0].at: " in said and "is not a site" in said
    assert hint in said if hint else "(write" not in said


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("24-28", "[24, 25, 26, 27, 28]"), ("24..26", "[24, 25, 26]"), ("24 to 26", "[24, 25, 26]"),
        ("1-99", "[1, 2, ..., 99]"), ("24, 25", "write [24, 25]"), ("24 25", "write [24, 25]"), ("24", "write [24]"),
        ("[24-26]", "24, 25, 26)"), ("[24.0]", "write 24)"), ("['24']", "remove the quotes"), ("28-24", None),
        ("all", None),
    ],
)  # fmt: skip
def test_lists_of_layers(tmp_path: Path, typed: str, hint: str | None) -> None:
    said = told(tmp_path, f"stages:\n  - use: skip_layers\n    layers: {typed}\n")
    assert "stages[0].layers" in said and "whole number" in said
    assert hint in said if hint else "write" not in said


@pytest.mark.parametrize(("typed", "hint"), [("36.0", "(write 36)"), ("'36'", "(remove the quotes)"), ("36.5", None)])
def test_tokens(tmp_path: Path, typed: str, hint: str | None) -> None:
    said = told(tmp_path, STAGE.replace("keep: 0.5", f"keep_tokens: {typed}"))
    assert hint in said if hint else "write" not in said


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        (STAGE.replace("keep: 0.5", "keep:0.5"), "F:4:5", "put a blank after the colon: `keep: 0.5`"),
        (STAGE.replace("- use: fastv", "-use: fastv"), "F:3:", "put a blank after the dash: `- use: fastv`"),
        (STAGE.replace("    at", "   at"), "F:3:4", "here 4, in the line before 5"),
        (STAGE.replace("    at", "      at"), "F:3:9", "here 7, in the line before 5"),
        (STAGE.replace("    keep", "  keep"), "F:4:3", "here 3, in the line before 5"),
        (STAGE.replace("    at", "\tat"), "F:3:1", "indent with blanks"),
    ],
)
def test_text_that_is_no_yaml(tmp_path: Path, text: str, place: str, hint: str) -> None:
    said = told(tmp_path, text)
    assert place in said and "not YAML: " in said and hint in said


def test_what_is_said_loads(tmp_path: Path) -> None:
    for keep in ("0.5", "0.125", "0.3333"):
        assert prunekit.load(STAGE.replace("0.5", keep)).name
    assert prunekit.load("stages:\n  - use: skip_layers\n    layers: [24, 25, 26]\n").name
