"""What a family file says about a vision tower that can be cut and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prunekit.families.images import Images
from prunekit.families.weights import product_params
from prunekit.strategy.decisions import TowerParams, TowerShape


@dataclass(frozen=True)
class Tower:
    """The vision tower, where a family's tower can be cut and read. Families whose towers cannot leave it out.

    layers: its blocks, each called with hidden states (rows, tokens, width); a row is one crop or frame. attention,
    mlp: names of the two parts of a block, each added to the residual. leading: tokens in front of the patches, such as
    CLS. feature_layer: which hidden state the projector gets, counted as in `output_hidden_states` (-1 the last; of
    several, the latest). projector: from tower features to the decoder's width, token by token; None where it mixes or
    pools them. Behind a cut it runs on what visual tokens still need, if it gets the tower's rows with all tokens or
    without the first; what it gets in other numbers, such as pooled frames, it maps in full. norm: of the tower, which
    the projector's input has passed behind the block; None: it is the block's output as it is. pool: the head behind
    the blocks that attends from one learned query, where there is one.
    patch_groups: from the name of the modality, the method's arguments, the rows of the tower's batch and the patches
    of a row (without `leading`) to int64 (V, p) for each image or video: the patches, numbered through all rows, that
    become each of its visual tokens; -1 for one without a patch, such as a newline. Raises Unsupported where visual
    tokens are not made of whole patches. None: a row is an image, and a patch a visual token.
    packed: blocks get all images or videos as one sequence, (tokens, width) or (1, tokens, width), with their rotations
    and borders, or a mask.
    embedding: makes the state of each patch from its pixels, by one matrix product. mergers: make visual tokens of the
    blocks' output, module by module from what becomes one token; in a packed tower each gets (tokens, ...), the patches
    of a visual token together, or (visual tokens, ...), in the order of the tokens that enter the blocks, and its
    output is (visual tokens, ...). Without an embedding the cost of the tower is not known.
    images: how the method's arguments hold images; None where that is not known. parts: from the name of the modality,
    the method's arguments and the number of a block to int64 (V,) for each image or video: the part of it, such as a
    frame or a window, within which the patches of each visual token attend in that block of a packed tower; None: each
    image is one part. tokens: T where all images have one size; None where the tower is packed. mapped: of each row the
    tokens that the projector gets, by modality. behind: the block behind which each merger stands; empty: all stand
    behind the last.
    """

    layers: Sequence[nn.Module]
    projector: nn.Module | None
    attention: str = "self_attn"
    mlp: str = "mlp"
    leading: int = 0
    feature_layer: int = -1
    patch_groups: Callable[[str, Mapping[str, Any], int, int], list[Tensor]] | None = None
    norm: nn.Module | None = None
    pool: nn.Module | None = None
    packed: bool = False
    embedding: nn.Module | None = None
    mergers: tuple[nn.Module, ...] = ()
    images: Images | None = None
    parts: Callable[[str, Mapping[str, Any], int], list[Tensor]] | None = None
    tokens: int | None = None
    mapped: Mapping[str, int] = field(default_factory=dict)
    behind: tuple[int, ...] = ()

    def project(self, states: Tensor) -> Tensor:
        """States (n, W) of the feature block as the decoder gets them, (n, H); only with a `projector`."""
        assert self.projector is not None
        projected: Tensor = self.projector(states if self.norm is None else self.norm(states))
        return projected

    @property
    def feature_block(self) -> int:
        """The block whose output the projector gets; -1: none has run."""
        return self.feature_layer % (len(self.layers) + 1) - 1

    def shape(self) -> TowerShape:
        """The numbers of the tower; it may live on the meta device."""
        config: Any = getattr(getattr(self.layers[0], self.attention), "config", None)
        return TowerShape(
            blocks=len(self.layers),
            feature_block=self.feature_block,
            leading=self.leading,
            pool=self.pool is not None,
            projects_tokens=self.projector is not None,
            attention=str(getattr(config, "_attn_implementation", "eager")),
            width=_width(getattr(self.layers[0], self.attention)),
            images="" if self.images is None else "whole" if self.images.cell is None else "any",
            work=self._params(),
        )

    def _params(self) -> TowerParams | None:
        if self.embedding is None:
            return None
        block = self.layers[0]
        attention: Any = getattr(block, self.attention)
        width = getattr(attention, "num_heads", 0) * getattr(attention, "head_dim", 0)
        if not width:
            return None
        return TowerParams(
            patch=product_params(self.embedding),
            attention=product_params(attention),
            mlp=product_params(getattr(block, self.mlp)),
            width=width,
            projector=0 if self.projector is None else product_params(self.projector),
            mergers=tuple(map(product_params, self.mergers)),
            pool=0 if self.pool is None else product_params(self.pool),
            tokens=self.tokens,
            mapped=self.mapped.get("image", 0),
            behind=self.behind,
        )


def _width(attention: nn.Module) -> int:
    """Numbers of one token's state, by the input of the first linear module of an attention; 0 where there is none."""
    inputs = (getattr(one, "in_features", None) for one in attention.modules())
    return next((one for one in inputs if isinstance(one, int)), 0)
