"""prunekit as a model of lmms-eval: `lmms_eval --model prunekit --model_args pretrained=...,pipeline=....yaml`."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, cast

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import ImageFile
from prunekit_evals.lmms import model_args
from prunekit_evals.lmms.requests import Question, Settings, choice_of, naming, of_one_prompt, read, rounds
from prunekit_evals.run import likelihoods
from prunekit_evals.run.answering import Loaded, Tally, answer, journal_file, means
from prunekit_evals.run.generation import HonorUntil, decoding
from prunekit_evals.run.identity import code_identity
from prunekit_evals.run.journal import Answer, Journal
from prunekit_evals.run.rounds import Rounds
from prunekit_evals.run.unanswered import Unanswered

import prunekit
from prunekit import families
from prunekit.errors import InputError, PrunekitError, Unsupported, did_you_mean
from prunekit.pipeline.build import Pipeline
from prunekit.video_files import MAX_FRAMES, Sampling

UNANSWERED = Answer("", 0, 0)
DENSE = '{"name": "dense", "stages": [{"use": "dense"}]}'


class PruneKit(lmms):  # type: ignore[misc]
    """Answers requests of lmms-eval with a pruned model; which layout a request has is read off the request itself."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        pipeline: str = DENSE,
        device: str = "",
        device_map: str = "",
        dtype: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        attn_implementation: str = "",
        max_new_tokens: int = 1024,
        system_prompt: str = "",
        honor_until: HonorUntil = "stops",
        max_frames: int = MAX_FRAMES,
        fps: float | str | None = None,
        journal: str = "",
        download: bool | str | int = False,
        **unknown: object,
    ) -> None:
        """Load the model.

        pretrained: a model folder, a hub id, or a registered short name. pipeline: a YAML file, or YAML or JSON text.
        device_map: `auto`, or a mapping as JSON text, as transformers takes it. system_prompt: text, or a file with it.
        honor_until: see `generation.decoding`. max_frames, fps: as `Sampling`. journal: keeps answers, so that a killed
        run goes on where it was. max_batch_size is ignored. Raises PrunekitError before the model is loaded.
        """
        names = tuple(inspect.signature(PruneKit.__init__).parameters)
        for name in unknown:
            raise InputError(f"model_args has no '{name}' ({did_you_mean(name, names)}see docs/evaluate.md)")
        if not pretrained:
            raise InputError("model_args needs pretrained=<a model folder, a hub id or a short name>")
        model_args.texts(
            pretrained=pretrained, pipeline=pipeline, device=device, dtype=dtype, journal=journal,
            attn_implementation=attn_implementation, system_prompt=system_prompt,
        )  # fmt: skip
        fetch, where = model_args.flag("download", download), model_args.device_map(device_map, device)
        text = self._system_prompt(str(system_prompt))
        size, longest = model_args.count("batch_size", batch_size), model_args.count("max_new_tokens", max_new_tokens)
        rate = None if fps in (None, "") else model_args.number("fps", fps)
        sampling = Sampling(model_args.count("max_frames", max_frames), rate)
        settings = Settings(size, longest, text, honor_until, sampling)
        decoding({}, longest, honor_until)  # refuse a wrong value now, not at the first task
        built = prunekit.load(pipeline)
        loaded = Loaded.load(str(pretrained), dtype or None, device or None, attn_implementation or None, fetch, where)
        self.setup(loaded, built, settings, journal)

    def _system_prompt(self, given: str) -> str:
        try:
            return str(self._resolve_system_prompt(given))
        except UnicodeDecodeError as error:
            raise InputError(f"system_prompt: the file '{given}' is not UTF-8 (convert it)") from error

    @classmethod
    def over(cls, loaded: Loaded, pipeline: Pipeline, settings: Settings, journal: str = "") -> PruneKit:
        """An adapter over a model that is already there."""
        self = cls.__new__(cls)
        self.setup(loaded, pipeline, settings, journal)
        return self

    def setup(self, loaded: Loaded, pipeline: Pipeline, settings: Settings, journal: str) -> None:
        """Check that the pipeline fits the model, and open the journal."""
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.loaded, self.pipeline, self.settings = loaded, pipeline, settings
        pipeline.bind(families.shape_of(loaded.model))
        self.journal = Journal(journal_file(journal, self._rank, self._world_size))
        self.tally = Tally()
        self.unanswered = Unanswered()
        # lmms-eval lets PIL fill truncated images up with grey; `prunekit run` refuses them, and so does this.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        self.batch_sizes = {"generate_until": settings.batch_size}
        self.progress: Callable[[int], None] = lambda answered: None
        self._code = code_identity(pipeline)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> PruneKit:
        """What lmms-eval calls for `--model prunekit`.

        Raises InputError when lmms-eval's response cache is on: it names a model by its arguments alone, and an
        edited pipeline file would be scored with the answers of the old one. Under lmms-eval's own command line,
        which hides errors and exits with 0, an error ends the program with 2.
        """
        call = _harness_call()
        try:
            if call.get("use_cache") is not None:
                raise InputError(
                    "lmms-eval's --use_cache knows a pipeline only by its path, so an edited file would be scored with "
                    "stale answers; use --model_args ...,journal=answers.jsonl, whose keys hold the pipeline's hash"
                )
            return cast(PruneKit, super().create_from_arg_string(arg_string, additional_config))
        except PrunekitError as error:
            if call.get("cli_args") is None:
                raise
            sys.stderr.write(f"prunekit: error: {error}\n")
            raise SystemExit(2) from error

    def __repr__(self) -> str:
        """All that an answer depends on: lmms-eval's response cache takes this text for the identity of the model."""
        return f"{type(self).__name__}({json.dumps(self.identity, sort_keys=True)})"

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides the question, as plain data."""
        settings = self.settings
        return {
            "model": self.loaded.identity,
            "pipeline": self.pipeline.sha,
            "dtype": self.loaded.dtype,
            "device": self.loaded.device.type,
            "attention": getattr(self.loaded.model.config, "_attn_implementation", ""),
            "max_new_tokens": settings.max_new_tokens,
            "system_prompt": hashlib.sha256(settings.system_prompt.encode()).hexdigest()[:12],
            "honor_until": settings.honor_until,
            "prunekit": prunekit.__version__,
            "code": self._code,
        }

    @property
    def device(self) -> torch.device:
        """Where the evaluator puts the tensors that it gathers."""
        return self.loaded.device

    @property
    def batch_size(self) -> int:
        """How many questions are answered together."""
        return self.settings.batch_size

    def clean(self) -> None:
        """Keep the model, which the base class would delete after the first task; the journal is opened when needed."""
        self.journal.close()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request, in the order given.

        No process talks to another in here: with a warm cache some of them never arrive.
        """
        answers: dict[int, Answer] = {}
        before = self.tally.computed, self.tally.seconds, self.tally.new_tokens
        for batch in self._batches(requests, answers):
            batch, answered = self._answered(batch)
            self.tally.add(answered, journaled=False)
            self.journal.add((one.key, each) for one, each in zip(batch, answered, strict=True))
            answers |= {one.place: each for one, each in zip(batch, answered, strict=True)}
            self.progress(len(batch))
        self._log(*before)
        results = (answers.get(place, UNANSWERED) for place in range(len(requests)))
        return [GenerationResult(each.text, TokenCounts(each.input_tokens, each.output_tokens)) for each in results]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The loss of each continuation: lmms-eval takes the smallest, whatever the method is called.

        A pair is wrapped, because lmms-eval turns a bare tuple into a string.
        """
        found: dict[int, tuple[float, bool]] = {}
        for places, together in of_one_prompt(requests):
            found |= zip(places, self._losses(together), strict=True)
            self.progress(len(places))
        return [GenerationResult(cast(str, found[place])) for place in range(len(requests))]

    def _losses(self, together: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Of continuations of one prompt; all are infinite where it cannot be asked."""
        request = together[0]
        try:
            with naming(request):
                prompt, said = choice_of(together, self)
                self.tally.saw(request.task_name, request.doc_id, prompt, self.batch_size)
                scored = likelihoods.losses(self.loaded, self.pipeline, prompt, said, self.batch_size, self.tally)
        except Exception as error:
            self.unanswered.add(request.task_name, request.doc_id, error)
            return [(float("inf"), False)] * len(together)
        self.unanswered.interrupt()
        return scored

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of every round, for each request, which lmms-eval hands to the task as they are.

        Rounds of one document depend on one another, so that documents are asked one by one.
        """
        answers = []
        before = self.tally.computed, self.tally.seconds, self.tally.new_tokens
        for request in requests:
            said: list[str] = []
            try:
                self._converse(request, said)
            except Exception as error:
                self.unanswered.add(request.task_name, request.doc_id, error)
                said = said or [""]
            else:
                self.unanswered.interrupt()
            answers.append(said)
            self.progress(1)
        self._log(*before)
        return answers

    def _converse(self, request: Instance, said: list[str]) -> None:
        """Ask every round of a request; `said` gets the answers."""
        asking = rounds(request, self)
        with Rounds(self.loaded, self.pipeline, self.tally) as conversation:
            question = next(asking, None)
            while question is not None:
                prompt, arguments = question
                how = decoding(arguments, self.settings.max_new_tokens, self.settings.honor_until)
                with naming(request):
                    self.tally.saw(request.task_name, request.doc_id, prompt, self.batch_size)
                    one = conversation.ask(prompt, how)
                self.tally.add([one], journaled=False)
                said.append(one.text)
                question = _sent(asking, one.text)

    def generate_visual_cot(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: it asks for pictures on the way to the answer."""
        raise Unsupported(
            f"task '{requests[0].task_name}' wants the model to draw pictures on the way to its answer; models that "
            "are pruned here write text only"
        )

    def _answered(self, batch: list[Question]) -> tuple[list[Question], list[Answer]]:
        """Those of a batch that can be answered, with their answers: all together, or each alone where that fails."""
        asked = [one.prompt for one in batch]
        try:
            answered = answer(self.loaded, self.pipeline, asked, batch[0].how, self.tally)
        except Exception as error:
            if not self.unanswered.tolerant:
                raise
            if len(batch) == 1:
                self._give_up(batch[0].task, batch[0].number, error)
                return [], []
            alone = [self._answered([one]) for one in batch]
            return [one for some, _ in alone for one in some], [one for _, some in alone for one in some]
        self.unanswered.interrupt()
        return batch, answered

    def _give_up(self, task: str, number: int, error: Exception) -> None:
        """Count a question as one that cannot be answered."""
        self.unanswered.add(task, number, error)
        self.progress(1)

    def _asked(
        self, place: int, request: Instance, seen: dict[str, int], answers: dict[int, Answer]
    ) -> tuple[Question, tuple[Any, ...]] | None:
        """The question of a request and its kind; None where the journal knows the answer, which goes into `answers`.

        Raises what keeps it from being asked, such as a damaged image.
        """
        question = read(place, request, self, seen)
        with naming(request):
            self.tally.saw(request.task_name, request.doc_id, question.prompt, self.batch_size)
            journaled = self.journal.get(question.key)
            if journaled is None:
                return question, question.kind  # decodes videos
        answers[place] = journaled
        self.tally.add([journaled], journaled=True)
        self.unanswered.interrupt()
        self.progress(1)
        return None

    def _batches(self, requests: Sequence[Instance], answers: dict[int, Answer]) -> Iterator[list[Question]]:
        """Batches of questions of one kind, full where possible; what the journal knows goes into `answers`."""
        waiting: dict[tuple[Any, ...], list[Question]] = {}
        seen: dict[str, int] = {}
        for place, request in enumerate(requests):
            try:
                asked = self._asked(place, request, seen, answers)
            except Exception as error:
                self._give_up(request.task_name, request.doc_id, error)
                continue
            if asked is None:
                continue
            question, kind = asked
            batch = waiting.setdefault(kind, [])
            batch.append(question)
            if len(batch) == self.batch_size:
                yield waiting.pop(kind)
        yield from waiting.values()

    def doc(self, doc_id: int, task: str, split: str) -> dict[str, Any]:
        """A row of a task's data, images not yet decoded."""
        return cast("dict[str, Any]", self.task_dict[task][split][doc_id])

    def _log(self, computed: int, seconds: float, tokens: int) -> None:
        """Tell lmms-eval what was saved and how long it took; answers of the journal took none."""
        tally, facts = self.tally, self.tally.facts
        if tally.computed == computed or not facts:
            return
        count, took = tally.computed - computed, tally.seconds - seconds
        written = tally.new_tokens - tokens
        log_metrics(took, written, written / took if took else 0.0, {"total_requests": count, **means(facts)})


def _sent(asking: Generator[Any, str, None], text: str) -> Any:
    """What a generator gives for `text`, or None after its end."""
    try:
        return asking.send(text)
    except StopIteration:
        return None


class PruneKitChat(PruneKit):
    """For generation tasks: asks in messages."""

    is_simple = False


class PruneKitSimple(PruneKit):
    """For `--force_simple`, and for tasks that compare likelihoods, which lmms-eval does not ask in messages."""

    is_simple = True


def _harness_call() -> dict[str, Any]:
    """The arguments of the `simple_evaluate` that is creating us; it does not hand all of them on."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "simple_evaluate":
            return frame.f_locals
        frame = frame.f_back
    return {}
