"""What an engine that prunekit is not part of, such as vLLM or SGLang, could do with a stage of a pipeline.

Engines take what happens before the decoder, with a count that follows from the image's size, and without the question:
they keep what a vision tower gave by the hash of the image, and hand it to the next question about it (vLLM RFC 45098).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.stage import Stage
from prunekit.strategy.about import about
from prunekit.strategy.decisions import LayerAction

Way = Literal["nothing", "images", "image_embeds", "checkpoint", "no"]
MEANS = {
    "nothing": "yes, it changes nothing",
    "images": "yes, hand in smaller images",
    "image_embeds": "yes, prune first and hand in the remaining features as `image_embeds`",
    "checkpoint": "yes, as a checkpoint without these layers: `prunekit export`",
    "no": "no",
}


@dataclass(frozen=True)
class Advice:
    """way: how an engine could do it. why: where it could not, or what has to be minded; may be empty."""

    stage: str
    way: Way
    why: str = ""

    def __str__(self) -> str:
        return f"{self.stage}: {MEANS[self.way]}" + (f": {self.why}" if self.why else "")

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return asdict(self)


def of_stage(stage: Stage, bound: BoundPipeline) -> Advice:
    """What an engine could do with a stage of this pipeline, on the model that it is bound to."""
    if stage.is_router:
        why = "it decides for each sample" + (", about layers as well" if stage.decides_layers else "")
        return Advice(stage.label, "no", f"{why}, by the question")
    if stage.is_image:
        return Advice(stage.label, "images", "the engine counts their tokens by itself")
    if stage.is_token:
        return _tokens(stage, bound)
    return _layers(stage, bound)


def _tokens(stage: Stage, bound: BoundPipeline) -> Advice:
    sites = [cut.site for cut in bound.cuts if cut.stage is stage]
    if not sites:
        return Advice(stage.label, "nothing")
    inside = [str(site) for site in sites if site.place in ("layer", "prefill_end")]
    if inside:
        return Advice(stage.label, "no", f"it acts inside the decoder, at {', '.join(inside)}")
    told = about(type(stage.strategy))
    if bound.ladder is not None or told.count == "own" or (told.count == "given" and not (stage.keeps or stage.open)):
        return Advice(stage.label, "no", "how many tokens stay depends on what the image shows, so no grid says it")
    if told.text_aware:
        return Advice(stage.label, "no", "it may see the question, and engines hand features to the next question")
    gaps = "it numbers them without gaps, as `positions: renumber` does, and this pipeline keeps positions"
    return Advice(stage.label, "image_embeds", gaps if bound.positions == "keep" else "")


def _layers(stage: Stage, bound: BoundPipeline) -> Advice:
    plan = bound.plan
    other = sorted(
        layer for layer in plan.layers if (plan[layer], plan.decoding(layer)) != (LayerAction.SKIP, LayerAction.SKIP)
    )
    if not plan.layers:
        return Advice(stage.label, "nothing")
    if other:
        listed = ", ".join(map(str, other))
        return Advice(stage.label, "no", f"layers {listed} do not simply stay out, in prefill and in decoding")
    return Advice(stage.label, "checkpoint")
