"""`generate` under a pipeline: what it must not be asked for, and what it turns into something else on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.overrides import Overrides
from prunekit.errors import Unsupported

# Where the 2-D mask of a prompt waits on the 4-D one that `generate` makes of it for a static cache.
_FLAT = "_prunekit_flat"
CACHES = (None, "dynamic", "static")
# Arguments, and options of a GenerationConfig, that make `generate` do what pruning cannot follow.
REFUSED = {
    "assistant_model": "the assistant's own cache and tokens would not be those of the pruned model; leave it out, or "
    "use prompt_lookup_num_tokens",
    "assistant_early_exit": "the first layers alone would draft; leave it out, or use prompt_lookup_num_tokens",
    "prefill_chunk_size": "stages must see the whole prompt at once; leave it out",
    "custom_generate": "what it does with caches and masks is not known; call generate without it",
    "use_mtp": "the prediction layers have a KV cache of their own; leave it out",
}


def override(overrides: Overrides, model: Any) -> None:
    """Look at calls of `generate` on `model` before they compute anything."""
    overrides.replace(model, "generate", _generate(model))
    overrides.replace(model, "prepare_inputs_for_generation", _prepare)
    if callable(getattr(model, "generate_batch", None)):
        overrides.replace(model, "generate_batch", _generate_batch)


def flat_mask(mask: Any) -> Tensor | None:
    """The 2-D mask of what `generate` made of it; None for any other mask that is not 2-D."""
    if isinstance(mask, dict):
        return next((flat for part in mask.values() if (flat := flat_mask(part)) is not None), None)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    beside: Tensor | None = getattr(mask, _FLAT, None)
    return beside


def _generate(model: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config

            def asked(name: str) -> Any:
                return kwargs[name] if name in kwargs else getattr(config, name, None)

            for name, reason in REFUSED.items():
                if asked(name) not in (None, False):
                    raise Unsupported(f"generate({name}=...) is not supported under a pruning pipeline: {reason}")
            if asked("use_cache") is False:
                raise Unsupported(
                    "generate(use_cache=False) would prune anew at every step; leave use_cache at its default"
                )
            if asked("cache_implementation") not in CACHES:
                raise Unsupported(
                    f"generate(cache_implementation={asked('cache_implementation')!r}) is not supported under a "
                    f"pruning pipeline; leave it out, or use one of {', '.join(filter(None, CACHES))}"
                )
            return original(*args, **kwargs)

        return generate

    return make


def _generate_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_batch(*args: Any, **kwargs: Any) -> Any:
        raise Unsupported("generate_batch keeps its KV in pages, which cannot be pruned layer by layer; use generate")

    return generate_batch


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    """For caches of fixed size `generate` makes the 4-D mask itself: keep the 2-D one beside it."""

    def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
        inputs = original(*args, **kwargs)
        mask, flat = inputs.get("attention_mask"), kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if flat is None and isinstance(ids, Tensor):
            flat = torch.ones_like(ids)  # `generate` leaves out a mask that masks nothing
        if isinstance(flat, Tensor) and flat.ndim == 2:
            for part in mask.values() if isinstance(mask, dict) else (mask,):
                if isinstance(part, Tensor) and part.ndim == 4:
                    setattr(part, _FLAT, flat)
        return inputs

    return prepare_inputs_for_generation
