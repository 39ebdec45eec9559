"""What a router costs and what PAR promises, exactly: counted by torch on the meta device, without computing."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from prunekit_evals.studies.par.cells import pipeline
from prunekit_evals.studies.par.settings import PAPER
from prunekit_strategies.par.config import config_of
from prunekit_strategies.par.router import Router
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

from prunekit import cost, families
from prunekit.pipeline.forecast import forecast
from prunekit.strategy.decisions import ModelShape

TEXT = 64  # tokens of the prompt beside the image's
ROUTERS: tuple[tuple[int | str, int], ...] = ((64, 1), (128, 1), (256, 1), (512, 1), (512, 2), ("model", 1))


def counted(module: nn.Module, *arguments: Any, **named: Any) -> int:
    """FLOPs of one call on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        module(*arguments, **named)
    return int(counter.get_total_flops())


def router_flops(shape: ModelShape, width: Any, depth: int, prompt: int) -> int:
    """Counted FLOPs of a router's forward."""
    with torch.device("meta"):
        router = Router(config_of(shape, depth, width))
        embeds = torch.empty(1, prompt, shape.hidden)
        there = torch.ones(1, prompt, dtype=torch.bool)
    router._mask = lambda positions, tokens: None  # type: ignore[method-assign]  # it asks a tensor for its values
    return counted(router, embeds, there, there)


def llava_7b() -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B without its weights."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig())


def overhead() -> dict[str, Any]:
    """Routers at the shape of LLaVA-1.5-7B: FLOPs as a fraction of the dense prefill, both counted."""
    model = llava_7b()
    shape = families.find(model).shape()
    assert shape.visual_tokens is not None
    prompt = shape.visual_tokens + TEXT
    with torch.device("meta"):
        states, mask = torch.empty(1, prompt, shape.hidden), torch.empty(1, 1, prompt, prompt)
    dense = counted(model.model.language_model, inputs_embeds=states, attention_mask=mask, use_cache=False)
    rows = [
        {"width": width, "depth": depth, "share": round(router_flops(shape, width, depth, prompt) / dense, 6)}
        for width, depth in ROUTERS
    ]
    formula = cost.prefill_flops(shape, [prompt] * shape.layers)
    return {"prompt": prompt, "dense": dense, "formula": formula, "rows": rows, "promised": promised(shape)}


def promised(shape: ModelShape) -> list[dict[str, Any]]:
    """The paper's four settings at this shape, with the default router: fractions of dense."""
    rows = []
    for tokens, layers in PAPER:
        stage = {"use": "par", "weights": None, "seed": 0, "keep_tokens": tokens, "keep_layers": layers}
        predicted = forecast(pipeline([stage]).bind(shape), TEXT)
        assert predicted is not None
        flops = predicted.flops[1] + predicted.decisions
        rows.append({
            "tokens": tokens, "layers": layers, "flops": round(flops, 5), "router": round(predicted.decisions, 6),
            "kv": round(predicted.kv[1], 5), "speed": round(1 / flops, 3),
        })  # fmt: skip
    return rows
