"""`apply`: put a pipeline on an unmodified model for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from prunekit.engine.attach import Attached
from prunekit.errors import InputError
from prunekit.pipeline.build import Pipeline, build
from prunekit.spec.compose import Source
from prunekit.verify.proof import proved_parts


@contextmanager
def apply(
    model: PreTrainedModel,
    pipeline: Pipeline | Source,
    overrides: Sequence[str] = (),
    *,
    processor: Any = None,
    shared: bool = False,
    trace: bool = False,
) -> Iterator[Attached]:
    """Within the block, `model` really drops the tokens and skips the layers that `pipeline` says.

    pipeline: a `Pipeline`, or anything that `prunekit.load` takes. overrides: `key=value` strings, as for `load`;
    none with a `Pipeline`.
    processor: the model's processor or tokenizer, which strategies that read the prompt as text need; None: such a
    strategy is refused. A model without a family file is proved first, on a tiny twin, which takes seconds, once for
    each config.
    shared: whose calls of `model` are pruned. False: those of the thread or asyncio task that opens the block, of
    threads and tasks that it starts inside, and of whatever runs in its context (`asyncio.to_thread`); a call from
    elsewhere raises Unsupported while the block is open, and so does another block there. True: everybody's, as in a
    server that opens one block for all requests.
    trace: also keep, of each decision, where dropped tokens went and by which scores, for the `trace` of what is
    yielded, which `prunekit.trace` draws. It changes no number that the model computes.
    Yields an `Attached`, whose `report` tells what the newest prompt batch did. On leaving, also by an exception, the
    model is as it was, bit for bit. Inside another block on the same model, the stages of both act, as if one pipeline
    held them all; the outer block's own pipeline is back when the inner one is left. Raises SpecError for a pipeline
    that is wrong or does not fit the model, Unsupported for a model or a call that cannot be pruned exactly; both
    before any compute.
    """
    if isinstance(pipeline, Pipeline) and overrides:
        raise InputError("overrides change a pipeline as it is read: give them to prunekit.load, or the file to apply")
    built = pipeline if isinstance(pipeline, Pipeline) else build(pipeline, overrides)
    with Attached(model, built, proved_parts(model), processor, shared=shared, trace=trace) as attached:
        yield attached
