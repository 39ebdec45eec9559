"""A ten-line strategy for every site and action of the engine, as an author would write them, and nothing else."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from prunekit import PIXELS, LayerAction, LayerPlan, Route, Selection, Site, Sites, hookimpl, plugins, strategy
from prunekit.ops import top_k_mask

EVERYWHERE = Sites(tower=True, end=True)


@strategy(sites=EVERYWHERE)
class Loud:
    """Baseline: keep the longest states, at any site."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.norm(dim=-1)


@strategy(sites=EVERYWHERE, crops=True)
class Cropped:
    """Baseline: keep the longest states, also in the KV of the layers before."""

    @hookimpl
    def select_tokens(self, hidden, valid, count):
        return Selection(top_k_mask(hidden.norm(dim=-1), count, valid), crop=True)


@strategy(sites=EVERYWHERE, per_sample=True)
class Gather:
    """Baseline: every dropped token is averaged into the next kept one; sizes count along (ToMe's weighted average)."""

    @hookimpl
    def select_tokens(self, hidden, sizes, count):
        keep = top_k_mask(hidden.norm(dim=-1), count)
        kept = keep.nonzero()[:, 0]
        owner = torch.searchsorted(kept, torch.arange(len(keep))).clamp(max=len(kept) - 1)
        weights = (kept[owner] == torch.arange(len(keep))[:, None]).to(hidden.dtype) * sizes.to(hidden.dtype)
        total = weights.sum(1, keepdim=True)
        return Selection(keep, weights / total.clamp(min=1), torch.where(keep, total[:, 0], 1.0))


@strategy()
class Recycle:
    """Baseline: what is dropped goes, by its similarity, into all that is kept, which keeps its own state too."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.norm(dim=-1)

    @hookimpl
    def merge_tokens(self, keep, hidden, valid):
        unit = torch.nn.functional.normalize(hidden, dim=-1)
        rest = (unit @ unit.transpose(1, 2)).exp() * (valid & ~keep)[:, None]
        return torch.eye(keep.shape[1], dtype=hidden.dtype) + 0.5 * rest / rest.sum(-1, keepdim=True).clamp(min=1e-3)


@strategy(sites=Sites(decoder=False), extras=("cls",), per_sample=True)
class WithCls:
    """Baseline: keep the longest states, and each picture's CLS token in the slots of the shortest (TRIM's idea)."""

    @hookimpl
    def select_tokens(self, hidden, extras, count):
        keep = top_k_mask(hidden.norm(dim=-1), count)
        weights = torch.eye(len(keep), len(keep) + len(extras), dtype=hidden.dtype)
        for number, slot in enumerate((~keep).nonzero()[: len(extras), 0].tolist()):
            keep[slot], weights[slot] = True, 0
            weights[slot, len(keep) + number] = 1
        return Selection(keep, weights)


@strategy()
class Pyramid:
    """Baseline: one stage with several cuts; each adds to the scores of those before (in `state`)."""

    @hookimpl
    def score_tokens(self, hidden, coords, cut, state):
        now = hidden.norm(dim=-1)
        if "ids" in state:  # the tokens that are left are found again by their places
            same = (coords[:, :, None, :3] == state["ids"][:, None, :, :3]).all(-1).to(now.dtype)
            now = now + 0.5 * cut * (same @ state["sum"][..., None])[..., 0] / same.sum(-1).clamp(min=1)
        state["ids"], state["sum"] = coords, now
        return now


@strategy(per_sample=True)
class EachCrop:
    """Baseline: the same share of every crop or frame."""

    @hookimpl
    def select_tokens(self, hidden, frames, coords, count):
        keep, score = torch.zeros(len(hidden), dtype=torch.bool), hidden.norm(dim=-1)
        parts = torch.stack([coords[:, 0], frames], 1).unique(dim=0)
        for number, (picture, frame) in enumerate(parts.tolist()):
            share = count * (number + 1) // len(parts) - count * number // len(parts)
            here = (coords[:, 0] == picture) & (frames == frame)
            keep |= top_k_mask(score, share, here)
        return keep if keep.any() else top_k_mask(score, count)


@strategy(sites=Sites(default=PIXELS, pixels=True))
class Bright:
    """Baseline: the brightest squares of pixels."""

    @hookimpl
    def score_tokens(self, patches):
        return patches.flatten(2).mean(-1)


@strategy()
class Acts:
    """Baseline: one action in some layers, in prefill and, if `decode` names one, another in decoding."""

    layers: tuple[int, ...]
    action: str = "run"
    decode: str = ""

    @hookimpl
    def plan_layers(self, shape):
        plan = dict.fromkeys(self.layers, LayerAction(self.action))
        return LayerPlan(plan, dict.fromkeys(self.layers, LayerAction(self.decode)) if self.decode else None)


@strategy(keep="refused", keep_layers="refused", routes=("layers",))
class Lots:
    """Baseline: every sample has a plan of its own, drawn from its seed."""

    @hookimpl
    def route(self, shape, seed):
        actions, plans = list(LayerAction), []
        for one in seed:
            draw = torch.randint(len(actions), (shape.layers,), generator=torch.Generator().manual_seed(one)).tolist()
            plan = {layer: actions[number] for layer, number in enumerate(draw)}
            for source in {source for layer, source in enumerate(shape.kv_sources) if layer != source}:
                plan[source] = plan[source] if plan[source].writes_kv else LayerAction.RUN  # others read it
            plans.append(LayerPlan(plan))
        return Route(plans=plans)


@strategy(sites=Sites(default=Site(1), lowest=0))
class Par:
    """Baseline: scores for tokens and layers from the embeddings; the budgets cut both (PAR's shape)."""

    @hookimpl
    def route(self, embeds, valid, shape):
        mean = (embeds * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        return Route(tokens=embeds.norm(dim=-1), layers=(mean[:, : shape.layers] * 1e3).sin())


# No strategy of an installed plugin has such a name.
EXAMPLES = {
    "ex_loud": Loud, "ex_cropped": Cropped, "ex_gather": Gather, "ex_recycle": Recycle, "ex_with_cls": WithCls,
    "ex_pyramid": Pyramid, "ex_each_crop": EachCrop, "ex_acts": Acts, "ex_lots": Lots, "ex_par": Par,
    "ex_bright": Bright,
}  # fmt: skip


class Plugin:
    """Registers the examples."""

    @hookimpl
    def prunekit_register(self, registry):
        for name, cls in EXAMPLES.items():
            registry.strategy(name, f"{cls.__module__}:{cls.__name__}")


@contextmanager
def registered():
    """While open, the examples can be named in pipelines."""
    plugins.register(Plugin(), name="examples")
    try:
        yield
    finally:
        plugins.unregister("examples")
