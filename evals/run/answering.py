"""A loaded model that answers prompts under a pipeline, and counts what that cost."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from prunekit_evals.run.generation import Decoding
from prunekit_evals.run.journal import Answer, Facts
from prunekit_evals.run.kept import Kept
from prunekit_evals.run.prompts import Prompt
from prunekit_evals.run.seen import with_features

import prunekit
from prunekit import loading
from prunekit.errors import InputError, Unsupported
from prunekit.loading import model_identity
from prunekit.pipeline.build import Pipeline
from prunekit.video_files import as_videos

if TYPE_CHECKING:
    from prunekit.records import RunReport


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, held in one plain object so that the harness does not take the model away.

    name: as the user wrote it. identity: see `model_identity`. kept: what several cells ask it alike.
    """

    name: str
    identity: str
    model: Any
    processor: Any
    kept: Kept = field(default_factory=Kept, compare=False, repr=False)

    @classmethod
    def load(
        cls, name: str, dtype: str | None = None, device: str | None = None, attn: str | None = None,
        download: bool = False, device_map: str | Mapping[str, int | str] | None = None,
    ) -> Loaded:  # fmt: skip
        """Load by name, as `prunekit.loading.load` does, with a left-padding tokenizer. Raises InputError, and
        Unsupported for a device map over several accelerators.
        """
        model, processor = loading.load(name, dtype, device or default_device(), attn, download, device_map)
        computing = {str(one) for one in getattr(model, "hf_device_map", {}).values()} - {"cpu", "disk"}
        if len(computing) > 1:
            raise Unsupported(
                f"device_map spreads the model over {', '.join(sorted(computing))}, across which pruning is not "
                "tested; keep it on one of them, with the rest on cpu or disk, or run one process for each (torchrun)"
            )
        where = loading.resolve(name)
        return cls(name, model_identity(where) or "unknown", model, left_padded(processor))

    @property
    def dtype(self) -> str:
        """The dtype that the model computes in, such as `float32`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the model computes; parts that a device map keeps elsewhere come there."""
        hook = getattr(self.model, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or self.model.device)


@dataclass
class Tally:
    """What one adapter has done: costs of all answers, and times of those that were computed in this process.

    unsound: questions, or continuations that were compared, for which the model computed NaN or infinity. images: task
    and number of a question -> its `Prompt.image_id`, where it has an image.
    """

    facts: list[Facts] = field(default_factory=list)
    computed: int = 0
    journaled: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    notes: set[str] = field(default_factory=set)
    unsound: int = 0
    first_prompts: list[Prompt] = field(default_factory=list)
    images: dict[tuple[str, int], str] = field(default_factory=dict)

    def saw(self, task: str, number: int, prompt: Prompt, batch: int) -> None:
        """Remember what a question shows, and the first prompts, at most `batch`, that can be timed together."""
        if prompt.image_id is None:
            return
        self.images[task, number] = prompt.image_id
        first = self.first_prompts
        if len(first) < batch and (not first or prompt.shape == first[0].shape):
            first.append(prompt)

    def add(self, answers: Sequence[Answer], *, journaled: bool) -> None:
        """Count answers."""
        known = [answer.facts for answer in answers if answer.facts is not None]
        self.facts += known
        self.unsound += sum(not facts.sound for facts in known)
        if journaled:
            self.journaled += len(answers)
        else:
            self.computed += len(answers)
            self.new_tokens += sum(answer.output_tokens for answer in answers)


def means(facts: Sequence[Facts]) -> dict[str, float]:
    """What was saved, in the words that lmms-eval prints: means of tokens, fractions of the dense totals."""
    whole, unsound = whole_fraction(facts), sum(not one.sound for one in facts)
    return {
        **({"unsound_questions": float(unsound)} if unsound else {}),
        "visual_tokens_in": sum(one.visual_tokens for one in facts) / len(facts),
        "visual_tokens_kept": sum(one.kept_tokens for one in facts) / len(facts),
        "prefill_flops_fraction": sum(f.prefill_flops for f in facts) / sum(f.dense_prefill_flops for f in facts),
        **({} if whole is None else {"whole_prefill_flops_fraction": whole}),
        "kv_fraction": sum(one.kv_bytes for one in facts) / sum(one.dense_kv_bytes for one in facts),
    }


def whole_fraction(facts: Sequence[Facts]) -> float | None:
    """FLOPs of the whole prefills, with vision tower and projector, over the dense model's; None where not known."""
    own, dense = 0, 0
    for one in facts:
        if one.tower_flops is None or one.dense_tower_flops is None:
            return None
        own += one.prefill_flops + one.tower_flops
        dense += one.dense_prefill_flops + one.dense_tower_flops
    return own / dense


def default_device() -> str | None:
    """Each process of a multi-process run takes its own GPU; None leaves the choice to the loader."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None


def device_type(device: str | None) -> str:
    """`cpu` or `cuda`: where a model loaded with this device ends up."""
    return str(device or default_device() or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]


def left_padded(processor: Any) -> Any:
    """The same processor, padding on the left: a decoder that goes on from padding gives other answers in batches."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"{type(processor).__name__} has no tokenizer, so its prompts cannot be padded")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def encode(loaded: Loaded, prompts: Sequence[Prompt]) -> Any:
    """Model inputs, left-padded, on the model's device, of prompts of one shape."""
    inputs = loaded.kept.inputs(prompts, lambda: _processed(loaded, prompts))
    # Other floats, such as seconds between frames, would lose digits that positions are counted by.
    cast = {name for name, value in inputs.items() if name.startswith("pixel") and value.is_floating_point()}
    return {
        name: value.to(loaded.device, loaded.model.dtype if name in cast else value.dtype)
        for name, value in inputs.items()
    }


def _processed(loaded: Loaded, prompts: Sequence[Prompt]) -> Any:
    images = [list(prompt.images) for prompt in prompts] if any(prompt.images for prompt in prompts) else None
    begin = loaded.processor.tokenizer.bos_token
    return loaded.processor(
        text=[prompt.text for prompt in prompts],
        images=images,
        **as_videos([clip for prompt in prompts for clip in prompt.videos]),
        padding=True,
        return_tensors="pt",
        # A chat template that already wrote the first token must not get a second one.
        add_special_tokens=not (begin and prompts[0].text.startswith(begin)),
    )


def answer(loaded: Loaded, pipeline: Pipeline, prompts: Sequence[Prompt], how: Decoding, tally: Tally) -> list[Answer]:
    """Answer a batch. Whatever the model raises is raised: an error is not an empty answer."""
    inputs = encode(loaded, prompts)
    length = inputs["input_ids"].shape[1]
    pad = loaded.processor.tokenizer.pad_token_id
    with torch.inference_mode(), prunekit.apply(loaded.model, pipeline, processor=loaded.processor) as run:
        given, tower = dict(inputs), 0.0
        if loaded.kept.room and not run.needs_pixels and not how.searches:
            given, tower = with_features(loaded.model, given, prompts, loaded.kept.seen, lambda: clock(loaded))
        start = clock(loaded)
        output = loaded.model.generate(**given, **dict(how.arguments), pad_token_id=pad)
        tally.seconds += clock(loaded) - start + tower
        report = run.report
    if report is not None:
        tally.notes.update(report.notes)
    facts = facts_of(report, len(prompts))
    new = output[:, length:]
    texts = loaded.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    sizes = inputs["attention_mask"].sum(1).tolist()
    return [
        Answer(how.cut(text), size, written(ids, loaded.model.generation_config), fact)
        for text, size, ids, fact in zip(texts, sizes, new.tolist(), facts, strict=True)
    ]


def written(ids: Sequence[int], config: Any) -> int:
    """How many tokens the model wrote, the one that ends the answer included."""
    ends = config.eos_token_id
    stop = set(ends if isinstance(ends, list | tuple) else [ends])
    return next((place + 1 for place, token in enumerate(ids) if token in stop), len(ids))


def facts_of(report: RunReport | None, rows: int) -> list[Facts | None]:
    """The costs of `rows` prompts. Beam search prefills each prompt once for every beam; one of them counts."""
    if report is None:
        return [None] * rows
    beams = max(report.samples // rows, 1)
    cost = report.cost
    unknown = (None,) * report.samples
    columns = (
        report.visual_tokens, report.kept_tokens, cost.prefill_flops, cost.dense_prefill_flops, cost.kv_bytes,
        cost.dense_kv_bytes, cost.tower_flops or unknown, cost.dense_tower_flops or unknown,
    )  # fmt: skip
    unsound = {sample // beams for sample in report.unsound}
    found = list(zip(*columns, strict=True))[::beams][:rows]
    decoder = [decoder_facts(report, sample) for sample in range(report.samples)][::beams]
    return [
        Facts(*row, sound=number not in unsound, **rest)
        for number, (row, rest) in enumerate(zip(found, decoder[:rows], strict=True))
    ]


def decoder_facts(report: RunReport, sample: int) -> dict[str, Any]:
    """What the decoder and its stages did with one prompt, as `Facts` has it."""
    plan, layers = report.plans[sample], range(len(report.layer_tokens[sample]))
    asked = [
        (f"{event.stage} at {event.site}", event.asked[sample], len(event.kept[sample]))
        for event in report.events
        if event.asked is not None
    ]
    return {
        "prompt_tokens": report.prompt_tokens[sample],
        "layer_tokens": report.layer_tokens[sample],
        "layers_run": sum(plan[layer].attends or plan[layer].feeds_mlp for layer in layers),
        "missed": tuple(one for one in asked if one[1] != one[2]),
    }


def clock(loaded: Loaded) -> float:
    """Seconds, once the device has finished what it was given."""
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    return time.perf_counter()


def journal_file(text: str, rank: int, world: int) -> Path | None:
    """The journal of this process: one file each when several processes share the work. None for an empty text."""
    if not text:
        return None
    path = Path(text)
    return path.with_name(f"{path.name}.rank{rank}") if world > 1 else path
