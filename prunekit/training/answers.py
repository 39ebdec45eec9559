"""What the dense model answers, and how far a pruned model's distribution over that answer is from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from prunekit.training.recipe import Recipe


@dataclass(frozen=True)
class Answers:
    """Greedy answers of the dense model to a batch. T: tokens of the longest.

    tokens: int64 (B, T). valid: bool (B, T), the answer with its end token. logits: float32 (B, T, vocabulary).
    """

    tokens: Tensor
    valid: Tensor
    logits: Tensor


class _Forced(LogitsProcessor):
    """Makes greedy decoding say given tokens; the raw logits are taken before."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.tokens[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def dense_answers(model: Any, inputs: Mapping[str, Tensor], most: int) -> Answers:
    """Ask the model as it is."""
    output = _generate(model, inputs, most)
    logits = torch.stack(output.logits, 1).float()
    tokens = output.sequences[:, -logits.shape[1] :]
    ends = model.generation_config.eos_token_id
    stop = torch.zeros_like(tokens, dtype=torch.bool)
    if ends is not None:
        stop = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device).flatten())
    before = stop.cumsum(1) - stop.long()
    return Answers(tokens, before == 0, logits)


def told_logits(model: Any, inputs: Mapping[str, Tensor], answers: Answers) -> Tensor:
    """Logits, float32 (B, T, vocabulary), of the model as it is pruned now, while it is made to give these answers."""
    forced = _Forced(answers.tokens, inputs["input_ids"].shape[1])
    length = answers.tokens.shape[1]
    output = _generate(model, inputs, length, min_new_tokens=length, logits_processor=[forced])
    return torch.stack(output.logits, 1).float()


def divergence(answers: Answers, logits: Tensor, recipe: Recipe) -> Tensor:
    """KL of each sample, float32 (B,): summed over the vocabulary, mean over the tokens of the answer."""
    dense, pruned = (F.log_softmax(one / recipe.temperature, -1) for one in (answers.logits, logits))
    if recipe.kl == "reverse":
        dense, pruned = pruned, dense
    each = (dense.exp() * (dense - pruned)).nan_to_num(0.0).sum(-1)  # 0 log 0
    return (each * answers.valid).sum(1) / answers.valid.sum(1)


def _generate(model: Any, inputs: Mapping[str, Tensor], most: int, **more: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=most, do_sample=False, num_beams=1, use_cache=True, output_logits=True,
        return_dict_in_generate=True, **more,
    )  # fmt: skip
