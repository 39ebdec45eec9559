"""`prunekit export`: a checkpoint without the layers that a pipeline always skips."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prunekit.cli.arguments import add_common, add_loading, load


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "export",
        help="a checkpoint without the layers that a pipeline skips, for any engine",
        description="Write a shallower checkpoint for a pipeline that leaves out decoder layers and does nothing else. "
        "It is checked that it answers as the pipeline does; then any engine serves it.",
        epilog="example: prunekit export skip-two --model micro --out shallow",
    )
    command.add_argument("pipeline", help="a pipeline file or name")
    add_common(command, model=True)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add_loading(command)
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """What can be checked without the weights is checked before they are loaded."""
    from PIL import Image

    from prunekit import loading
    from prunekit.cli.prompts import prepare
    from prunekit.errors import InputError
    from prunekit.pipeline.build import build
    from prunekit.serving import shallow
    from prunekit.serving.shallow import remaining

    out: Path = namespace.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: it is there and not empty (name a new folder)")
    pipeline = build(namespace.pipeline, namespace.overrides)
    remaining(pipeline.bind(loading.load_shape(namespace.model, namespace.download)))
    model, processor = load(namespace)
    images = [Image.effect_noise((224, 224), 64).convert("RGB")]
    inputs = prepare(processor, "What is shown?", images).to(model.device, model.dtype)
    made = shallow(model, pipeline, inputs)
    made.save(out, processor)
    if namespace.json:
        print(json.dumps({"folder": str(out), "layers": made.layers, "kept": list(made.kept), "error": made.error}))
    else:
        print(f"wrote {out}: {len(made.kept)} of {made.layers} layers, logits as the pipeline's to {made.error:.0e}")
    return 0
