"""Models that other libraries have changed: adapters, quantised weights, transformers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoint import picture, save

import prunekit
from prunekit import loading
from prunekit.errors import SpecError, Unsupported
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent

PIPELINE: dict[str, Any] = {
    "name": "both",
    "stages": [{"use": "fastv", "at": 2, "keep": 0.5}, {"use": "skip_layers", "layers": [3]}],
}


@pytest.fixture
def adapted() -> Any:
    """A LoRA on queries, values and the MLP, not merged."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(tiny_llava(), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    return model.eval().double()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_model_with_adapters_is_pruned_exactly(adapted: Any) -> None:
    with pytest.raises(Unsupported, match=r"PEFT.* give the model inside"), prunekit.apply(adapted, PIPELINE):
        pass
    inside = adapted.get_base_model()
    assert_equivalent(inside, PIPELINE, tiny_inputs())
    with torch.inference_mode():
        with prunekit.apply(inside, PIPELINE):  # and whoever calls the wrapper calls it
            through = adapted(**tiny_inputs()).logits
        with adapted.disable_adapter(), prunekit.apply(inside, PIPELINE):
            assert (adapted(**tiny_inputs()).logits - through).abs().max() > 1e-6
        merged = adapted.merge_and_unload()
        with prunekit.apply(merged, PIPELINE):
            assert (merged(**tiny_inputs()).logits - through).abs().max() < 1e-9


def test_the_pipeline_of_transformers_calls_a_pruned_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    model, processor = loading.load(folder)
    ask: Any = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": str(picture(tmp_path / "i.png"))}, {"type": "text", "text": "w9"}]
    chat = [{"role": "user", "content": content}]
    with prunekit.apply(model, "fastv-k2-r25") as run:
        pruned = ask(text=chat, max_new_tokens=3, return_full_text=False, do_sample=False)
    assert run.report is not None and run.report.kept_tokens[0] * 4 == run.report.visual_tokens[0]
    assert isinstance(pruned[0]["generated_text"], str)


def test_kvpress_is_no_stage_and_it_is_said_why() -> None:
    with pytest.raises(SpecError, match=r"kvpress.*transformers below 5\.3.*language models"):
        prunekit.load({"stages": [{"use": "kvpress", "press": "SnapKVPress"}]})
