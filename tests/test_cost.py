"""Costs: the formula equals what torch counts, dense and pruned, on the meta device and in a real run."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import prunekit
from prunekit.cost import Work, cost_of, kv_tokens, layer_flops, prefill_flops
from prunekit.families import shape_of
from prunekit.strategy.decisions import LayerAction, LayerPlan

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
        [{"use": "random", "at": "1.mid", "keep": 0.25}, {"use": "skip_layers", "layers": [3]}],
        [{"use": "freeze_layers", "layers": [1, 3]}, {"use": "stride", "at": 2, "keep": 0.5}],
        [{"use": "skip_layers", "layers": [2, 3], "phase": "prefill", "fill_kv": True}],
        [{"use": "random", "at": "2.after", "keep": 0.5}, {"use": "skip_layers", "layers": [3], "phase": "decode"}],
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
        # FastV's own row, one product with each key, is computed inside its layer, and it says so.
        assert run.report.cost.prefill_flops == (counted,)
        assert run.report.cost.decision_flops == (2 * 21 * SMALL.hidden_size * (stages[0]["use"] == "fastv"),)
        assert run.report.cost.flops_fraction < 1


def test_actions_split_a_layer_exactly() -> None:
    shape = shape_of(llava(SMALL))
    cost = {action: layer_flops(shape, 37, action, visual=16) for action in LayerAction}
    run = cost[LayerAction.RUN]
    assert cost[LayerAction.SKIP] == 0
    # What remains without attention, plus what remains without MLP.
    assert cost[LayerAction.SKIP_ATTENTION] + cost[LayerAction.SKIP_MLP] == run
    assert 0 < cost[LayerAction.FILL_KV] < cost[LayerAction.FREEZE] < run
    assert layer_flops(shape, 37, LayerAction.FREEZE, visual=0) == run
    assert layer_flops(shape, 37, mlp=10) == run - 2 * shape.mlp_params * 27


def test_kv_is_what_layers_write_and_decoding_reads() -> None:
    shape = shape_of(llava(SMALL))
    plan = LayerPlan({0: LayerAction.SKIP, 1: LayerAction.SKIP_ATTENTION, 2: LayerAction.SKIP_MLP})
    kv = kv_tokens(shape, (10, 10, 10, 4, 4), plan)
    assert kv == (0, 0, 10, 4, 4)
    assert kv_tokens(shape, (9, 9), LayerPlan({0: LayerAction.FILL_KV}, {})) == (9, 9)
    assert kv_tokens(shape, (9, 9), LayerPlan({}, {1: LayerAction.SKIP})) == (9, 0)
    work = [Work(plan[layer], tokens, 0, tokens) for layer, tokens in enumerate((10, 10, 10, 4, 4))]
    cost = cost_of(shape, [work], [kv], [10], itemsize=2)
    per_token = 2 * 2 * 8 * 2  # keys and values, two KV heads of width 8, two bytes
    assert cost.kv_bytes == (per_token * (10 + 4 + 4),)
    assert cost.dense_kv_bytes == (per_token * 50,)
    assert cost.kv_fraction == pytest.approx(18 / 50)
