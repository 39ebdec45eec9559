"""`prunekit run`: one prompt through a pruned model, with what was saved."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from prunekit.cli.arguments import add_common, add_loading, load, positive
from prunekit.cli.prompts import add_prompt, answer, on_model, prepare, prompt_of

if TYPE_CHECKING:
    from prunekit.pipeline.build import Pipeline


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "run",
        help="answer one prompt with a pruned model",
        description="Load a model, prune it as the pipeline says, answer a prompt, and report what was kept and saved.",
        epilog='example: prunekit run fastv.yaml --model micro --image cat.png --prompt "What is it?"',
    )
    command.add_argument("pipeline", help="a pipeline file, or a name of `prunekit list pipelines`")
    add_prompt(command)
    add_common(command, model=True)
    command.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="length of the answer")
    command.add_argument("--compare-dense", action="store_true", help="answer without pruning, too")
    add_loading(command)
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Answer the prompt. What can be checked without the weights is checked before they are loaded."""
    from prunekit import loading
    from prunekit.apply import apply
    from prunekit.pipeline.build import build

    pipeline = build(namespace.pipeline, namespace.overrides)
    prompt = prompt_of(namespace)
    pipeline.bind(loading.load_shape(namespace.model, namespace.download))
    model, processor = load(namespace)
    prompt = prompt.shown_to(processor)
    inputs = on_model(model, prepare(processor, prompt.text, prompt.images, prompt.videos))
    data: dict[str, Any] = {"pipeline": pipeline.name, "sha": pipeline.sha, "model": namespace.model}
    if namespace.compare_dense:
        data["dense_answer"], data["dense_seconds"] = answer(model, processor, inputs, namespace.max_new_tokens)
    with apply(model, pipeline, processor=processor) as attached:
        data["answer"], data["seconds"] = answer(model, processor, inputs, namespace.max_new_tokens)
        report = attached.report
    if namespace.json:
        print(json.dumps({**data, "report": report.to_json() if report else None}, indent=2))
        return 0
    _print(data, pipeline, report)
    return 0


def _print(data: dict[str, Any], pipeline: Pipeline, report: object) -> None:
    if "dense_answer" in data:
        print(f"dense:  {data['dense_answer']}  ({data['dense_seconds']:.2f} s)")
        print(f"pruned: {data['answer']}  ({data['seconds']:.2f} s)")
    else:
        print(data["answer"])
    print()
    print(report if report is not None else f"pipeline {pipeline.name}: nothing was prefilled")
