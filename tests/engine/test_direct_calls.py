"""A prefill by a direct call of the model, which makes its own cache on the way, leaves what `generate` leaves."""

from __future__ import annotations

import pytest
from examples import registered

import prunekit
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.upstream import CACHE
from prunekit.verify.comparison import kv_length

PIPELINES = {
    "end": [{"use": "ex_loud", "at": "prefill_end", "keep": 0.25}],
    "crop": [{"use": "ex_cropped", "at": 3, "keep": 0.25}],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_cropped_leaves_a_cache_that_the_model_made(name: str) -> None:
    model, inputs = tiny_llava(), tiny_inputs((1,), (9,))
    with registered(), prunekit.apply(model, {"name": name, "stages": PIPELINES[name]}) as run:
        cache = model(**inputs, use_cache=True)[CACHE]
    assert run.report is not None
    held = tuple(kv_length(cache, layer) for layer in range(6))
    assert held == run.report.kv_tokens[0] and max(held) < inputs["input_ids"].shape[1]
