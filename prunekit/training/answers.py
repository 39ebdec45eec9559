"""What the dense model answers, and how far a pruned model's distribution over that answer is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from prunekit.training.recipe import Recipe

# Inputs with one entry for each token of the prompt that can be continued for the tokens of an answer.
_BESIDE = frozenset({"input_ids", "attention_mask", "mm_token_type_ids"})


@dataclass(frozen=True)
class Answers:
    """Greedy answers of the dense model to a batch. T: tokens of the longest.

    tokens: int64 (B, T). valid: bool (B, T), the answer with its end token. logits: float32 (B, T, vocabulary).
    """

    tokens: Tensor
    valid: Tensor
    logits: Tensor


class _Forced(LogitsProcessor):
    """Forces greedy decoding to generate `tokens`; the raw logits are recorded before this processor acts."""

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


def forced_logits(model: Any, inputs: Mapping[str, Tensor], answers: Answers) -> Tensor:
    """Logits, float32 (B, T, vocabulary), of the model as it is pruned now, when it is forced to these answers."""
    forced = _Forced(answers.tokens, inputs["input_ids"].shape[1])
    length = answers.tokens.shape[1]
    output = _generate(model, inputs, length, min_new_tokens=length, logits_processor=[forced])
    return torch.stack(output.logits, 1).float()


def can_be_at_once(inputs: Mapping[str, Any], answers: Answers, visual_ids: Sequence[int]) -> bool:
    """Whether one forward can run prompts and answers: every input of the ids' shape can be continued, and no visual
    token is at the end of a prompt or in an answer, where it would count as one of the prompt's.
    """
    ids = inputs["input_ids"]
    beside = {name for name, one in inputs.items() if isinstance(one, Tensor) and one.shape[:2] == ids.shape[:2]}
    if not beside <= _BESIDE or not bool(inputs.get("attention_mask", ids.new_ones(1, 1))[:, -1].all()):
        return False
    visual = torch.as_tensor(list(visual_ids), device=ids.device)
    return not bool(torch.isin(torch.cat([ids[:, -1:], answers.tokens], 1), visual).any())


def at_once(model: Any, inputs: Mapping[str, Any], answers: Answers) -> Tensor:
    """As `forced_logits`, by one forward over prompts and answers, padded on the left, in place of decoding steps.

    Equal to it where the pipeline treats every token after the prompt as it treats the prompt's last one. Tokens of an
    answer that are not valid get meaningless logits. Checks nothing itself: see `can_be_at_once`.
    """
    ids, length = inputs["input_ids"], answers.tokens.shape[1]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    mask = torch.cat([mask, answers.valid[:, 1:].to(mask)], 1)
    order = mask.argsort(dim=1, stable=True)  # all padding to the left
    joined = dict(inputs) | {"attention_mask": mask.gather(1, order)}
    for name in _BESIDE & joined.keys() - {"attention_mask"}:
        more = answers.tokens[:, :-1].to(ids) if name == "input_ids" else ids.new_zeros(len(ids), length - 1)
        joined[name] = torch.cat([joined[name], more.to(joined[name])], 1).gather(1, order)
    with torch.no_grad():
        logits: Tensor = model(**joined, use_cache=False, logits_to_keep=length).logits.float()
    counts = answers.valid.sum(1, keepdim=True)
    steps = length - counts + torch.arange(length, device=ids.device)  # the valid end of each row
    return logits.gather(1, steps.clamp(max=length - 1)[..., None].expand(-1, -1, logits.shape[-1]))


def divergence(answers: Answers, logits: Tensor, recipe: Recipe) -> Tensor:
    """KL of each sample, float32 (B,): summed over the vocabulary, mean over the tokens of the answer; NaN where logits
    are.
    """
    dense, pruned = (F.log_softmax(one / recipe.temperature, -1) for one in (answers.logits, logits))
    if recipe.kl == "reverse":
        dense, pruned = pruned, dense
    each = (dense.exp() * (dense - pruned)).masked_fill(dense.exp() == 0, 0.0).sum(-1)  # 0 log 0
    return each.masked_fill(~answers.valid, 0.0).sum(1) / answers.valid.sum(1)


def _generate(model: Any, inputs: Mapping[str, Tensor], most: int, **more: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=most, do_sample=False, num_beams=1, use_cache=True, output_logits=True,
        return_dict_in_generate=True, **more,
    )  # fmt: skip
