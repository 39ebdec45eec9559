"""LVLM families: one short file each. The engine asks `find` for the parts of a model and knows no family by name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from transformers import AutoConfig, GenerationMixin, PreTrainedModel

from prunekit.errors import Unsupported
from prunekit.families import generic
from prunekit.families.base import Family, Parts
from prunekit.families.decoders import PROVED
from prunekit.strategy.decisions import ModelShape


def families() -> tuple[Family, ...]:
    """Every family file of this package that declares a `FAMILY`, by file name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def find(model: PreTrainedModel) -> Parts:
    """The parts of `model`, which may live on the meta device: as the file of its family says, else as they look.

    `prunekit.verify.proof.proved_parts` proves those that only look right. Raises Unsupported, with what is amiss.
    """
    family = family_of(model)
    return generic.recognise(model) if family is None else family.parts(model)


def family_of(model: PreTrainedModel) -> Family | None:
    """The family whose file knows models of this type, None where none does.

    Raises Unsupported for a model of a known family without its head or its vision tower, and for what is no model of
    transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise Unsupported(
            f"expected a model of transformers, not {type(model).__name__}; of a wrapper (torch.compile, DataParallel, "
            "PEFT) give the model inside, and a name has to be loaded first"
        )
    model_type = model.config.model_type
    for family in families():
        if model_type in family.model_types:
            if not isinstance(model, GenerationMixin):
                raise Unsupported(f"{type(model).__name__} cannot generate; give the complete model with its head")
            if getattr(model.config, "vision_config", "not asked for") is None:
                raise Unsupported(f"this {model_type} was made without a vision tower: it takes no images to prune")
            return family
    return None


def is_vouched_for(model: PreTrainedModel) -> bool:
    """Whether the tests prove models of this type with their decoder: its family's own one, or one of `PROVED`."""
    if family_of(model) is None:
        return False
    config: Any = model.config
    own, text = type(config).sub_configs.get("text_config"), config.get_text_config()
    return text.model_type in PROVED or own is None or (own is not AutoConfig and isinstance(text, own))


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The numbers of `model` (which may live on the meta device) that pipelines are checked and costed against.

    Of a model of no known family as it looks, without a proof.
    """
    return find(model).shape()
