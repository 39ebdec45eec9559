"""prunekit: pruning strategies for Large Vision-Language Models as plugins.

    with prunekit.apply(model, "fastv.yaml") as run:
        output = model.generate(**inputs)
    print(run.report)

Names are loaded when first used, so that `import prunekit` costs nothing and commands that need no model import no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.decisions import LayerAction, LayerPlan, ModelShape, Rows, Selection
    from prunekit.engine.attach import apply
    from prunekit.errors import PrunekitError, PrunekitWarning, SpecError, Unsupported
    from prunekit.hookspecs import hookimpl
    from prunekit.pipeline import Pipeline
    from prunekit.pipeline import build as load
    from prunekit.report import RunReport, StageEvent
    from prunekit.sites import ENCODER, Keep, Site, Sites

__version__ = "0.1.0"

_WHERE = {
    "apply": ("engine.attach", "apply"),
    "load": ("pipeline", "build"),
    "hookimpl": ("hookspecs", "hookimpl"),
    "Pipeline": ("pipeline", "Pipeline"),
    **{name: ("decisions", name) for name in ("LayerAction", "LayerPlan", "ModelShape", "Rows", "Selection")},
    **{name: ("sites", name) for name in ("ENCODER", "Keep", "Site", "Sites")},
    **{name: ("report", name) for name in ("RunReport", "StageEvent")},
    **{name: ("errors", name) for name in ("PrunekitError", "PrunekitWarning", "SpecError", "Unsupported")},
}

__all__ = [
    "ENCODER", "Keep", "LayerAction", "LayerPlan", "ModelShape", "Pipeline", "PrunekitError", "PrunekitWarning", "Rows",
    "RunReport", "Selection", "Site", "Sites", "SpecError", "StageEvent", "Unsupported", "apply", "hookimpl", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'prunekit' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(f"prunekit.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
