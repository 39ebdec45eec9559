"""How long each strategy takes to choose, at the sizes of LLaVA-1.5-7B: 128 of 576 visual tokens, 64 text tokens.

Its hooks run on drawn inputs, with the checks of their answers, on one CPU thread in float32; attention rows and other
inputs are given. Beside it stands the time that dense prefill would take at the speed of this machine's matrix
products, so that the ratio says of a selection whether it is dear in time where it is cheap in FLOPs: loops are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from prunekit_evals.bench import llava_7b
from prunekit_evals.bench.drawn import Drawn
from prunekit_evals.bench.timing import Case, interleaved, median

from prunekit import plugins
from prunekit.engine.asking import decide
from prunekit.pipeline.stage import Stage
from prunekit.strategy.about import About, about

VIDEO = (16, 6)  # frames, and their side in tokens: 576 in all, as an image has
SQUARE = 1024  # of the matrices whose product tells the machine's speed


@dataclass(frozen=True)
class Selection:
    """One strategy. seconds: the median CPU time of one decision, at the first of its sites, which sees all tokens.

    flops: that all its decisions cost, of dense prefill, as it says; None where it stands on other models alone. time:
    the seconds over those of dense prefill at the speed of matrix products. why: that it is not timed; then both are
    None.
    """

    strategy: str
    group: str
    flops: float | None
    seconds: float | None = None
    time: float | None = None
    why: str = ""


def selection_rows(rounds: int, tiny: bool = False) -> list[Selection]:
    """Every registered strategy, in the order of their names."""
    told = {entry.name: about(entry.load()) for entry in plugins.registry().strategies()}
    with tempfile.TemporaryDirectory() as folder:
        priced = {name: llava_7b.decided(name, Path(folder)) for name in told}
        stages = {name: stage_of(name, Path(folder)) for name in told}
    reasons = {name: one if isinstance(one, str) else _not_drawn(one, told[name]) for name, one in stages.items()}
    cases: dict[str, Case] = {
        name: partial(_case, drawn(cast("Stage", stages[name]), told[name], tiny))
        for name, why in reasons.items()
        if not why
    }
    seconds = {name: median(taken).cpu for name, taken in interleaved(cases, rounds, "selection").items()}
    dense = llava_7b.dense_flops() / speed()
    rows = []
    for name, one in told.items():
        taken = seconds.get(name)
        share = None if taken is None else taken / dense
        rows.append(Selection(name, one.group, priced[name], taken, share, reasons[name]))
    return rows


def stage_of(name: str, folder: Path) -> Stage | str:
    """The strategy as a stage, or why its decisions are not timed."""
    told = about(plugins.registry().get_strategy(name))
    if told.kind == "router":
        return "its router is priced in full, and timed with PAR"
    if told.kind != "token":
        return "decides without looking at tokens"
    if "question" in told.asks:
        return "needs the text tower of a CLIP model"
    return llava_7b.pipeline(name, folder).stages[0]


def drawn(stage: Stage, told: About, tiny: bool = False) -> Drawn:
    """Inputs for it: an image, or for strategies for videos a video."""
    frames, side = VIDEO if told.group == "video" else (1, 24)
    side = 6 if tiny and frames == 1 else side
    tokens = frames * side**2
    placed = stage.placements(32, 23)
    keep = placed[0][1] if placed else None
    return Drawn(stage, side, None if keep is None else keep.count(tokens, tokens), frames)


def speed() -> float:
    """FLOPs a second of a product of two matrices, the best of five."""
    matrix = torch.randn(SQUARE, SQUARE)
    best = 0.0
    for _ in range(5):
        begun = time.process_time()
        matrix @ matrix
        best = max(best, 2 * SQUARE**3 / (time.process_time() - begun))
    return best


def _not_drawn(stage: Stage, told: About) -> str:
    """Why its inputs cannot be drawn; empty where they can."""
    try:
        for name in told.asks:
            if name not in ("scores", "keep"):
                drawn(stage, told, tiny=True).get(name)
    except LookupError as error:
        return str(error)
    return ""


@contextmanager
def _case(given: Drawn) -> Iterator[Any]:
    """A case of `timing.interleaved`; what a stage remembers is forgotten, and inputs are made beforehand."""
    for name in about(type(given.stage.strategy)).asks:
        if name not in ("scores", "keep"):
            given.get(name)
    given.get("state").clear()
    yield lambda: decide(given.stage, cast(Any, given))
