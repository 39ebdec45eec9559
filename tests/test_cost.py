"""Costs: the formula equals what torch counts, dense and pruned, on the meta device and in a real run."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import prunekit
from prunekit.cost import cost_of, layer_flops, prefill_flops
from prunekit.decisions import LayerAction, LayerPlan
from prunekit.families import shape_of

IMAGE = 90


def llava(text: LlamaConfig, device: str = "cpu") -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


SMALL = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
)


def test_the_7b_prefill_is_what_torch_counts_on_the_meta_device() -> None:
    model = llava(LlamaConfig(vocab_size=32064), device="meta")  # Llama's defaults are the 7B
    text, tokens = model.model.language_model, 622
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        mask = torch.empty(1, 1, tokens, tokens)
        text(inputs_embeds=torch.empty(1, tokens, 4096), attention_mask=mask, use_cache=False)
    counted = counter.get_total_flops()
    assert prefill_flops(shape_of(model), [tokens] * 32) == counted
    assert counted == pytest.approx(8.259e12, rel=1e-3)


@pytest.mark.parametrize(
    "stages",
    [
        [{"use": "fastv", "at": 2, "keep": 0.25}],
        [{"use": "stride", "keep": 0.5}, {"use": "skip_layers", "layers": [1, 4]}],
        [{"use": "skip_layers", "layers": [0, 3], "what": "attention"}],
        [{"use": "vtw", "at": 3}, {"use": "skip_layers", "layers": [2], "what": "mlp"}],
    ],
    ids=lambda stages: "+".join(stage["use"] for stage in stages),
)
def test_a_pruned_prefill_executes_the_flops_that_its_report_says(stages: list[dict[str, object]]) -> None:
    model = llava(SMALL)
    ids = torch.tensor([[1, 5, *[IMAGE] * 16, 7, 8, 9]])
    with prunekit.apply(model, {"name": "cost", "stages": stages}) as run, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, pixel_values=torch.randn(1, 3, 56, 56))
        layer = re.compile(r"language_model\.layers\.\d+$")
        counted = sum(sum(flops.values()) for name, flops in counter.get_flop_counts().items() if layer.search(name))
        assert run.report is not None
        assert run.report.cost.prefill_flops == (counted,)
        assert run.report.cost.flops_fraction < 1


def test_actions_split_a_layer_exactly() -> None:
    shape = shape_of(llava(SMALL))
    run, skip, attention, mlp = (layer_flops(shape, 37, action) for action in LayerAction)
    assert skip == 0
    assert attention + mlp == run  # what remains without attention, plus what remains without MLP


def test_kv_bytes_count_keys_and_values_of_the_layers_that_write() -> None:
    shape = shape_of(llava(SMALL))
    plan = LayerPlan({0: LayerAction.SKIP, 1: LayerAction.SKIP_ATTENTION, 2: LayerAction.SKIP_MLP})
    cost = cost_of(shape, [(10, 10, 10, 4, 4)], [10], plan, itemsize=2)
    per_token = 2 * 2 * 8 * 2  # keys and values, two KV heads of width 8, two bytes
    assert cost.kv_bytes == (per_token * (10 + 4 + 4),)
    assert cost.dense_kv_bytes == (per_token * 50,)
    assert cost.kv_fraction == pytest.approx(18 / 50)
