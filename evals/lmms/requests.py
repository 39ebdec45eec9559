"""From a request of lmms-eval to a question that can be answered, whichever of its layouts the request has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from prunekit_evals.run.generation import Decoding, HonorUntil, decoding
from prunekit_evals.run.journal import key_of
from prunekit_evals.run.placeholders import holds
from prunekit_evals.run.prompts import Prompt, from_messages, from_visuals, placeholder

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from prunekit_evals.run.answering import Loaded


@dataclass(frozen=True)
class Settings:
    """What changes answers besides model and pipeline. `max_new_tokens` is for tasks that name no length."""

    batch_size: int = 1
    max_new_tokens: int = 1024
    system_prompt: str = ""
    honor_until: HonorUntil = "stops"


@dataclass(frozen=True)
class Question:
    """One request, ready to be answered. `place` is its number among the requests, `key` its name in the journal.

    task, number: which document of which task it is about.
    """

    place: int
    task: str
    number: int
    key: str
    prompt: Prompt
    how: Decoding

    @property
    def kind(self) -> tuple[bool, Decoding]:
        """Questions of one kind may share a batch: all with images or all without, decoded alike."""
        return bool(self.prompt.images), self.how


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
    processor, settings = asked.loaded.processor, asked.settings
    if callable(rest[0]):
        to_messages, arguments, *where = rest

        def make() -> Prompt:
            return from_messages(to_messages(asked.doc(*where)), processor, settings.system_prompt)
    else:
        arguments, to_visual, *where = rest

        def make() -> Prompt:
            doc = asked.doc(*where)
            own = holds(doc, placeholder(processor))
            return from_visuals(flat(to_visual(doc)), context, processor, settings.system_prompt, own=own)

    prompt = asked.loaded.kept.prompt((request.idx, str(context), *where), make)
    key = key_of(
        task=request.task_name,
        doc=request.doc_id,
        idx=request.idx,
        context=context,
        prompt=prompt.digest(),
        arguments=json.loads(json.dumps(arguments, default=str)),
        identity=asked.identity,
    )
    times = seen[key] = seen.get(key, 0) + 1
    how = decoding(arguments, settings.max_new_tokens, settings.honor_until)
    return Question(place, request.task_name, request.doc_id, key if times == 1 else f"{key}#{times}", prompt, how)


def flat(visuals: Any) -> list[Any]:
    """Tasks give a list of visuals, a nested one, or None."""
    if not isinstance(visuals, list | tuple):
        return [] if visuals is None else [visuals]
    return [one for visual in visuals for one in flat(visual)]
