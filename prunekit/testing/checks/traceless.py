"""A run changes nothing: not what hooks are given, not the prompt batch, not the model, not the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError
from prunekit.pipeline.build import Pipeline
from prunekit.testing.check import check, expect, shown
from prunekit.testing.hook_calls import watched
from prunekit.testing.subject import Subject

LEAKS = (
    "a forward hook or an attribute that a hook of the strategy puts on a module and that is not taken off again; "
    "weights that are written to; `torch.set_default_dtype` and the like. Use the inputs that the table offers in "
    "place "
    "of hooks of your own."
)


class Interrupted(PrunekitError):
    """What the check itself raises in the middle of a run."""


@check(
    "Hooks only read what they are given. It is copied from the model, so that writing to it changes no result, but "
    "the "
    "other hooks of the stage, wrappers and traces read the same tensors. The prompt batch stays as it was, too.",
    "in-place operations on an argument: `scores[~valid] = -1` where `scores` is an argument, `hidden -= mean`, "
    "`attention.masked_fill_(...)`. Leave out the underscore, or clone first.",
)
def inputs_unchanged(subject: Subject) -> None:
    written: dict[str, None] = {}
    versions: list[dict[str, int]] = []

    def before(hook: str, arguments: dict[str, Any]) -> None:
        versions.append(_versions(arguments))

    def after(hook: str, arguments: dict[str, Any], answer: Any) -> None:
        earlier = versions.pop()
        now = _versions(arguments)
        written.update({f"{hook} writes to `{name}`": None for name in earlier if now[name] != earlier[name]})

    pipeline, batch = subject.build(), subject.batch("mixed")
    kept = {name: value.clone() for name, value in batch.items()}
    with watched(pipeline, before, after):
        subject.apply(pipeline, batch)
    expect(not written, shown(written))
    changed = [name for name, value in batch.items() if not torch.equal(value, kept[name])]
    expect(not changed, f"the prompt batch has other {', '.join(changed)} than before")


def _versions(arguments: dict[str, Any]) -> dict[str, int]:
    """How often each tensor among the arguments was written to."""
    found = {}
    for name, value in arguments.items():
        for number, one in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(one, Tensor):
                found[name if not isinstance(value, tuple) else f"{name}[{number}]"] = one._version
    return found


@check(
    "When the block is left, model and process are what they were: weights, modules, their hooks and attributes, "
    "configuration, PyTorch's defaults and the environment; and the model computes the same bits.",
    LEAKS,
)
def nothing_left(subject: Subject) -> None:
    with _unchanged(subject):
        subject.apply(subject.build(), subject.batch("mixed"))


@check(
    "The same where the run ends with an exception: behind any hook of the strategy, or behind the decoder.",
    LEAKS + " What one hook puts in and a later one takes out stays where an exception comes between.",
)
def nothing_left_after_an_exception(subject: Subject) -> None:
    pipeline = subject.build()
    with _unchanged(subject):
        hooks: list[str] = []
        with watched(pipeline, after=lambda hook, arguments, answer: hooks.append(hook)):
            _interrupted(subject, pipeline)
        for hook in dict.fromkeys(hooks):

            def stop(called: str, arguments: dict[str, Any], answer: Any, at: str = hook) -> None:
                if called == at:
                    raise Interrupted(f"behind {at}")

            with watched(pipeline, after=stop):
                _interrupted(subject, pipeline, behind_decoder=False)


def _interrupted(subject: Subject, pipeline: Pipeline, behind_decoder: bool = True) -> None:
    """A run that ends with an exception; it does not where a hook is not called for this batch."""

    def stop(*_: Any) -> None:
        raise Interrupted("behind the decoder")

    handle = subject.model.get_output_embeddings().register_forward_pre_hook(stop) if behind_decoder else None
    try:
        subject.apply(pipeline, subject.batch("mixed"))
    except Interrupted:
        pass
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _unchanged(subject: Subject) -> Iterator[None]:
    """Raises Broken where model or process are afterwards others than before."""
    subject.run("one")  # what the first run of a process loads is no trace
    dense, weights = subject.dense("mixed"), {name: one.clone() for name, one in _tensors(subject.model)}
    modules, process = _modules(subject.model), _process()
    yield
    after, now = _modules(subject.model), _process()
    changed = [name for name in modules.keys() | after.keys() if modules.get(name) != after.get(name)]
    expect(not changed, f"other attributes or hooks than before: {shown(sorted(changed))}")
    written = [name for name, one in _tensors(subject.model) if not torch.equal(one, weights.get(name, one[..., :0]))]
    expect(not written, f"weights were written to: {shown(written)}")
    differ = [f"{name} was {process[name]} and is {now[name]}" for name in process if process[name] != now[name]]
    _restore(process)
    expect(not differ, shown(differ))
    subject._dense.pop("mixed")
    expect(torch.equal(subject.dense("mixed"), dense), "the model computes other logits than before")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _modules(model: nn.Module) -> dict[str, Any]:
    """Of every module its class, its attributes and how many hooks stand on it."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {kind: len(each) for kind, each in vars(module).items() if kind.endswith("_hooks") and each}
        attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        config = getattr(module, "config", None)
        found[f"{name or 'the model'} ({type(module).__name__})"] = (
            hooks, attributes, type(module), getattr(config, "_attn_implementation", None)
        )  # fmt: skip
    return found


def _process() -> dict[str, Any]:
    return {
        "torch's default dtype": torch.get_default_dtype(), "torch's grad mode": torch.is_grad_enabled(),
        "torch's threads": torch.get_num_threads(), "torch's default device": torch.get_default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    }  # fmt: skip


def _restore(process: dict[str, Any]) -> None:
    """So that one broken strategy fails one check and not all that follow."""
    torch.set_default_dtype(process["torch's default dtype"])
    torch.set_grad_enabled(process["torch's grad mode"])
    torch.set_num_threads(process["torch's threads"])
    torch.use_deterministic_algorithms(process["deterministic algorithms"])
