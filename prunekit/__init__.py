"""prunekit: pruning strategies for Large Vision-Language Models as plugins.

    with prunekit.apply(model, "fastv.yaml") as run:
        output = model.generate(**inputs)
    print(run.report)

Names are loaded when first used, so that `import prunekit` costs nothing and commands that need no model import no
torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.apply import apply
    from prunekit.errors import PrunekitError, PrunekitWarning, SpecError, Unsupported
    from prunekit.hookspecs import hookimpl
    from prunekit.pipeline.build import Pipeline
    from prunekit.pipeline.build import build as load
    from prunekit.records import RunReport, StageEvent
    from prunekit.strategy.artefact import Artefact, CalibrationPrompt, read_artefact
    from prunekit.strategy.decisions import LayerAction, LayerPlan, ModelShape, Owners, Route, Selection
    from prunekit.strategy.declare import strategy
    from prunekit.strategy.decoder_requests import Keys, PromptTokens, Rows, Values
    from prunekit.strategy.sites import ENCODER, PIXELS, PREFILL_END, Keep, Site, Sites
    from prunekit.strategy.tower_requests import EncoderKeys, EncoderQueries, EncoderRows, EncoderValues, Features

_WHERE = {
    "__version__": ("version", "VERSION"),
    "apply": ("apply", "apply"),
    "load": ("pipeline.build", "build"),
    "hookimpl": ("hookspecs", "hookimpl"),
    "Pipeline": ("pipeline.build", "Pipeline"),
    **{
        name: ("strategy.decisions", name)
        for name in ("LayerAction", "LayerPlan", "ModelShape", "Owners", "Route", "Selection")
    },
    **{name: ("strategy.decoder_requests", name) for name in ("Keys", "PromptTokens", "Rows", "Values")},
    **{
        name: ("strategy.tower_requests", name)
        for name in ("EncoderKeys", "EncoderQueries", "EncoderRows", "EncoderValues", "Features")
    },
    "strategy": ("strategy.declare", "strategy"),
    **{name: ("strategy.artefact", name) for name in ("Artefact", "CalibrationPrompt", "read_artefact")},
    **{name: ("strategy.sites", name) for name in ("ENCODER", "PIXELS", "PREFILL_END", "Keep", "Site", "Sites")},
    **{name: ("records", name) for name in ("RunReport", "StageEvent")},
    **{name: ("errors", name) for name in ("PrunekitError", "PrunekitWarning", "SpecError", "Unsupported")},
}

__all__ = [
    "ENCODER", "PIXELS", "PREFILL_END", "Artefact", "CalibrationPrompt", "EncoderKeys", "EncoderQueries", "EncoderRows",
    "EncoderValues", "Features", "Keep", "Keys", "LayerAction", "LayerPlan", "ModelShape", "Owners", "Pipeline",
    "PromptTokens", "PrunekitError", "PrunekitWarning", "Route", "Rows", "RunReport", "Selection", "Site", "Sites",
    "SpecError", "StageEvent", "Unsupported", "Values", "apply", "hookimpl", "load", "read_artefact", "strategy",
]  # fmt: skip


class _Public(ModuleType):
    """The package; its public names win over submodules of the same name (`apply.py`, `strategy/`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):  # importing a submodule binds it to its package
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'prunekit' has no attribute {name!r}")
        module, attribute = _WHERE[name]
        return getattr(importlib.import_module(f"prunekit.{module}"), attribute)


sys.modules[__name__].__class__ = _Public


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
