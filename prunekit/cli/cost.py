"""`prunekit cost`: what pipelines cost on a model, from its config alone."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunekit.cli.arguments import add_common, positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prunekit.estimate import Estimate, Model, Prompt

# Pixels on a side, and of one image: what an image processor still prepares in seconds.
LONGEST, LARGEST = 16384, 64_000_000
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "cost",
        help="exact FLOPs, KV bytes and tokens of pipelines on a model, without its weights",
        description="FLOPs of vision tower, projector, router, selection, prefill and of a decoded token, KV bytes and "
        "tokens, for one prompt under each pipeline: from the model's config alone, before anything runs.",
        epilog="example: prunekit cost fastv-k2-r25 divprune-r11 --model llava-1.5-7b --text-tokens 64",
    )
    command.add_argument("pipelines", nargs="*", metavar="pipeline", help="pipeline files or names; none: only dense")
    add_common(command, model=True)
    add_prompt(command)
    command.add_argument("--dtype", choices=tuple(BYTES), help="of weights and KV cache; default: the checkpoint's own")
    add_equal(command)
    command.set_defaults(run=run)


def add_prompt(command: argparse.ArgumentParser) -> None:
    """Options that say what the prompt is."""
    command.add_argument(
        "--text-tokens", type=positive, default=64, metavar="N", help="prompt tokens that are no visual ones (64)"
    )
    command.add_argument(
        "--image", type=image_size, action="append", metavar="HxW",
        help="height and width of an image in pixels (672x672); may be repeated",
    )  # fmt: skip
    command.add_argument("--frames", type=positive, metavar="N", help="a video of N frames of that size instead")


def add_equal(command: argparse.ArgumentParser) -> None:
    """The option that compares at one cost."""
    command.add_argument(
        "--equal", type=equal_budget, metavar="WHAT=F",
        help="compare at one budget: every pipeline's open stages are solved to it, such as flops=0.5",
    )  # fmt: skip


def image_size(text: str) -> tuple[int, int]:
    """Height and width of an image, for argparse."""
    found = re.fullmatch(r"([1-9][0-9]*)[xX]([1-9][0-9]*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a height and a width in pixels, such as 672x448")
    height, width = int(found[1]), int(found[2])
    if max(height, width) > LONGEST or height * width > LARGEST:
        raise argparse.ArgumentTypeError(
            f"'{text}' is too large: at most {LONGEST} pixels a side, and {LARGEST // 10**6} million in all"
        )
    return height, width


def equal_budget(text: str) -> tuple[str, float]:
    """An accounting and a fraction, for argparse."""
    from prunekit.errors import did_you_mean
    from prunekit.spec.budget_keys import ACCOUNTINGS

    what, _, number = text.partition("=")
    if what not in ACCOUNTINGS:
        hint = f"{did_you_mean(what, ACCOUNTINGS)}known: {', '.join(ACCOUNTINGS)}"
        raise argparse.ArgumentTypeError(f"'{text}' names no accounting, such as flops=0.5 ({hint})")
    try:
        fraction = float(number)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' names no fraction in (0, 1], such as {what}=0.5")
    return what, fraction


def run(namespace: argparse.Namespace) -> int:
    """Print the table, or the figures as JSON. 2 when a pipeline cannot meet the budget that all shall have."""
    from prunekit import loading
    from prunekit.errors import InputError
    from prunekit.estimate import SIZE, Model, estimate, prompt_of
    from prunekit.pipeline.build import build
    from prunekit.pipeline.equal import at_equal

    if namespace.frames and len(namespace.image or ()) > 1:
        raise InputError("--frames is of one video: name the size of its frames by one --image")
    sources, pipelines = namespace.pipelines, []
    if namespace.equal is None:
        pipelines = [build(source, namespace.overrides) for source in sources]
    skeleton = loading.load_skeleton(namespace.model, namespace.download)
    model = Model.of(skeleton)
    processor = loading.load_image_processor(namespace.model, namespace.download)
    prompt = prompt_of(model, processor, namespace.image or [SIZE], namespace.frames, namespace.text_tokens)
    refused = []
    if namespace.equal is not None:
        equal = at_equal(sources, namespace.overrides, namespace.equal, prompt.shape, namespace.text_tokens)
        pipelines, refused = list(equal.pipelines), list(equal.refused)
    dense = estimate(model, prompt, None)
    rows = [estimate(model, prompt, pipeline) for pipeline in pipelines] or [dense]
    itemsize = BYTES[namespace.dtype or _dtype(skeleton)]
    table = _Table(namespace.model, model, prompt, dense, rows, itemsize)
    if namespace.json:
        data = {**table.data(), "refused": [str(error) for error in refused]}
        print(json.dumps(data if len(rows) != 1 else {**data, **data["pipelines"][0]}, indent=2))
    else:
        print(table)
    for error in refused:
        sys.stderr.write(f"prunekit: refused: {error}\n")
    return 2 if refused else 0


def _dtype(skeleton: Any) -> str:
    """Of a checkpoint, by its config."""
    name = str(getattr(skeleton.config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in BYTES else "float32"


@dataclass(frozen=True)
class _Table:
    """Estimates of several pipelines and of the dense model. itemsize: bytes of a number in weights and KV cache."""

    name: str
    model: Model
    prompt: Prompt
    dense: Estimate
    rows: Sequence[Estimate]
    itemsize: int

    def data(self) -> dict[str, Any]:
        """For JSON."""
        model, prompt = self.model, self.prompt
        return {
            "model": self.name,
            "family": model.shape.family,
            "prompt_tokens": prompt.visual_tokens + prompt.text_tokens,
            "visual_tokens": prompt.visual_tokens,
            "text_tokens": prompt.text_tokens,
            "note": self._note or None,
            "weights": {"parameters": model.params, "bytes": model.params * self.itemsize},
            "flops_of_head_per_token": 2 * model.head,
            "dense": _row(self.dense, self.dense, self.itemsize),
            "pipelines": [_row(one, self.dense, self.itemsize) for one in self.rows],
        }

    def __str__(self) -> str:
        model, prompt = self.model, self.prompt
        every = [self.dense, *(one for one in self.rows if one.pipeline != self.dense.pipeline)]
        cells = [HEADER, *(_cells(one, self.dense, self.itemsize) for one in every)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            f"{self.name} ({model.shape.family}, {model.shape.layers} layers, {_si(model.params)}parameters, "
            f"{_si(model.params * self.itemsize)}B of weights)",
            f"prompt: {prompt.visual_tokens + prompt.text_tokens} tokens, {prompt.visual_tokens} of them visual",
            *([f"note: {self._note}"] if self._note else []),
            "",
        ]
        for first, *others in cells:
            right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *right]))
        ranges = "" if all(map(_exact, self.rows)) else f"\n{RANGES}"
        head = f"The output layer, {_si(2 * model.head)}FLOP a logit, is in no figure."
        return "\n".join(lines) + f"\n\n{CONVENTION}\n{head}{ranges}"

    @property
    def _note(self) -> str:
        shape, notes = self.model.shape, [self.prompt.note]
        if shape.recurrent:
            notes.append("without the recurrence of layers that hold a state, whose products depend on the kernel")
        if shape.opaque:
            notes.append(f"of a decoder that is not known inside, by its weights: {shape.opaque}")
        return "; ".join(filter(None, notes))


def _row(one: Estimate, dense: Estimate, itemsize: int) -> dict[str, Any]:
    """A number where it is certain; [least, most] where it depends on the prompt; null where it is not known."""
    whole, paper = one.whole, one.paper
    return {
        "pipeline": one.pipeline,
        "sha": one.sha or None,
        "exact": _exact(one),
        "flops": {
            "vision": _plain(one.vision),
            "projector": _plain(one.projector),
            "router": _plain(one.router),
            "selection": _plain(one.selection),
            "prefill": _plain(one.prefill),
            "decode_per_token": _plain(one.decode),
        },
        "kv_bytes": _plain((one.kv_numbers[0] * itemsize, one.kv_numbers[1] * itemsize)),
        "first_token_flops": _plain(whole),
        "fractions": {
            "prefill": _over(one.prefill, dense.prefill),
            "first_token": None if whole is None or dense.whole is None else _over(whole, dense.whole),
            "decode_per_token": _over(one.decode, dense.decode),
            "kv_bytes": _over(one.kv_numbers, dense.kv_numbers),
            "papers_formula": None if paper is None or dense.paper is None else _over(paper, dense.paper),
        },
        "papers_formula": _plain(paper),
        "mean_layer_tokens": _plain(one.mean_tokens),
        "last_layer_tokens": _plain(one.last_tokens),
        "cuts": [{"stage": stage, "site": site, "visual_tokens": _plain(left)} for stage, site, left in one.cuts],
    }


def _exact(one: Estimate) -> bool:
    ranges = (one.vision, one.projector, one.router, one.selection, one.prefill, one.decode, one.kv_numbers)
    return all(low == high for low, high in filter(None, ranges))


def _plain(bounds: Sequence[Any] | None) -> Any:
    if bounds is None:
        return None
    return bounds[0] if bounds[0] == bounds[1] else list(bounds)


def _over(bounds: Sequence[int], dense: Sequence[int]) -> Any:
    return _plain([one / dense[1] for one in bounds])


CONVENTION = """\
FLOPs: 2 for a multiply-add, attention as the full square. first token: tower, projector, decisions and prefill, of
dense. decode: of the first decoded token. papers: 4nd^2 + 2n^2d + 2ndm a layer, of dense by the same."""
RANGES = "A range: what a stage or a router decides by the prompt is not known before it runs."
HEADER = (
    "pipeline", "vision", "projector", "router", "selection", "prefill", "of dense", "first token", "decode/token",
    "KV bytes", "mean tokens", "at end", "papers", "of dense",
)  # fmt: skip


def _cells(one: Estimate, dense: Estimate, itemsize: int) -> tuple[str, ...]:
    whole = None if one.whole is None or dense.whole is None else _percent(one.whole, dense.whole)
    paper = None if one.paper is None or dense.paper is None else _percent(one.paper, dense.paper)
    flops = (one.vision, one.projector, one.router, one.selection, one.prefill)
    return (
        one.pipeline, *map(_range, flops), _percent(one.prefill, dense.prefill), whole or "not known",
        _range(one.decode), _range((one.kv_numbers[0] * itemsize, one.kv_numbers[1] * itemsize)),
        _joined(*(f"{count:.0f}" for count in one.mean_tokens)), _joined(*map(str, one.last_tokens)),
        _range(one.paper), paper or "not known",
    )  # fmt: skip


def _range(bounds: Sequence[int] | None) -> str:
    return "not known" if bounds is None else _joined(*map(_si, bounds))


def _percent(bounds: Sequence[int], dense: Sequence[int]) -> str:
    return _joined(*(f"{count / dense[1]:.1%}" for count in bounds))


def _joined(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _si(number: float) -> str:
    """With a prefix, as `8.50 T`."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number:.0f} "
