"""The training loop: candidates, pairs, a step of the optimizer, at intervals a measurement and a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.pipeline.build import Pipeline
from prunekit.training import checkpoint
from prunekit.training.card import card_of
from prunekit.training.checkpoint import Progress
from prunekit.training.data import Source, encode, order
from prunekit.training.forced import Decide, Shown
from prunekit.training.learner import Learner, learner_of
from prunekit.training.memory import Memory
from prunekit.training.preference import Loss, loss_of
from prunekit.training.processes import Processes
from prunekit.training.recipe import Recipe, as_data
from prunekit.training.teacher import Pairs, Teacher, at_random, plainly
from prunekit.verify.proof import proved_parts
from prunekit.version import VERSION

Measured = dict[str, float]


@dataclass
class Trainer:
    """One training. model: frozen, in evaluation mode. folder: where the router and its checkpoint go.

    say: gets one line at each step. model_id, data_name: as the user named them.
    """

    model: Any
    processor: Any
    pipeline: Pipeline
    source: Source
    recipe: Recipe
    folder: Path
    model_id: str
    data_name: str
    say: Callable[[str], None]
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        self.parts = proved_parts(self.model)
        self.bound = self.pipeline.bind(self.parts.shape())
        self.teacher = Teacher(self.model, self.pipeline, self.bound, self.recipe, self.processor)
        self.model.requires_grad_(False)
        self.learner = learner_of(self.teacher.stage, self.bound.shape, self.parts)
        self.learner.module.to(self.model.device)
        self.start = self.base = self.learner.snapshot()
        groups = self.learner.parameters()
        self.rates = {"new": self.recipe.lr, "copied": self.recipe.copied_lr}
        self.optimizer = torch.optim.AdamW(
            [{"params": list(groups[name]), "name": name} for name in self.rates if groups[name]], weight_decay=0.0
        )
        self.memory = Memory(
            self.folder, self.recipe, self.processes.number, self.model.dtype, torch.device(self.model.device)
        )
        rest = len(self.source) - self.recipe.held_out
        if rest < self.recipe.batch:
            raise InputError(
                f"the data holds {len(self.source)} prompts; {self.recipe.held_out} are held out, and the rest is "
                f"less than a batch of {self.recipe.batch} (give more, or set held_out or batch lower)"
            )
        self.order = order(rest, self.recipe.seed, self.recipe.total * self.recipe.batch)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the training that resumes from it have in common."""
        return {
            "recipe": as_data(self.recipe), "pipeline": self.pipeline.sha, "data": self.source.digest,
            "model": self.model_id, "processes": self.processes.count,
        }  # fmt: skip

    def run(self) -> Progress:
        """Train to the end, from the checkpoint if there is one, and save the router."""
        progress = checkpoint.restore(
            self.folder, self.identity, self.learner.module, self.base.module, self.optimizer
        ) or Progress(0, (self._measure_start(),))
        for step in range(progress.step, self.recipe.total):
            if step and self.recipe.round_of(step) != self.recipe.round_of(step - 1):
                self.base = self.learner.snapshot()
            measured = self._step(step)
            done = step + 1
            if done % self.recipe.measure_every == 0 or done == self.recipe.total:
                measured["held_out"] = self._held_out(plainly(self.learner))
                progress = Progress(done, (*progress.curve, measured))
            progress = Progress(done, progress.curve)
            self._tell(measured)
            if self.processes.first and (done % self.recipe.save_every == 0 or done == self.recipe.total):
                checkpoint.save(
                    self.folder, progress, self.identity, self.learner.module, self.base.module, self.optimizer
                )
        self._save(progress)
        return progress

    def _step(self, step: int) -> Measured:
        """Try candidates for one batch, and learn from it and from earlier ones; what was measured on the way."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * self._rate(step)
        numbers = self.order[step * self.recipe.batch : (step + 1) * self.recipe.batch]
        mine = self.processes.share(numbers)
        inputs = self._inputs(mine)
        seeds = [self.recipe.seed * 2_147_483_647 + step * self.recipe.batch + numbers.index(one) for one in mine]
        with self.teacher.encoding_once():
            pairs, seen = self.teacher.pairs(self.base, inputs, self.teacher.answers(inputs), seeds)
        self.memory.put(step, pairs, seen)
        measured = self._learn(step + 1, pairs, seen)
        for earlier in self.memory.draw(step):
            self._learn(step + 1, *earlier)
        return measured

    def _learn(self, step: int, pairs: Pairs, seen: Shown) -> Measured:
        """One step of the optimizer on one batch; what the batch said before it."""
        loss = self._loss(pairs, seen)
        useful = self.processes.sums([float(loss.pairs)])[0]
        total = loss.preference / max(useful, 1.0) + self.recipe.sparsity * loss.sparsity / self.recipe.batch
        self.optimizer.zero_grad(set_to_none=False)
        total.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.processes.add_gradients(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.recipe.clip))
        if not math.isfinite(norm):
            raise InputError(
                f"step {step}: the gradient is not finite ({norm}), and the step was not made (set "
                "lr lower, and begin anew with --restart)"
            )
        self.optimizer.step()
        return self._measured(step, loss, pairs, useful, norm)

    def _measured(self, step: int, loss: Loss, pairs: Pairs, useful: float, norm: float) -> Measured:
        batch = self.recipe.batch
        difference = pairs.better.difference(pairs.worse)[pairs.useful].sum()
        parts = [loss.preference, loss.sparsity, difference, pairs.kl[0].sum(), pairs.kl.amin(0).sum()]
        preference, sparsity, changed, plain, best = self.processes.sums([float(part.detach()) for part in parts])
        return {
            "step": step, "loss": preference / max(useful, 1.0) + self.recipe.sparsity * sparsity / batch,
            "preference": preference / max(useful, 1.0), "sparsity": sparsity / batch, "useful": useful / batch,
            "difference": changed / max(useful, 1.0), "plain": plain / batch, "best": best / batch, "gradient": norm,
        }  # fmt: skip

    def _loss(self, pairs: Pairs, seen: Shown) -> Loss:
        device = seen.valid.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.recipe.router_dtype == "bfloat16"):
            scores = self.learner.scores(seen.embeds.float(), seen.visual, seen.valid)
        reference = None
        if self.recipe.loss == "dpo":
            with torch.no_grad():
                reference = self.start.scores(seen.embeds.float(), seen.visual, seen.valid)
        return loss_of(scores, reference, pairs, seen, self.teacher)

    def _rate(self, step: int) -> float:
        """Of the learning rate: linear warm-up, then half a cosine."""
        total = max(self.recipe.total, 1)
        warmup = math.ceil(self.recipe.warmup * total)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    def _measure_start(self) -> Measured:
        layers = self.bound.shape.layers
        seeds = range(self.recipe.seed * 1000 + 1, self.recipe.seed * 1000 + 1 + self.recipe.held_out)
        measured = {"step": 0.0, "held_out": self._held_out(plainly(self.learner))}
        measured["random"] = self._held_out(None, lambda mine: at_random(layers, [seeds[n] for n in mine]))
        self._tell(measured)
        return measured

    def _held_out(self, by: Decide | None, make: Callable[[Sequence[int]], Decide] | None = None) -> float:
        """Mean KL on the held-out prompts; `make` gives what decides about the prompts of these numbers."""
        total, first = 0.0, len(self.source) - self.recipe.held_out
        for begin in range(0, self.recipe.held_out, self.recipe.batch):
            mine = self.processes.share(range(begin, min(begin + self.recipe.batch, self.recipe.held_out)))
            if not mine:
                continue
            decide = by if make is None else make(mine)
            assert decide is not None
            inputs = self._inputs([first + number for number in mine])
            with self.teacher.encoding_once():
                total += float(self.teacher.decide(inputs, self.teacher.answers(inputs), decide)[0].sum())
        return self.processes.sums([total])[0] / self.recipe.held_out

    def _inputs(self, numbers: Sequence[int]) -> Mapping[str, Tensor]:
        """Model inputs of these prompts."""
        encoded = encode(self.processor, [self.source[number] for number in numbers])
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in encoded.items()
            if isinstance(value, Tensor)
        }

    def _tell(self, measured: Mapping[str, float]) -> None:
        if self.processes.first:
            shown = " ".join(f"{name} {value:.4g}" for name, value in measured.items() if name != "step")
            self.say(f"step {int(measured['step'])}/{self.recipe.total} {shown}")

    def _save(self, progress: Progress) -> None:
        if self.processes.first:
            training = {
                "prunekit": VERSION, "pipeline": self.pipeline.resolved, "pipeline_sha": self.pipeline.sha,
                "data": {"name": self.data_name, "digest": self.source.digest, "prompts": len(self.source)},
                "recipe": as_data(self.recipe), "steps": progress.step, "curve": list(progress.curve),
            }  # fmt: skip
            self.learner.save_pretrained(self.folder, self.model_id, training, card_of(self.model_id, training))
            checkpoint.remove(self.folder)
            self.memory.clear()
        self.processes.wait()


def finished(folder: Path) -> bool:
    """Whether the folder holds a router, and no checkpoint of an unfinished training."""
    return (folder / "config.json").is_file() and not (folder / checkpoint.NAME).is_file()


__all__ = ["Learner", "Trainer", "finished"]
