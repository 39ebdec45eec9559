"""What strategies decide: plain frozen data, no live modules. What they ask for is in `inputs`.

Shape letters: B batch, S sequence, V visual tokens, H hidden, A heads, N layers, O output slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


Mode = Literal["mean", "size_mean", "sum"]
MODES: tuple[Mode, ...] = ("mean", "size_mean", "sum")


@dataclass(frozen=True)
class Owners:
    """Which kept token each token joins: a merge without a matrix, in O(V).

    owner: int64 (B, V), for each token that entered the index (0 to V - 1) of the kept token whose group it joins. A
        kept token owns itself; -1: the token goes nowhere; entries on padding are ignored.
    mode: what stands in the slot of a kept token afterwards: `mean`, the mean of its group; `size_mean`, the mean
        weighted by the current sizes (ToMe, https://arxiv.org/abs/2210.09461); `sum`, the sum of the group's tokens,
        each times its amount.
    amounts: float (B, V), for `sum` and only there: the factor of each token.

    A merge changes no sizes by itself: what attention shall count is what `Selection.sizes` says.
    Raises ValueError for an unknown mode, for `sum` without amounts, and for amounts without `sum`.
    """

    owner: Tensor
    mode: Mode = "mean"
    amounts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it takes {', '.join(map(repr, MODES))}")
        if (self.mode == "sum") != (self.amounts is not None):
            raise ValueError(f"mode is {self.mode!r}; amounts belong to mode='sum', which needs them")


@dataclass(frozen=True)
class Selection:
    """Which visual tokens leave a stage, for the whole batch, and where those that leave go.

    keep: bool (B, V), the anchors: a kept token keeps its slot and its position.
    weights: None when every slot simply is its anchor. `Owners` where each token joins one kept token. Else float
        (B, V, V + E): row `i` of a kept token says how the V tokens that entered, and after them the E declared extras,
        are summed into its slot. Rows of dropped tokens have no slot and are not read; such a row is refused where it
        takes an extra, which would be lost. Appending an extra is a row that takes the extra alone, in the slot of a
        token that would else go.
    sizes: None leaves them as they are, 1 at first. Else float (B, V), above 0: how many tokens each kept slot stands
        for. From here on attention adds log(size) to the logits of that key, in prefill and decoding (ToMe,
        https://arxiv.org/abs/2210.09461, proportional attention).
    extras: in front of and inside the decoder, float (B, E, H): states of the strategy's own for the last E columns of
        `weights`, in place of declared extras. For E that differs between the samples of a batch, rows are padded.
    crop: also remove the dropped tokens from the KV that earlier layers have already written; only of a strategy that
        is declared with `crops`. What was computed with them stays as it is; only decoding no longer sees them.
    """

    keep: Tensor
    weights: Tensor | Owners | None = None
    sizes: Tensor | None = None
    crop: bool = False
    extras: Tensor | None = None


class LayerAction(Enum):
    """What becomes of one decoder layer in one phase."""

    RUN = "run"
    SKIP = "skip"  # the identity; the layer writes no KV
    SKIP_ATTENTION = "skip_attention"  # MLP only; the layer writes no KV
    SKIP_MLP = "skip_mlp"  # attention only
    FILL_KV = "fill_kv"  # the identity, but keys and values of its input are written
    FREEZE = "freeze"  # visual tokens pass unchanged and are only attended to; the others run

    __hash__ = object.__hash__  # that of Enum is written in Python, and sets of actions are made for every layer

    @property
    def writes_kv(self) -> bool:
        """Its tokens' keys and values are in the KV cache afterwards."""
        return self not in (LayerAction.SKIP, LayerAction.SKIP_ATTENTION)

    @property
    def attends(self) -> bool:
        """Some of its tokens query the others."""
        return self in (LayerAction.RUN, LayerAction.SKIP_MLP, LayerAction.FREEZE)

    @property
    def feeds_mlp(self) -> bool:
        """Some of its tokens go through the MLP."""
        return self in (LayerAction.RUN, LayerAction.SKIP_ATTENTION, LayerAction.FREEZE)

    @property
    def in_decoding(self) -> LayerAction:
        """What decoding does when a plan names no action of its own for it: only a prompt has tokens to freeze, and
        KV is filled in order to be read.
        """
        return LayerAction.RUN if self in (LayerAction.FREEZE, LayerAction.FILL_KV) else self


@dataclass(frozen=True)
class LayerPlan:
    """An action for each decoder layer that does not simply run; layers that are not named run.

    actions: in prefill. decode: in decoding; None: as in prefill, but frozen and filled layers run.
    Raises TypeError for anything but numbers of layers with a `LayerAction` each.
    """

    actions: Mapping[int, LayerAction] = field(default_factory=dict)
    decode: Mapping[int, LayerAction] | None = None

    def __post_init__(self) -> None:
        phases: tuple[tuple[str, Any], ...] = (("actions", self.actions), ("decode", self.decode or {}))
        for phase, actions in phases:
            if not isinstance(actions, Mapping):
                raise TypeError(f"LayerPlan({phase}={actions!r}): it takes a dict such as {{3: LayerAction.SKIP}}")
            for layer, action in actions.items():
                if not isinstance(layer, int) or isinstance(layer, bool):
                    raise TypeError(f"LayerPlan has {layer!r} in `{phase}`; layers are whole numbers from 0")
                if not isinstance(action, LayerAction):
                    named = {one.value: f"LayerAction.{one.name}" for one in LayerAction}
                    right = named.get(str(action), f"one of {', '.join(named.values())}")
                    raise TypeError(f"LayerPlan has {action!r} for layer {layer} in `{phase}`; write {right}")

    def __getitem__(self, layer: int) -> LayerAction:
        return self.actions.get(layer, LayerAction.RUN)

    def __iter__(self) -> Iterator[tuple[int, LayerAction]]:
        return iter(sorted(self.actions.items()))

    def decoding(self, layer: int) -> LayerAction:
        """What decoding does with `layer`."""
        return self[layer].in_decoding if self.decode is None else self.decode.get(layer, LayerAction.RUN)

    @property
    def layers(self) -> frozenset[int]:
        """Layers that do not simply run in both phases."""
        return frozenset(self.actions) | frozenset(self.decode or ())

    def merge(self, other: LayerPlan) -> LayerPlan:
        """Both plans together. Raises ValueError when they disagree about a layer."""
        for layer in self.layers & other.layers:
            for mine, theirs in ((self[layer], other[layer]), (self.decoding(layer), other.decoding(layer))):
                if mine is not theirs:
                    raise ValueError(f"layer {layer}: one stage says {mine.value}, another {theirs.value}")
        actions = {**self.actions, **other.actions}
        if self.decode is None and other.decode is None:
            return LayerPlan(actions)
        layers = self.layers | other.layers
        owner = {layer: self if layer in self.layers else other for layer in layers}
        return LayerPlan(actions, {layer: plan.decoding(layer) for layer, plan in owner.items()})


@dataclass(frozen=True)
class Route:
    """What a router decided for each sample of a batch. Scores become a plan by the stage's budget.

    tokens: float (B, S) over the prompt's positions, higher is more important; entries that are no visual tokens are
        ignored. The stage's `keep` or `keep_tokens` cuts by them at its site. None: nothing is said about tokens.
    layers: float (B, N), higher is more important; the stage's `keep_layers` keeps the best. None: nothing is said.
    plans: one plan for each sample, in place of `layers`, when the router decides about layers all by itself.
    note: what a reader of the results should know; goes to the notes of the run's report.
    """

    tokens: Tensor | None = None
    layers: Tensor | None = None
    plans: Sequence[LayerPlan] | None = None
    note: str | None = None


@dataclass(frozen=True)
class TowerParams:
    """What a vision tower and its projector multiply by: weights of matrix products, convolutions among them.

    patch: for each patch, where pixels become states. attention, mlp: for each token, of one block. width: numbers of
    one token in the products of attention, all heads together. projector: for each token that the projector maps.
    mergers: for each visual token, where patches become one, module by module; behind: the block behind which each of
    them stands; empty: all stand behind the last. pool: of the pooling head; 0: there is none. tokens: of the tower, of
    one image at the one size that it takes; None: that depends on the image. mapped: of these the ones that the
    projector maps where nothing is cut.
    """

    patch: int
    attention: int
    mlp: int
    width: int
    projector: int = 0
    mergers: tuple[int, ...] = ()
    pool: int = 0
    tokens: int | None = None
    mapped: int = 0
    behind: tuple[int, ...] = ()


# Kinds of layers, as `layer_types` of a config names them, that hold a state in place of keys and values.
RECURRENT = frozenset({"linear_attention", "conv"})

# Kinds of layers that attend within a window, or a chunk.
WINDOWED = ("sliding_attention", "chunked_attention")

# Attention implementations that take a mask for single tokens.
MASKED = ("sdpa", "eager")


@dataclass(frozen=True)
class TowerShape:
    """The numbers of a vision tower that can be cut and read.

    blocks: how many it has. feature_block: the one whose output the projector gets; -1: it gets the tower's input.
    leading: tokens in front of the patches of each image or crop, such as CLS. pool: a pooling head stands behind the
    blocks. projects_tokens: the projector maps tokens one by one. attention: the attention implementation. width:
    numbers of one token's state; 0: not known.
    images: how it takes them: `any` size, as a sequence of patches, of which some can leave before; `whole` ones of one
    size; empty: that is not known. work: what it costs; None: that is not known.
    """

    blocks: int
    feature_block: int
    leading: int = 0
    pool: bool = False
    projects_tokens: bool = False
    attention: str = "sdpa"
    width: int = 0
    images: Literal["", "whole", "any"] = ""
    work: TowerParams | None = None

    @property
    def features(self) -> str:
        """Where image features come from, for people."""
        if self.feature_block < 0:
            return "image features are the tower's input"
        return f"image features are taken after block {self.feature_block}"


@dataclass(frozen=True)
class LayerShape:
    """The numbers of one decoder layer, as `ModelShape` has them of all.

    other_params: multiplications for one token in parts beside attention and MLP, whenever the layer runs for it.
    early_params: those of them in front of attention, also for tokens of which only keys and values are made.
    reads_kv: it attends to keys and values of an earlier layer: it projects none, and holds none.
    """

    heads: int
    head_dim: int
    attention_params: int
    output_params: int
    mlp_params: int
    kv_width: int
    other_params: int = 0
    early_params: int = 0
    reads_kv: bool = False


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that pipelines are checked and costed against.

    visual_tokens: per image, or None where it depends on the image.
    attention_params, mlp_params: weights of the matrix products of one decoder layer's attention and MLP, those that
        one token uses (of a mixture of experts, the router and the chosen experts). output_params: the part of
        attention_params in the output projection.
    tower: None where the vision tower can neither be cut nor read.
    attention: the attention implementation of the decoder. cuts_inside: tokens can leave between the attention and the
        MLP of its layers. logical_until: behind layers before this one it adds features of its images to
        hidden states. layer_kinds: of attention, one for each layer, such as `sliding_attention`; empty: all are alike.
    recurrent: layers that hold a state in place of keys and values of tokens (linear attention, convolutions).
        mixer_params: weights of the products of what such a layer has in place of attention.
    rotary: it has rotary positions that can be renumbered.
    opaque: why nothing can be cut inside the decoder, but at its input only; empty: all can be. FLOPs of such a decoder
        are those of its weights, spread evenly over its layers, and of plain attention.
    head_dim: numbers of a head; where keys and values differ, the mean of both.
    kv_width: numbers that one token adds to the KV cache of one layer (keys and values together).
    per_layer: of models whose layers differ, the numbers of each; those above are then of layer 0, or averages.
    kv_sources: for each layer the one whose keys and values it attends to, itself or an earlier one; empty: itself.
    last_only: from this layer on none writes KV, and in `generate` the decoder runs them for the prompt's last token
        alone; None: all layers run for all tokens.
    window: tokens, itself included, that a token sees in the layers that attend within a window; None: there are none.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    head_dim: int
    attention_params: int
    mlp_params: int
    kv_width: int
    visual_tokens: int | None
    output_params: int = 0
    tower: TowerShape | None = None
    attention: str = "sdpa"
    cuts_inside: bool = True
    logical_until: int = 0
    layer_kinds: tuple[str, ...] = ()
    rotary: bool = True
    recurrent: tuple[int, ...] = ()
    mixer_params: int = 0
    opaque: str = ""
    per_layer: tuple[LayerShape, ...] = ()
    kv_sources: tuple[int, ...] = ()
    last_only: int | None = None
    window: int | None = None

    def of(self, layer: int) -> LayerShape:
        """The numbers of one decoder layer."""
        if self.per_layer:
            return self.per_layer[layer]
        if layer in self.recurrent:  # its mixer is all output: it runs for the tokens that enter, and attends to none
            return LayerShape(0, 0, self.mixer_params, self.mixer_params, self.mlp_params, 0)
        return LayerShape(
            self.heads, self.head_dim, self.attention_params, self.output_params, self.mlp_params, self.kv_width
        )

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to."""
        return self.kv_sources[layer] if self.kv_sources else layer

    def window_of(self, layer: int) -> int | None:
        """As `window`, of one layer. Layers whose kinds are not told are all alike."""
        kind = self.layer_kinds[layer] if self.layer_kinds else WINDOWED[0]
        return self.window if kind in WINDOWED else None

    @property
    def tower_depth(self) -> int:
        """Blocks of the vision tower that lead to the features that the projector gets; 0 where it cannot be cut."""
        return 0 if self.tower is None else self.tower.feature_block + 1

    def row_flops(self, queries: int, keys: int) -> int:
        """FLOPs of the attention rows of so many queries in one layer: their products with all `keys`."""
        return 2 * queries * keys * self.heads * self.head_dim

    def look_flops(self, tokens: int) -> int:
        """FLOPs of the queries, keys and values of `tokens` tokens in one layer: of a look ahead, or of rows without
        rotation, for which a layer is called once more up to its attention.
        """
        return 2 * (self.attention_params - self.output_params) * tokens
