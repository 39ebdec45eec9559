"""What `bind` accepts from a config alone, `apply` accepts and a prompt runs; what it refuses, `apply` refuses."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import torch
import transformers
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import prunekit
from prunekit import (
    EncoderKeys,
    EncoderRows,
    Features,
    Keys,
    LayerAction,
    LayerPlan,
    Rows,
    Sites,
    Values,
    families,
    hookimpl,
)
from prunekit.pipeline import build
from prunekit.registry import Registry
from prunekit.testing.tiny_families import tiny_batch, tiny_model

FAMILIES = (
    "llava",
    "llava_next",
    "paligemma",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "internvl",
    "cohere2_vision",
    "mistral3",
)
# Sites of one stage, in the order of the data.
SITES = (
    "pixels", "vision.0.mid", "vision.0", "vision.1", "vision.2", "vision.9", "encoder", "0", "0.mid", "0.after", "2",
    "2.mid", "3.after", "9", "prefill_end",
)  # fmt: skip
BLOCKS = st.sampled_from((None, -1, 0, 1, 7))
# Inputs of a hook, and what is requested of them.
INPUTS = {
    "hidden": st.none(),
    "previous_hidden": st.none(),
    "text": st.none(),
    "text_hidden": st.none(),
    "forward": st.none(),
    "extras": st.none(),
    "cls_crops": st.none(),
    "project": st.none(),
    "places": st.none(),
    "videos": st.none(),
    "patches": st.none(),
    "coords": st.none(),
    "shape": st.none(),
    "attention": st.builds(Rows, layer=st.sampled_from(("previous", "own", "next")), optional=st.booleans()),
    "keys": st.builds(Keys, layer=st.sampled_from(("previous", "own", "next"))),
    "text_values": st.builds(Values, layer=st.sampled_from(("previous", "own", "next"))),
    "rotary": st.none(),
    "encoder_attention": st.one_of(
        st.builds(EncoderRows, layer=BLOCKS, query=st.sampled_from(("cls", "mean"))),
        st.just(EncoderRows(query="pool")),
    ),
    "encoder_keys": st.builds(EncoderKeys, layer=BLOCKS, of=st.sampled_from(("patches", "cls"))),
    "features": st.one_of(st.builds(Features, layer=BLOCKS), st.just(Features(projected=True))),
}


EVERYWHERE = Sites(tower=True, end=True, pixels=True)


def reader(names: tuple[str, ...], inputs: dict[str, Any], per_sample: bool) -> type[Any]:
    """Asks for inputs, looks at none of them and keeps the first tokens."""
    space: dict[str, Any] = {}
    exec(f"def score_tokens(self, {', '.join(('valid', *names))}):\n    return 1.0 * valid", space)
    extras = ("cls",) if "extras" in names else ()
    declared = prunekit.strategy(sites=EVERYWHERE, inputs=inputs, extras=extras, per_sample=per_sample)
    cls: type[Any] = declared(type("Reader", (), {"score_tokens": hookimpl(space["score_tokens"])}))
    return cls


@prunekit.strategy()
class Plan:
    """One action for one layer."""

    layer: int
    action: str

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        return LayerPlan({self.layer: LayerAction(self.action)})


@prunekit.strategy()
class Smaller:
    """Images at a fraction of their sides."""

    @hookimpl
    def resize_images(self, images: Any) -> Any:
        return torch.full((len(images),), 0.6)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[type[Any]], dict[str, Any]]:
    """Strategy classes, named s0, s1 ..., and a pipeline of them."""
    classes: list[type[Any]] = []
    stages: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 2))):
        names = tuple(draw(st.sets(st.sampled_from(sorted(INPUTS)), max_size=2)))
        requests = {name: draw(INPUTS[name]) for name in names}
        inputs = {name: request for name, request in requests.items() if request is not None}
        classes.append(reader(names, inputs, "forward" not in names and draw(st.booleans())))
        sites = draw(st.lists(st.sampled_from(SITES), min_size=1, max_size=2, unique=True))
        stages.append({"use": f"s{number}", "at": sorted(sites, key=SITES.index), "keep": 0.5 if number else 0.75})
    stages.sort(key=lambda stage: SITES.index(stage["at"][0]))
    for number, stage in enumerate(stages):
        stage["keep"] = 0.75 - 0.25 * number
    if draw(st.integers(0, 3)) == 0:
        stages.insert(draw(st.integers(0, 1)), {"use": "smaller"})
    if draw(st.booleans()):
        action = draw(st.sampled_from(("skip", "skip_mlp", "freeze")))
        stages.append({"use": "plan", "layer": draw(st.integers(0, 6)), "action": action})
    return classes, {"stages": stages, "positions": draw(st.sampled_from(("keep", "renumber")))}


@functools.cache
def model_of(family: str, attention: str) -> Any:
    return tiny_model(family, attention, dtype=torch.float32)


@functools.cache
def shape_of(family: str, attention: str) -> prunekit.ModelShape:
    """From the config, without weights."""
    config = model_of(family, attention).config
    make: Any = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        return families.shape_of(make.from_config(config, attn_implementation=attention))


def accepted(built: build.Pipeline, shape: prunekit.ModelShape) -> str:
    """Why not, or nothing."""
    try:
        built.bind(shape)
    except (prunekit.SpecError, prunekit.Unsupported) as error:
        return str(error)
    return ""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pipelines(), st.sampled_from(FAMILIES), st.sampled_from(("sdpa", "eager")))
def test_what_bind_accepts_runs(case: tuple[list[type[Any]], dict[str, Any]], family: str, attention: str) -> None:
    classes, data = case
    registry = Registry("here", "here 1")
    for number, cls in enumerate([*classes, Plan, Smaller]):
        name = {Plan: "plan", Smaller: "smaller"}.get(cls, f"s{number}")
        globals()[f"Made{number}"] = cls
        registry.strategy(name, f"{__name__}:Made{number}")
    with contextlib.suppress(prunekit.SpecError):
        built = build.build(data, registry=registry)
        model = model_of(family, attention)
        why = accepted(built, shape_of(family, attention))
        event("refused" if why else "accepted")
        assert accepted(built, families.find(model).shape()) == why
        if not why:
            with warnings.catch_warnings(), torch.no_grad(), prunekit.apply(model, built) as run:
                warnings.simplefilter("ignore", prunekit.PrunekitWarning)
                model(**tiny_batch(model))
            assert run.report is not None
