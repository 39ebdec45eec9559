"""What becomes of the decoder layers of a model: static plans, and what a router may decide beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from prunekit.errors import Fault, PluginError, PrunekitError
from prunekit.pipeline.stage import Stage, named_problem
from prunekit.strategy.decisions import MASKED, LayerAction, LayerPlan, ModelShape


def static_plan(stages: Sequence[Stage], shape: ModelShape, faults: list[Fault]) -> LayerPlan:
    """The plans of all layer stages together; adds to `faults` what does not fit the model or each other."""
    plan = LayerPlan()
    for stage in stages:
        if not stage.is_layer:
            continue
        own = _plan_of(stage, shape, faults)
        beyond = sorted(layer for layer in own.layers if layer not in range(shape.layers))
        if beyond:
            message = f"plan_layers of '{stage.use}' names {_layers(beyond)}, but the model has {shape.layers}, "
            message += f"0 to {shape.layers - 1}"
            faults.append(stage.fault(_key(stage), message, "name earlier layers"))
            continue
        if shape.attention not in MASKED and any(action is LayerAction.FREEZE for _, action in own):
            message = "freezes visual tokens, for which a layer needs a mask that flash kernels do not take"
            faults.append(stage.fault(_key(stage), message, "load the model with sdpa or eager attention"))
        if own.layers and shape.opaque:
            message = f"plans layers, but this decoder can be cut at its input only: {shape.opaque}"
            faults.append(stage.fault("use", message, "leave this stage out"))
        if held := without_kv(own, shape):
            message = f"{held[1]}, of which layers {_listed(held[0])} have none"
            faults.append(stage.fault(_key(stage), message, "name layers that attend, or skip them"))
        try:
            plan = plan.merge(own)
        except ValueError as error:
            faults.append(stage.fault(_key(stage), f"plans disagree: {error}", "let one stage decide about each layer"))
    deciding = [stage for stage in stages if stage.is_layer]
    if deciding and (problem := sharing_problem(plan, shape)):
        last, hint = deciding[-1], "leave the layers alone that others read, or skip both"
        faults.append(last.fault(_key(last), problem, hint))
    return plan


def _key(stage: Stage) -> str:
    """The option of a layer stage that is to blame for its plan, by its usual name; empty: the stage itself is."""
    return "layers" if any(one.name == "layers" for one in dataclasses.fields(stage.strategy)) else ""


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def without_kv(plan: LayerPlan, shape: ModelShape) -> tuple[frozenset[int], str] | None:
    """Layers with a recurrent state that `plan` tells to do what only keys and values of tokens allow, and what that
    is; None: there are none.
    """
    needs = {
        LayerAction.FREEZE: "freezes visual tokens, which the others see by their keys and values",
        LayerAction.FILL_KV: "fills in keys and values",
    }
    for action, what in needs.items():
        layers = frozenset(layer for layer in shape.recurrent if action in (plan[layer], plan.decoding(layer)))
        if layers:
            return layers, what
    return None


def sharing_problem(plan: LayerPlan, shape: ModelShape) -> str:
    """Why a plan leaves out keys and values that a layer attends to; empty: it does not."""
    phases = (("prefill", plan.__getitem__), ("decoding", plan.decoding))
    for reader, source in enumerate(shape.kv_sources):
        for phase, action in phases:
            if source != reader and action(reader).attends and not action(source).writes_kv:
                return (
                    f"layer {source} is to {action(source).value} in {phase}, but layer {reader}, which is to "
                    f"{action(reader).value}, attends to its keys and values"
                )
    return ""


def read_sources(plan: LayerPlan, shape: ModelShape) -> frozenset[int]:
    """Layers whose keys and values another one, which `plan` lets attend, reads."""
    return frozenset(
        source
        for reader, source in enumerate(shape.kv_sources)
        if source != reader and (plan[reader].attends or plan.decoding(reader).attends)
    )


def layers_before_routing(stages: Sequence[Stage]) -> frozenset[int]:
    """Decoder layers that have run when the router that decides about layers is asked."""
    deciding = (stage for stage in stages if stage.is_router and stage.decides_layers)
    return frozenset(range(max((stage.route_at.reach for stage in deciding), default=0)))


def _plan_of(stage: Stage, shape: ModelShape, faults: list[Fault]) -> LayerPlan:
    try:
        plan = stage.hook.plan_layers(shape=shape)
    except PrunekitError:
        raise
    except ValueError as error:
        problem = named_problem(type(stage.strategy), str(error))
        faults.append(stage.fault(problem.key, problem.message))
        return LayerPlan()
    except Exception as error:
        raise PluginError(
            f"{stage.label} from {stage.origin}: plan_layers failed with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(plan, LayerPlan):
        raise PluginError(f"{stage.label} from {stage.origin}: plan_layers must return a LayerPlan, not {plan!r}")
    return plan


def layer_budget(stages: Sequence[Stage], layers: int) -> int | None:
    """How many of the decoder's `layers` run for each sample; None when no router has a budget of layers."""
    return next((stage.keep_layers.count(layers, layers) for stage in stages if stage.keep_layers), None)


def rival_faults(stages: Sequence[Stage]) -> Iterator[Fault]:
    """More than one router that decides about layers."""
    deciding = [stage for stage in stages if stage.is_router and stage.decides_layers]
    for stage in deciding[1:]:
        message = f"{deciding[0].label} already decides which layers run"
        yield stage.fault("use", message, "let one router decide about layers")


def routing_faults(
    stages: Sequence[Stage], plan: LayerPlan, protected: frozenset[int], shape: ModelShape
) -> Iterator[Fault]:
    """A budget of layers that this model or its other stages make impossible."""
    router = next((stage for stage in stages if stage.is_router and stage.decides_layers), None)
    if router is None:
        return
    keep = router.keep_layers
    if keep is None:
        return
    if shape.opaque:
        message = f"asks for a budget of layers, but this decoder can be cut at its input only: {shape.opaque}"
        yield router.fault("keep_layers", message, "leave it out")
        return
    skipped = frozenset(layer for layer in plan.layers if plan[layer] is LayerAction.SKIP)
    fixed = protected | (plan.layers - skipped)
    count, most = keep.count(shape.layers, shape.layers), shape.layers - len(skipped)
    if (keep.tokens or 0) > shape.layers:
        message = f"asks for {keep.tokens} layers, but the model has {shape.layers}"
        yield router.fault("keep_layers", message, f"name at most {shape.layers}, or a fraction")
    elif count > most:
        message = f"asks for {count} layers, but another stage skips {_listed(skipped)}, which leaves {most}"
        yield router.fault("keep_layers", message, "keep fewer layers, or skip fewer")
    elif count < len(fixed):
        own = "it protects, or " if router.states("protected_layers") else ""
        own += "later layers attend to the keys and values of, or " if read_sources(plan, shape) else ""
        message = f"leaves {count} layers, but {own}other stages read, cut inside or plan layers {_listed(fixed)}"
        yield router.fault("keep_layers", message, f"keep at least {len(fixed)}, or move those stages")


def _listed(layers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
