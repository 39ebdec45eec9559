"""Sites as authors write them in code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit import ENCODER, Site, Sites
from prunekit.errors import PluginError
from prunekit.strategy.sites import PLACES, POINTS


def test_a_number_is_a_layer_and_none_the_decoder_input() -> None:
    assert (str(Site(2)), Site(None)) == ("2", ENCODER)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a point in the place": (lambda: Site(2, any_("after")), "write Site(2, 'layer', 'after'), or Site.parse('2."),
    "a place": (lambda: Site(2, any_("layr")), "'layr' is no place; did you mean 'layer'? it is 'pixels',"),
    "a point": (lambda: Site(2, "layer", any_("aftr")), "'aftr' is no point; did you mean 'after'? it is 'before',"),
    "a list as point": (lambda: Site(2, "layer", any_(["mid"])), "['mid'] is no point; it is 'before', 'mid' or 'aft"),
    "no layer": (lambda: Site(None, "layer"), "a site at a layer has its number (write Site(2))"),
    "a layer of the encoder": (lambda: Site(2, "encoder"), "'encoder' has neither layers nor points (write Site(None,"),
    "a point of the encoder": (lambda: Site(None, "encoder", "mid"), "'encoder' has neither layers nor points"),
    "a layer of the pixels": (lambda: Site(0, "pixels"), "(write Site(None, 'pixels'))"),
    "before a block": (lambda: Site(3, "vision"), "'mid' or 'after' a block (write Site.parse('vision.3'))"),
    "no block": (lambda: Site(None, "vision", "after"), "'mid' or 'after' a block (write Site.parse('vision.0'))"),
    "from the end": (lambda: Site(-1), "layers are whole numbers from 0 (layers are counted from the first one, 0: of"),
    "text": (lambda: Site(any_("2.after")), "layers are whole numbers from 0 (write Site.parse('2.after'))"),
    "a layer in words": (lambda: Site(any_("layer 3")), "(write Site(3))"),
    "the encoder in words": (lambda: Site(any_("encoder")), "(write Site.parse('encoder'))"),
    "a flag": (lambda: Site(True), "Site(True): layers are whole numbers from 0"),
    "a fraction": (lambda: Site(any_(1.5)), "Site(1.5): layers are whole numbers from 0"),
    "a number by default": (lambda: Sites(default=any_(2)), "(write Sites(default=Site(2)))"),
    "words by default": (lambda: Sites(default=any_("2.mid")), "it takes a Site, or a function from the number of "
                         "layers to one (write Site.parse('2.mid'))"),
    "nothing by default": (lambda: Sites(default=any_(None)), "it takes a Site, or a function from the number of"),
    "several by default": (lambda: Sites(default=any_([Site(2)])), "it takes one Site; several sites are a schedule"),
    "a function of nothing": (lambda: Sites(default=any_(lambda: Site(2))), "it is called with the number of decoder"),
    "a default in a tower": (lambda: Sites(default=Site.parse("vision.1")), "'vision.1' is not allowed: it needs "
                             "'encoder' or a decoder layer, 0 or later (say tower=True)"),
    "a default too low": (lambda: Sites(default=Site(2), lowest=3), "'2' is not allowed: it needs layer 3 or later"),
    "a default of another point": (lambda: Sites(default=Site(2), points=("after",)), "'2' is not allowed: it needs"),
    "a point in words": (lambda: Sites(points=any_("mid")), "it is a tuple of 'before', 'mid', 'after'"),
    "a misspelt point": (lambda: Sites(points=any_(("midd",))), "did you mean 'mid'? it is a tuple of"),
    "no point": (lambda: Sites(points=()), "it is a tuple of 'before', 'mid', 'after'"),
    "the lowest in words": (lambda: Sites(lowest=any_("2")), "Sites(lowest='2'): it is the number of a decoder layer"),
    "the lowest from the end": (lambda: Sites(lowest=-1), "Sites(lowest=-1): it is the number of a decoder layer, fro"),
    "a flag in words": (lambda: Sites(tower=any_("yes")), "Sites(tower='yes'): it is True or False"),
}  # fmt: skip


def any_(value: object) -> Any:
    """A value that the type does not allow."""
    return value


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_site_is_said_where_it_is_written(name: str) -> None:
    make, said = WRONG[name]
    with pytest.raises(ValueError) as caught:
        make()
    assert said in str(caught.value), caught.value


@given(
    st.sampled_from([None, 0, 3, -1, True, "2", "encoder"]),
    st.sampled_from(["", *PLACES, "before", "mid", "after", "tower", None]),
    st.sampled_from([*POINTS, "", "end", None]),
)
def test_what_is_accepted_can_be_written_and_read_again(layer: Any, place: Any, point: Any) -> None:
    """Whatever the constructor takes is one of the sites of the table, and everything else is a ValueError."""
    try:
        site = Site(layer, place, point)
    except ValueError:
        return
    assert Site.parse(int(str(site)) if str(site).isdigit() else str(site)) == site
    assert Sites().reason_against(site) is None or site.place in ("pixels", "vision", "prefill_end")


def test_a_function_that_fails_is_told_as_the_plugin_s() -> None:
    with pytest.raises(PluginError, match=r"the function Sites\(default=...\) failed with ZeroDivisionError"):
        Sites(default=lambda layers: Site(layers // 0)).resolve(4)
