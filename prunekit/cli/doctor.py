"""`prunekit doctor`: what prunekit recognises in a model, and a proof that it prunes it exactly."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.families.base import Parts
    from prunekit.verify.observed import Observed

NO_STATE = "attention and MLP run side by side, or what goes past the MLP is scaled"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "doctor",
        help="what is recognised in a model, and a proof that it is pruned exactly",
        description="Read a model's config, say which parts were recognised and what is not supported, and prune a "
        "tiny twin of it (same classes, shrunken numbers, random weights) against the masked reference. "
        "Loads no weights. Exit code 1 if the model is refused or the proof fails.",
        epilog="examples:\n  prunekit doctor micro --json\n  prunekit doctor llava-1.5-7b --serving fastv-k2-r25",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", help="a short name such as micro, a model folder or a hub id")
    command.add_argument(
        "--serving", action="append", default=[], metavar="PIPELINE",
        help="say of each stage of this pipeline what a serving engine could do with it, and nothing else; repeatable",
    )  # fmt: skip
    command.add_argument("--no-proof", action="store_true", help="only what is recognised; takes no seconds")
    command.add_argument(
        "--download", action="store_true", help="a config that is not here may be fetched from the hub"
    )
    command.add_argument("--json", action="store_true", help="machine-readable on stdout")
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Examine one model, or pipelines on it."""
    from prunekit import loading

    if namespace.serving:
        return _serving(namespace)
    data = examine(loading.load_skeleton(namespace.model, namespace.download), not namespace.no_proof)
    data = {"model": namespace.model, **data}
    if namespace.json:
        print(json.dumps(data, indent=2))
    else:
        for line in lines(data):
            print(line)
    return 0 if data["ok"] else 1


def _serving(namespace: argparse.Namespace) -> int:
    from prunekit import loading
    from prunekit.pipeline.build import build
    from prunekit.serving import of_stage

    shape = loading.load_shape(namespace.model, namespace.download)
    bound = [build(source).bind(shape) for source in namespace.serving]
    advice = {one.name: [of_stage(stage, one) for stage in one.stages] for one in bound}
    if namespace.json:
        print(json.dumps({name: [one.to_json() for one in stages] for name, stages in advice.items()}, indent=2))
        return 0
    for name, stages in advice.items():
        print(name)
        for one in stages:
            print(f"  {one}")
    return 0


def examine(model: PreTrainedModel, proof: bool = True) -> dict[str, Any]:
    """What `prunekit doctor` says of `model`, which may live on the meta device, ready for JSON.

    `ok` is False, and `refused` says why, for a model that is not pruned; also when the proof was run and failed.
    """
    from prunekit import families
    from prunekit.errors import Unsupported

    config: Any = model.config
    head: dict[str, Any] = {"type": config.model_type, "class": type(model).__name__}
    try:
        family = families.family_of(model)
        parts = families.find(model)
    except Unsupported as error:
        return head | {"ok": False, "refused": str(error)}
    data = head | {"ok": True, "refused": None} | _recognised(model, parts, file=family is not None)
    if not proof:
        return data
    proved = _proved(model, parts, recognised=family is None)
    data["unsupported"] += proved.pop("lacks")
    return data | proved


def _recognised(model: PreTrainedModel, parts: Parts, file: bool) -> dict[str, Any]:
    tower = parts.tower
    return {
        "family": parts.family,
        "family_file": file,
        "base": type(parts.base).__name__,
        "decoder": {
            "class": type(parts.text).__name__,
            "layers": parts.text.config.num_hidden_layers,  # type: ignore[union-attr]
            "opaque": parts.opaque,
            "attention": parts.attention,
            "mlp": parts.mlp,
            "mlp_norm": parts.mlp_norm,
            "rotary": parts.rotary,
            "logical_until": parts.logical_until,
        },
        "visual_inputs": [
            {"name": one.name, "method": one.method, "pixels": one.pixels, "token_ids": list(one.token_ids)}
            for one in parts.modalities
        ],
        "visual_tokens": parts.visual_tokens,
        "tower": None if tower is None else {**asdict(tower.shape()), "packed": tower.packed},
        "attention_implementation": parts.attention_implementation,
        "caches": _caches(parts),
        "unsupported": list(_unsupported(parts)),
    }


def _caches(parts: Parts) -> dict[str, int]:
    """Layers of each kind of cache."""
    config: Any = parts.text.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(parts.layers)
    return dict(Counter(kinds))


def _unsupported(parts: Parts) -> Iterator[str]:
    if parts.tower is None:
        yield "sites pixels and vision.N, inputs from the tower: this family declares no tower"
    if parts.opaque is not None:
        yield f"sites in the decoder, layers: {parts.opaque}"
    elif parts.mlp_norm is None:
        yield "sites N.mid: " + NO_STATE


def _proved(model: PreTrainedModel, parts: Parts, recognised: bool) -> dict[str, Any]:
    from prunekit.errors import Unsupported
    from prunekit.verify import proof

    try:
        proved = proof.prove(model)
    except Unsupported as error:
        return {"ok": False, "refused": str(error), "proof": None, "lacks": []}
    cases = [{"name": case.name, "error": case.error, "fault": case.fault} for case in proved.cases]
    refused = None if proved.holds else "the proof does not hold"
    lacks = list(_lacks(parts, proved.observed, recognised))
    return {"ok": proved.holds, "refused": refused, "proof": cases, "lacks": lacks}


def _lacks(parts: Parts, seen: Observed, recognised: bool) -> Iterator[str]:
    """What the proof has shown beside what was recognised."""
    if recognised and not seen.coords:
        yield "coords, frames: visual tokens are not where the config lets expect them"
    if recognised and "video" not in seen.kinds:
        yield "videos: its twin runs on no prompt with one, or it takes none"
    if seen.opaque is not None:
        yield f"sites in the decoder, layers: {seen.opaque}"
    elif parts.opaque is None and parts.mlp_norm is not None and not seen.cuts_inside:
        yield "sites N.mid: " + NO_STATE


def lines(data: dict[str, Any]) -> Iterator[str]:
    """The answer for people."""
    yield f"{data['model']}: {data['class']} ({data['type']})"
    if "family" in data:
        yield from _recognised_lines(data)
    for number, case in enumerate(data.get("proof") or ()):
        mark = f"largest error {case['error']:.1e}" if case["fault"] is None else f"FAILED: {case['fault']}"
        yield f"{'' if number else 'proof':<12}{case['name']}: {mark}"
    accepted = "pruned exactly" if "proof" in data else "recognised; the proof was not run"
    yield f"{'verdict':<12}" + (f"refused: {data['refused']}" if data["refused"] else accepted)


def _tower_line(tower: dict[str, Any]) -> str:
    taken = "what enters the first" if tower["feature_block"] < 0 else f"the output of block {tower['feature_block']}"
    leading = f", {tower['leading']} CLS in front" if tower["leading"] else ""
    projected = "token by token" if tower["projects_tokens"] or tower["packed"] else "in full also behind a cut"
    sizes = {"any": "; images of any size, whose patches may leave before", "whole": "; whole images", "": ""}
    images = sizes[tower["images"]]
    return f"blocks 0 to {tower['blocks'] - 1}{leading}; the projector gets {taken}, {projected}{images}"


def _recognised_lines(data: dict[str, Any]) -> Iterator[str]:
    decoder = data["decoder"]
    norm = decoder["mlp_norm"]
    between = ", nothing between them" if norm == decoder["mlp"] else f", {norm} between them" if norm else ""
    inside = f"{decoder['attention']}, {decoder['mlp']}{between}"
    inside = inside if decoder["opaque"] is None else "cut at its input only"
    rows = [
        ("family", data["family"] + ("" if data["family_file"] else ", recognised without a family file")),
        ("decoder", f"{decoder['class']}, {decoder['layers']} layers: {inside}"),
        ("caches", ", ".join(f"{kind} in {count} layers" for kind, count in data["caches"].items())),
        ("attention", data["attention_implementation"]),
    ]
    for one in data["visual_inputs"]:
        ids = ", ".join(map(str, one["token_ids"]))
        rows.append((one["name"], f"{one['method']}({one['pixels']}) fills token id {ids}"))
    count = data["visual_tokens"]
    rows.append(("tokens", f"{count} an image" if count else "as many as the image asks for"))
    tower = data["tower"]
    rows.append(("tower", _tower_line(tower) if tower else "not declared"))
    rows += [("" if number else "unsupported", reason) for number, reason in enumerate(data["unsupported"])]
    yield from (f"{name:<12}{text}" for name, text in rows)
