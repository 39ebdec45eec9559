"""What a prompt will cost on a model under a pipeline: from its config alone, before there are weights.

The images of a prompt go through the model's own image processor, as blank ones of their size, which says how many
crops, windows and visual tokens they become. What a model of no known family makes of them is counted by running its
encoding method on the meta device.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from prunekit import families
from prunekit.cost import TowerInput
from prunekit.errors import InputError, Unsupported
from prunekit.families.base import Modality, Parts
from prunekit.families.tower_inputs import tower_input
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.build import Pipeline
from prunekit.pipeline.forecast import Bounds, forecast, visual_counts
from prunekit.strategy.decisions import LayerAction, LayerPlan, ModelShape
from prunekit.strategy.sites import ENCODER

# Height and width in pixels, where nobody says another size.
SIZE = (672, 672)
BLANK = (255, 255, 255)  # some models take black images for padding


@dataclass(frozen=True)
class Prompt:
    """A prompt of a model: its images or video, and how much text.

    given: what the tower gets; None where the family does not say, and `counted` are the FLOPs of tower and projector.
    shape: of the model, with the visual tokens of this prompt. note: what a reader of figures should know.
    """

    shape: ModelShape
    text_tokens: int
    visual_tokens: int
    given: TowerInput | None
    counted: tuple[int, int] = (0, 0)
    note: str = ""


@dataclass(frozen=True)
class Model:
    """What is known of a model without weights. params: all its weights; head: those of its output layer.

    mlp: numbers inside the MLP, None where the config does not say.
    """

    skeleton: PreTrainedModel
    parts: Parts
    shape: ModelShape
    params: int
    head: int
    mlp: int | None

    @classmethod
    def of(cls, skeleton: PreTrainedModel) -> Model:
        """From a model on the meta device. Raises Unsupported where its decoder is not recognised."""
        parts = families.find(skeleton)
        config: Any = skeleton.config.get_text_config()
        live: Any = skeleton
        output = live.get_output_embeddings()
        inside = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
        head = 0 if output is None else output.weight.numel()
        params = sum(one.numel() for one in skeleton.parameters())
        return cls(skeleton, parts, parts.shape(), params, head, inside if isinstance(inside, int) else None)


@dataclass(frozen=True)
class Estimate:
    """What one pipeline costs: FLOPs of each part, as the least and the most that they can be, and tokens.

    vision, projector: None where they are not known. decode: of the first decoded token. paper: by the formula that
    papers use, 4nd^2 + 2n^2d + 2ndm for each layer that n tokens enter (FastV, https://arxiv.org/abs/2403.06764); None
    where there is no m. mean_tokens: that enter a layer; last_tokens: that enter the last one. cuts: the stage, the
    site, and how many visual tokens are left behind it.
    """

    pipeline: str
    sha: str
    vision: Bounds | None
    projector: Bounds | None
    router: Bounds
    selection: Bounds
    prefill: Bounds
    decode: Bounds
    kv_numbers: Bounds
    paper: Bounds | None
    mean_tokens: tuple[float, float]
    last_tokens: Bounds
    cuts: tuple[tuple[str, str, Bounds], ...]

    @property
    def whole(self) -> Bounds | None:
        """All up to the first token, without the output layer; None where those of the tower are not known."""
        parts = (self.vision, self.projector, self.router, self.selection, self.prefill)
        known = [one for one in parts if one is not None]
        return (sum(one[0] for one in known), sum(one[1] for one in known)) if len(known) == len(parts) else None


def prompt_of(
    model: Model, processor: Any, sizes: Sequence[tuple[int, int]], frames: int | None, text_tokens: int
) -> Prompt:
    """A prompt of blank images of these sizes, or of one video of `frames` frames of the first size.

    sizes: height and width in pixels. processor: as `loading.load_image_processor` gives it. Raises InputError where it
    refuses the images, Unsupported where the model does not say what it makes of them.
    """
    modality = model.parts.modalities[0]
    video = next((one for one in model.parts.modalities if one.name == "video"), None)
    note = ""
    if frames is None:
        arguments = _prepared(processor, sizes)
    elif video is None:
        note = f"this model takes no videos: {frames} frames are {frames} images, each seen whole"
        arguments = {name: _repeated(value, frames) for name, value in _prepared(processor, sizes[:1], True).items()}
    else:
        modality, note = video, "frames have the size that one image of theirs has"
        arguments = _video(model.parts, video, _prepared(processor, sizes[:1], whole=True), frames)
    given, counted, visual = _encoded(model, modality, arguments)
    shape = replace(model.shape, visual_tokens=visual)
    if given is None and shape.tower is not None:
        shape = replace(shape, tower=replace(shape.tower, work=None))
    return Prompt(shape, text_tokens, visual, given, counted, note)


def estimate(model: Model, prompt: Prompt, pipeline: Pipeline | None) -> Estimate:
    """What the pipeline costs for this prompt; None: the dense model. Raises SpecError where it does not fit."""
    shape = prompt.shape
    bound = BoundPipeline("dense", "", "keep", (), shape, (), LayerPlan()) if pipeline is None else pipeline.bind(shape)
    found = forecast(bound, prompt.text_tokens, prompt.given)
    assert found is not None, "the prompt has said how many visual tokens there are"
    vision, projector = found.vision, found.projector
    if prompt.given is None and not any(cut.site < ENCODER for cut in bound.cuts):
        vision, projector = ((one, one) for one in prompt.counted)
    layers = model.shape.layers
    fewest, most = found.least_tokens, found.layer_tokens
    running = [bound.plan[layer] is not LayerAction.SKIP for layer in range(layers)]
    paper = None if model.mlp is None else (_paper(model, fewest, running), _paper(model, most, running))
    mean = sum(fewest) / layers, sum(most) / layers
    inputs = () if prompt.given is None else prompt.given.inputs
    cheapest = bound if bound.ladder is None else bound.ladder.rungs[-1]
    ends = (cheapest, False), (bound, True)
    left = [visual_counts(one.cuts, prompt.visual_tokens, decided, inputs)[1:] for one, decided in ends]
    cuts = tuple(
        (cut.stage.label, str(cut.site), both) for cut, both in zip(bound.cuts, zip(*left, strict=True), strict=True)
    )
    last = fewest[-1], most[-1]
    return Estimate(
        bound.name, bound.sha, vision, projector, found.routing, found.selection, found.prefill, found.decode,
        found.kv_numbers, paper, mean, last, cuts,
    )  # fmt: skip


def _paper(model: Model, tokens: Sequence[int], running: Sequence[bool]) -> int:
    d, m = model.shape.hidden, model.mlp or 0
    return sum(4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m for n, runs in zip(tokens, running, strict=True) if runs)


def arguments_of(processor: Any, sizes: Sequence[tuple[int, int]], times: int = 1) -> dict[str, Any]:
    """The arguments of the encoding method for blank images of these sizes, all of them `times` times; pixels, where
    there are several times, on the meta device. Raises InputError where the processor refuses them.
    """
    arguments = _prepared(processor, sizes)
    return arguments if times == 1 else {name: _repeated(value, times) for name, value in arguments.items()}


def _prepared(processor: Any, sizes: Sequence[tuple[int, int]], whole: bool = False) -> dict[str, Any]:
    """What an image processor makes of blank images. whole: not in tiles."""
    images = [Image.new("RGB", (width, height), BLANK) for height, width in sizes]
    options = {"crop_to_patches": False} if whole and hasattr(processor, "crop_to_patches") else {}
    try:
        return dict(processor(images=images, return_tensors="pt", **options))
    except (ValueError, RuntimeError, TypeError, MemoryError) as error:
        listed = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise InputError(f"the model's image processor refuses images of {listed} pixels: {error}") from error


def _video(parts: Parts, video: Modality, image: Mapping[str, Any], frames: int) -> dict[str, Any]:
    """The arguments of a video of so many frames, each like the prepared `image`."""
    images = None if parts.tower is None else parts.tower.images
    pixels = image["pixel_values"]
    if images is not None and images.cell is not None:
        shown = images.unpack("image", image)[0].to("meta")
        groups = -(-frames // shown.shape[1])  # the last ones are filled up, as processors do
        sizes = next(key for key in image if key.startswith("image_grid")).replace("image", "video")
        grid = {sizes: torch.zeros(1, 3, dtype=torch.int64)}
        return images.pack("video", grid, [shown.expand(groups, *shown.shape[1:])])
    return {video.pixels: torch.empty(1, frames, *pixels.shape[-3:], device="meta")}


def _repeated(value: Any, times: int) -> Any:
    """The arguments of one image as those of so many."""
    return _meta(value).repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value


def _encoded(
    model: Model, modality: Modality, arguments: Mapping[str, Any]
) -> tuple[TowerInput | None, tuple[int, int], int]:
    """What the tower gets; else what it and its projector cost; and the number of visual tokens."""
    tower = model.parts.tower
    if tower is not None and tower.shape().work is not None:
        try:
            given = tower_input(tower, modality, arguments)
        except (Unsupported, NotImplementedError):  # visual tokens that are no whole patches; pixels that are read
            pass
        else:
            if given is not None:
                return given, (0, 0), given.visual
    return None, *_counted(model, modality, arguments)


def _counted(model: Model, modality: Modality, arguments: Mapping[str, Any]) -> tuple[tuple[int, int], int]:
    """FLOPs of the encoding method, those of the projector apart where it is known, and the visual tokens that it
    makes: by a run on the meta device.
    """
    method = getattr(model.parts.base, modality.method)
    names = inspect.signature(method).parameters
    taken = {name: _meta(value) for name, value in arguments.items() if name in names}
    tower, marks = model.parts.tower, [0]
    projecting = () if tower is None else (tower.projector, *tower.mergers)
    counter = FlopCounterMode(display=False)

    def mark(sign: int) -> Any:
        return lambda *_: marks.append(sign * counter.get_total_flops())

    try:
        with ExitStack() as stack:
            for module in filter(None, projecting):
                stack.callback(module.register_forward_pre_hook(mark(-1)).remove)
                stack.callback(module.register_forward_hook(mark(1)).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(counter)
            features = method(**taken, return_dict=True).pooler_output
    except Exception as error:
        raise Unsupported(
            f"what {type(model.skeleton).__name__} makes of its images cannot be told without running it "
            f"({type(error).__name__}: {error}); `prunekit run` reports what a run cost"
        ) from error
    return (counter.get_total_flops() - sum(marks), sum(marks)), sum(len(one) for one in features)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and value.is_floating_point() else value
