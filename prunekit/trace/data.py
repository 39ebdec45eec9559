"""A figure as plain data. The page docs/trace.md says what every key means; SCHEMA grows when one changes."""

from __future__ import annotations

from typing import Any

from prunekit.trace.fates import StageMap
from prunekit.trace.figure import Column, Figure
from prunekit.trace.surfaces import Placed

SCHEMA = 1


def data_of(figure: Figure) -> dict[str, Any]:
    """For `json.dump`."""
    return {
        "schema": SCHEMA,
        "model": figure.model,
        "prompt": figure.prompt,
        "sample": figure.sample,
        "inputs": [_input(figure, number, one) for number, one in enumerate(figure.placed)],
        "pipelines": [_column(one) for one in figure.columns],
        "notes": list(figure.notes),
    }


def _input(figure: Figure, number: int, one: Placed) -> dict[str, Any]:
    exhibit = figure.exhibits[number]
    tokens, size = exhibit.tokens, exhibit.frames[0].size if exhibit.frames else None
    boxes: dict[int, list[float]] = {}
    if one.on_image and size is not None:
        boxes = {
            cell.token: [round(edge, 2) for edge in cell.box.scaled(*size)]
            for surface in one.surfaces
            for cell in surface.cells
        }
    places = tokens.coords or (None,) * len(tokens.ordinals)
    return {
        "kind": tokens.kind,
        "width": None if size is None else size[0],
        "height": None if size is None else size[1],
        "tokens": [
            {"token": token, "box": boxes.get(token), **_place(place)}
            for token, place in zip(tokens.ordinals, places, strict=True)
        ],
        "note": one.note or None,
    }


def _place(place: tuple[int, ...] | None) -> dict[str, int | None]:
    """Crop or frame, row and column there; None where a token has none."""
    crop, row, column = (None, None, None) if place is None else place[:3]
    return {"crop": crop, "row": None if row == -1 else row, "column": None if column == -1 else column}


def _column(one: Column) -> dict[str, Any]:
    return {
        "name": one.report.pipeline,
        "sha": one.report.sha,
        "answer": one.run.answer,
        "stages": [_stage(stage) for stage in one.stages],
        "layers": [
            {
                "layer": layer.number, "prefill": layer.prefill, "decode": layer.decode, "tokens": layer.tokens,
                "visual": layer.visual,
            }
            for layer in one.layers
        ],
        "report": one.report.to_json(),
    }  # fmt: skip


def _stage(stage: StageMap) -> dict[str, Any]:
    event, trace = stage.event, stage.trace
    return {
        "stage": event.stage,
        "index": event.index,
        "site": event.site,
        "asked": None if event.asked is None else event.asked[stage.sample],
        "entered": list(trace.entered),
        "kept": list(trace.kept),
        "merged": {str(token): list(into) for token, into in trace.merged.items()},
        "dropped": list(trace.dropped),
        "scores": None if trace.scores is None else {str(token): score for token, score in trace.scores.items()},
    }
