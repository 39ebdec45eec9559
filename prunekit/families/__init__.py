"""LVLM families: one short file each. The engine asks `find` for the parts of a model and knows no family by name."""

from __future__ import annotations

import importlib
import pkgutil

from transformers import GenerationMixin, PreTrainedModel

from prunekit.decisions import ModelShape
from prunekit.errors import Unsupported
from prunekit.families.base import Family, Parts


def families() -> tuple[Family, ...]:
    """Every family file of this package that declares a `FAMILY`, by file name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def find(model: PreTrainedModel) -> Parts:
    """The parts of `model`. Raises Unsupported for a model of no known family."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for family in families():
        if model_type in family.model_types:
            if not isinstance(model, GenerationMixin):
                raise Unsupported(f"{type(model).__name__} cannot generate; give the complete model with its head")
            return family.parts(model)
    known = ", ".join(sorted(t for family in families() for t in family.model_types))
    raise Unsupported(
        f"no family file for models of type '{model_type}' ({type(model).__name__}); this version runs: {known}. "
        "A family is one short file in prunekit/families/."
    )


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The numbers of `model` (which may live on the meta device) that pipelines are checked and costed against."""
    return find(model).shape()
