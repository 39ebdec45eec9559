"""What fixes the architecture of a PAR router (https://arxiv.org/abs/2412.06458): `architecture` in its config.json.

The paper's text on the router could not be consulted and the released code ships no config, so depth and initialisation
are options. The released code has blocks of the LVLM's own width; a narrow router, whose input is projected down first,
is prunekit's deviation: at the shape of a 7B model one full block costs more than 3 % of the prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from prunekit import ModelShape

Attention = Literal["bidirectional", "causal", "text_first"]
ATTENTION: tuple[Attention, ...] = ("bidirectional", "causal", "text_first")
WIDTH, HEAD = 512, 64


@dataclass(frozen=True)
class RouterConfig:
    """A router's architecture.

    hidden, layers: of the LVLM's decoder; there is one layer token for each of its layers. depth: blocks. width: of the
    blocks. heads, kv_heads, head_dim: of their attention. mlp: inner width of their gated MLP. attention: who
    attends to whom, see `router`. bias: the projections to queries, keys and values have one. theta: base of the
    rotations. eps: of the norms. scatter: how far their places alone set scores of visual tokens apart, see `router`.
    """

    hidden: int
    layers: int
    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    attention: Attention
    bias: bool = False
    theta: float = 10000.0
    eps: float = 1e-5
    scatter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "depth", "width", "heads", "kv_heads", "head_dim", "mlp"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be a whole number, at least 1, not {value!r}")
        if self.head_dim % 2 or self.heads % self.kv_heads:
            raise ValueError("heads: heads have an even width, and are a multiple of the key-value heads")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention: must be one of {', '.join(ATTENTION)}, not {self.attention!r}")
        if not 0 <= self.scatter < math.inf:
            raise ValueError(f"scatter: must be a number, at least 0, not {self.scatter!r}")

    @property
    def narrow(self) -> bool:
        """Its input is projected down to `width` first."""
        return self.width != self.hidden

    def flops(self, prompt: int) -> int:
        """FLOPs for a prompt of `prompt` tokens, a multiply-add counted as two: projection down, blocks and head, with
        attention counted as the full square, as `cost` does for the decoder.
        """
        tokens, inner = prompt + self.layers, self.heads * self.head_dim
        attention = self.width * (2 * inner + 2 * self.kv_heads * self.head_dim)
        block = 2 * (attention + 3 * self.width * self.mlp) * tokens + 4 * inner * tokens**2
        down = 2 * self.hidden * self.width * prompt if self.narrow else 0
        return down + self.depth * block + 2 * self.width * tokens


def config_of(
    shape: ModelShape,
    depth: int = 1,
    width: int | Literal["model"] = WIDTH,
    heads: int | None = None,
    attention: Attention = "bidirectional",
    scatter: float = 0.0,
) -> RouterConfig:
    """The architecture for a model. width `model`: blocks as large as the LVLM's own.

    heads: None takes the LVLM's in blocks of its width, else one for each 64 numbers of the width. Raises ValueError
    beginning with the option's name.
    """
    if width != "model" and width != shape.hidden:
        heads = heads or max(1, width // HEAD)
        if width % heads or width // heads % 2:
            raise ValueError(f"heads: {heads} heads do not share a width of {width} evenly in pairs")
        mlp = -(-8 * width // 3 // 8) * 8  # gated, so two thirds of the usual four times; a multiple of 8
        return RouterConfig(
            shape.hidden, shape.layers, depth, width, heads, heads, width // heads, mlp, attention, scatter=scatter
        )
    if heads not in (None, shape.heads):
        raise ValueError(f"heads: blocks of the model's width have its {shape.heads} heads; leave it out")
    kv_heads = shape.kv_width // (2 * shape.head_dim)
    mlp = max(1, shape.mlp_params // (3 * shape.hidden))
    return RouterConfig(
        shape.hidden, shape.layers, depth, shape.hidden, shape.heads, kv_heads, shape.head_dim, mlp, attention,
        scatter=scatter,
    )  # fmt: skip
