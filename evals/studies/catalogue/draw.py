"""What each strategy keeps of one image, as small pictures for its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit_evals.run.answering import Loaded
from prunekit_evals.studies.catalogue.cells import say
from prunekit_evals.studies.catalogue.measure import CALIBRATED_ON, calibrated
from prunekit_evals.studies.catalogue.rows import Wanted, wanted

from prunekit import families
from prunekit.cli.prompts import Prompt
from prunekit.cli.trace import traced
from prunekit.trace import save_thumbnails
from prunekit.training.data import source

SHARE, SHOWN = 0.25, 21  # the budget, and the scene, which is that of docs/trace.md


def run(folder: Path, cache: Path) -> None:
    """One picture of each strategy that runs on the bundled model: at a quarter of the tokens, or as it comes."""
    loaded = Loaded.load("micro", "float32", "cpu")
    sample = source(CALIBRATED_ON)[SHOWN]
    prompt = Prompt(tuple(sample.images), sample.prompt)

    def found(stage: Mapping[str, Any]) -> Path:
        return calibrated(loaded, stage, cache)

    chosen: dict[str, Wanted] = {}
    for one in wanted(families.shape_of(loaded.model), found):
        if isinstance(one, Wanted) and (one.strategy not in chosen or one.share == SHARE):
            chosen[one.strategy] = one
    for stale in folder.glob("*"):
        stale.unlink()
    pipelines = [one.pipeline for one in chosen.values()]
    save_thumbnails(traced(loaded.model, loaded.processor, pipelines, prompt, "micro", 1), folder)
    say(f"{len(pipelines)} keep maps: {folder}")
