"""`prunekit run`: one prompt through a pruned model, with what was saved."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.arguments import add_common, add_loading, load, positive

if TYPE_CHECKING:
    from PIL.Image import Image

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
    command.add_argument("--image", action="append", default=[], type=Path, metavar="FILE", help="may be repeated")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    add_common(command, model=True)
    command.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="length of the answer")
    command.add_argument("--compare-dense", action="store_true", help="answer without pruning, too")
    add_loading(command)
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Answer the prompt. What can be checked without the weights is checked before they are loaded."""
    from prunekit import loading
    from prunekit.apply import apply
    from prunekit.errors import InputError
    from prunekit.pipeline.build import build

    pipeline = build(namespace.pipeline, namespace.overrides)
    images = [_open(path) for path in namespace.image]
    if not namespace.prompt.strip():
        raise InputError("the prompt is empty (ask something with --prompt)")
    pipeline.bind(loading.load_shape(namespace.model, namespace.download))
    model, processor = load(namespace)
    inputs = prepare(processor, namespace.prompt, images).to(model.device, model.dtype)
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


def prepare(processor: Any, prompt: str, images: list[Image]) -> Any:
    """Model inputs for one question about `images`, in the words of the model's chat template.

    Raises InputError when the model brings no chat template, or the prompt holds the model's image placeholder.
    """
    from prunekit.errors import InputError

    if not getattr(processor, "chat_template", None):
        raise InputError("the model brings no chat template, so its prompt format is not known")
    placeholder = getattr(processor, "image_token", None)
    if placeholder and placeholder in prompt:
        raise InputError(f"the prompt holds '{placeholder}', which stands for an image (leave it out; use --image)")
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    # A chat template that already wrote the first token must not get a second one.
    special = not (begin and text.startswith(begin))
    return processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=special)


def answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> tuple[str, float]:
    """The greedy answer, and how many seconds it took."""
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return text.strip(), time.perf_counter() - start


def _open(path: Path) -> Image:
    import PIL.Image

    from prunekit.errors import InputError

    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"no such image: '{path}'") from error
    except IsADirectoryError as error:
        raise InputError(f"'{path}' is a directory; name an image file") from error
    except (PIL.UnidentifiedImageError, PIL.Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise InputError(f"'{path}' is not a readable image: {error}") from error


def _print(data: dict[str, Any], pipeline: Pipeline, report: object) -> None:
    if "dense_answer" in data:
        print(f"dense:  {data['dense_answer']}  ({data['dense_seconds']:.2f} s)")
        print(f"pruned: {data['answer']}  ({data['seconds']:.2f} s)")
    else:
        print(data["answer"])
    print()
    print(report if report is not None else f"pipeline {pipeline.name}: nothing was prefilled")
