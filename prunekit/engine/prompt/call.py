"""One call of the LVLM's base model: what it was given, and what of it cannot be pruned exactly."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from prunekit.engine.cache import ragged, static
from prunekit.engine.prompt.generate import flat_mask
from prunekit.engine.prompt.prompt import Prompt
from prunekit.engine.prompt.visual_inputs import VisualInputs, recorded_on
from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.upstream import CACHE

_OF_EVERY_LAYER = ("output_attentions", "output_hidden_states")


class Call:
    """One call of the LVLM's base model: its arguments, and the outputs of its encoders once they are known.

    owner: the state of the prompt batch that its KV cache holds; None: it begins one.
    """

    def __init__(self, given: Mapping[str, Any], parts: Parts) -> None:
        self.given, self.parts = given, parts
        encoded = given.get("mm_encoder_outputs")
        self.outputs: dict[str, Any] = {}
        if encoded:
            self.outputs.update((name, output) for name, output in encoded.items() if output is not None)
        self.owner: Any = ragged.owner_of(given.get(CACHE))

    def refuse_unsupported(self) -> None:
        """Raise Unsupported for what cannot be answered on fewer tokens."""
        cache = self.given.get(CACHE)
        is_prompt = self.owner is None
        for name in _OF_EVERY_LAYER:
            if self.given.get(name) or (is_prompt and self._configured(name)):
                raise Unsupported(
                    f"{name}=True is not available under a pruning pipeline: layers hold different tokens"
                )
        if cache is not None and is_prompt:
            taken = ragged.takes(cache) or static.takes(cache)
            ragged.check(cache, taken if self.parts.opaque is None else isinstance(cache, DynamicCache))
        mask = self.given.get("attention_mask")
        if mask is not None and is_prompt and flat_mask(mask) is None:
            raise Unsupported("give a 2-D attention_mask (batch, tokens); prunekit makes each layer's own mask from it")
        if self.given.get("input_ids") is None:
            raise Unsupported("pass input_ids: prunekit finds the visual tokens by their ids, not in inputs_embeds")
        if is_prompt:
            self._refuse_incomplete(flat_mask(mask))
        self._refuse_checkpointing()

    def _configured(self, name: str) -> bool:
        """Whether a config asks for an output of every layer, and the call does not say otherwise."""
        configs = () if self.given.get(name) is not None else (self.parts.base.config, self.parts.text.config)
        return any(bool(getattr(config, name, False)) for config in configs)

    def _refuse_incomplete(self, mask: Tensor | None) -> None:
        """Raise Unsupported for a prompt whose parts do not fit each other."""
        ids = self.given["input_ids"]
        if mask is not None and mask.shape != ids.shape:
            raise Unsupported(
                f"attention_mask is {tuple(mask.shape)}, but input_ids are {tuple(ids.shape)}; give one entry for each "
                "token of the prompt"
            )
        taken = {modality.pixels for modality in self.parts.modalities}
        if "pixel_values_videos" not in taken and self.given.get("pixel_values_videos") is not None:
            raise Unsupported(
                f"videos of this model cannot be pruned, only {', '.join(one.name for one in self.parts.modalities)}s: "
                "give these, or run it without a pipeline"
            )
        if self.outputs or any(self.given.get(modality.pixels) is not None for modality in self.parts.modalities):
            return
        shown = torch.isin(ids, torch.tensor(self.parts.visual_ids, device=ids.device))
        if count := int((shown if mask is None else shown & mask.to(ids.device, torch.bool)).sum()):
            raise Unsupported(
                f"the prompt shows {count} visual tokens, but no images or videos came with it; give their pixels"
            )

    def _refuse_checkpointing(self) -> None:
        """Raise Unsupported where layers would run a second time in the backward pass."""
        layers = self.parts.layers
        if torch.is_grad_enabled() and any(
            getattr(one, "gradient_checkpointing", False) and one.training for one in layers
        ):
            raise Unsupported(
                "gradient checkpointing would run the decoder layers again after pruning has moved on; turn it off "
                "(model.gradient_checkpointing_disable())"
            )

    def refuse_new_inputs(self) -> None:
        """Raise Unsupported when later tokens on a prompt's cache bring images or videos."""
        if self.outputs:
            raise Unsupported(
                "new images on a KV cache that already holds a prompt are not supported: stages decide once, when a "
                "prompt begins; start a new prompt with all that was said"
            )

    def sources(self) -> tuple[VisualInputs, ...]:
        """What was encoded for this call, modality by modality."""
        kinds = ((modality, self.outputs.get(modality.name)) for modality in self.parts.modalities)
        sources = (recorded_on(output, modality) for modality, output in kinds if output is not None)
        return tuple(source for source in sources if source is not None)

    def prompt(self) -> Prompt:
        """The prompt batch of a prefill; one read back from the device."""
        ids = self.given["input_ids"]
        mask = flat_mask(self.given.get("attention_mask"))
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device, torch.bool)
        visual = torch.isin(ids, torch.tensor(self.parts.visual_ids, device=ids.device)) & real
        visual_counts, lengths = torch.stack([visual.sum(1), real.sum(1)]).tolist()
        return Prompt(ids, real, visual, tuple(visual_counts), tuple(lengths), self.sources())


# Not a field of what is attached: threads may call the model at once under one block, each in a context of its own.
CALL: ContextVar[Call | None] = ContextVar("prunekit_call", default=None)
