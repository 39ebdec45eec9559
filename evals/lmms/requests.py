"""From a request of lmms-eval to a question that can be answered, whichever of its layouts the request has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from prunekit_evals.run.generation import Decoding, HonorUntil, decoding
from prunekit_evals.run.journal import key_of
from prunekit_evals.run.prompts import Prompt, from_messages, from_visuals
from prunekit_evals.run.videos import Sampling

from prunekit.errors import InputError

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from prunekit_evals.run.answering import Loaded


@dataclass(frozen=True)
class Settings:
    """What changes answers besides model and pipeline. max_new_tokens: where a task names none. sampling: of videos."""

    batch_size: int = 1
    max_new_tokens: int = 1024
    system_prompt: str = ""
    honor_until: HonorUntil = "stops"
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Question:
    """One request, ready to be answered. `place` is its number among the requests, `key` its name in the journal."""

    place: int
    key: str
    prompt: Prompt
    how: Decoding

    @property
    def kind(self) -> tuple[Any, ...]:
        """Questions of one kind may share a batch: they show the same kinds of things, and are decoded alike."""
        return self.prompt.shape, self.how


class Asked(Protocol):
    """Who is asked."""

    loaded: Loaded
    settings: Settings
    doc: Callable[..., dict[str, Any]]
    identity: dict[str, Any]


def read(place: int, request: Instance, asked: Asked, seen: dict[str, int]) -> Question:
    """Read a `generate_until` request. seen: how often each key has come up; a repeated question is another draw.

    Chat requests are `(context, to_messages, arguments, doc, task, split)`, simple ones `(context, arguments,
    to_visual, doc, task, split)`. lmms-eval hands simple ones to chat models in places, so the request itself decides.
    """
    context, *rest = request.args
    asking, settings = (asked.loaded.processor, asked.settings.system_prompt, asked.settings.sampling), asked.settings
    with naming(request):
        if callable(rest[0]):
            to_messages, arguments, *where = rest
            prompt = from_messages(to_messages(asked.doc(*where)), *asking)
        else:
            arguments, to_visual, *where = rest
            prompt = from_visuals(flat(to_visual(asked.doc(*where))), context, *asking)
        image = prompt.digest()
    key = key_of(
        task=request.task_name,
        doc=request.doc_id,
        idx=request.idx,
        context=context,
        prompt=image,
        arguments=json.loads(json.dumps(arguments, default=str)),
        identity=asked.identity,
    )
    times = seen[key] = seen.get(key, 0) + 1
    how = decoding(arguments, settings.max_new_tokens, settings.honor_until)
    return Question(place, key if times == 1 else f"{key}#{times}", prompt, how)


def flat(visuals: Any) -> list[Any]:
    """Tasks give a list of visuals, a nested one, or None."""
    if not isinstance(visuals, list | tuple):
        return [] if visuals is None else [visuals]
    return [one for visual in visuals for one in flat(visual)]


@contextmanager
def naming(request: Instance) -> Iterator[None]:
    """Say which document an InputError is about; where a task's code would end the process, raise one instead."""
    where = f"document {request.doc_id} of task '{request.task_name}'"
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except SystemExit as error:  # tasks do this for videos that are not there
        raise InputError(f"{where}: {error}") from error
