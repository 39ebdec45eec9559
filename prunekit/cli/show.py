"""`prunekit show` and `prunekit validate`: a pipeline as it will run, and everything that is wrong with it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from prunekit.cli.arguments import add_common, positive

if TYPE_CHECKING:
    from prunekit.errors import Fault
    from prunekit.pipeline.bound import Ladder
    from prunekit.pipeline.build import BoundPipeline, Cut, Pipeline, Stage
    from prunekit.strategy.decisions import ModelShape


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    show = commands.add_parser(
        "show",
        help="a pipeline with every default filled in, and what it does to a model",
        description="The resolved pipeline and its hash; with --model also its sites, layers, tokens and FLOPs there.",
        epilog="example: prunekit show compose --model micro stages.0.keep=0.3",
    )
    show.add_argument("pipeline", help="a pipeline file, or a name of `prunekit list pipelines`")
    add_common(show)
    show.add_argument("--text-tokens", type=positive, default=64, metavar="N", help="prompt tokens beside the image")
    show.add_argument("--resolved", action="store_true", help="only the resolved pipeline, as a file of the same hash")
    show.set_defaults(run=run_show)
    check = commands.add_parser(
        "validate",
        help="every fault of pipeline files",
        description="Report every fault of every file with file:line:col, key and suggestion. Exit code 2 if any.",
        epilog="example: prunekit validate my.yaml other.yaml --model micro",
    )
    check.add_argument("pipelines", nargs="+", metavar="pipeline", help="pipeline files or names")
    add_common(check)
    check.add_argument("--syntax", action="store_true", help="only the files themselves; imports no strategy")
    check.set_defaults(run=run_validate)


def run_show(namespace: argparse.Namespace) -> int:
    """Print the resolved pipeline."""
    from prunekit import loading
    from prunekit.pipeline.build import build

    pipeline = build(namespace.pipeline, namespace.overrides)
    bound = pipeline.bind(loading.load_shape(namespace.model, namespace.download)) if namespace.model else None
    if namespace.resolved:
        print(pipeline.resolved, end="")
        return 0
    if namespace.json:
        data = _pipeline_data(pipeline)
        if bound:
            data["model"] = {"name": namespace.model, **_bound_data(bound, namespace.text_tokens)}
        print(json.dumps(data, indent=2))
        return 0
    print(f"# {pipeline.name}, {pipeline.sha}, from {pipeline.source}")
    print(pipeline.resolved.rstrip())
    print("\nstages")
    for stage in pipeline.stages:
        print(f"  {stage.label}: {_doc(stage)}  [{stage.origin}]")
    if bound:
        _print_bound(namespace.model, bound, namespace.text_tokens)
    return 0


def run_validate(namespace: argparse.Namespace) -> int:
    """Check every file and report every fault."""
    from prunekit import loading
    from prunekit.errors import InputError

    if not namespace.pipelines:
        raise InputError("nothing to validate: name a pipeline file")
    shape = loading.load_shape(namespace.model, namespace.download) if namespace.model else None
    rows = [_validated(source, namespace, shape) for source in namespace.pipelines]
    bad = [row for row in rows if not row["ok"]]
    if namespace.json:
        files = [{**row, "faults": [_fault_data(fault) for fault in row["faults"]]} for row in rows]
        print(json.dumps({"files": files}, indent=2))
    else:
        for row in rows:
            if row["ok"]:
                print(f"{row['source']}: ok" + (f" ({row['sha']})" if row["sha"] else ""))
    for row in bad:
        for fault in row["faults"]:
            sys.stderr.write(f"{fault}\n")
    if bad:
        count = sum(len(row["faults"]) for row in bad)
        sys.stderr.write(f"prunekit: {count} fault{'s' * (count != 1)} in {len(bad)} of {len(rows)} files\n")
    return 2 if bad else 0


def _validated(source: str, namespace: argparse.Namespace, shape: ModelShape | None) -> dict[str, Any]:
    from prunekit import plugins
    from prunekit.errors import SpecError
    from prunekit.pipeline.build import build, file_of
    from prunekit.spec import schema

    try:
        if namespace.syntax:
            schema.load(file_of(source, plugins.registry()), namespace.overrides)
            return {"source": source, "ok": True, "sha": None, "faults": []}
        pipeline = build(source, namespace.overrides)
        if shape:
            pipeline.bind(shape)
    except SpecError as error:
        return {"source": source, "ok": False, "sha": None, "faults": list(error.faults)}
    return {"source": source, "ok": True, "sha": pipeline.sha, "faults": []}


def _fault_data(fault: Fault) -> dict[str, Any]:
    where = fault.where
    return {
        "file": where.file if where else None,
        "line": where.line if where else None,
        "col": where.col if where else None,
        "key": fault.key,
        "message": fault.message,
        "hint": fault.hint,
    }


def _pipeline_data(pipeline: Pipeline) -> dict[str, Any]:
    import yaml

    resolved = yaml.safe_load(pipeline.resolved)
    stages = [
        {"index": stage.index, "doc": _doc(stage), "origin": stage.origin, **row}
        for stage, row in zip(pipeline.stages, resolved["stages"], strict=True)
    ]
    return {
        "name": pipeline.name,
        "description": pipeline.description,
        "sha": pipeline.sha,
        "source": pipeline.source,
        "positions": pipeline.positions,
        "budget": resolved.get("budget"),
        "stages": stages,
    }


def _bound_data(bound: BoundPipeline, text_tokens: int) -> dict[str, Any]:
    from prunekit.cost import FLOPS_OF, WHOLE_FLOPS_OF
    from prunekit.pipeline.forecast import forecast
    from prunekit.records import plan_data

    shape = bound.shape
    data: dict[str, Any] = {
        "family": shape.family,
        "layers": shape.layers,
        "visual_tokens": shape.visual_tokens,
        "positions": bound.positions,
        "cuts": [_cut_data(cut) for cut in bound.cuts],
        "routers": [_router_data(router, bound) for router in bound.routers],
        "plan": plan_data(bound.plan),
        "ladder": None if bound.ladder is None else _ladder_data(bound.ladder),
    }
    if (figures := forecast(bound, text_tokens)) is not None:
        data |= {
            "text_tokens": text_tokens,
            "layer_tokens": list(figures.layer_tokens),
            "mlp_tokens": list(figures.mlp_tokens),
            "kv_tokens": list(figures.kv_tokens),
            "tokens_at_most": figures.at_most,
            "prefill_flops_fraction": list(figures.flops),
            "kv_fraction": list(figures.kv),
            "decision_flops_fraction": figures.decisions,
            "flops_of": FLOPS_OF,
            "whole_prefill_flops_fraction": None if figures.whole is None else list(figures.whole),
            "whole_flops_of": WHOLE_FLOPS_OF,
        }
    return data


def _cut_data(cut: Cut) -> dict[str, Any]:
    keep = None if cut.keep is None else str(cut.keep)
    return {"stage": cut.stage.label, "site": str(cut.site), "keep": keep, "drops_all": cut.drops_all}


def _ladder_data(ladder: Ladder) -> dict[str, Any]:
    cuts = [(rung.cuts, rung.layer_budget) for rung in ladder.rungs[1:]]
    kept = [{"keep": [str(cut.keep) for cut in row], "layers": layers} for row, layers in cuts]
    return {"rungs": kept, "harm_below": None if math.isinf(ladder.threshold) else ladder.threshold}


def _router_data(router: Stage, bound: BoundPipeline) -> dict[str, Any]:
    decides = router.decides_layers
    return {
        "stage": router.label,
        "asked_at": str(router.route_at),
        "decides_layers": decides,
        "keep_layers": bound.layer_budget if decides else None,
        "protected": sorted(bound.protected) if decides else [],
    }


def _print_bound(model: str, bound: BoundPipeline, text_tokens: int) -> None:
    from prunekit.records import plan_lines

    data = _bound_data(bound, text_tokens)
    visual = data["visual_tokens"] or "image-dependent"
    print(f"\non {model} ({data['family']}, {data['layers']} layers, {visual} visual tokens an image)")
    if data["ladder"] is not None:
        _print_ladder(data["ladder"], data["layers"])
    for cut in () if data["ladder"] is not None else data["cuts"]:
        what = "drops all" if cut["drops_all"] else f"keeps {cut['keep'] or 'what it decides'}"
        print(f"  {cut['stage']}: at {cut['site']}, {what}")
    routers = () if data["ladder"] is not None else data["routers"]
    for router in (router for router in routers if router["decides_layers"]):
        print(f"  {router['stage']}: {_routed(router, data['layers'])}")
    for line in plan_lines(bound.plan):
        print(line)
    print(f"  positions: {'renumbered without gaps' if data['positions'] == 'renumber' else 'kept'}")
    if "layer_tokens" in data:
        why = "each sample takes its own rung" if data["ladder"] is not None else "a stage decides by itself"
        most = f"at most, since {why}, " if data["tokens_at_most"] else ""
        print(f"  tokens entering each layer, {most}for one image and {text_tokens} text tokens:")
        print(f"    {' '.join(map(str, data['layer_tokens']))}")
        flops, kv = _percent(data["prefill_flops_fraction"]), _percent(data["kv_fraction"])
        own = data["decision_flops_fraction"]
        told = own >= 0.0005  # less is 0.0%
        more = f", decisions another {'at most ' * data['tokens_at_most']}{own:.1%}" if told else ""
        print(f"  prefill FLOPs of the decoder {flops} of dense{more}, KV {kv} of dense")
        if (whole := data["whole_prefill_flops_fraction"]) is not None:
            print(f"  whole-prefill FLOPs, with vision tower and projector, {_percent(whole)} of dense")


def _print_ladder(ladder: dict[str, Any], layers: int) -> None:
    below = "any" if ladder["harm_below"] is None else f"below {ladder['harm_below']:.4g}"
    told = "takes no rung: it runs dense" if ladder["harm_below"] == 0 else f"takes rungs while their harm is {below}"
    print(f"  each sample {told}")
    for number, rung in enumerate(ladder["rungs"], start=1):
        of_layers = "" if rung["layers"] is None else f", {rung['layers']} of {layers} layers"
        print(f"    rung {number}: {', '.join(rung['keep'])}{of_layers}")


def _routed(router: dict[str, Any], layers: int) -> str:
    count, protected = router["keep_layers"], ", ".join(map(str, router["protected"]))
    text = "decides which layers run" if count is None else f"{count} of {layers} layers run for each sample"
    text += "" if router["asked_at"] == "encoder" else f", decided before layer {router['asked_at']}"
    return text + (f"; always {protected}" if protected else "")


def _percent(bounds: list[float]) -> str:
    low, high = (f"{bound:.1%}" for bound in bounds)
    return low if low == high else f"{low} to {high}"


def _doc(stage: Stage) -> str:
    return (type(stage.strategy).__doc__ or "no description").strip().partition("\n")[0]
