"""`prunekit trace`: which visual tokens each stage keeps, merges and drops, drawn on the image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.arguments import add_common, add_loading, load, positive
from prunekit.cli.prompts import Prompt, add_prompt, answer, on_model, prepare, prompt_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prunekit.pipeline.build import Pipeline
    from prunekit.trace import Figure


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "trace",
        help="draw which visual tokens each stage keeps, merges and drops",
        description="Answer one prompt under each pipeline, and say what became of every visual token: as JSON, as a "
        "PNG, or as one HTML page, on the image or on each frame of a video, with several pipelines side by side.",
        epilog="example: prunekit trace fastv-k2-r25 par --model micro --data micro-scenes -o keep.png",
    )
    command.add_argument("pipelines", nargs="+", metavar="pipeline", help="pipeline files, or names")
    add_prompt(command)
    add_common(command, model=True)
    command.add_argument(
        "-o", "--out", action="append", default=[], type=Path, metavar="FILE",
        help="a .json, .png or .html file to write; may be repeated; none: what was kept in words",
    )  # fmt: skip
    command.add_argument(
        "--thumbnails", type=Path, metavar="DIR",
        help="write a small picture of each pipeline, named like it, as `prunekit leaderboard --keep-maps` takes them",
    )  # fmt: skip
    command.add_argument("--max-new-tokens", type=positive, default=16, metavar="N", help="length of the answer")
    add_loading(command)
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Write the figure. What can be checked without the weights is checked before they are loaded."""
    from prunekit import loading
    from prunekit.errors import InputError
    from prunekit.pipeline.build import build
    from prunekit.trace import save, save_thumbnails, saving
    from prunekit.trace.data import data_of

    if not namespace.pipelines:
        raise InputError("there is nothing to trace: name a pipeline (`prunekit list pipelines`)")
    for path in namespace.out:
        saving.check(path)
    pipelines = [build(source, namespace.overrides) for source in namespace.pipelines]
    prompt = prompt_of(namespace)
    if not prompt.images and not prompt.videos:
        raise InputError(
            "there is nothing to draw: the prompt shows no image (name one with --image or --video, or take --data)"
        )
    shape = loading.load_shape(namespace.model, namespace.download)
    for pipeline in pipelines:
        pipeline.bind(shape)
    model, processor = load(namespace)
    figure = traced(model, processor, pipelines, prompt, namespace.model, namespace.max_new_tokens)
    written = [save(figure, path) for path in namespace.out]
    if namespace.thumbnails is not None:
        written += save_thumbnails(figure, namespace.thumbnails)
    if namespace.json:
        print(json.dumps(data_of(figure), indent=2))
    elif written:
        print("\n".join(f"wrote {path}" for path in written))
    else:
        print(said(figure))
    return 0


def traced(
    model: Any, processor: Any, pipelines: Sequence[Pipeline], prompt: Prompt, name: str, max_new_tokens: int
) -> Figure:
    """The figure of one prompt under these pipelines. name: of the model."""
    from prunekit.apply import apply
    from prunekit.trace import Run, figure_of
    from prunekit.verify.proof import proved_parts

    prompt = prompt.shown_to(processor)
    inputs = on_model(model, prepare(processor, prompt.text, prompt.images, prompt.videos))
    runs = []
    for pipeline in pipelines:
        with apply(model, pipeline, processor=processor, trace=True) as attached:
            words, _ = answer(model, processor, inputs, max_new_tokens)
            trace = attached.trace
        assert trace is not None, "the prompt has just been answered"
        runs.append(Run(trace, words))
    tower = proved_parts(model).tower
    return figure_of(
        runs,
        (*prompt.images, *(clip.images() for clip in prompt.videos)),
        prepare=lambda images: prepare(processor, prompt.text, images),
        holder=None if tower is None else tower.images,
        model=name,
        prompt=prompt.text,
    )


def said(figure: Figure) -> str:
    """The figure in words: a line for each stage, and the layers."""
    from prunekit.trace.layer_bars import summary

    lines = []
    for column in figure.columns:
        lines.append(f"{column.report.pipeline}: {column.run.answer}")
        lines += [f"  {stage.title}: {stage.caption}" for stage in column.stages]
        lines.append(f"  {summary(column.layers)}")
    lines += [f"note: {note}" for note in figure.notes]
    lines.append("write a picture with -o keep.png, a page with -o keep.html, every token with -o keep.json")
    return "\n".join(lines)
