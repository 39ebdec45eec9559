"""Pipelines at one cost: the open stages of each are solved to the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.errors import Fault, SpecError
from prunekit.pipeline.build import Pipeline, build
from prunekit.spec.compose import Source
from prunekit.strategy.decisions import ModelShape


@dataclass(frozen=True)
class Equal:
    """Pipelines that meet one budget on a model, each with that budget in its file; and why others do not.

    refused: for each of the others its faults: it leaves no stage open, or the least that it can cost is more.
    """

    pipelines: tuple[Pipeline, ...]
    refused: tuple[SpecError, ...]


def at_equal(
    sources: Sequence[Source], overrides: Sequence[str], wanted: tuple[str, float], shape: ModelShape, text_tokens: int
) -> Equal:
    """Each pipeline with the budget `wanted`, an accounting and a fraction of the dense model's; what prunes nothing
    as it is.

    shape: of the model, with the visual tokens of the prompt that the budget is for; text_tokens: its others.
    Raises SpecError for a pipeline that is wrong without a budget, too.
    """
    what, fraction = wanted
    budget = [f"budget.{what}={fraction}", f"budget.text_tokens={text_tokens}"]
    if shape.visual_tokens is not None:
        budget.append(f"budget.visual_tokens={shape.visual_tokens}")
    met: list[Pipeline] = []
    refused: list[SpecError] = []
    for source in sources:
        pipeline = build(source, [*overrides, *budget])
        try:
            pipeline.bind(shape)
        except SpecError as error:
            if any(not fault.key.startswith("budget") for fault in error.faults):
                raise
            plain = None if any(stage.open for stage in pipeline.stages) else build(source, overrides)
            if plain is not None and not plain.bind(shape).acts:
                met.append(plain)  # what the others are compared with
                continue
            refused.append(SpecError([_named(pipeline, fault) for fault in error.faults]))
        else:
            met.append(pipeline)
    return Equal(tuple(met), tuple(refused))


def _named(pipeline: Pipeline, fault: Fault) -> Fault:
    """The place of the budget is no place in a file: what counts is whose it is."""
    return Fault(None, pipeline.name, fault.message, fault.hint)
