"""What a token costs does not depend on how linear layers keep their weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import prunekit
from prunekit.families import find
from prunekit.families.weights import matrix_params
from prunekit.testing.tiny import tiny_inputs, tiny_llava

FASTV = {"stages": [{"use": "fastv", "at": 2, "keep": 0.4}]}


class Like(nn.Module):
    """A linear layer with features, and its weights elsewhere: as `keep` leaves them."""

    def __init__(self, linear, keep):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.inner = [linear]  # a list hides it from torch
        keep(self, linear.weight)

    def forward(self, x):
        return self.inner[0](x)


def nibbles(self, weight):
    """As bitsandbytes' Linear4bit: two weights a byte, in one column."""
    self.weight = nn.Parameter(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def buffers(self, weight):
    """As GPTQ's and AWQ's layers: eight weights a number, with scales beside them."""
    self.register_buffer("qweight", torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32))
    self.register_buffer("scales", torch.zeros(1, weight.shape[0]))


def blocks(self, weight):
    """As transformers' FP8Linear: a scale for each block."""
    self.weight = nn.Parameter(torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), requires_grad=False)
    self.weight_scale_inv = nn.Parameter(torch.ones(weight.shape[0] // 8, weight.shape[1] // 8))


def nothing(self, weight):
    """Weights that no parameter and no buffer holds."""


class Adapted(nn.Module):
    """As PEFT's LoRA layers: a wrapper with features of its own around the layer, and two products beside it."""

    RANK = 3

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, self.RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(self.RANK, linear.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + 0 * self.lora_B["default"](self.lora_A["default"](x))


def replaced(model, make):
    for layer in model.get_decoder().layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, make(child))
    return model


def costs(model, inputs):
    with torch.no_grad(), prunekit.apply(model, FASTV) as run:
        model(**inputs)
    return run.report.cost


@pytest.mark.parametrize("keep", [nibbles, buffers, blocks, nothing], ids=lambda one: one.__name__)
def test_layers_that_keep_their_weights_otherwise(keep):
    plain, inputs = tiny_llava(dtype=torch.float32), tiny_inputs(dtype=torch.float32)
    other = replaced(tiny_llava(dtype=torch.float32), lambda linear: Like(linear, keep))
    assert find(other).shape() == find(plain).shape()
    assert costs(other, inputs) == costs(plain, inputs)


@pytest.mark.filterwarnings("ignore")  # torch announces where this is moving to
def test_dynamically_quantised_layers():
    """Of PyTorch itself. Their results are those of the same layers under a mask: rows are quantised as a whole."""
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    plain, inputs = tiny_llava(dtype=torch.float32), tiny_inputs(dtype=torch.float32)
    other = quantize(tiny_llava(dtype=torch.float32), {nn.Linear})
    assert not list(other.get_decoder().layers[0].mlp.parameters())
    assert find(other).shape() == find(plain).shape()
    assert costs(other, inputs) == costs(plain, inputs)


def test_parametrised_layers():
    plain, other = tiny_llava(), tiny_llava()
    for layer in other.get_decoder().layers:
        nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    assert find(other).shape() == find(plain).shape()


def test_adapters_count_beside_what_they_are_on():
    plain, other = find(tiny_llava()).shape(), find(replaced(tiny_llava(), Adapted)).shape()
    layer = tiny_llava().get_decoder().layers[0]
    for part, one, more in (
        (layer.self_attn, plain.attention_params, other.attention_params),
        (layer.mlp, plain.mlp_params, other.mlp_params),
    ):
        linears = [child for child in part.children() if isinstance(child, nn.Linear)]
        assert more - one == Adapted.RANK * sum(linear.in_features + linear.out_features for linear in linears)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_packed_weights_elsewhere_are_refused(dtype, where):
    """As experts that are kept in blocks of four bits: nothing says how many weights they are."""
    model = tiny_llava()
    packed = torch.zeros(4, 8, 2, 16, dtype=dtype)
    mlp = model.get_decoder().layers[1].mlp
    if where == "parameter":
        mlp.gate_up_proj_blocks = nn.Parameter(packed, requires_grad=False)
    else:
        mlp.register_buffer("gate_up_proj_blocks", packed)
    told = "LlamaMLP.gate_up_proj_blocks" + re.escape(" holds packed weights (")
    with pytest.raises(prunekit.Unsupported, match=told):
        matrix_params(mlp)
    with pytest.raises(prunekit.Unsupported, match=told), prunekit.apply(model, FASTV):
        pass
