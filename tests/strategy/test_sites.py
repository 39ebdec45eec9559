"""Sites as authors write them in code."""

from __future__ import annotations

from typing import Any

import pytest

from prunekit import ENCODER, Site


def test_a_number_is_a_layer_and_none_the_decoder_input() -> None:
    assert (str(Site(2)), Site(None)) == ("2", ENCODER)


@pytest.mark.parametrize("layer", [-1, "2", True, 1.5])
def test_what_is_no_layer(layer: Any) -> None:
    with pytest.raises(ValueError, match="whole numbers from 0"):
        Site(layer)


@pytest.mark.parametrize("made", [lambda: Site(3, "vision"), lambda: Site(None, "vision", "after")])
def test_a_tower_site_says_its_block_and_its_point(made: Any) -> None:
    """A block has no place before it that the one in front has not behind it; such a cut would never happen."""
    with pytest.raises(ValueError, match="'mid' or 'after' a block"):
        made()
    assert Site(3, "vision", "after") == Site.parse("vision.3")
