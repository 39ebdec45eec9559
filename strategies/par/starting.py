"""Routers before any training (PAR, https://arxiv.org/abs/2412.06458): random, or copies of the LVLM's first blocks.

How the authors start is not published: their code has the generic normal initialisation, and none that copies blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from prunekit_strategies.par.config import RouterConfig
from prunekit_strategies.par.router import Block, Router
from torch import Tensor, nn

from prunekit import Unsupported

STD = 0.02
LayerTokens = Literal["normal", "zeros", "distinct"]
# Where a Llama-type decoder layer keeps what a router block has under another name.
COPIED = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def random_router(config: RouterConfig, seed: int, layer_tokens: LayerTokens = "normal") -> Router:
    """Every matrix normal, float32, drawn on the CPU: with std 0.02, which suits blocks of a 7B model's width; in
    narrow blocks with one over the root of the inputs, else they would hardly mix tokens and noise would do nothing.
    layer_tokens `zeros`: as in the released code; they then differ by position alone. `distinct`: with a deviation of
    1, as large as what a block adds, so that the head tells layers apart from the first step on.
    """
    router = Router(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(router.named_parameters()):
            if parameter.ndim == 2:
                mixing = config.narrow and name.startswith(("blocks", "project"))
                parameter.normal_(0, parameter.shape[1] ** -0.5 if mixing else STD, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    if layer_tokens != "normal":
        router.layer_tokens.data.mul_({"zeros": 0.0, "distinct": 1 / STD}[layer_tokens])
    return router


def router_of_layers(
    config: RouterConfig, layers: Sequence[nn.Module], theta: float, seed: int, layer_tokens: LayerTokens = "normal"
) -> Router:
    """Blocks that are copies of the LVLM's first decoder layers; the rest as in `random_router`.

    config: with blocks of the LVLM's width. theta: base of its rotary frequencies. Raises Unsupported for decoder
    layers that are not of Llama's type.
    """
    if config.narrow:
        raise Unsupported("init: llm_first copies blocks, which needs `width: model`; a narrow router starts at random")
    if config.depth > len(layers):
        raise Unsupported(f"init: llm_first copies {config.depth} blocks, but the model has {len(layers)} layers")
    first = layers[0]
    norm: Any = _part(first, COPIED["norm1"])
    bias = getattr(_part(first, COPIED["q"]), "bias", None) is not None
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", config.eps)))
    config = dataclasses.replace(config, bias=bias, theta=theta, eps=eps)
    router = random_router(config, seed, layer_tokens)
    for block, layer in zip(router.blocks, layers, strict=False):
        assert isinstance(block, Block)
        _copy(block, layer)
    return router


def _copy(block: Block, layer: nn.Module) -> None:
    wanted = block.state_dict()
    copied: dict[str, Tensor] = {}
    for mine, theirs in COPIED.items():
        for name, value in _part(layer, theirs).state_dict().items():
            copied[f"{mine}.{name}"] = value.detach().to(torch.float32).cpu()
    odd = [name for name in wanted if name not in copied or copied[name].shape != wanted[name].shape]
    extra = sorted(copied.keys() - wanted.keys())
    total = sum(parameter.numel() for parameter in layer.parameters())
    if odd or extra or total != sum(value.numel() for value in wanted.values()):
        raise _unlike([*odd, *extra])
    block.load_state_dict(copied)


def _part(layer: nn.Module, path: str) -> nn.Module:
    try:
        return layer.get_submodule(path)
    except AttributeError as error:
        raise _unlike([path]) from error


def _unlike(parts: Sequence[str]) -> Unsupported:
    where = f" ({', '.join(parts[:3])})" if parts else ""
    return Unsupported(
        f"init: llm_first copies decoder layers of Llama's type, and this model's are not{where}; use init: random"
    )
