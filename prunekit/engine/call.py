"""One call of the LVLM's base model: what it was given, and what of it cannot be pruned exactly."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from prunekit.engine import kv
from prunekit.engine.pictures import Pictures, noted
from prunekit.engine.prompt import Prompt
from prunekit.errors import Unsupported
from prunekit.families.base import Parts


class Call:
    """One call of the LVLM's base model: its arguments, and the outputs of its encoders once they are known."""

    def __init__(self, given: Mapping[str, Any], parts: Parts) -> None:
        self.given, self.parts = given, parts
        encoded = given.get("mm_encoder_outputs") or {}
        self.outputs: dict[str, Any] = {name: out for name, out in encoded.items() if out is not None}

    def refuse_unsupported(self) -> None:
        """Raise Unsupported for what cannot be answered on fewer tokens."""
        for name in ("output_attentions", "output_hidden_states"):
            if self.given.get(name):
                raise Unsupported(
                    f"{name}=True is not available under a pruning pipeline: layers hold different tokens"
                )
        cache = self.given.get("past_key_values")
        if cache is not None and kv.owner_of(cache) is None:
            kv.check(cache)
        if self.given.get("use_cache") is False and self.given.get("mm_encoder_outputs"):
            raise Unsupported(
                "generate(use_cache=False) would prune anew at every step; leave use_cache at its default"
            )
        mask = self.given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise Unsupported("give a 2-D attention_mask (batch, tokens); prunekit makes each layer's own mask from it")
        if self.given.get("input_ids") is None:
            raise Unsupported("pass input_ids: prunekit finds the visual tokens by their ids, not in inputs_embeds")

    def refuse_new_pictures(self) -> None:
        """Raise Unsupported when later tokens on a pruned cache bring pictures."""
        if self.outputs:
            raise Unsupported("new images on a KV cache that was already pruned are not supported; start a new prompt")

    def pictures(self) -> tuple[Pictures, ...]:
        """What was encoded for this call, kind by kind."""
        kinds = ((modality, self.outputs.get(modality.name)) for modality in self.parts.modalities)
        found = (noted(output, modality) for modality, output in kinds if output is not None)
        return tuple(pictures for pictures in found if pictures is not None)

    def prompt(self) -> Prompt:
        """The prompt batch of a prefill; one read back from the device."""
        ids = self.given["input_ids"]
        mask = self.given.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device, torch.bool)
        visual = torch.isin(ids, torch.tensor(self.parts.visual_ids, device=ids.device)) & real
        visual_counts, lengths = torch.stack([visual.sum(1), real.sum(1)]).tolist()
        return Prompt(ids, real, visual, tuple(visual_counts), tuple(lengths), self.pictures())


CALL: ContextVar[Call | None] = ContextVar("prunekit_call", default=None)
