"""The table of inputs: every argument that a token or router hook may name, in one row.

Signatures of hooks, what is refused at a site, how an input is cut for one sample, and the page of the documentation
follow from the rows. A new input is one row here, and one property of the engine's views that computes it.

Shape letters: B batch, S sequence, V visual tokens, T text tokens, E extras, H hidden, W width of the vision tower, C
colours, Y and X rows and columns of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prunekit.errors import did_you_mean
from prunekit.strategy.decoder_requests import Keys, Rows, Values, is_optional, layer_before, layer_of
from prunekit.strategy.sites import Site
from prunekit.strategy.tower_requests import EncoderKeys, EncoderQueries, EncoderRows, EncoderValues, Features

TOKEN_HOOKS = ("score_tokens", "select_tokens", "merge_tokens")
IMAGE_HOOK = "resize_images"
# Parts of the way of the data in which an input may exist; `route` is asked where `encoder` ends.
Region = Literal["pixels", "tower", "encoder", "decoder", "end"]
_EVERYWHERE: tuple[Region, ...] = ("pixels", "tower", "encoder", "decoder", "end")
_FROM_TOWER = _EVERYWHERE[1:]
_WITH_PROMPT: tuple[Region, ...] = ("encoder", "decoder", "end")


@dataclass(frozen=True)
class Input:
    """One argument of hooks.

    kind: `float`, `int64` or `bool` for a tensor, else what it is. axes: of a tensor, its first dimensions by letter,
        such as `B V H`; of anything else `B` where it has one entry for each sample; empty: the whole batch's.
    hooks: that may name it. regions: the sites where it exists. request: what may be declared for it; None: nothing.
    about: what a documentation page says of it. deprecated: since which version of the specifications, and what to
    name instead; whoever names it is warned; empty: it is not.
    """

    name: str
    kind: str
    axes: str
    about: str
    hooks: tuple[str, ...] = TOKEN_HOOKS
    regions: tuple[Region, ...] = _EVERYWHERE
    request: type[Any] | None = None
    deprecated: str = ""

    @property
    def is_tensor(self) -> bool:
        """Cut along its second axis for one sample, whose padding goes."""
        return self.kind in ("float", "int64", "bool")

    @property
    def length(self) -> str:
        """The letter of the axis that is padded: V, T, E or S; empty: none is."""
        letters = self.axes.split()
        return letters[1] if self.is_tensor and len(letters) > 1 else ""

    @property
    def shape(self) -> str:
        """`float (B, V, H)`, or what it is."""
        return f"{self.kind} ({', '.join(self.axes.split())})" if self.is_tensor else self.kind


_ALL = (*TOKEN_HOOKS, "route")
_HOOKS = (*_ALL, IMAGE_HOOK)

INPUTS: tuple[Input, ...] = (
    Input(
        "scores", "float", "B V", "what `score_tokens` of the same stage returned; asked for only where it is named",
        ("select_tokens",),
    ),
    Input("keep", "bool", "B V", "what was selected; False on padding", ("merge_tokens",), _FROM_TOWER),
    Input(
        "images", "a tuple of B float tensors (..., C, H, W)", "B",
        "the pixels of each image or video, as the processor normalised them: of one of any size (frames, F, C, H, W), "
        "as in `patches`; else as the model takes it, such as (crops, C, H, W)", (IMAGE_HOOK,), ("pixels",),
    ),
    Input(
        "patches", "float", "B V F C Y X",
        "the pixels that become each visual token, a square of Y x X in C colours of the F frames that the tower takes "
        "together (a still image is its own second frame), as the processor normalised them: (value / 255 - "
        "`image_mean`) / `image_std`; zeros on padding", regions=("pixels",),
    ),
    Input(
        "hidden", "float", "B V H",
        "visual tokens as they enter the site; at `encoder` the projected features; in the tower (B, V, W), the mean "
        "over the patches of each token", _ALL, _FROM_TOWER,
    ),
    Input(
        "previous_hidden", "float", "B V H", "the same tokens as they entered the newest decoder layer that has begun",
        regions=("decoder", "end"),
    ),
    Input(
        "attention", "float", "B V",
        "attention that each visual token receives in a decoder layer, for the query rows of the request; only these "
        "rows are computed, and the model keeps its fast attention", _ALL, _WITH_PROMPT, Rows,
    ),
    Input(
        "keys", "float", "B V D", "keys of the visual tokens in a decoder layer, as requested", _ALL, _WITH_PROMPT, Keys
    ),
    Input(
        "values", "float", "B V D", "values of the visual tokens in a decoder layer, as requested", _ALL, _WITH_PROMPT,
        Values,
    ),
    Input(
        "text_keys", "float", "B T D", "keys of the text tokens in a decoder layer, as requested", _ALL, _WITH_PROMPT,
        Keys,
    ),
    Input(
        "text_values", "float", "B T D", "values of the text tokens in a decoder layer, as requested", _ALL,
        _WITH_PROMPT, Values,
    ),
    Input("text", "float", "B T H", "embeddings of the text tokens", regions=_WITH_PROMPT),
    Input("text_hidden", "float", "B T H", "states of the text tokens at the site", regions=_WITH_PROMPT),
    Input("text_ids", "int64", "B T", "ids of the text tokens; -1 on padding", _ALL, _WITH_PROMPT),
    Input("text_valid", "bool", "B T", "False on padding", _ALL, _WITH_PROMPT),
    Input("text_after", "bool", "B T", "text behind the last visual token of its row", _ALL, _WITH_PROMPT),
    Input(
        "question", "a tuple of B str", "B",
        "the user's words without the chat template, decoded by the processor that `apply` was given", _ALL,
        _WITH_PROMPT,
    ),
    Input(
        "encoder_attention", "float", "B V", "attention that each visual token receives in the vision tower", _ALL,
        _FROM_TOWER, EncoderRows,
    ),
    Input(
        "encoder_keys", "float", "B V D", "its keys in a block of the vision tower", _ALL, _FROM_TOWER, EncoderKeys
    ),
    Input(
        "encoder_values", "float", "B V D", "its values in a block of the vision tower", _ALL, _FROM_TOWER,
        EncoderValues,
    ),
    Input(
        "encoder_queries", "float", "B V D", "its queries in a block of the vision tower", _ALL, _FROM_TOWER,
        EncoderQueries,
    ),
    Input(
        "features", "float", "B V W", "its state behind a block of the vision tower, or what the projector made of it",
        _ALL, _FROM_TOWER, Features,
    ),
    Input(
        "extras", "float", "B E H", "what `extras=(\"cls\",)` declares, projected to the decoder's width",
        regions=("encoder",),
    ),
    Input("extras_valid", "bool", "B E", "False on padding of `extras`", regions=("encoder",)),
    Input(
        "cls_crops", "int64", "B E 2",
        "of which image each CLS token in `extras`, or requested with `of=\"cls\"`, is, as in `coords`, and of which "
        "crop, as in `frames`; -1 on padding",
    ),
    Input(
        "coords", "int64", "B V 5",
        "number of the image or video in the prompt, row, column, rows and columns of its crop or frame; -1 on "
        "padding, row and column also on tokens that only separate, such as newlines", _ALL,
    ),
    Input(
        "frames", "int64", "B V", "number of the crop or video frame within its image or video; -1 on padding", _ALL
    ),
    Input(
        "videos", "bool", "B V",
        "True at tokens of a video, whose frames follow each other in time; False at those of still images, whose "
        "crops do not, and on padding. A video that the model is given as images is images", _ALL,
    ),
    Input(
        "places", "int64", "B V 4",
        "row, column, rows and columns in the grid of the complete image or frame, in which the crops of an image "
        "stand side by side; as in `coords` where an image is not cut into crops, or where it is not known how they "
        "lie; -1 as in `coords`", _ALL,
    ),
    Input(
        "index", "int64", "B V", "number of the token among the original visual tokens of its sample; -1 on padding",
        _ALL,
    ),
    Input(
        "positions", "int64", "B V P",
        "rotary position ids of the complete prompt, P of them for each token: 1, or one for each axis of M-RoPE; -1 "
        "on padding", regions=_WITH_PROMPT,
    ),
    Input(
        "rotary", "float", "B V P R",
        "the rotation at each of `positions`, in at least float32: the cosines by which the numbers of a head are "
        "multiplied, then the sines; zeros on padding", regions=_WITH_PROMPT,
    ),
    Input(
        "sizes", "float", "B V",
        "how many original tokens each token stands for, as earlier stages said; 1 where none did, and on padding",
    ),
    Input("valid", "bool", "B V", "False on padding"),
    Input(
        "embeds", "float", "B S H", "the prompt where the router is asked: embeddings, or states that enter a layer",
        ("route",), ("encoder", "decoder"),
    ),
    Input("visual", "bool", "B S", "the visual tokens that are left", ("route",), ("encoder", "decoder")),
    Input("text", "bool", "B S", "the other real tokens", ("route",), ("encoder", "decoder")),
    Input("valid", "bool", "B S", "both; False on padding", ("route",), ("encoder", "decoder")),
    Input("shape", "a `ModelShape`", "", "the numbers of the model", _ALL, _WITH_PROMPT),
    Input(
        "count", "a tuple of B ints", "B",
        "how many visual tokens to leave of each sample; None where the file gives no budget", _ALL,
    ),
    Input("cut", "an int", "", "number of the site among the stage's sites, from 0"),
    Input("sites", "a tuple of `Site`", "", "the stage's sites; `sites[cut]` is the one at which it is asked"),
    Input(
        "seed", "a tuple of B ints", "B", "drawn from each sample's token ids and pixels: equal in every batch and run",
        _HOOKS,
    ),
    Input(
        "state", "a dict", "B", "lives for one prompt batch and belongs to the stage, at all of its sites", _ALL
    ),
    Input(
        "project", "a function of states (..., W)", "",
        "the model's projector, token by token: states (..., H) for those of the block whose output it gets, such as "
        "sums of `features` that a `Selection` with `extras` puts in", regions=("encoder",),
    ),
    Input(
        "norm", "a function of states (..., H)", "", "the model's final norm", regions=_WITH_PROMPT
    ),
    Input(
        "forward", "a function", "",
        "runs decoder layers or modules on the current tokens and throws away what they write: `forward([3, 4])` gives "
        "`hidden`, `text`, `last` and, with `rows=Rows(...)`, `attention`; not with `per_sample`",
        regions=("encoder", "decoder"),
    ),
)  # fmt: skip

# Inputs with something to request, by name; the default request is the class without arguments.
REQUESTS: Mapping[str, type[Any]] = {one.name: one.request for one in INPUTS if one.request is not None}
OF_DECODER_LAYERS = tuple(name for name, request in REQUESTS.items() if request in (Rows, Keys, Values))
OF_TOWER = tuple(name for name in REQUESTS if name not in OF_DECODER_LAYERS)


def inputs_of(hook: str) -> tuple[Input, ...]:
    """The inputs that implementations of `hook` may name, in the order of the table."""
    return tuple(one for one in INPUTS if hook in one.hooks)


def cut_for_sample(name: str, value: Any, b: int, lengths: Mapping[str, int]) -> Any:
    """What sample `b` of the batch sees of an input over visual or text tokens: no B axis, no padding.

    value: of the batch; a dict holds one dict for each sample, and None stays None. lengths: of the sample, by the
    letter of the axis.
    """
    row = _OVER_TOKENS[name]
    if value is None or not row.axes:
        return value
    if isinstance(value, dict):
        return value.setdefault(b, {})
    return value[b, : lengths[row.length]] if row.length else value[b]


# `route` has inputs over the sequence under the same names; it cuts those itself.
_OVER_TOKENS = {one.name: one for one in INPUTS if one.hooks != ("route",)}


def region_of(site: Site) -> Region:
    """The part of the way of the data that `site` lies in."""
    if site.in_tower:
        return "pixels" if site.place == "pixels" else "tower"
    return {"encoder": "encoder", "layer": "decoder", "prefill_end": "end"}[site.place]  # type: ignore[return-value]


def problem(inputs: object) -> str | None:
    """What is wrong with the requests of a strategy, a dict by the names of inputs; None: nothing."""
    if not isinstance(inputs, Mapping):
        return f"`inputs` is {inputs!r}; it is a dict such as {{'attention': Rows(...)}}"
    for name, request in inputs.items():
        if name not in REQUESTS:
            near = did_you_mean(str(name), REQUESTS)
            return f"`inputs` has '{name}', for which nothing can be requested; {near}it takes {', '.join(REQUESTS)}"
        kind = REQUESTS[name]
        if not request or not all(isinstance(one, kind) for one in _as_tuple(request)):
            return f"inputs['{name}'] is {request!r}; it takes {kind.__name__}(...) or a tuple of them"
    return None


def request(inputs: Mapping[str, Any], name: str) -> Any:
    """The request for input `name` among those of a strategy, or a tuple of them; the default one where it has none."""
    return inputs[name] if name in inputs else REQUESTS[name]()


def requests(inputs: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """The same, always as a tuple; empty for an input with nothing to request."""
    return _as_tuple(request(inputs, name)) if name in REQUESTS else ()


class NotThere(ValueError):
    """An input that does not exist at a site, and what to do about it."""

    def __init__(self, message: str, hint: str) -> None:
        self.hint = hint
        super().__init__(message)


def layers_read(inputs: Mapping[str, Any], names: frozenset[str], site: Site, layers: int) -> dict[int, str]:
    """The decoder layers, of `layers`, whose run gives an input among `names` at `site`, with the input's name.

    inputs: requests by name. Look-ahead is not among the layers: it needs no run. Raises NotThere for an input that
    does not exist at `site`.
    """
    read: dict[int, str] = {}
    for name in sorted(names & set(OF_DECODER_LAYERS)):
        for one in requests(inputs, name):
            layer = layer_of(one.layer, site, layers)
            if layer is None:
                if is_optional(one):
                    continue
                message = f"{name} of the {_SAID[one.layer]} is not there at '{site}'"
                raise NotThere(message, _instead(one, site, layers))
            if one.layer != "next":
                read[layer] = name
    if "previous_hidden" in names and layer_before(site, layers) is None:
        raise NotThere(f"previous_hidden is not there at '{site}': no layer has run", "name a layer, such as 1")
    return read


def _instead(request: Rows | Keys | Values, site: Site, layers: int) -> str:
    """Sites at which the same is there; and for who writes the strategy, what is there at this one."""
    number = site.layer or 0
    if request.layer == "own":
        here = f"name '{number}.mid' or '{number}.after'" if site.place == "layer" else "name a layer, such as '2.mid'"
        said = "Sites(default=Site.parse('2.after'), encoder=False, points=('mid', 'after')) says that it needs one"
        return f"{here}; {said}"
    if request.layer == "next":
        return "name an earlier site" + f", such as '{number}'" * (site.place == "layer")
    also = ", or optional=True gives None there" if isinstance(request, Rows) else ""
    ahead = layer_of("next", site, layers) is not None
    kind = type(request).__name__
    other = f"; in the strategy {kind}(layer='next') reads the layer ahead{also}" if ahead else ""
    return f"name a layer that another runs before, such as 1{other}"


_SAID = {"previous": "layer before", "next": "layer ahead", "own": "layer that the site stands in"}


def _as_tuple(request: Any) -> tuple[Any, ...]:
    return request if isinstance(request, tuple) else (request,)
