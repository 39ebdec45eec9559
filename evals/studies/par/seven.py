"""Measured prefill at the shape of LLaVA-1.5-7B, on a CPU: all its layers share the weights of one.

Thirty-two layers of their own would not fit into the memory of a small machine. What is computed is the same, and since
one layer (400 MB in bfloat16) is far larger than any cache, so is what is read from memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from prunekit_evals.studies.par.settings import PAPER
from prunekit_evals.studies.par.times import DENSE, flops_of, listed, paper_cases, ratios, timing, workload

SHAPE = workload.Size(layers=32, hidden=4096, mlp=11008, heads=32, side=24, text=64)
SETTINGS = (PAPER[1], PAPER[3])  # the one that the paper trains at, and its smallest


def model_of(size: workload.Size) -> Any:
    """The benchmark's random model in bfloat16, with one layer's weights in every layer."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        whole = workload.model_of(workload.Size(**{**vars(size), "layers": 1}))
        with torch.device("meta"):
            shaped = workload.model_of(size)
    finally:
        torch.set_default_dtype(before)
    decoder, first = shaped.model.language_model, whole.model.language_model.layers[0]
    for layer in decoder.layers:
        layer.load_state_dict(first.state_dict(), assign=True)  # the same tensors, not copies
    whole.model.language_model.layers = decoder.layers
    for config in (whole.config.text_config, whole.model.language_model.config):
        config.num_hidden_layers = size.layers
    return whole.eval().requires_grad_(False)


def seven(size: workload.Size, rounds: int) -> dict[str, Any]:
    """Rows by case as in `times.large`, of the prefill alone."""
    model, inputs = model_of(size), workload.inputs_of(size)
    features = inputs["mm_encoder_outputs"]["image"]
    features.pooler_output = tuple(one.bfloat16() for one in features.pooler_output)
    cases = paper_cases(size, SETTINGS)
    times = timing.interleaved(
        {name: partial(workload.prefill, model, listed(stages), inputs) for name, stages in cases.items()}, rounds
    )
    rows = {
        name: {"flops": round(flops_of(model, stages, inputs), 5), "prefill": ratios(times[name], times[DENSE])}
        for name, stages in cases.items()
        if name != DENSE
    }
    return {"rounds": rounds, "dense_s": round(timing.median(times[DENSE]).cpu, 2), "rows": rows}
