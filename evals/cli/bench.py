"""`prunekit bench`: what pipelines take on this machine, and where pruning pays."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.arguments import add_common, add_loading, positive

if TYPE_CHECKING:
    from prunekit_evals.bench.breakeven import Row
    from prunekit_evals.bench.measure import Point

    from prunekit.pipeline.build import Pipeline

EXAMPLES = """\
examples:
  prunekit bench fastv-k2-r25 divprune-r11 --model micro
  prunekit bench fastv-k2-r25 --model llava-1.5-7b --random --batch 1,8 --images 1,4 --new-tokens 1,64
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    from prunekit.cli.cost import image_size

    command = commands.add_parser(
        "bench",
        help="measured time and memory of pipelines, and where pruning pays",
        description="Time to the first token with and without the vision tower, time of a decoded token, end to end, "
        "peak memory and what selecting costs, in interleaved rounds against the dense model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("pipelines", nargs="+", metavar="pipeline", help="pipeline files or names")
    add_common(command, model=True)
    command.add_argument("--random", action="store_true", help="random weights, made on the device from the config")
    grid = command.add_argument_group("what is measured: every combination of")
    grid.add_argument("--batch", type=_several(positive), default=[1], metavar="N,N", help="rows of a batch (1)")
    grid.add_argument(
        "--image", type=_several(image_size), default=[(336, 336)], metavar="HxW,HxW",
        help="heights and widths of an image in pixels (336x336)",
    )  # fmt: skip
    grid.add_argument("--images", type=_several(positive), default=[1], metavar="N,N", help="images of a row (1)")
    grid.add_argument(
        "--new-tokens", type=_several(positive), default=[1, 64], metavar="N,N", help="lengths of the answer (1,64)"
    )
    command.add_argument("--text-tokens", type=positive, default=64, metavar="N", help="other tokens of a row (64)")
    command.add_argument("--rounds", type=positive, default=9, metavar="N", help="most timed rounds of a point (9)")
    command.add_argument("--seconds", type=positive, default=60, metavar="N", help="in which to be done, about (60)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="the break-even map as .html, .json (needs Altair)")
    command.add_argument("--threads", type=positive, metavar="N", help="CPU threads; default: torch chooses")
    add_loading(command)
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Measure, and print what was found."""
    import torch
    from prunekit_evals.bench import breakeven

    from prunekit.errors import InputError
    from prunekit.pipeline.build import build

    if namespace.plot is not None:
        _check_plot(namespace.plot)
    if namespace.text_tokens < 9:
        raise InputError("--text-tokens is at least 9: eight stand in front of the image")
    if namespace.threads:
        torch.set_num_threads(namespace.threads)
    pipelines: dict[str, Pipeline | None] = {"dense": None}
    for source in namespace.pipelines:
        pipeline = build(source, namespace.overrides)
        pipelines[pipeline.name if pipeline.name not in pipelines else f"{pipeline.name} {pipeline.sha}"] = pipeline
    model, processor = _model(namespace)
    rows = list(_rows(namespace, model, processor, pipelines))
    if not rows:
        raise InputError("nothing could be measured: no point fits into the device's memory")
    about = _about(namespace, model)
    if namespace.plot is not None:
        breakeven.chart(rows).save(str(namespace.plot))
    if namespace.json:
        print(json.dumps({"about": about, "rows": [row.to_json() for row in rows]}, indent=2))
        return 0
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    print(f"\nMedians of {min(row.rounds for row in rows)} rounds or more, with their quartiles.\n")
    print(breakeven.table(rows, namespace.new_tokens))
    print("\nTimes faster than dense: + pays, = even within the quartiles, - costs.\n")
    print(breakeven.break_even(rows))
    return 0


def _rows(
    namespace: argparse.Namespace, model: Any, processor: Any, pipelines: dict[str, Pipeline | None]
) -> Iterator[Row]:
    """Every point of the grid; says what it leaves out."""
    import torch
    from prunekit_evals.bench import breakeven
    from prunekit_evals.bench.measure import Times, inputs_of, measure, once, twin_of

    points, end = _points(namespace), time.perf_counter() + namespace.seconds
    for number, point in enumerate(points):
        try:
            inputs = inputs_of(model, processor, point)
            _check(model, pipelines, inputs.visual)
            twins: dict[str, Pipeline | None] = {}
            for name, pipeline in pipelines.items():
                seen = Times()
                once(model, pipeline, inputs, seen, False)
                if (twin := twin_of(seen)) is not None:
                    twins[f"{name}: as many tokens"] = twin
            left = max(end - time.perf_counter(), 0) / (len(points) - number)
            times = measure(model, {**pipelines, **twins}, inputs, namespace.rounds, left)
        except torch.cuda.OutOfMemoryError:
            sys.stderr.write(f"prunekit: batch {point.batch}, {point.images} images: left out, no memory for it\n")
            torch.cuda.empty_cache()
            continue
        measured = {name: times[name] for name in pipelines}
        beside = {name: times[f"{name}: as many tokens"] for name in pipelines if f"{name}: as many tokens" in twins}
        yield from breakeven.rows_of(point, inputs.visual, measured, beside, namespace.new_tokens)


def _points(namespace: argparse.Namespace) -> list[Point]:
    from prunekit_evals.bench.measure import Point

    return [
        Point(batch, image, images, namespace.text_tokens)
        for image in namespace.image for images in namespace.images for batch in namespace.batch
    ]  # fmt: skip


def _check(model: Any, pipelines: dict[str, Pipeline | None], visual: int) -> None:
    """Raise SpecError for a pipeline that does not fit, before anything is timed."""
    from dataclasses import replace

    from prunekit.families import shape_of

    shape = replace(shape_of(model), visual_tokens=visual)
    for pipeline in filter(None, pipelines.values()):
        pipeline.bind(shape)


def _model(namespace: argparse.Namespace) -> tuple[Any, Any]:
    """The model, with weights or random ones, and what prepares its images."""
    import torch
    from prunekit_evals.bench.measure import random_model

    from prunekit import loading
    from prunekit.cli.arguments import load

    if not namespace.random:
        model, _ = load(namespace)
        return model, loading.load_image_processor(namespace.model, namespace.download)
    config = loading.load_config(namespace.model, namespace.download)
    device = loading.device_of(namespace.device)
    usual = "float32" if device.type == "cpu" else str(getattr(config, "dtype", None) or "bfloat16")
    dtype = loading.dtype_of((namespace.dtype or usual).removeprefix("torch."))
    _check_size(namespace, device, dtype)
    model = random_model(config, torch.device(device), dtype, namespace.attn)
    return model, loading.load_image_processor(namespace.model, namespace.download)


def _check_size(namespace: argparse.Namespace, device: Any, dtype: Any) -> None:
    """Raise InputError for weights that the device cannot hold."""
    import os

    import torch

    from prunekit import loading
    from prunekit.errors import InputError

    skeleton = loading.load_skeleton(namespace.model, namespace.download)
    size = sum(one.numel() for one in skeleton.parameters()) * torch.empty(0, dtype=dtype).element_size()
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if size > there:
        raise InputError(
            f"the weights of {namespace.model} take {size / 1e9:.1f} GB in {dtype}, and {device} has "
            f"{there / 1e9:.1f} GB free (take a smaller model, or --dtype bfloat16)"
        )


def _check_plot(path: Path) -> None:
    from importlib.util import find_spec

    from prunekit.errors import InputError

    if path.suffix not in (".html", ".json"):
        raise InputError(f"--plot {path}: name a file that ends in .html or .json")
    if find_spec("altair") is None:
        raise InputError('--plot needs Altair: pip install "prunekit[plot]"')
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: there is no such folder")


def _about(namespace: argparse.Namespace, model: Any) -> dict[str, Any]:
    import torch
    import transformers

    import prunekit

    cuda = model.device.type == "cuda"
    return {
        "model": namespace.model, "weights": "random" if namespace.random else "its own",
        "device": torch.cuda.get_device_name(model.device) if cuda else platform.processor() or platform.machine(),
        "threads": None if cuda else torch.get_num_threads(), "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation, "torch": torch.__version__,
        "transformers": transformers.__version__, "prunekit": prunekit.__version__,
    }  # fmt: skip


def _several(kind: Any) -> Any:
    """A list with commas, of what `kind` reads, for argparse."""

    def several(text: str) -> list[Any]:
        return [kind(one) for one in text.split(",")]

    return several
