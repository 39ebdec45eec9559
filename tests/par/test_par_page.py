"""docs/par.md says which options a recipe has, and their defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import yaml

from prunekit.training.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "par.md"
ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| (.+?) \| .+ \|$", re.M)


def test_the_page_has_every_option_of_a_recipe_and_its_default() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("Every option of the recipe")[2].partition("\n\n## ")[0]
    told = {}
    for names, cell in ROW.findall(table.partition("\n### ")[0]):
        options = re.findall(r"`(\w+)`", names)
        defaults = [yaml.safe_load(text) for text in re.findall(r"`([^`]+)`", cell)]
        told.update({name: defaults[place : place + 1] for place, name in enumerate(options)})
    fields = {field.name: field.default for field in dataclasses.fields(Recipe)}
    assert set(told) == set(fields)
    # What has no value of its own is told in words.
    said = {name: float(told[name][0]) if isinstance(value, float) else told[name][0]
            for name, value in fields.items() if value is not None}  # fmt: skip
    assert said == {name: value for name, value in fields.items() if value is not None}
