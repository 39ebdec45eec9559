"""What each stage shows and asks, and its loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from prunekit_evals.micro.compose import IMAGE_SIZE, TOKENS
from prunekit_evals.micro.drop import PATTERNS, kept
from prunekit_evals.smol.base import LAYERS
from prunekit_evals.studies.smol.decoder import WHOLE, Cut, Merged
from prunekit_evals.studies.smol.feed import Batch, Feed
from prunekit_evals.studies.smol.model import Asked, Smol
from prunekit_evals.studies.smol.rows import KINDS, LEVELS, Rows
from prunekit_evals.studies.smol.see import Labels
from torch import Tensor

SHARES = {"see": 0.16, "words": 0.1, "letters": 0.12, "all": 0.42, "joint": 0.2}  # of the time
MASTERED = 0.85  # of a level's rows right, before the next level
CAPTION, KL = 0.5, 0.5  # weights beside the questions' cross entropy
DEEPEST = 12  # layers left out of a step at most
DROPPED = 0.4  # share of steps with fewer visual tokens
FEWEST, LAST = 0.06, 25  # share of the tokens kept at least; the last layer that they may go before
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Scenes of a language step, images of a vision step and of its pool, scenes that a depth probe asks about."""

    scenes: int
    see: int
    pool: int
    probe: int
    workers: int


SIZES = {"cuda": Sizes(32, 256, 100_000, 16, 14), "cpu": Sizes(4, 20, 2000, 2, 1)}


def asked(rows: Rows, device: torch.device) -> Asked:
    ids, labels = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (rows.ids, rows.labels))
    return Asked(ids, labels, rows.groups)


def row_of(groups: tuple[tuple[int, int], ...]) -> np.ndarray:
    """For every token the number of its row, int64 `[S]`."""
    lengths = [length for count, length in groups for _ in range(count)]
    return np.repeat(np.arange(len(lengths)), lengths)


def rows_right(logits: Tensor, asked: Asked) -> Tensor:
    """Which rows are answered exactly: bool `[B, rows]`."""
    wrong = torch.zeros(asked.labels.shape, dtype=torch.bool, device=logits.device)
    wrong[asked.answers] = logits.argmax(-1) != asked.labels[asked.answers]
    row = torch.from_numpy(row_of(asked.groups)).to(logits.device)
    bad = torch.zeros(len(wrong), int(row[-1]) + 1, device=logits.device)
    return bad.index_add_(1, row, wrong.float()) == 0


class Pool:
    """Images and classes that vision steps draw from, on the device; new ones replace the oldest."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.images = torch.empty(size, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device=device)
        self.labels = torch.empty(size, 4, TOKENS, dtype=torch.uint8, device=device)
        self.seen = 0

    def add(self, batch: Batch) -> None:
        count = len(batch.images)
        at = (torch.arange(self.seen, self.seen + count) % len(self.images)).to(self.images.device)
        self.images[at] = torch.from_numpy(batch.images).to(self.images.device)
        self.labels[at] = torch.from_numpy(batch.labels).to(self.images.device)
        self.seen += count

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Labels]:
        chosen = torch.from_numpy(rng.integers(0, min(self.seen, len(self.images)), count)).to(self.images.device)
        return self.images[chosen], Labels(*self.labels[chosen].long().unbind(1))


@dataclass
class Depth:
    """How often each layer is left out: the less, the more its own removal was last seen to change answers."""

    weights: np.ndarray = field(default_factory=lambda: np.ones(LAYERS))

    def measured(self, harm: np.ndarray) -> None:
        """`harm`: for each layer the KL divergence, nats a token, that its removal causes."""
        self.weights = 1 / (0.05 + np.maximum(harm, 0))

    def draw(self, rng: np.random.Generator, progress: float) -> frozenset[int]:
        if rng.random() >= 0.3 + 0.3 * progress:
            return frozenset()
        most = round(4 + (DEEPEST - 4) * min(1.0, progress / 0.6))
        count = int(rng.integers(1, most + 1))
        return frozenset(rng.choice(LAYERS, count, replace=False, p=self.weights / self.weights.sum()).tolist())


class Steps:
    """Losses of all stages. `progress` runs from 0 to 1 within a stage."""

    def __init__(self, model: Smol, feed: Feed, sizes: Sizes, seed: int) -> None:
        self.model, self.feed, self.sizes = model, feed, sizes
        self.rng = np.random.default_rng([seed, 3])
        self.pool: Pool | None = None
        self.depth = Depth()
        self.level, self.mastery, self.count = 0, 0.0, 0

    def loss(self, stage: str, progress: float) -> tuple[Tensor, Metrics]:
        self.count += 1
        if stage == "see":
            return self._see(progress)
        self.pool = None
        if stage == "words":
            return self._ask("easy", WHOLE, False)
        if stage == "letters":
            return self._ask(f"letters {self.level}", WHOLE, False)
        return self._ask("late", self._cut(progress if stage == "all" else 1.0), stage == "joint")

    def finished(self, stage: str) -> bool:
        """Whether the stage has nothing more to teach before its time is over."""
        return stage == "letters" and self.level == LEVELS - 1 and self.mastery > 0.95

    def _see(self, progress: float) -> tuple[Tensor, Metrics]:
        self.feed.ask("see")
        self.pool = self.pool or Pool(self.sizes.pool, self.model.device)
        while (batch := self.feed.take(wait=self.pool.seen < self.sizes.see)) is not None:
            self.pool.add(batch)
            if not self.feed.busy or self.pool.seen < self.sizes.see:
                break
        images, about = self.pool.draw(self.sizes.see, self.rng)
        with self.model.mixed():
            loss, right = self.model.see(*self.model.vision(images), about, 0.3 + 1.7 * min(1.0, progress / 0.5))
        return loss, right | {"images": torch.tensor(float(self.pool.seen))}

    def _texts(self, merged: Merged, texts: Rows) -> tuple[Tensor, Metrics]:
        """Questions about texts alone; the level rises when it is mastered."""
        rows = asked(texts, self.model.device)
        logits = self.model.answers(merged, None, rows)
        self.mastery = 0.8 * self.mastery + 0.2 * rows_right(logits, rows).float().mean().item()
        metrics = {"level": torch.tensor(float(self.level)), "mastery": torch.tensor(self.mastery)}
        if self.mastery > MASTERED and self.level < LEVELS - 1:
            self.level, self.mastery = self.level + 1, 0.0
        return F.cross_entropy(logits, rows.labels[rows.answers]), metrics

    def _batch(self, mode: str) -> Batch:
        self.feed.ask(mode)
        batch = self.feed.take()
        assert batch is not None
        return batch

    def _cut(self, progress: float) -> Cut:
        rng, layer, keep = self.rng, 0, None
        if rng.random() < DROPPED:
            count = round(TOKENS * rng.uniform(FEWEST, 1))
            chosen = kept(rng, self.sizes.scenes, count, PATTERNS[rng.integers(len(PATTERNS))])
            layer, keep = int(rng.integers(LAST + 1)), torch.from_numpy(chosen).to(self.model.device)
        return Cut(self.depth.draw(rng, progress), layer, keep)

    def _ask(self, mode: str, cut: Cut, through: bool) -> tuple[Tensor, Metrics]:
        """Cross entropies of answers, that of captions at a lower weight, and where something is left out the
        divergence from the model's own answers with everything. `through`: the answers also teach the tower."""
        batch, model = self._batch(mode), self.model
        rows, merged = asked(batch.rows[0], model.device), model.decoder.merged()
        images = torch.from_numpy(batch.images).to(model.device)
        with model.mixed():
            visual, features, pooled = model.vision(images)
            loss, metrics = model.see(visual, features, pooled, Labels.of(batch.labels).to(model.device), 2.0)
        visual = visual if through else visual.detach()
        logits = model.answers(merged, visual, rows, cut)
        caption = self._captions(batch.rows[0])[rows.answers]
        each = F.cross_entropy(logits, rows.labels[rows.answers], reduction="none")
        metrics |= {"ask": each[~caption].mean(), "caption": each[caption].mean()}
        loss = loss + metrics["ask"] + CAPTION * metrics["caption"]
        for texts in batch.rows[1:]:
            told, more = self._texts(merged, texts)
            loss, metrics = loss + told, metrics | more | {"told": told.detach()}
        if not cut.nothing:
            with torch.no_grad():
                whole = model.answers(merged, visual, rows).log_softmax(-1)
            metrics["kl"] = F.kl_div(logits.log_softmax(-1), whole, reduction="batchmean", log_target=True)
            loss = loss + KL * metrics["kl"]
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _captions(self, rows: Rows) -> Tensor:
        """Which tokens belong to captions, bool `[B, S]`."""
        of_row = rows.kinds == KINDS.index("caption")
        return torch.from_numpy(of_row[:, row_of(rows.groups)]).to(self.model.device)

    @torch.no_grad()
    def probe_depth(self, batches: Iterator[tuple[Tensor, Asked]]) -> np.ndarray:
        """For every layer the mean KL divergence that leaving it out causes, float `[30]`; the draw follows it."""
        model, merged = self.model, self.model.decoder.merged()
        harm, count = np.zeros(LAYERS), 0
        for visual, rows in batches:
            whole = model.answers(merged, visual, rows).log_softmax(-1)
            for layer in range(LAYERS):
                less = model.answers(merged, visual, rows, Cut(frozenset({layer}))).log_softmax(-1)
                harm[layer] += F.kl_div(less, whole, reduction="sum", log_target=True).item()
            count += len(whole)
        self.depth.measured(harm / max(count, 1))
        return harm / max(count, 1)


__all__ = ["SHARES", "SIZES", "Depth", "Pool", "Sizes", "Steps", "asked", "row_of", "rows_right"]
