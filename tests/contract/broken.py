"""Strategies that each break a rule of the contract, and what a failure has to say they did."""

from __future__ import annotations

import gc
from itertools import count as counting

import torch
from transformers import DynamicCache

from prunekit import EncoderRows, LayerAction, LayerPlan, Route, Selection, Site, Sites, hookimpl, strategy

CALLS = counting()


@strategy()
class Silent:
    @hookimpl
    def score_tokens(self, hidden):
        return hidden.sum(-1)


@strategy()
class Remembers:
    """A baseline gone wrong: it counts its calls behind the back of its frozen fields."""

    calls: int = 0

    @hookimpl
    def score_tokens(self, hidden):
        object.__setattr__(self, "calls", self.calls + 1)
        return hidden.sum(-1)


@strategy()
class Rewrites:
    """A baseline gone wrong: an option is another each time that it is read."""

    order: int = 1

    def __post_init__(self):
        object.__setattr__(self, "order", self.order + 1)

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.sum(-1)


def _at_call(norm, number, do):
    """`do` is called with what the final norm gives at its call of this number from now, and may change it; once."""
    left = [number]

    def meet(module, args, output):
        left[0] -= 1
        if left[0] >= 0:
            return output
        handle.remove()
        return do(output)

    handle = norm.register_forward_hook(meet)


@strategy()
class TouchesPrefill:
    """A baseline gone wrong: it changes what the model computes at the prefill."""

    @hookimpl
    def score_tokens(self, hidden, norm):
        _at_call(norm, 0, lambda output: output * 1.01)
        return hidden.sum(-1)


@strategy()
class TouchesDecoding:
    """A baseline gone wrong: it changes what the model computes at the first decoding step."""

    @hookimpl
    def score_tokens(self, hidden, norm):
        _at_call(norm, 1, lambda output: output * 1.01)
        return hidden.sum(-1)


@strategy()
class TouchesCache:
    """A baseline gone wrong: behind the last decoding step it writes a token into the cache once more."""

    @hookimpl
    def score_tokens(self, hidden, norm):
        _at_call(norm, 3, self._repeat)
        return hidden.sum(-1)

    def _repeat(self, output):
        for one in [one for one in gc.get_objects() if issubclass(type(one), DynamicCache)]:
            layer = one.layers[0]
            if layer.keys is not None:
                layer.keys = torch.cat([layer.keys, layer.keys[:, :, -1:]], 2)
                layer.values = torch.cat([layer.values, layer.values[:, :, -1:]], 2)
        return output


@strategy()
class AtHome:
    """A baseline gone wrong: it allows every site, and works at one."""

    @hookimpl
    def score_tokens(self, hidden, sites, cut):
        if str(sites[cut]) != "encoder":
            raise KeyError(f"no rule for '{sites[cut]}'")
        return hidden.sum(-1)


@strategy(routes=("layers",), per_sample=True)
class Unscored:
    """A baseline gone wrong: layers whose scores are a logarithm of 0."""

    @hookimpl
    def route(self, shape):
        return Route(layers=torch.zeros(shape.layers).log())


@strategy(group="video")
class TiedVideos:
    """A baseline gone wrong: tokens of videos are chosen by the row's number in the batch."""

    @hookimpl
    def score_tokens(self, hidden, videos):
        signs = 1.0 - 2 * (torch.arange(len(hidden)) % 2)
        order = torch.arange(hidden.shape[1]).float()
        return torch.where(videos, order + 1000 * signs[:, None], order)


@strategy()
class Greedy:
    """A baseline gone wrong: keeps one token more than it was told to."""

    @hookimpl
    def select_tokens(self, valid, count):
        return valid & (torch.arange(valid.shape[1]) < torch.tensor(count)[:, None] + 1)


@strategy(per_sample=True)
class Blurred:
    """A baseline gone wrong: merges even when everything is kept."""

    @hookimpl
    def select_tokens(self, hidden, count):
        keep = torch.arange(len(hidden)) < count
        return Selection(keep, torch.full((len(hidden), len(hidden)), 1 / len(hidden), dtype=hidden.dtype))


@strategy(keep="refused", drops_all=True, sites=Sites(default=Site(3)))
class KeepsOne:
    """A baseline gone wrong: declared to leave nothing, and leaves one."""

    @hookimpl
    def select_tokens(self, valid):
        return valid & (torch.arange(valid.shape[1]) < 1)


@strategy(keep="refused", per_sample=True)
class Empties:
    """A baseline gone wrong: of a single image it keeps nothing."""

    @hookimpl
    def select_tokens(self, valid):
        return valid & (len(valid) > 20)


@strategy()
class DrawnPlan:
    """A baseline gone wrong: it plans another layer at each call."""

    @hookimpl
    def plan_layers(self, shape):
        return LayerPlan({next(CALLS) % shape.layers: LayerAction.SKIP})


@strategy()
class Larger:
    """A baseline gone wrong: it enlarges."""

    @hookimpl
    def resize_images(self, seed):
        return torch.full((len(seed),), 1.5)


@strategy()
class Forgetful:
    """A baseline gone wrong: another draw at every call."""

    @hookimpl
    def score_tokens(self, hidden):
        return torch.rand(hidden.shape[:2])


@strategy()
class Batchwise:
    """A baseline gone wrong: a row's choice depends on the rows beside it."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.sum(-1) * hidden.sum((1, 2)).argsort().argsort()[:, None] * (-1) ** len(hidden)


@strategy(routes=("tokens",), per_sample=True)
class NeedsImage:
    """A baseline gone wrong: a router that takes the best of no visual tokens."""

    @hookimpl
    def route(self, embeds, visual):
        best = embeds[visual].sum(-1).max()
        return Route(tokens=embeds.sum(-1) - best)


@strategy()
class Writes:
    """A baseline gone wrong: it centres its input in place."""

    @hookimpl
    def score_tokens(self, hidden):
        hidden -= hidden.mean(1, keepdim=True)
        return hidden.norm(dim=-1)


@strategy()
class LeavesHook:
    """A baseline gone wrong: it watches the model, and goes on to."""

    @hookimpl
    def score_tokens(self, hidden, norm):
        norm.register_forward_hook(lambda module, args, output: None)
        return hidden.sum(-1)


@strategy()
class TidiesLate:
    """A baseline gone wrong: what its first hook puts in, its last one takes out."""

    @hookimpl
    def score_tokens(self, hidden, norm, state):
        state["handle"] = norm.register_forward_hook(lambda module, args, output: None)
        return hidden.sum(-1)

    @hookimpl
    def merge_tokens(self, state):
        state["handle"].remove()


@strategy(sites=Sites(decoder=False))
class Squares:
    """A baseline gone wrong: it takes the tokens for complete images of four rows."""

    @hookimpl
    def score_tokens(self, hidden):
        rows = hidden.view(len(hidden), -1, 4, 4, hidden.shape[-1])
        return (rows - rows.mean(3, keepdim=True)).norm(dim=-1).flatten(1)


@strategy(per_sample=True)
class Cosine:
    """A baseline gone wrong: it divides by norms that may be 0."""

    @hookimpl
    def score_tokens(self, hidden):
        unit = hidden / hidden.norm(dim=-1, keepdim=True)
        return -(unit @ unit.mean(0))


@strategy()
class Overflows:
    """A baseline gone wrong: sums of squares in half precision."""

    @hookimpl
    def score_tokens(self, hidden):
        return -(hidden * hidden).sum(-1).nan_to_num(posinf=65504)


@strategy(inputs={"encoder_attention": EncoderRows(layer=90)}, sites=Sites(decoder=False))
class Elsewhere:
    """A baseline for towers that are deeper than any of the kit's."""

    @hookimpl
    def score_tokens(self, encoder_attention):
        return encoder_attention.float()


@strategy(keep="optional", per_sample=True)
class Counting:
    """A baseline gone wrong: it need not be told a number, and cannot do without."""

    @hookimpl
    def select_tokens(self, hidden, count):
        return torch.arange(len(hidden)) < count


# By rule: the strategy, and what its failure says it found.
BROKEN: dict[str, tuple[type, str]] = {
    "model": (Elsewhere, "there is no block 90: the vision tower has blocks 0 to 2 override `model()` of the contract"),
    "source": (Silent, "Silent names no paper and is no baseline"),
    "frozen": (Remembers, "after a run calls of Remembers is another than before"),
    "yaml-round-trip": (Rewrites, "after being written and read"),
    "prefill": (TouchesPrefill, "differ at the prefill by"),
    "decoding": (TouchesDecoding, "differ at decoding step 1 by"),
    "kv-lengths": (TouchesCache, "the cache holds"),
    "sites": (AtHome, "no rule for '0'"),
    "skipped-layers": (Unscored, "route (layers) returned NaN or infinity"),
    "videos": (TiedVideos, "keeps other tokens in the batch than alone"),
    "keep": (Greedy, "should keep 15 and keeps 16"),
    "keep-all": (Blurred, "logits differ from the model's own by"),
    "without-keep": (Counting, "select_tokens failed with TypeError"),
    "drops-all": (KeepsOne, "visual tokens stay"),
    "text-stays": (Empties, "row 2 keeps none of its 16 visual tokens"),
    "plan": (DrawnPlan, "and then"),
    "keep-layers": (Unscored, "route (layers) returned NaN or infinity"),
    "one-size": (Larger, "resize_images must be above 0 and at most 1"),
    "smaller-images": (Larger, "resize_images must be above 0 and at most 1"),
    "same-result": (Forgetful, "a second run of the same batch decides otherwise"),
    "rows-alone": (Batchwise, "tokens in the batch and"),
    "no-image": (NeedsImage, "route failed with RuntimeError"),
    "inputs-unchanged": (Writes, "score_tokens writes to `hidden`"),
    "nothing-left": (LeavesHook, "other attributes or hooks than before: model.language_model.norm"),
    "nothing-left-after-an-exception": (TidiesLate, "other attributes or hooks than before"),
    "after-others": (Squares, "score_tokens failed with RuntimeError"),
    "before-others": (TouchesPrefill, "differ at the prefill by"),
    "finite": (Cosine, "where all features are zero"),
    "half-precision": (Overflows, "another choice than of float32 by score_tokens in torch.float16"),
}
