"""Where stages cut on a model, in the order of the data, and what is wrong with that."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from prunekit.errors import Fault
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import LayerAction, LayerPlan, TowerShape
from prunekit.strategy.decoder_requests import layer_of
from prunekit.strategy.inputs import OF_DECODER_LAYERS, requests
from prunekit.strategy.sites import ENCODER, Keep

# What a layer may do inside which tokens leave, between its attention and its MLP.
CAN_BE_CUT = (LayerAction.RUN, LayerAction.SKIP_ATTENTION)
LET_RUN = "move it, or let that layer run"


def cuts_of(stages: Sequence[Stage], layers: int | None, blocks: int = 0) -> tuple[Cut, ...]:
    """The cuts of all stages in the order in which the data passes them; at one site in the order of the stages.

    layers: of the decoder; None leaves out stages whose default site scales with them. blocks: of the vision tower,
    those that lead to the image features.
    """
    cuts: list[Cut] = []
    for stage in stages:
        unread = stage.sites_given is None and "at" in stage.names
        if unread or not stage.cuts_tokens:
            continue
        placements = stage.placements(layers, blocks) or ()
        sites = tuple(site for site, _ in placements)
        cuts += [Cut(site, stage, keep, number, sites) for number, (site, keep) in enumerate(placements)]
    return tuple(sorted(cuts, key=lambda cut: (cut.site, cut.stage.index)))


def on_tower(cuts: Sequence[Cut], tower: TowerShape | None) -> tuple[Cut, ...]:
    """The cuts on a model with this tower: one that takes one size makes all tokens of an image, however small."""
    every = tower is not None and tower.images == "whole"
    return tuple(dataclasses.replace(cut, keep=Keep(1.0)) if every and cut.stage.is_image else cut for cut in cuts)


def sequence_faults(stages: Sequence[Stage], cuts: Sequence[Cut], visual: int | None) -> list[Fault]:
    """Stages out of order, stages without tokens to decide about, and budgets above what earlier ones leave.

    visual: the visual tokens of one image, None where they are not known.
    """
    misplaced = [*_order_faults(stages, cuts), *_router_faults(cuts)]
    if misplaced:  # what follows is then about the order that the file has
        cuts = sorted(cuts, key=lambda cut: cut.stage.index)
    return [*misplaced, *_resize_faults(cuts), *_gone_faults(cuts), *_budget_faults(cuts, visual)]


def _order_faults(stages: Sequence[Stage], cuts: Sequence[Cut]) -> Iterator[Fault]:
    first = {cut.stage.index: cut for cut in reversed(cuts)}
    placed = [first[stage.index] for stage in stages if stage.index in first]
    for earlier, later in itertools.pairwise(placed):
        if later.site < earlier.site:
            message = (
                f"stages are out of order: '{later.stage.use}' at '{later.site}' stands after "
                f"'{earlier.stage.use}' at '{earlier.site}'"
            )
            hint = "list stages in the order in which the data passes them"
            yield later.stage.fault(later.key("at"), message, hint)


def _router_faults(cuts: Sequence[Cut]) -> Iterator[Fault]:
    """Stages that are listed after a router where that is asked, which decides after them."""
    routers = [cut for cut in cuts if cut.routes_here]
    for cut, router in itertools.product(cuts, routers):
        if cut.site == router.site and not cut.routes_here and cut.stage.index > router.stage.index:
            place = "the decoder input" if router.site == ENCODER else f"'{router.site}'"
            message = f"'{router.stage.use}' routes after all other stages at {place}, so also after this one"
            yield cut.stage.fault(cut.key("at"), message, f"list it before {router.stage.label}")


def _resize_faults(cuts: Sequence[Cut]) -> Iterator[Fault]:
    """Stages that resize images behind another that has already changed them."""
    for index, cut in enumerate(cuts):
        if cut.stage.is_image and index:
            message = f"resizes whole images, of which {cuts[index - 1].label} has already changed what the tower gets"
            yield cut.stage.fault("use", message, "list one such stage, before all others")


def _gone_faults(cuts: Sequence[Cut]) -> Iterator[Fault]:
    """Stages behind one that leaves no tokens to decide about."""
    told: set[int] = set()
    for index, cut in enumerate(cuts):
        blind = next((earlier for earlier in cuts[:index] if earlier.drops_all), None)
        if blind and cut.stage.index not in told:
            told.add(cut.stage.index)
            message = f"'{blind.stage.use}' before it leaves no visual tokens"
            yield cut.stage.fault("use", message, "remove one of the two stages")


def _budget_faults(cuts: Sequence[Cut], visual: int | None) -> Iterator[Fault]:
    """Cuts with a fixed count that ask for more than there is, or than an earlier one leaves."""
    fixed = [cut for cut in cuts if cut.keep and cut.keep.of == "original"]
    for index, cut in enumerate(fixed):
        if visual is not None and cut.keep and (cut.keep.tokens or 0) > visual:
            message = f"asks for {cut.keep.tokens} of the {visual} visual tokens that this model has per image"
            yield cut.stage.fault(cut.key("keep_tokens"), message, f"name at most {visual}, or a fraction with `keep`")
            continue
        for earlier in fixed[:index]:
            if _asks_more(cut, earlier, visual):
                key = "keep" if cut.keep and cut.keep.tokens is None else "keep_tokens"
                message = f"asks for {cut.keep}, but {earlier.label} leaves only {earlier.keep}"
                yield cut.stage.fault(cut.key(key), message, "keep less at this stage or more at that one")
                break


def _asks_more(cut: Cut, earlier: Cut, visual: int | None) -> bool:
    """For certain, whatever the prompt; a fraction and a number are compared on one image, if its tokens are known."""
    new, old = cut.keep, earlier.keep
    if new is None or old is None:
        return False
    if new.fraction is not None and old.fraction is not None:
        return new.fraction > old.fraction
    if new.tokens is not None and old.tokens is not None:
        return new.tokens > old.tokens
    return visual is not None and new.count(visual, visual) > old.count(visual, visual)


def plan_faults(cuts: Sequence[Cut], plan: LayerPlan, layers: int) -> Iterator[Fault]:
    """Cuts that read or stand inside a layer that a static plan leaves out."""
    for cut in cuts:
        unread = {layer: name for layer, name in _reads(cut, layers).items() if not plan[layer].attends}
        for layer, name in unread.items():
            message = f"'{cut.stage.use}' reads the {name} of layer {layer}"
            yield cut.stage.fault(cut.key("at"), f"{message}, which another stage skips", LET_RUN)
        for layer, name in _ahead(cut, layers).items():
            if not plan[layer].attends:
                message = f"'{cut.stage.use}' looks ahead at the {name} of layer {layer}"
                yield cut.stage.fault(cut.key("at"), f"{message}, which another stage skips", LET_RUN)
        inside = cut.site.layer if cut.site.in_decoder and cut.site.point == "mid" else None
        if inside is not None and not unread and plan[inside] not in CAN_BE_CUT:
            why = f"does not simply run: another stage says {plan[inside].value}"
            message = f"'{cut.stage.use}' cuts inside layer {inside}, which {why}"
            yield cut.stage.fault(cut.key("at"), message, LET_RUN)


def protected_layers(cuts: Sequence[Cut], layers: int) -> frozenset[int]:
    """Decoder layers that have to run for every sample: something is read of them, or tokens leave inside them."""
    read = {layer for cut in cuts for layer in _reads(cut, layers)}
    return frozenset(layer for layer in read | cut_inside(cuts) if layer in range(layers))


def cut_inside(cuts: Sequence[Cut]) -> frozenset[int]:
    """Decoder layers inside which tokens leave."""
    mid = (cut.site for cut in cuts if cut.site.in_decoder and cut.site.point == "mid")
    return frozenset(site.layer for site in mid if site.layer is not None)


def _ahead(cut: Cut, layers: int) -> dict[int, str]:
    """The decoder layers at which the stage looks before they run, with the input that asks for it."""
    named = [name for name in OF_DECODER_LAYERS if cut.stage.asks_for(name)]
    listed = [(name, one) for name in named for one in requests(cut.stage.inputs, name) if one.layer == "next"]
    found = {layer_of("next", cut.asked_at, layers): name for name, _ in listed}
    return {layer: name for layer, name in found.items() if layer is not None}


def _reads(cut: Cut, layers: int) -> dict[int, str]:
    """As `Cut.reads`; nothing where that is already a fault."""
    try:
        return cut.reads(layers)
    except ValueError:
        return {}
