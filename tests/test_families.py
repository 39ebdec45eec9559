"""Families say where the parts of a model are; what they do not know is refused before any compute."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    SiglipVisionConfig,
)

import prunekit
from prunekit.families import families, shape_of

IMAGE = 90
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
POOL = {"name": "pool", "stages": [{"use": "pool", "keep": 0.25}]}
RANDOM = {"name": "random", "stages": [{"use": "random", "keep": 0.25}]}


def llava(vision: PretrainedConfig, select: str) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_select_strategy=select,
    )
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def kept(model: LlavaForConditionalGeneration, pipeline: dict[str, object], tokens: int) -> tuple[int, ...]:
    with prunekit.apply(model, pipeline) as run:
        model(input_ids=torch.tensor([[1, *[IMAGE] * tokens, 5]]), pixel_values=torch.randn(1, 3, 56, 56))
    assert run.report is not None
    return run.report.kept_tokens


CLIP = CLIPVisionConfig(image_size=56, patch_size=14, **SIZES)
SIGLIP = SiglipVisionConfig(image_size=56, patch_size=14, vision_use_head=False, **SIZES)


@pytest.mark.parametrize(
    ("vision", "select", "tokens"), [(CLIP, "default", 16), (SIGLIP, "full", 16), (CLIP, "full", 17)]
)
def test_tokens_per_image(vision: PretrainedConfig, select: str, tokens: int) -> None:
    model = llava(vision, select)
    assert shape_of(model).visual_tokens == tokens
    assert kept(model, RANDOM, tokens) == (4,)
    if tokens == 16:
        assert kept(model, POOL, tokens) == (4,)


def test_a_cls_token_among_the_visual_tokens_has_no_place_on_a_grid() -> None:
    with pytest.raises(prunekit.Unsupported, match="17 visual tokens do not fill a square grid"):
        kept(llava(CLIP, "full"), POOL, 17)


def test_a_tower_that_is_not_known_is_refused() -> None:
    model = llava(Dinov2Config(image_size=56, patch_size=14, **SIZES), "full")
    with pytest.raises(prunekit.Unsupported, match="'dinov2' tower is not supported"), prunekit.apply(model, RANDOM):
        pass


def test_a_model_of_no_known_family_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    refusal = "models of type 'llama' .* have no family file, .* it takes no images: its forward has no `pixel_values`"
    with pytest.raises(prunekit.Unsupported, match=refusal), prunekit.apply(model, RANDOM):
        pass


def test_a_model_without_its_head_is_refused() -> None:
    model = llava(CLIP, "default").model
    with pytest.raises(prunekit.Unsupported, match="LlavaModel cannot generate"), prunekit.apply(model, RANDOM):
        pass


def test_what_is_no_model_of_transformers_is_refused() -> None:
    for wrong in (torch.nn.Linear(2, 2), torch.nn.DataParallel(llava(CLIP, "default")), "llava"):
        with pytest.raises(prunekit.Unsupported, match="expected a model of transformers, not"):
            prunekit.apply(wrong, RANDOM).__enter__()


def test_every_family_file_declares_itself() -> None:
    names = [family.name for family in families()]
    assert names == sorted(set(names))
    assert {"llava", "qwen_vl", "gemma3", "idefics3"} < set(names)
