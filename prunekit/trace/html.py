"""A figure as one HTML page that needs nothing else: no script, no network, light and dark.

Images are in the page once each, as data; what lies over them are small drawings that tell of each token in words.
"""

from __future__ import annotations

import base64
import io
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from prunekit.trace.boxes import union
from prunekit.trace.colours import JOIN, MARK, NIGHT, code, heat
from prunekit.trace.fates import Fate, Scores, StageMap
from prunekit.trace.figure import Column, Figure, Layer
from prunekit.trace.layer_bars import RUN, summary
from prunekit.trace.surfaces import Surface

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 1024  # pixels of a side of an image in the page
UNIT = 1000  # of the longer side of a drawing
CLASSES = {Fate.KEPT: "k", Fate.MERGED: "m", Fate.DROPPED: "d", Fate.GONE: "g"}
WORDS = {Fate.KEPT: "kept", Fate.MERGED: "merged into the outlined ones", Fate.DROPPED: "dropped here",
         Fate.GONE: "gone before"}  # fmt: skip


def page(figure: Figure) -> str:
    """The page."""
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    pictures = _Pictures(figure)
    columns = "".join(_column(figure, pictures, column) for column in figure.columns)
    named = f"sample {figure.sample}" if figure.sample else ""
    under = ", ".join(part for part in (figure.model, named) if part)
    shown = _panel("what the model is shown", "", _maps(figure, pictures, None, None))
    return template.substitute(
        title=escape(figure.prompt or "keep maps"),
        under=escape(under),
        night=code(NIGHT), mark=code(MARK), join=code(JOIN),
        styles=pictures.styles,
        alone="alone" if len(figure.columns) == 1 else "several",
        shown=f'<section class="column"><h2>&nbsp;</h2>{shown}</section>',
        columns=columns,
        legend=_legend(figure),
        notes="".join(f"<li>{escape(note)}</li>" for note in figure.notes),
    )  # fmt: skip


class _Pictures:
    """The images of a figure as classes of a style sheet, each once. styles: their rules."""

    def __init__(self, figure: Figure) -> None:
        self._names: dict[int, str] = {}
        rules = []
        for surface in figure.surfaces:
            picture = surface.picture
            if picture is not None and id(picture) not in self._names:
                self._names[id(picture)] = name = f"p{len(self._names)}"
                rules.append(f".{name}{{background-image:url({_encoded(picture)})}}")
        self.styles = "\n".join(rules)

    def name(self, surface: Surface) -> str:
        """The class of what lies below a surface."""
        return "plain" if surface.picture is None else self._names[id(surface.picture)]


def _encoded(picture: Image) -> str:
    """As a data URI; photographs as JPEG, drawings with few colours as PNG."""
    shown = picture.convert("RGB")
    shown.thumbnail((LARGEST, LARGEST))
    few = shown.getcolors(256) is not None
    held = io.BytesIO()
    shown.save(held, "PNG" if few else "JPEG", **({} if few else {"quality": 88}))
    return f"data:image/{'png' if few else 'jpeg'};base64,{base64.b64encode(held.getvalue()).decode()}"


def _column(figure: Figure, pictures: _Pictures, column: Column) -> str:
    report = column.report
    saved = f"{report.kept_tokens[figure.sample]} visual tokens left, {report.cost.flops_fraction:.0%} of dense FLOPs"
    panels = []
    for stage in column.stages:
        panels.append(_panel(stage.title, stage.caption, _maps(figure, pictures, stage, None)))
        if (scores := stage.scores) is not None:
            numbers = f"lowest {scores.low:.2g}, median {scores.middle:.2g}, highest {scores.high:.2g}"
            panels.append(_panel(f"scores of {stage.title}", numbers, _maps(figure, pictures, stage, scores), _ramp()))
    answer = "" if column.run.answer is None else f'<p class="answer">answer: {escape(column.run.answer)}</p>'
    head = f'<h2>{escape(report.pipeline)}</h2><p class="pale">{escape(saved)}</p>{answer}'
    none = '<p class="pale">no stage decides about visual tokens</p>'
    body = f'<div class="panels">{"".join(panels) or none}</div>'
    layers = _layers(column.layers, report.visual_tokens[figure.sample])
    return f'<section class="column">{head}{body}<div class="layers">{layers}</div></section>'


def _panel(title: str, caption: str, maps: str, ramp: str = "") -> str:
    words = f"<h3>{escape(title)}</h3>" + (f'<p class="pale">{escape(caption)}</p>' if caption else "")
    return f'<figure class="panel"><figcaption>{words}</figcaption><div class="maps">{maps}</div>{ramp}</figure>'


def _ramp() -> str:
    stops = ",".join(code(heat(step / 9)) for step in range(10))
    return f'<div class="ramp" style="background:linear-gradient(90deg,{stops})"></div>'


def _maps(figure: Figure, pictures: _Pictures, stage: StageMap | None, scores: Scores | None) -> str:
    surfaces = figure.surfaces
    across = 1 if len(surfaces) == 1 else 2 if len(surfaces) <= 6 else 4
    drawn = []
    for surface in surfaces:
        width, height = _extent(surface)
        cells = _cells(surface, stage, scores, width, height)
        label = escape(surface.title, quote=True)
        drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{cells}</svg>'
        ground = f'<div class="map {pictures.name(surface)}" style="aspect-ratio:{width}/{height}">{drawing}</div>'
        name = "" if len(surfaces) == 1 else f'<span class="pale">{escape(surface.title)}</span>'
        drawn.append(f'<div style="width:{100 / across - 1:.1f}%">{name}{ground}</div>')
    return "".join(drawn)


def _extent(surface: Surface) -> tuple[int, int]:
    scale = UNIT / max(surface.aspect, 1)
    return max(round(scale * surface.aspect), 1), max(round(scale), 1)


def _cells(surface: Surface, stage: StageMap | None, scores: Scores | None, width: int, height: int) -> str:
    """Of each token a box that says what became of it, and its mark; outlined ones last, on top."""
    boxes = [(cell.token, tuple(round(edge, 1) for edge in cell.box.scaled(width, height))) for cell in surface.cells]
    front: frozenset[int] = frozenset() if stage is None or scores is not None else stage.anchors
    drawn = [_unseen(surface, width, height)]
    for token, edges in sorted(boxes, key=lambda one: one[0] in front):
        drawn.append(_cell(token, edges, stage, scores))
    return "".join(drawn)


def _unseen(surface: Surface, width: int, height: int) -> str:
    """Pale, what no token shows of the image."""
    if not surface.cells:
        return ""
    box = union([cell.box for cell in surface.cells])
    if max(box.left, box.top, 1 - box.right, 1 - box.bottom) < 0.01:
        return ""
    left, top, right, bottom = (round(edge, 1) for edge in box.scaled(width, height))
    hole = f"M{left:g} {top:g}H{right:g}V{bottom:g}H{left:g}Z"
    return f'<path class="u" fill-rule="evenodd" d="M0 0H{width}V{height}H0Z{hole}"/>'


def _cell(token: int, edges: tuple[float, ...], stage: StageMap | None, scores: Scores | None) -> str:
    left, top, right, bottom = edges
    where = f'x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"'
    if stage is None:
        return f'<rect class="k" {where}><title>token {token}</title></rect>'
    fate = stage.fates[token]
    told = escape(f"token {token}: {_told(stage, token, fate)}")
    if scores is not None:
        rank = scores.ranks.get(token)
        fill = "var(--unscored)" if rank is None else code(heat(rank))
        framed = " f" if fate is Fate.KEPT else ""
        return f'<rect class="h{framed}" fill="{fill}" {where}><title>{told}</title></rect>'
    anchor = " a" if token in stage.anchors else ""
    rectangle = f'<rect class="{CLASSES[fate]}{anchor}" {where}><title>{told}</title></rect>'
    return rectangle + _mark(fate, left, top, right, bottom)


def _told(stage: StageMap, token: int, fate: Fate) -> str:
    words = fate.value
    if fate is Fate.MERGED:
        words += f" into {', '.join(map(str, stage.trace.merged[token]))}"
    score = (stage.trace.scores or {}).get(token)
    return words if score is None else f"{words}, score {score:.4g}"


def _mark(fate: Fate, left: float, top: float, right: float, bottom: float) -> str:
    """As in the PNG: a cross on what was dropped, strokes on what was merged."""
    across, down, side = (left + right) / 2, (top + bottom) / 2, min(right - left, bottom - top)
    if fate is Fate.DROPPED:
        arm = side / 6
        box = [across - arm, down - arm, across + arm, down + arm]
        x0, y0, x1, y1 = (f"{edge:.1f}" for edge in box)
        return f'<path class="x" d="M{x0} {y0}L{x1} {y1}M{x0} {y1}L{x1} {y0}"/>'
    if fate is Fate.MERGED:
        arm = side / 3
        x0, y0, x1, y1 = (f"{edge:.1f}" for edge in (across - arm, down - arm, across + arm, down + arm))
        return f'<path class="j" d="M{x0} {y1}L{x1} {y0}M{x0} {down:.1f}L{across:.1f} {y0}"/>'
    return ""


def _layers(layers: tuple[Layer, ...], original: int) -> str:
    bars = []
    for layer in layers:
        part = 100 * layer.visual / max(original, 1)
        name = "run" if layer.prefill == RUN else "skip"
        told = escape(
            f"layer {layer.number}: {layer.prefill} in prefill, {layer.decode} in decoding, "
            f"{layer.tokens} tokens enter, {layer.visual} of them visual"
        )
        height = max(part, 8 if name == "skip" else 1)
        bars.append(f'<i class="{name}" style="height:{height:.1f}%" title="{told}"></i>')
    under = f"visual tokens entering layers 0 to {len(layers) - 1}"
    return f'<p>{escape(summary(layers))}</p><div class="bars">{"".join(bars)}</div><p class="pale">{under}</p>'


def _legend(figure: Figure) -> str:
    used = {fate for column in figure.columns for stage in column.stages for fate in stage.fates.values()}
    entries = []
    for fate, words in WORDS.items():
        if fate in used or fate is Fate.KEPT:
            drawn = f'<rect class="{CLASSES[fate]}" width="20" height="20"/>{_mark(fate, 0, 0, 20, 20)}'
            entries.append(f'<span><svg class="plain swatch" viewBox="0 0 20 20">{drawn}</svg> {words}</span>')
    if any(stage.scores for column in figure.columns for stage in column.stages):
        entries.append("<span>scores: colour by rank, brighter is higher; kept tokens are framed</span>")
    return "".join(entries)
