"""A figure as a picture: pipelines side by side, their stages from top to bottom, the legend below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.trace import layer_bars, maps
from prunekit.trace.colours import INK, PALE, PAPER, heat
from prunekit.trace.fates import Fate, Scores, StageMap
from prunekit.trace.figure import Column, Figure
from prunekit.trace.pieces import Piece, blank, flow, label, row, stack, text

if TYPE_CHECKING:
    from PIL.Image import Image

PANEL, TALLEST = 264, 340  # pixels of one map: its width, and at most its height
MARGIN, GAP = 20, 22
PER_ROW = 4  # maps of one pipeline beside each other, where it is drawn alone
LEGEND = {
    Fate.KEPT: "kept", Fate.MERGED: "merged into the outlined ones", Fate.DROPPED: "dropped here",
    Fate.GONE: "gone before",
}  # fmt: skip
MOST_PIXELS = 120_000_000


def draw(figure: Figure) -> Image:
    """The picture, RGB. Raises ValueError for one that would be too large to look at."""
    from PIL import Image as images

    whole = page(figure)
    size = whole.width + 2 * MARGIN, whole.height + 2 * MARGIN
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels are too many")
    image = images.new("RGB", size, PAPER)
    whole.paint(image, MARGIN, MARGIN)
    return image


def page(figure: Figure) -> Piece:
    """All of it, without margins."""
    alone = len(figure.columns) == 1
    shown = _panel(figure, "what the model is shown", _counted(figure), None)
    columns = [_column(figure, column, alone) for column in figure.columns]
    body = row([shown, *columns], GAP)
    width = max(body.width, 2 * PANEL)
    parts = [_heading(figure, width), body, _legend(figure, width)]
    if figure.notes:
        parts.append(stack([text(f"note: {note}", width, 12, PALE) for note in figure.notes], 2))
    return stack(parts, GAP - 6)


def _heading(figure: Figure, width: int) -> Piece:
    lines = [text(figure.prompt, width, 17, INK, most=3)] if figure.prompt else []
    named = f"sample {figure.sample}" if figure.sample else ""
    under = ", ".join(part for part in (figure.model, named) if part)
    return stack([*lines, *([text(under, width, 12, PALE)] if under else [])], 3)


def _counted(figure: Figure) -> str:
    total = sum(len(one.tokens.ordinals) for one in figure.exhibits)
    return f"{total} visual tokens"


def _column(figure: Figure, column: Column, alone: bool) -> Piece:
    panels = []
    for stage in column.stages:
        panels.append(_panel(figure, stage.title, stage.caption, stage))
        if stage.scores is not None:
            panels.append(_heat_panel(figure, stage, stage.scores))
    if not panels:
        panels.append(text("no stage decides about visual tokens", PANEL, 12, PALE))
    across = min(PER_ROW, len(panels)) if alone else 1
    width = across * PANEL + (across - 1) * GAP
    report, answer = column.report, column.run.answer
    saved = f"{report.kept_tokens[figure.sample]} visual tokens left, {report.cost.flops_fraction:.0%} of dense FLOPs"
    heading = [text(report.pipeline, width, 16), text(saved, width, 12, PALE)]
    if answer is not None:
        heading.append(text(f"answer: {answer}", width, 12))
    bars = layer_bars.bars(column.layers, report.visual_tokens[figure.sample], PANEL)
    return stack([stack(heading, 2), flow(panels, across, GAP), bars], 12)


def _panel(figure: Figure, title: str, caption: str, stage: StageMap | None) -> Piece:
    """One map of all surfaces with words above it."""
    words = [text(title, PANEL, 13), text(caption, PANEL, 12, PALE, most=2)]
    return stack([*words, _surfaces(figure, stage, None)], 4)


def _heat_panel(figure: Figure, stage: StageMap, scores: Scores) -> Piece:
    numbers = f"lowest {scores.low:.2g}, median {scores.middle:.2g}, highest {scores.high:.2g}"
    words = [text(f"scores of {stage.title}", PANEL, 13), text(numbers, PANEL, 12, PALE, most=2)]
    return stack([*words, _surfaces(figure, stage, scores), _ramp(PANEL)], 4)


def _ramp(width: int) -> Piece:
    """The colours of ranks from the lowest to the highest."""

    def paint(image: Image, x: int, y: int) -> None:
        for column in range(width):
            image.paste(heat(column / (width - 1)), (x + column, y, x + column + 1, y + 8))

    return Piece(width, 8, paint)


def _surfaces(figure: Figure, stage: StageMap | None, scores: Scores | None) -> Piece:
    """The maps of all surfaces; several share the width of the panel."""
    surfaces = figure.surfaces
    across = 1 if len(surfaces) == 1 else 2 if len(surfaces) <= 6 else 4
    gap = 8
    width = (PANEL - gap * (across - 1)) // across
    cells = []
    for surface in surfaces:
        size = maps.size_of(surface, width, TALLEST // across)
        if stage is None or scores is None:
            drawn = maps.keep_map(surface, stage, size)
        else:
            drawn = maps.heat_map(surface, scores, stage, size)
        named = [] if len(surfaces) == 1 else [text(surface.title, width, 10, PALE, most=1)]
        whole = stack([*named, drawn], 1)
        cells.append(row([whole, blank(width - whole.width, 1)], 0))
    return stack([flow(cells, across, gap), blank(PANEL, 0)], 0)


def _legend(figure: Figure, width: int) -> Piece:
    used = {fate for column in figure.columns for stage in column.stages for fate in stage.fates.values()}
    entries = [
        row([maps.swatch(fate, 18), label(words, 12)], 6)
        for fate, words in LEGEND.items()
        if fate in used or fate is Fate.KEPT
    ]
    if any(stage.scores for column in figure.columns for stage in column.stages):
        words = "scores: colour by rank, brighter is higher; kept tokens are framed"
        entries.append(row([_ramp(60), label(words, 12)], 6))
    return _wrapped(entries, width)


def _wrapped(pieces: list[Piece], width: int) -> Piece:
    """In rows as long as fit."""
    rows: list[list[Piece]] = [[]]
    for piece in pieces:
        if rows[-1] and row([*rows[-1], piece], 16).width > width:
            rows.append([])
        rows[-1].append(piece)
    return stack([row(one, 16) for one in rows], 6)
