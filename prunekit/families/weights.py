"""What is counted of a model's modules: weights of matrix products, sizes of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from torch import nn

from prunekit.errors import Unsupported


@dataclass(frozen=True)
class HeadSizes:
    """Numbers of one key and of one value of a head, and those that a token adds to the KV cache of a layer."""

    key: int
    value: int
    kv_width: int


def head_sizes(config: Any, attentions: Mapping[int, nn.Module]) -> HeadSizes:
    """Of the attentions of these layers, on average, as they may differ."""
    every = [_head_sizes(layer_config(config, number), module) for number, module in attentions.items()]
    numbers = (sum(column) // len(every) for column in zip(*map(astuple, every), strict=True))
    return HeadSizes(*numbers)


def _head_sizes(config: Any, attention: nn.Module) -> HeadSizes:
    """Of one layer. Attention with latent keys and values (MLA) caches these, and expands them when it attends."""
    own = getattr(attention, "head_dim", None)
    size = own or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key, value = size, getattr(config, "v_head_dim", None) or size
    if getattr(config, "qk_nope_head_dim", None):
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
    if hasattr(attention, "expand_kv"):
        return HeadSizes(key, value, config.kv_lora_rank + config.qk_rope_head_dim)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    projection = getattr(attention, "k_proj", None)
    if isinstance(projection, nn.Linear):  # layers may have more of them than the config says
        kv_heads = projection.out_features // key
    elif groups := getattr(attention, "num_key_value_groups", None):
        kv_heads = config.num_attention_heads // groups
    return HeadSizes(key, value, kv_heads * (key + value))


def layer_config(config: Any, number: int) -> Any:
    """The config of one decoder layer: layers of the newest models differ in their numbers."""
    return config.per_layer_config[number] if getattr(config, "is_heterogeneous", False) else config


def mixer_params(module: nn.Module) -> int:
    """Weights of the products that every token passes in a recurrent part: of matrices and convolutions."""
    convolutions = (one for one in module.modules() if isinstance(one, nn.Conv1d))
    return matrix_params(module) + sum(one.weight.numel() for one in convolutions)


# Several weights share one number of these; of `float4_e2m1fn_x2`, as its name says, two.
PACKED = frozenset({"torch.uint8", "torch.int16", "torch.int32", "torch.float4_e2m1fn_x2"})


def matrix_params(module: nn.Module) -> int:
    """Weights of the matrix products that every token passes.

    A linear layer counts by its features, whatever holds its weights: quantised ones keep them packed, or in no
    parameter at all. Raises Unsupported for packed weights elsewhere, which do not say how many they are.
    """
    if is_linear(module):
        return int(module.in_features * module.out_features)  # type: ignore[operator]
    own = list(module.named_parameters(recurse=False))
    for name, tensor in (*own, *module.named_buffers(recurse=False)):
        if tensor.ndim > 1 and str(tensor.dtype) in PACKED:
            raise Unsupported(
                f"{type(module).__name__}.{name} holds packed weights ({tensor.dtype}) outside of a linear layer, so "
                "that FLOPs could not be stated; load the model without quantising this part"
            )
    return sum(p.numel() for _, p in own if p.ndim == 2) + sum(map(matrix_params, module.children()))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear layer: it says its features, and is no wrapper of others, as adapters are."""
    features = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return all(isinstance(one, int) for one in features) and not any(
        hasattr(part, "in_features") for part in module.modules() if part is not module
    )


def product_params(module: nn.Module) -> int:
    """Weights of matrix products, those of convolutions among them; a learned query or a norm is none.

    Of a linear layer by its sizes, since quantised ones pack their weights.
    """
    total = 0
    for part in module.modules():
        linear: Any = part
        if isinstance(getattr(part, "in_features", None), int):
            total += linear.in_features * linear.out_features
        else:
            shapes = [parameter.shape for parameter in part.parameters(recurse=False)]
            total += sum(shape.numel() for shape in shapes if len(shape) >= 2 and shape[0] > 1)
    return total
