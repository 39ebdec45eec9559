"""Sites that a model does not have, and inputs that do not exist there: all that its numbers alone can tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prunekit.errors import Fault
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import MASKED, ModelShape, TowerShape
from prunekit.strategy.declare import implements
from prunekit.strategy.decoder_requests import layer_and_rope, layer_of
from prunekit.strategy.inputs import (
    IMAGE_HOOK,
    OF_DECODER_LAYERS,
    OF_TOWER,
    TOKEN_HOOKS,
    NotThere,
    inputs_of,
    region_of,
    requests,
)
from prunekit.strategy.sites import ENCODER, Site
from prunekit.strategy.tower_requests import POOL, EncoderRows, EncoderSpec, Features, resolved

OF_POSITIONS = ("positions", "rotary")
# What is wrong, and what to do.
Problem = tuple[str, str]


def site_faults(stages: Sequence[Stage], cuts: Sequence[Cut], shape: ModelShape) -> Iterator[Fault]:
    """Sites that this model does not have, or at which a stage cannot get what it asks for."""
    for cut in cuts:
        problem = _site_problem(cut, cuts, shape) or _input_problem(cut, cuts, shape)
        if problem:
            yield cut.stage.fault(cut.key("at"), *problem)
    cutting = {cut.stage.index for cut in cuts}
    for stage in stages:
        if not stage.is_router:
            continue
        asked = Cut(stage.route_at, stage, None, 0)
        if problem := _no_such_place(stage.route_at, shape):
            yield stage.fault("route_at", *problem)
        elif stage.index not in cutting and (problem := _input_problem(asked, cuts, shape)):
            yield stage.fault("use", *problem)


def _no_such_place(site: Site, shape: ModelShape) -> Problem | None:
    """Why this decoder has no such site."""
    if site.place == "layer" and site.layer is not None and site.layer >= shape.layers:
        message = f"there is no layer {site.layer}: the model has layers 0 to {shape.layers - 1}"
        return message, "name an earlier layer"
    if shape.opaque and site > ENCODER:
        return f"'{site}' is inside a decoder that can be cut at its input only: {shape.opaque}", "name 'encoder'"
    return None


def _site_problem(cut: Cut, cuts: Sequence[Cut], shape: ModelShape) -> Problem | None:
    site, use = cut.site, cut.stage.use
    if problem := _no_such_place(site, shape):
        return problem
    if site.place == "pixels" and (problem := _pixels_problem(cut, cuts, shape.tower)):
        return problem
    if site.place == "layer" and site.point == "mid" and not shape.cuts_inside:
        message = (
            f"the layers of {shape.family} have no state between attention and MLP that could be cut: they run these "
            "side by side, or scale what goes past the MLP"
        )
        return message, f"cut at '{site.layer}' or '{site.layer}.after'"
    if site.place == "vision" and (problem := _tower_site_problem(cut, cuts, shape.tower)):
        return problem
    if reason := cut.stage.sites.reason_against(site):
        if cut.stage.sites_given is None:
            return f"is missing: '{use}' {reason}", _where(cut.stage, shape)
        return f"'{use}' cannot act at '{site}': it {reason}", ""
    if cut.stage.is_router and site < cut.asked_at:
        if cut.asked_at == ENCODER:
            return f"'{use}' decides at the decoder input, after '{site}'", "name 'encoder' or a layer"
        message = f"'{use}' is only asked at '{cut.asked_at}', so no token can leave by it at '{site}'"
        return message, f"name '{cut.asked_at}' or a later layer"
    return None


def _where(stage: Stage, shape: ModelShape) -> str:
    """A site that a stage without a default may name, and how its strategy would have one."""
    some = ["pixels", "encoder", stage.sites.lowest, f"{stage.sites.lowest}.after", "prefill_end"]
    if shape.tower is not None and shape.tower_depth:
        some.insert(1, f"vision.{shape.tower.feature_block}")
    allowed = [one for one in some if stage.sites.reason_against(Site.parse(one)) is None]
    if not allowed:
        return "name the site"
    code = f"Site({allowed[0]})" if isinstance(allowed[0], int) else f"Site.parse('{allowed[0]}')"
    return f"name the site, such as `at: {allowed[0]}`; in the strategy Sites(default={code}) makes it the default"


def _pixels_problem(cut: Cut, cuts: Sequence[Cut], tower: TowerShape | None) -> Problem | None:
    if tower is None or not tower.images:
        return "how images reach this model's vision tower is not known", "cut at 'encoder' or later"
    if cut.stage.is_image:
        return None
    if tower.images == "whole":
        message = "this model's vision tower takes whole images, of which no part can leave before"
        return message, f"resize the images with a strategy that implements {IMAGE_HOOK}, or cut at 'vision.0' or later"
    if implements(type(cut.stage.strategy), "merge_tokens"):
        return f"'{cut.stage.use}' merges, and pixels are no states that could be merged", "name 'vision.0' or later"
    return _attention_problem(tower) or _two_kinds_problem(cut, cuts)


def _tower_site_problem(cut: Cut, cuts: Sequence[Cut], tower: TowerShape | None) -> Problem | None:
    number = cut.site.layer or 0
    if tower is None:
        return "this model's vision tower cannot be cut", "cut at 'encoder' or later"
    if number >= tower.blocks:
        message = f"there is no tower block {number}: the tower has blocks 0 to {tower.blocks - 1}"
        return message, "name an earlier one"
    if number > tower.feature_block:
        message = f"{tower.features}, so a cut behind block {number} changes nothing that the decoder sees"
        return message, "cut earlier, or at 'encoder'"
    return _attention_problem(tower) or _two_kinds_problem(cut, cuts)


def _attention_problem(tower: TowerShape) -> Problem | None:
    if tower.attention in MASKED:
        return None
    message = f"the vision tower runs on '{tower.attention}', which takes no masks of single tokens"
    return message, "load the tower with sdpa or eager, or cut at 'encoder'"


def _two_kinds_problem(cut: Cut, cuts: Sequence[Cut]) -> Problem | None:
    if cut.number == 0 and any(other.stage.index == cut.stage.index and not other.site.in_tower for other in cuts):
        message = "in the tower a sample is an image, behind it a prompt, so one stage cannot act at both"
        return message, "split the stage in two"
    return None


def _input_problem(cut: Cut, cuts: Sequence[Cut], shape: ModelShape) -> Problem | None:
    """Of what the stage asks for at this cut, the first that cannot be given."""
    use, site, tower = cut.stage.use, cut.asked_at, shape.tower
    absent = _absent(cut)
    if site.place != "pixels" and "patches" in absent:
        return f"'{use}' asks for patches, which are there at 'pixels' alone", "name 'pixels'"
    if site.in_tower and absent:
        return f"'{use}' asks for {absent[0]}, which is not there yet at '{site}'", "name 'encoder' or a later site"
    inside = (*OF_DECODER_LAYERS, "forward", "norm", *OF_POSITIONS)
    inner = [name for name in inside if cut.stage.asks_for(name)]
    if shape.opaque and inner and not site.in_tower:
        return f"'{use}' asks for {inner[0]}, but nothing is known inside this decoder: {shape.opaque}", ""
    if cut.stage.asks_for("forward") and ("forward" in absent or site.point == "mid"):
        return f"'{use}' asks for forward, but no layer can be run from '{site}'", "name another site"
    placed = [name for name in OF_POSITIONS if cut.stage.asks_for(name)]
    if placed and not shape.rotary:
        message = f"'{use}' asks for {placed[0]}, but the {shape.family} decoder rotates nothing"
        return message, "use another strategy"
    rows = requests(cut.stage.inputs, "attention") if cut.stage.asks_for("attention") else ()
    if any(one.undecay for one in rows) and not shape.rotary:
        message = f"'{use}' undoes the decay of rotary positions, but the {shape.family} decoder has none"
        return message, "use another strategy"
    of_tower = ["extras"] * bool(cut.stage.extras) + [name for name in OF_TOWER if cut.stage.asks_for(name)]
    if of_tower and tower is None:
        return f"'{use}' asks for {of_tower[0]}, but this model's vision tower cannot be read", "use another strategy"
    if tower is not None and cut.stage.extras and (problem := _extras_problem(cut, tower)):
        return problem
    if cut.stage.asks_for("project") and (problem := _project_problem(cut, tower)):
        return problem
    if cut.stage.asks_for("cls_crops") and not (cut.stage.extras or _reads_cls(cut.stage)):
        return f"'{use}' asks for cls_crops, but for no CLS token of which they could be", "request of='cls'"
    for name in of_tower:
        assert tower is not None, "said above"
        for request in requests(cut.stage.inputs, name):
            wanted = _of_this_depth(request, site, tower)
            if problem := _request_problem(wanted, site, cuts, tower):
                return f"'{use}' asks for {name}, {wanted}: {problem[0]}", problem[1]
    try:
        cut.reads(shape.layers)
    except NotThere as error:
        return f"'{use}' cannot act at '{cut.site}': {error}", error.hint
    return _recurrent_problem(cut, shape) or _rope_problem(cut, shape) or _ahead_problem(cut, shape)


def _recurrent_problem(cut: Cut, shape: ModelShape) -> Problem | None:
    """Why the attention of a layer is not there: it has a recurrent state in its place."""
    use = cut.stage.use
    for name in OF_DECODER_LAYERS:
        asked = requests(cut.stage.inputs, name) if cut.stage.asks_for(name) else ()
        for layer in (layer_of(request.layer, cut.asked_at, shape.layers) for request in asked):
            if layer is not None and layer in shape.recurrent:
                kind = shape.layer_kinds[layer]
                attending = sorted(set(range(shape.layers)) - set(shape.recurrent))
                message = f"'{use}' asks for {name} of layer {layer}, which holds a recurrent state ({kind}) instead"
                return message, f"layers that attend are {', '.join(map(str, attending))}: read one of them"
    return None


def _rope_problem(cut: Cut, shape: ModelShape) -> Problem | None:
    """Keys of another layer come rotated."""
    for name in OF_DECODER_LAYERS:
        for request in requests(cut.stage.inputs, name) if cut.stage.asks_for(name) else ():
            number = layer_of(request.layer, cut.asked_at, shape.layers)
            if number is None or shape.kv_source(number) == number or layer_and_rope(request)[1]:
                continue
            message = f"'{cut.stage.use}' asks for {name} with rope=False, but layer {number} reads rotated keys"
            return f"{message} of layer {shape.kv_source(number)}", "name another site, or take rope=True"
    return None


def _ahead_problem(cut: Cut, shape: ModelShape) -> Problem | None:
    """Why the attention of the layer ahead is not known behind a layer, if the stage asks for it."""
    site, use = cut.asked_at, cut.stage.use
    names = [name for name in OF_DECODER_LAYERS if cut.stage.asks_for(name)]
    looks = any(request.layer == "next" for name in names for request in requests(cut.stage.inputs, name))
    if not looks or site.layer is None or site.point != "after":
        return None
    ahead, kinds = site.layer + 1, shape.layer_kinds
    if ahead <= shape.logical_until:
        message = f"'{use}' looks ahead at layer {ahead}, but this model adds features of its images in between"
        return message, f"name '{ahead}'"
    if kinds and kinds[ahead] not in kinds[:ahead]:
        message = f"'{use}' looks ahead at layer {ahead}, but no layer of its kind, {kinds[ahead]}, has run before"
        return message, f"name '{ahead}'"
    return None


def _absent(cut: Cut) -> list[str]:
    """Inputs that the stage asks for and that do not exist at the cut's site, in the order of their table."""
    region = region_of(cut.asked_at)
    rows = (one for hook in TOKEN_HOOKS for one in inputs_of(hook) if one.name in cut.stage.requests(hook))
    return list(dict.fromkeys(one.name for one in rows if region not in one.regions))


def _extras_problem(cut: Cut, tower: TowerShape) -> Problem | None:
    extras = f"'{cut.stage.use}' takes extras ({', '.join(cut.stage.extras)})"
    if cut.site != ENCODER:
        return f"{extras}, which are there at 'encoder' only", "name 'encoder'"
    reason = None
    if not tower.leading:
        reason = "there is no CLS token in this vision tower"
    elif not tower.projects_tokens:
        reason = "the projector of this model does not map single tokens, so its CLS token cannot be projected"
    elif tower.feature_block < 0:
        reason = "the projector gets the tower's input, which no block has made"
    return None if reason is None else (f"{extras}, but {reason}", "use another strategy")


def _project_problem(cut: Cut, tower: TowerShape | None) -> Problem | None:
    asks = f"'{cut.stage.use}' asks for project"
    if cut.site != ENCODER:
        return f"{asks}, but what the projector makes goes in at 'encoder' only", "name 'encoder'"
    if tower is None or not tower.projects_tokens:
        return f"{asks}, but there is no projector here that maps single tokens", "use another strategy"
    if tower.feature_block < 0:
        return f"{asks}, but the projector gets what enters the tower, no features", "use another strategy"
    return None


def _reads_cls(stage: Stage) -> bool:
    """It requests something of the tower's CLS tokens."""
    names = [name for name in OF_TOWER if stage.asks_for(name)]
    return any(getattr(one, "of", "") == "cls" for name in names for one in requests(stage.inputs, name))


def _of_this_depth(request: EncoderSpec, site: Site, tower: TowerShape) -> EncoderSpec:
    """The request with a number where it has a function of the tower's depth."""
    return resolved(request, site, tower.blocks, tower.feature_block) if callable(request.layer) else request


def _request_problem(request: EncoderSpec, site: Site, cuts: Sequence[Cut], tower: TowerShape) -> Problem | None:
    """Why a tower with these numbers cannot give what is requested at `site`."""
    inside = site.place == "vision"
    if "cls" in (getattr(request, "of", ""), getattr(request, "query", "")) and not tower.leading:
        return "this vision tower has no CLS token", "request query='mean', or inputs of the patches"
    if isinstance(request, EncoderRows) and request.query == POOL:
        if not tower.pool:
            return "this vision tower has no pooling head", "request query='cls' or 'mean'"
        if any(cut.site.in_tower and not cut.stage.is_image for cut in cuts):
            message = "the pooling head would also attend to what cuts in the tower have dropped"
            return message, "read the pooling head or cut in the tower, not both"
        return None
    if isinstance(request, Features) and request.projected:
        return ("inside the tower nothing has been projected yet", "name 'encoder'") if inside else None
    block = resolved(request, site, tower.blocks, tower.feature_block).layer
    if not isinstance(block, int) or block not in range(tower.blocks):
        return f"there is no block {request.layer}: the vision tower has blocks 0 to {tower.blocks - 1}", ""
    if inside and site.layer is not None and block > site.layer:
        return f"block {block} has not run yet at '{site}'", "request an earlier block, or name a later site"
    if inside and isinstance(request, Features) and site.point == "mid" and block == site.layer:
        return f"block {block} has not run to its end at '{site}'", "ask for `hidden`"
    return None
