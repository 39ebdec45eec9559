"""One small legitimate strategy of every kind: all of them keep the whole contract."""

from __future__ import annotations

from typing import Any

import torch

from prunekit import (
    PIXELS,
    PREFILL_END,
    EncoderRows,
    Keys,
    LayerAction,
    LayerPlan,
    Owners,
    Route,
    Rows,
    Selection,
    Site,
    Sites,
    hookimpl,
    strategy,
)


def _best(scores, count):
    """bool (V,), the `count` best of one sample."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:count]] = True
    return keep


@strategy(sites=Sites(decoder=False))
class EncoderOnly:
    """A baseline at the decoder's input alone."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)


@strategy(sites=Sites(tower=True, encoder=False, decoder=False, default=Site.parse("vision.0")))
class TowerOnly:
    """A baseline that cuts inside the vision tower alone."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)


@strategy(sites=Sites(tower=True, encoder=False, decoder=False, default=Site.parse("vision.1")), per_sample=True)
class TowerMerge:
    """A baseline that merges inside the tower: each dropped token joins the kept one before it, or the first."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)

    @hookimpl
    def merge_tokens(self, keep):
        here = torch.arange(len(keep))
        before = torch.where(keep, here, -1).cummax(0).values
        return Owners(torch.where(before < 0, keep.int().argmax(), before))


@strategy(sites=Sites(default=Site.parse("2.mid"), encoder=False, points=("mid",)))
class Mid:
    """A baseline between attention and MLP."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)


@strategy(
    sites=Sites(default=Site.parse("1.after"), encoder=False, points=("mid", "after")),
    inputs={"attention": Rows(layer="own")},
)
class OwnRows:
    """A baseline that reads the attention of the layer which it stands in."""

    @hookimpl
    def score_tokens(self, attention):
        return attention


@strategy(sites=Sites(end=True, encoder=False, decoder=False, default=PREFILL_END))
class AtEnd:
    """A baseline that cuts what the prefill left in the cache alone."""

    @hookimpl
    def score_tokens(self, valid):
        return valid.cumsum(-1).float()


@strategy(sites=Sites(pixels=True, encoder=False, decoder=False, default=PIXELS))
class Contrast:
    """A baseline before the tower: patches of high contrast."""

    @hookimpl
    def score_tokens(self, patches):
        return patches.float().flatten(2).std(-1)


@strategy(group="video", per_sample=True)
class EarlyFrames:
    """A baseline for videos: early frames first; of images, early rows."""

    @hookimpl
    def score_tokens(self, frames, coords, videos):
        return -torch.where(videos, frames, coords[:, 1]).float()


@strategy(per_sample=True)
class Whole:
    """A baseline that keeps whole groups of three tokens: at most as many as it is told, and one at least."""

    @hookimpl
    def select_tokens(self, hidden, count):
        most = count if count == len(hidden) else max(count // 3 * 3, 1)
        return torch.arange(len(hidden)) < most


@strategy(per_sample=True)
class Generous:
    """A baseline that never keeps fewer than five: it may keep more than it is told."""

    @hookimpl
    def select_tokens(self, hidden, count):
        return _best(hidden.float().norm(dim=-1), max(count, 5))


@strategy(per_sample=True, keep="refused")
class Threshold:
    """A baseline whose count is its own: tokens longer than the average one."""

    @hookimpl
    def select_tokens(self, hidden):
        norms = hidden.float().norm(dim=-1)
        return norms >= norms.mean() - 1e-6 * norms.abs().max()


@strategy(per_sample=True, keep="optional")
class Unasked:
    """A baseline that keeps a third where it is told no number."""

    @hookimpl
    def select_tokens(self, hidden, count):
        return _best(hidden.float().norm(dim=-1), max(len(hidden) // 3, 1) if count is None else count)


@strategy(sites=Sites(decoder=False), extras=("cls",))
class Appending:
    """A baseline that appends CLS at the decoder input: each CLS token takes the slot of the last kept tokens."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)

    @hookimpl
    def merge_tokens(self, hidden, keep, extras_valid):
        slots = torch.eye(keep.shape[1], keep.shape[1] + extras_valid.shape[1]).repeat(len(keep), 1, 1)
        for row, (kept, real) in enumerate(zip(keep, extras_valid, strict=True)):
            for extra, slot in zip(real.nonzero()[:, 0], kept.nonzero()[:, 0].flip(0), strict=False):
                slots[row, slot] = 0
                slots[row, slot, keep.shape[1] + extra] = 1
        return slots.to(hidden.dtype)


@strategy(
    sites=Sites(default=Site(2), encoder=False, lowest=1),
    inputs={"attention": (Rows(queries="last"), Rows(queries="text", heads="max")), "keys": Keys(heads="mean")},
)
class Tuples:
    """A baseline that asks for one input in two ways."""

    @hookimpl
    def score_tokens(self, attention, keys):
        last, text = attention
        return last.float() + text.float() - 1e-3 * keys.float().norm(dim=-1)


@strategy(per_sample=True)
class Sized:
    """A baseline with sizes: kept tokens stand for those that left."""

    @hookimpl
    def select_tokens(self, hidden, sizes, count):
        keep = _best(hidden.float().norm(dim=-1), count)
        return Selection(keep, sizes=torch.where(keep, sizes * sizes.sum() / sizes[keep].sum(), sizes))


@strategy(keep="refused", drops_all=True, sites=Sites(default=Site(3)))
class Nothing:
    """A baseline that leaves no visual token."""

    @hookimpl
    def select_tokens(self, valid):
        return torch.zeros_like(valid)


@strategy(crops=True, per_sample=True, sites=Sites(encoder=False, lowest=1, default=Site(2)))
class Cropping:
    """A baseline whose dropped tokens also leave the KV of earlier layers."""

    @hookimpl
    def select_tokens(self, hidden, count):
        return Selection(_best(hidden.float().norm(dim=-1), count), crop=True)


@strategy(schedule=lambda self, layers: {Site(layers // 3): 0.6, Site(layers // 2): 0.3}, sites=Sites(encoder=False))
class Scheduled:
    """A baseline with a schedule that scales with the depth."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)


@strategy(sites=Sites(default=Site(10), encoder=False))
class Deep:
    """A baseline whose default site a model of six layers does not have."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)


@strategy(inputs={"encoder_attention": EncoderRows(layer=9)}, sites=Sites(decoder=False))
class DeepInTower:
    """A baseline that reads a block which a tower of three blocks does not have."""

    @hookimpl
    def score_tokens(self, encoder_attention):
        return encoder_attention.float()


@strategy()
class Reading:
    """A baseline that reads: what it keeps depends on the words of the question."""

    @hookimpl
    def score_tokens(self, hidden, question):
        signs = torch.tensor([1.0 if len(words) % 2 else -1.0 for words in question])
        return hidden.float().norm(dim=-1) * signs[:, None]


@strategy()
class Halves:
    """A baseline that shows images at a half and at three quarters of their sides, by a draw."""

    @hookimpl
    def resize_images(self, seed):
        return torch.tensor([0.5 if one % 2 else 0.75 for one in seed])


@strategy()
class EveryThird:
    """A baseline that leaves out every third layer."""

    @hookimpl
    def plan_layers(self, shape):
        return LayerPlan(dict.fromkeys(range(2, shape.layers - 1, 3), LayerAction.SKIP))


def _likeness(embeds, text):
    prompt = embeds.float()[text].mean(0)
    return torch.cosine_similarity(embeds.float(), prompt[None], dim=-1)


@strategy(routes=("tokens",), per_sample=True, sites=Sites(default=Site(1)))
class TokenRouter:
    """A baseline that routes tokens."""

    @hookimpl
    def route(self, embeds, text):
        return Route(tokens=_likeness(embeds, text))


@strategy(routes=("layers",), per_sample=True)
class LayerRouter:
    """A baseline that routes layers, and always lets the first run."""

    @hookimpl
    def route(self, embeds, text, shape):
        return Route(layers=torch.arange(shape.layers).float() * embeds.float()[text].mean().sign())

    @hookimpl
    def protected_layers(self, shape):
        return (0,)


@strategy(per_sample=True, sites=Sites(default=Site(1)))
class BothRouter:
    """A baseline that routes tokens and layers."""

    @hookimpl
    def route(self, embeds, text, shape):
        layers = torch.arange(shape.layers).float() * embeds.float()[text].mean().sign()
        return Route(tokens=_likeness(embeds, text), layers=layers)


@strategy(keep="optional", per_sample=True, sites=Sites(default=Site(1)))
class LayersFirst(BothRouter):
    """A baseline that routes layers by the budget that it needs, and tokens where there is one."""


@strategy(keep_layers="optional", per_sample=True, sites=Sites(default=Site(1)))
class TokensFirst(BothRouter):
    """A baseline that routes tokens by the budget that it needs, and layers where there is one."""


@strategy(keep="optional", keep_layers="refused", per_sample=True, sites=Sites(default=Site(1)))
class PlanningTokens:
    """A baseline that plans layers by itself, and routes tokens where there is a budget."""

    @hookimpl
    def route(self, embeds, text):
        plan = LayerPlan({2: LayerAction.SKIP} if int(text.sum()) > 9 else {})
        return Route(tokens=_likeness(embeds, text), plans=[plan])


@strategy(routes=("layers",), keep_layers="refused", per_sample=True)
class PlanningRouter:
    """A baseline that plans layers by itself: long prompts skip the third."""

    @hookimpl
    def route(self, text):
        return Route(plans=[LayerPlan({2: LayerAction.SKIP} if int(text.sum()) > 9 else {})])


KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "encoder-only": (EncoderOnly, {}), "tower-only": (TowerOnly, {}), "tower-merge": (TowerMerge, {}),
    "mid": (Mid, {}), "own-rows": (OwnRows, {}), "at-end": (AtEnd, {}), "pixels": (Contrast, {}),
    "video": (EarlyFrames, {}), "at-most": (Whole, {"at_most": True}), "keep-more": (Generous, {"may_keep_more": True}),
    "own-count": (Threshold, {}), "unasked": (Unasked, {}), "extras": (Appending, {}), "tuples": (Tuples, {}),
    "sizes": (Sized, {}),
    "drops-all": (Nothing, {}), "crop": (Cropping, {}), "schedule": (Scheduled, {"keep": {}}), "deep": (Deep, {}),
    "deep-in-tower": (DeepInTower, {}), "reading": (Reading, {}), "image": (Halves, {}), "layers": (EveryThird, {}),
    "token-router": (TokenRouter, {}), "layer-router": (LayerRouter, {}), "both-router": (BothRouter, {}),
    "planning-router": (PlanningRouter, {}),
    "layers-first": (LayersFirst, {}), "tokens-first": (TokensFirst, {}),
    "planning-tokens": (PlanningTokens, {}),
}  # fmt: skip
