"""Shrunken configs of every family: a few layers, 32 wide, a vision tower of three blocks, 120 words.

One function a family, from the number of decoder layers to a config. Numbers are chosen so that what is special in a
family really happens: windows shorter than a prompt, M-RoPE with three unequal sections, merged patches, newlines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from prunekit.verify.tiny_models import BEGIN, BOS, END, IMAGE, PAD, VIDEO, VOCABULARY, WINDOW

HIDDEN, PATCH = 32, 14

Make = Callable[[int], Any]


def text(layers: int, **more: Any) -> dict[str, Any]:
    """Numbers of a small decoder with grouped queries; `more` overrides them."""
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": None, "pad_token_id": PAD,
    }  # fmt: skip
    return usual | more


def vision(kind: str, **more: Any) -> dict[str, Any]:
    """Numbers of a small tower that sees images of 56 x 56 pixels in patches of 14."""
    usual: dict[str, Any] = {
        "model_type": kind, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 56, "patch_size": PATCH,
    }  # fmt: skip
    return usual | more


def config(kind: str, text_config: dict[str, Any], vision_config: dict[str, Any], **more: Any) -> Any:
    """The config of a model type from those of its parts."""
    base: Any = transformers.AutoConfig.for_model(kind).__class__
    return base(
        text_config=text_config, vision_config=vision_config, image_token_id=IMAGE, tie_word_embeddings=False, **more
    )


def llava(layers: int) -> Any:
    return config(
        "llava", text(layers, model_type="llama"), vision("clip_vision_model"), image_seq_length=16,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip


def llava_next(layers: int) -> Any:
    return config(
        "llava_next", text(layers, model_type="mistral", sliding_window=None), vision("clip_vision_model"),
        image_seq_length=16, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )  # fmt: skip


def llava_onevision(layers: int) -> Any:
    return config(
        "llava_onevision", text(layers, model_type="qwen2"), vision("siglip_vision_model", vision_use_head=False),
        video_token_id=VIDEO, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 168]],
        vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip


def _mrope(section: tuple[int, int, int] = (2, 1, 1), **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}


def _qwen_tower(**more: Any) -> dict[str, Any]:
    return {"depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2} | more


def _qwen(kind: str, text_config: dict[str, Any], vision_config: dict[str, Any]) -> Any:
    return config(
        kind, text_config, vision_config, video_token_id=VIDEO, vision_start_token_id=BEGIN, vision_end_token_id=END
    )


def qwen2_vl(layers: int) -> Any:
    tower = _qwen_tower(embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2)
    return _qwen("qwen2_vl", text(layers, rope_parameters=_mrope()), tower)


def qwen2_5_vl(layers: int) -> Any:
    tower = _qwen_tower(
        hidden_size=32, intermediate_size=48, out_hidden_size=HIDDEN, window_size=56, fullatt_block_indexes=[1]
    )
    return _qwen("qwen2_5_vl", text(layers, rope_parameters=_mrope()), tower)


def _qwen3_tower() -> dict[str, Any]:
    return _qwen_tower(
        hidden_size=32, intermediate_size=48, out_hidden_size=HIDDEN, num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )  # fmt: skip


def qwen3_vl(layers: int) -> Any:
    decoder = text(layers, head_dim=8, rope_parameters=_mrope(mrope_interleaved=True))
    return _qwen("qwen3_vl", decoder, _qwen3_tower())


def qwen3_vl_moe(layers: int) -> Any:
    decoder = text(
        layers, head_dim=8, rope_parameters=_mrope(mrope_interleaved=True), num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    return _qwen("qwen3_vl_moe", decoder, _qwen3_tower())


def _qwen3_5_text(layers: int, **more: Any) -> dict[str, Any]:
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    return text(
        layers, head_dim=8, rope_parameters=_mrope(mrope_interleaved=True, partial_rotary_factor=1.0),
        layer_types=[kinds[n % 4] for n in range(layers)], linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4, **more,
    )  # fmt: skip


def _qwen3_5_tower() -> dict[str, Any]:
    return {name: value for name, value in _qwen3_tower().items() if name != "deepstack_visual_indexes"}


def qwen3_5(layers: int) -> Any:
    return _qwen("qwen3_5", _qwen3_5_text(layers), _qwen3_5_tower())


def qwen3_5_moe(layers: int) -> Any:
    decoder = _qwen3_5_text(
        layers, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    return _qwen("qwen3_5_moe", decoder, _qwen3_5_tower())


def llava_next_video(layers: int) -> Any:
    return config(
        "llava_next_video", text(layers, model_type="llama"), vision("clip_vision_model"), video_token_id=VIDEO,
        image_seq_length=16, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )  # fmt: skip


def vipllava(layers: int) -> Any:
    return config(
        "vipllava", text(layers, model_type="llama"), vision("clip_vision_model"), image_seq_length=16,
        vision_feature_layers=(-2, -3, 1),  # its name in all versions of transformers, today an alias
    )  # fmt: skip


def internvl(layers: int) -> Any:
    tower = vision("internvl_vision", image_size=[84, 84], patch_size=[PATCH, PATCH], use_qk_norm=True)
    return config("internvl", text(layers, model_type="qwen2"), tower, image_seq_length=9)


def gemma3(layers: int) -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    decoder = text(
        layers, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW,
        layer_types=[kinds[n % 3] for n in range(layers)],
    )  # fmt: skip
    tower = vision("siglip_vision_model", image_size=84, vision_use_head=False)
    return config("gemma3", decoder, tower, mm_tokens_per_image=9, boi_token_index=BEGIN, eoi_token_index=END)


def paligemma(layers: int) -> Any:
    tower = vision("siglip_vision_model", vision_use_head=False)
    return config(
        "paligemma", text(layers, model_type="gemma", head_dim=8), tower, projection_dim=HIDDEN, hidden_size=HIDDEN
    )


def _shuffled(kind: str, layers: int) -> Any:
    tower = vision(f"{kind}_vision", image_size=84)
    return config(kind, text(layers, model_type="llama"), tower, scale_factor=2)


def idefics3(layers: int) -> Any:
    return _shuffled("idefics3", layers)


def smolvlm(layers: int) -> Any:
    return _shuffled("smolvlm", layers)


def mistral3(layers: int) -> Any:
    decoder = text(layers, model_type="mistral", head_dim=8, sliding_window=None)
    return config("mistral3", decoder, vision("pixtral", image_size=112), spatial_merge_size=2)


def _glm_tower() -> dict[str, Any]:
    return _qwen_tower(hidden_size=32, intermediate_size=48, out_hidden_size=HIDDEN, image_size=56)


def _glm(kind: str, decoder: dict[str, Any]) -> Any:
    return config(
        kind, decoder, _glm_tower(), video_token_id=VIDEO, image_start_token_id=BEGIN, image_end_token_id=END,
        video_start_token_id=BEGIN, video_end_token_id=END,
    )  # fmt: skip


def _glm_text(layers: int, **more: Any) -> dict[str, Any]:
    return text(layers, rope_parameters=_mrope(**more))


def glm4v(layers: int) -> Any:
    return _glm("glm4v", _glm_text(layers))


def glm46v(layers: int) -> Any:
    return _glm("glm46v", _glm_text(layers))


def glm4v_moe(layers: int) -> Any:
    experts = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }  # fmt: skip
    return _glm("glm4v_moe", _glm_text(layers, partial_rotary_factor=1.0) | experts)


def _cohere(layers: int) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return text(layers, model_type="cohere2", sliding_window=WINDOW, layer_types=[kinds[n % 2] for n in range(layers)])


def aya_vision(layers: int) -> Any:
    tower = vision("siglip_vision_model", image_size=84, vision_use_head=False)
    return config("aya_vision", _cohere(layers), tower, downsample_factor=2)


def cohere2_vision(layers: int) -> Any:
    tower = vision("siglip_vision_model", image_size=84, vision_use_head=False)
    return config("cohere2_vision", _cohere(layers), tower, downsample_factor=2, alignment_intermediate_size=64)


def _two_kinds(layers: int) -> list[str]:
    """Sliding and full attention by turns, the last full."""
    return ["full_attention" if (layers - n) % 2 else "sliding_attention" for n in range(layers)]


def _shared(layers: int, **more: Any) -> dict[str, Any]:
    """A decoder whose last layers, half of them, read keys and values of earlier ones."""
    return text(
        layers, head_dim=8, sliding_window=WINDOW, layer_types=_two_kinds(layers), num_kv_shared_layers=layers // 2,
    ) | more  # fmt: skip


def gemma3n(layers: int) -> Any:
    decoder = _shared(
        layers, hidden_size_per_layer_input=6, vocab_size_per_layer_input=VOCABULARY, laurel_rank=4,
        activation_sparsity_pattern=[0.9, 0.9, *[0.0] * (layers - 2)],
    )  # fmt: skip
    tower = {"hidden_size": 24, "vocab_size": 8, "vocab_offset": VOCABULARY}
    audio = {
        "hidden_size": 16, "vocab_size": 8, "vocab_offset": VOCABULARY + 8, "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2, "sscp_conv_channel_size": (4, 4), "input_feat_size": 16,
    }  # fmt: skip
    made = config(
        "gemma3n", decoder, tower, audio_config=audio, vision_soft_tokens_per_image=16, boi_token_id=BEGIN,
        eoi_token_id=END, audio_token_id=7, boa_token_id=8, eoa_token_id=9,
    )  # fmt: skip
    # MobileNet needs another package; this gives the projector a map of as many channels and cells.
    resnet: Any = transformers.ResNetConfig
    made.__dict__["vision_config"] = resnet(
        embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic", image_size=32, rms_norm_eps=1e-6,
        **tower,
    )  # fmt: skip
    return made


def gemma4(layers: int) -> Any:
    decoder = _shared(
        layers, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True, use_double_wide_mlp=True,
        hidden_size_per_layer_input=6, vocab_size_per_layer_input=VOCABULARY, use_bidirectional_attention="vision",
        rope_parameters=_gemma4_rope(),
    )  # fmt: skip
    tower = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 12, "patch_size": 4, "pooling_kernel_size": 2,
        "position_embedding_size": 16,
    }  # fmt: skip
    return config(
        "gemma4", decoder, tower, video_token_id=VIDEO, audio_config=None, boi_token_id=BEGIN, eoi_token_id=END
    )


def _gemma4_rope() -> dict[str, Any]:
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    }


def gemma4_unified(layers: int) -> Any:
    tower = {
        "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 24, "mm_posemb_size": 16, "output_proj_dims": 24,
    }  # fmt: skip
    return config(
        "gemma4_unified", _shared(layers, global_head_dim=16, rope_parameters=_gemma4_rope()), tower,
        video_token_id=VIDEO, audio_config=None, boi_token_id=BEGIN, eoi_token_id=END,
    )  # fmt: skip


def paddleocr_vl(layers: int) -> Any:
    tower = vision("paddleocr_vl_vision", patch_size=PATCH, spatial_merge_size=2, num_attention_heads=2, hidden_size=32)
    decoder = text(layers, head_dim=8, rope_parameters=_mrope())
    return config("paddleocr_vl", decoder, tower, vision_start_token_id=BEGIN, vision_end_token_id=END)


def ovis2(layers: int) -> Any:
    tower = vision("ovis2_vision_model", vocab_size=48, hidden_stride=2, num_visual_indicator_tokens=5)
    decoder = text(layers, model_type="qwen2")
    indicators = [END + 1, END + 2, END + 3, END + 1, END + 2]
    return config(
        "ovis2", decoder, tower, hidden_size=HIDDEN, vocab_size=VOCABULARY, visual_indicator_token_ids=indicators
    )


def fast_vlm(layers: int) -> Any:
    """Its tower of timm is replaced by another one that gives a map."""
    tower = {
        "model_type": "segformer", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 24], "hidden_size": 24,
        "num_attention_heads": [1, 1, 2, 2], "image_size": 128,
    }  # fmt: skip
    return config("fast_vlm", text(layers, model_type="qwen2"), tower)


def perception_lm(layers: int) -> Any:
    """Its tower of timm is replaced by CLIP."""
    tower = vision("clip_vision_model", model_args={"embed_dim": 24})
    return config("perception_lm", text(layers, model_type="llama"), tower, projector_pooling_ratio=2)


def molmo2(layers: int) -> Any:
    tower = vision("molmo2_vision", image_size=[84, 84], num_position_embeddings=36, num_key_value_heads=2, head_dim=12)
    adapter = {
        "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 32,
        "text_hidden_size": HIDDEN, "vision_feature_layer": [1, 0],
    }  # fmt: skip
    decoder = text(layers, head_dim=8, additional_vocab_size=8)
    base: Any = transformers.AutoConfig.for_model("molmo2").__class__
    return base(
        text_config=decoder, vision_config=tower, adapter_config=adapter, image_patch_id=IMAGE,
        image_start_token_id=BEGIN, image_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip


CONFIGS: dict[str, Make] = {
    one.__name__: one
    for one in (
        llava, llava_next, llava_next_video, llava_onevision, vipllava, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe,
        qwen3_5, qwen3_5_moe, internvl, gemma3, paligemma, idefics3, smolvlm, mistral3, glm4v, glm46v, glm4v_moe,
        aya_vision, cohere2_vision, gemma3n, gemma4, gemma4_unified, paddleocr_vl, ovis2, fast_vlm, perception_lm,
        molmo2,
    )
}  # fmt: skip
