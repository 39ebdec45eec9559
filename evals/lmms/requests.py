"""From a request of lmms-eval to a question that can be answered, whichever of its layouts the request has."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from prunekit_evals.run.generation import Decoding, HonorUntil, decoding
from prunekit_evals.run.journal import key_of
from prunekit_evals.run.placeholders import holds
from prunekit_evals.run.prompts import Prompt, from_messages, from_visuals, placeholder

from prunekit.errors import InputError
from prunekit.video_files import Sampling

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
    with naming(request):
        prompt, arguments = prompt_of(request, asked)
        image = prompt.digest()
    key = key_of(
        task=request.task_name,
        doc=request.doc_id,
        idx=request.idx,
        context=request.args[0],
        prompt=image,
        arguments=json.loads(json.dumps(arguments, default=str)),
        identity=asked.identity,
    )
    times = seen[key] = seen.get(key, 0) + 1
    how = decoding(arguments, asked.settings.max_new_tokens, asked.settings.honor_until)
    return Question(place, request.task_name, request.doc_id, key if times == 1 else f"{key}#{times}", prompt, how)


def prompt_of(request: Instance, asked: Asked) -> tuple[Prompt, dict[str, Any]]:
    """The prompt of a `generate_until` request, and its task's generation arguments."""
    context, *rest = request.args
    asking = asked.loaded.processor, asked.settings.system_prompt, asked.settings.sampling
    if callable(rest[0]):
        to_messages, arguments, *where = rest

        def make() -> Prompt:
            return from_messages(to_messages(asked.doc(*where)), *asking)
    else:
        arguments, to_visual, *where = rest

        def make() -> Prompt:
            doc = asked.doc(*where)
            return _simple(to_visual(doc), context, doc, asked)

    return asked.loaded.kept.prompt((request.idx, str(context), *where), make), arguments


def _simple(visuals: Any, context: str, doc: Any, asked: Asked) -> Prompt:
    """The prompt of a simple request; a placeholder that the data itself has is text."""
    processor, settings = asked.loaded.processor, asked.settings
    own = holds(doc, placeholder(processor))
    return from_visuals(flat(visuals), context, processor, settings.system_prompt, settings.sampling, own=own)


def of_one_prompt(requests: Sequence[Instance]) -> Iterator[tuple[tuple[int, ...], tuple[Instance, ...]]]:
    """`loglikelihood` requests, those in a row about one prompt together, with their numbers among all."""
    numbered = enumerate(requests)
    for _, group in groupby(numbered, lambda one: (one[1].task_name, one[1].doc_id, one[1].args[0], len(one[1].args))):
        places, together = zip(*group, strict=True)
        yield places, together


def choice_of(together: Sequence[Instance], asked: Asked) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt of `loglikelihood` requests about one prompt, and the continuations."""
    context, _, *rest = together[0].args
    doc = asked.doc(*rest[1:]) if rest else {}
    prompt = _simple(rest[0](doc) if rest else [], context, doc, asked)
    return prompt, tuple(str(one.args[1](doc) if callable(one.args[1]) else one.args[1]) for one in together)


def rounds(request: Instance, asked: Asked) -> Generator[tuple[Prompt, dict[str, Any]], str, None]:
    """The rounds of a `generate_until_multi_round` request; each is sent what the model answered to it.

    Chat requests are as those of one round, and `to_messages` is called with the number of the round, the answers so
    far and what the task said about the last one; simple ones are `(context, arguments, to_visual, to_text, doc, task,
    split)`, where `to_text` is.
    """
    prompt, arguments, again = _first_round(request, asked)
    answers: list[str] = []
    about: Any = None
    while prompt is not None:
        answers.append((yield prompt, arguments))
        with naming(request):
            prompt, about = again(round_idx=len(answers), previous_output=list(answers), previous_round_info=about)


def _first_round(request: Instance, asked: Asked) -> tuple[Prompt | None, dict[str, Any], Callable[..., Any]]:
    """Its prompt, the generation arguments, and what gives the prompt of a later round, or None after the last."""
    context, *rest = request.args
    asking = asked.loaded.processor, asked.settings.system_prompt, asked.settings.sampling

    def chat(**about: Any) -> tuple[Prompt | None, Any]:
        told = rest[0](doc, **about)
        if not isinstance(told, tuple) or len(told) != 4 or told[1]:
            return None, None
        return from_messages(told[0], *asking), told[3]

    def simple(**about: Any) -> tuple[Prompt | None, Any]:
        visuals, text, done, _, more = rest[2](doc, **about)
        return (None, None) if done else (_simple(visuals, text, doc, asked), more)

    with naming(request):
        doc = asked.doc(*rest[-3:])
        if callable(rest[0]):
            return from_messages(rest[0](doc), *asking), rest[1], chat
        return _simple(rest[1](doc), context, doc, asked), rest[0], simple


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
