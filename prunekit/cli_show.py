"""`prunekit show` and `prunekit validate`: a pipeline as it will run, and everything that is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.decisions import ModelShape
    from prunekit.errors import Fault
    from prunekit.pipeline import BoundPipeline, Cut, Pipeline, Stage


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    show = commands.add_parser(
        "show",
        help="a pipeline with every default filled in, and what it does to a model",
        description="The resolved pipeline and its hash; with --model also its sites, layers, tokens and FLOPs there.",
        epilog="example: prunekit show docs/pipelines/compose.yaml --model micro --set stages[0].keep=0.3",
    )
    show.add_argument("pipeline", help="a pipeline file")
    add_common(show)
    show.add_argument("--text-tokens", type=positive, default=64, metavar="N", help="prompt tokens beside the image")
    show.set_defaults(run=run_show)
    check = commands.add_parser(
        "validate",
        help="every fault of pipeline files",
        description="Report every fault of every file with file:line:col, key and suggestion. Exit code 2 if any.",
        epilog="example: prunekit validate docs/pipelines/*.yaml --model micro",
    )
    check.add_argument("pipelines", nargs="+", metavar="pipeline", help="pipeline files")
    add_common(check)
    check.add_argument("--syntax", action="store_true", help="only the files themselves; imports no strategy")
    check.set_defaults(run=run_validate)


def add_common(command: argparse.ArgumentParser, model: bool = False) -> None:
    """Options that commands on a pipeline share; `model`: whether --model must be given."""
    command.add_argument(
        "--model", metavar="M", required=model, help="a short name such as micro, a model folder or a hub id"
    )
    command.add_argument("--download", action="store_true", help="a model that is not here may be fetched from the hub")
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="change one value, such as stages[0].keep=0.3; may be repeated",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="machine-readable on stdout; messages stay on stderr")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def run_show(namespace: argparse.Namespace) -> int:
    """Print the resolved pipeline."""
    from prunekit import loading
    from prunekit.pipeline import build

    pipeline = build(namespace.pipeline, namespace.overrides)
    bound = pipeline.bind(loading.load_shape(namespace.model, namespace.download)) if namespace.model else None
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
    from prunekit import spec
    from prunekit.errors import SpecError
    from prunekit.pipeline import build

    try:
        if namespace.syntax:
            spec.load(source, namespace.overrides)
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
    return {"name": pipeline.name, "sha": pipeline.sha, "source": pipeline.source, "stages": stages}


def _bound_data(bound: BoundPipeline, text_tokens: int) -> dict[str, Any]:
    shape = bound.shape
    data: dict[str, Any] = {
        "family": shape.family,
        "layers": shape.layers,
        "visual_tokens": shape.visual_tokens,
        "sites": [_cut_data(cut) for cut in bound.cuts],
        "actions": {str(layer): action.value for layer, action in bound.plan},
    }
    tokens = expected_tokens(bound, text_tokens)
    if tokens:
        from prunekit import cost

        dense = cost.prefill_flops(shape, [(shape.visual_tokens or 0) + text_tokens] * shape.layers)
        data["text_tokens"] = text_tokens
        data["layer_tokens"] = list(tokens)
        data["kv_tokens"] = list(cost.kv_tokens(tokens, bound.plan))
        data["prefill_flops_fraction"] = cost.prefill_flops(shape, tokens, bound.plan) / dense
        data["kv_fraction"] = sum(data["kv_tokens"]) / ((shape.visual_tokens or 0) + text_tokens) / shape.layers
    return data


def _cut_data(cut: Cut) -> dict[str, Any]:
    return {"stage": cut.stage.label, "site": str(cut.site), "keep": None if cut.keep is None else str(cut.keep)}


def expected_tokens(bound: BoundPipeline, text_tokens: int) -> tuple[int, ...] | None:
    """Tokens that enter each layer for one image and so many text tokens; None where that depends on the picture.

    A stage that merges may leave fewer than its budget; this is the budget.
    """
    original = bound.shape.visual_tokens
    if original is None:
        return None
    tokens, left = [], original
    cuts = list(bound.cuts)
    for layer in range(bound.shape.layers):
        while cuts and cuts[0].first_layer <= layer:
            cut = cuts.pop(0)
            if cut.drops_all:
                left = 0
            elif cut.keep:
                left = cut.keep.count(original, left)
        tokens.append(left + text_tokens)
    return tuple(tokens)


def _print_bound(model: str, bound: BoundPipeline, text_tokens: int) -> None:
    data = _bound_data(bound, text_tokens)
    visual = data["visual_tokens"] or "picture-dependent"
    print(f"\non {model} ({data['family']}, {data['layers']} layers, {visual} visual tokens an image)")
    for row in data["sites"]:
        print(f"  {row['stage']}: at {row['site']}")
    for layer, action in data["actions"].items():
        print(f"  layer {layer}: {action}")
    if "layer_tokens" in data:
        print(f"  tokens entering each layer, for one image and {text_tokens} text tokens:")
        print(f"    {' '.join(map(str, data['layer_tokens']))}")
        print(f"  prefill FLOPs {data['prefill_flops_fraction']:.1%} of dense, KV {data['kv_fraction']:.1%} of dense")


def _doc(stage: Stage) -> str:
    return (type(stage.strategy).__doc__ or "no description").strip().partition("\n")[0]
