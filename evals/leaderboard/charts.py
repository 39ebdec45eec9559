"""The plots of a section as Vega-Lite documents, made with Altair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit_evals.leaderboard.points import OTHER, Axis

DATA = "points"  # the name under which the page hands over the data, once for all plots of a section
KINDS = (OTHER, "dense", "random", "pool", "downsample")
SHAPES = ("circle", "diamond", "cross", "square", "triangle-up")
# From Okabe and Ito's colours, which remain apart for every kind of colour vision, on white and on black.
COLORS = ("#3b8fd4", "#009e73", "#d55e00", "#cc79a7", "#b8860b")
LABELS = 70  # % of dense, above which names stand to the left of their points


def pareto(axis: Axis, views: Sequence[str]) -> dict[str, Any]:
    """Accuracy against one cost as a Vega-Lite document on `DATA`; its parameter `view` chooses what is shown."""
    import altair

    view = altair.param(name="view", value=views[0])
    cost = altair.datum[axis.key]
    base = altair.Chart(altair.NamedData(name=DATA)).transform_filter((altair.datum.view == view) & (cost > 0))
    x, y = _near(altair.X, axis.key, axis.title), _near(altair.Y, "accuracy", "accuracy, %")
    front = base.transform_filter(altair.datum[f"{axis.key}_front"])
    named = base.transform_filter(altair.datum[f"{axis.key}_name"])
    layers = [
        front.mark_line(interpolate="step-after", strokeDash=[4, 3], opacity=0.6, color="currentColor").encode(x, y),
        base.mark_rule(opacity=0.5).encode(x, _near(altair.Y, "low"), altair.Y2("high:Q"), color=_kind(altair.Color)),
        base.mark_point(filled=True, size=80, opacity=1).encode(
            x, y, color=_kind(altair.Color), shape=_kind(altair.Shape), tooltip=_tooltip(axis)
        ),
        *(named.transform_filter(part).mark_text(align=align, dx=dx, dy=12, color="currentColor").encode(
            x, y, text="pipeline:N"
        ) for part, align, dx in ((cost <= LABELS, "left", 6), (cost > LABELS, "right", -6))),
    ]  # fmt: skip
    if axis.machine is not None:
        ends = _near(altair.X, f"{axis.key}_low"), altair.X2(f"{axis.key}_high:Q")
        layers.insert(1, base.mark_rule(opacity=0.5).encode(*ends, y, color=_kind(altair.Color)))
    made = altair.layer(*layers).add_params(view).properties(width="container", height=320)
    document: dict[str, Any] = made.configure(**_config()).to_dict(validate=False)  # half a second; the tests draw it
    del document["$schema"]  # an address, which nobody needs to look up
    return document


def _near(channel: Any, field: str, title: str | None = None) -> Any:
    """A channel on a scale that fits the data, with room for names at its ends."""
    import altair

    scale = altair.Scale(zero=False, nice=False, padding=20)
    return channel(field, type="quantitative", scale=scale, **({} if title is None else {"title": title}))


def _kind(channel: Any) -> Any:
    import altair

    looks = COLORS if channel is altair.Color else SHAPES
    legend = altair.Legend(orient="top", title=None, columns=3, symbolOpacity=1)
    return channel("kind:N", scale=altair.Scale(domain=KINDS, range=looks), legend=legend)


def _tooltip(axis: Axis) -> list[Any]:
    import altair

    numbers = {"accuracy": "accuracy, %", "low": "from", "high": "to", axis.key: axis.title}
    return ["pipeline:N", *(altair.Tooltip(f"{key}:Q", title=title) for key, title in numbers.items())]


def _config() -> dict[str, Any]:
    """Letters and lines in the page's own colour, light or dark."""
    own = "currentColor"
    axis = {"labelColor": own, "titleColor": own, "domainColor": own, "tickColor": own, "gridColor": own,
            "gridOpacity": 0.12, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}  # fmt: skip
    return {
        "background": "transparent", "font": "system-ui, sans-serif", "axis": axis, "view": {"stroke": None},
        "legend": {"labelColor": own, "labelFontSize": 12}, "text": {"fontSize": 11},
    }  # fmt: skip
