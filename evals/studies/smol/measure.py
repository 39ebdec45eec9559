"""What the trained decoder does with layers and tokens left out, written as it is found, the most wanted first.

All answers go into one JSON file: for every row of the table a bit for every held-out question. Which layers a greedy
set leaves out is decided by the answers' divergence on the first batch of scenes, of which `notes` gives the number.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from prunekit_evals.micro.compose import TOKENS, Scene
from prunekit_evals.micro.drop import kept
from prunekit_evals.micro.selections import View, oracle
from prunekit_evals.smol.base import LAYERS
from prunekit_evals.studies.smol.decoder import Cut, Groups
from prunekit_evals.studies.smol.model import Asked, Smol
from prunekit_evals.studies.smol.probe import Probe
from prunekit_evals.studies.smol.stages import asked, rows_right
from torch import Tensor

RANDOM_SETS = (4, 8, 10, 12)
SETS = 4  # random sets of each size
SITES, KEPT = (2, 8, 17), (36, 16)
GREEDY = 12  # layers that the greedy set grows to
Right = np.ndarray


class OutOfTime(Exception):
    """The next row would come too late."""


class Measurements:
    def __init__(self, model: Smol, probe: Probe, file: Path, seconds: float) -> None:
        self.model, self.probe, self.file = model, probe, file
        self.until = time.monotonic() + seconds
        self.found: dict[str, Right] = {}
        self.calibration = min(probe.batch, max(1, probe.count // 2))
        self.notes: dict[str, Any] = {"scenes of calibration": self.calibration}
        self.rng = np.random.default_rng(17)

    def run(self) -> None:
        """Every part in order, until the time is over."""
        parts: Sequence[Callable[[], None]] = (
            self._whole, self._single, self._random_sets, self._greedy, self._tokens, self._removed, self._both,
        )  # fmt: skip
        try:
            for part in parts:
                part()
                self._write()
        except OutOfTime:
            print(f"no time for what comes after {list(self.found)[-1]}", flush=True)
        finally:
            self._write()

    def _add(self, name: str, ask: Callable[[], Right]) -> Right:
        if time.monotonic() > self.until:
            raise OutOfTime
        right = self.found[name] = ask()
        shares = self.probe.by_family(right)
        print(f"{name}: {100 * sum(shares.values()) / len(shares):.1f}", flush=True)
        return right

    def _write(self) -> None:
        rows = {}
        for name, right in self.found.items():
            shares = self.probe.by_family(right)
            rows[name] = {
                "mean": sum(shares.values()) / len(shares), "families": shares,
                "right": base64.b64encode(np.packbits(right)).decode(),
            }  # fmt: skip
        kinds = base64.b64encode(self.probe.kinds.tobytes()).decode()
        text = {"shape": list(self.probe.kinds.shape), "kinds": kinds, "notes": self.notes, "rows": rows}
        self.file.with_suffix(".partial").write_text(json.dumps(text))
        self.file.with_suffix(".partial").replace(self.file)

    def _skip(self, layers: Sequence[int]) -> Right:
        return self.probe.right(self.model, Cut(frozenset(layers)))

    def _whole(self) -> None:
        self._add("dense", lambda: self.probe.right(self.model))
        self._add("blind", lambda: self.probe.right(self.model, blind=True))

    def _random_sets(self) -> None:
        """Drawn among all layers but those whose own removal is ruinous: over a nat a token on the first scenes."""
        harm = self._harms(frozenset(), range(LAYERS))
        self.notes["harm of one layer, nats a token"] = harm
        able = [layer for layer, kl in harm.items() if kl < 1]
        self.notes["layers that random sets may hold"] = able
        for size in RANDOM_SETS:
            for _ in range(SETS):
                layers = sorted(self.rng.choice(able, min(size, len(able)), replace=False).tolist())
                self._add(f"skip {size} random: {' '.join(map(str, layers))}", lambda s=layers: self._skip(s))

    def _single(self) -> None:
        for layer in range(LAYERS):
            self._add(f"skip {layer}", lambda i=layer: self._skip([i]))

    def _harms(self, gone: frozenset[int], candidates: Sequence[int]) -> dict[int, float]:
        """What leaving out each candidate beside `gone` does to the answers of some calibration scenes."""
        merged = self.model.decoder.merged()
        batches = list(self.probe.batches(self.model, self.calibration))
        found = {}
        with torch.no_grad():
            whole = [self.model.answers(merged, *batch).log_softmax(-1) for batch in batches]
            for layer in candidates:
                harm = 0.0
                for batch, dense in zip(batches, whole, strict=True):
                    less = self.model.answers(merged, *batch, Cut(gone | {layer})).log_softmax(-1)
                    harm += F.kl_div(less, dense, reduction="batchmean", log_target=True).item() / len(batches)
                found[layer] = harm
        return found

    def _greedy(self) -> None:
        """One layer at a time, that which changes the dense model's answers least."""
        gone: list[int] = []
        while len(gone) < GREEDY:
            if time.monotonic() > self.until:
                raise OutOfTime
            harms = self._harms(frozenset(gone), [i for i in range(LAYERS) if i not in gone])
            gone.append(min(harms, key=lambda i: harms[i]))
            if len(gone) in RANDOM_SETS or len(gone) == 6:
                self._add(f"skip {len(gone)} greedy: {' '.join(map(str, gone))}", lambda s=tuple(gone): self._skip(s))
        self.notes["greedy"] = gone

    def _removed(self) -> None:
        for layer in range(2, LAYERS, 2):
            self._add(f"none from {layer}", lambda k=layer: self._kept(k, _none))

    def _kept(self, layer: int, choose: Callable[[Sequence[Scene]], Tensor], skip: Sequence[int] = ()) -> Right:
        """The same tokens for all questions about a scene, from `layer` on."""
        merged, found = self.model.decoder.merged(), []
        with torch.no_grad():
            for (scenes, _), (visual, one) in zip(self.probe.parts, self.probe.batches(self.model), strict=True):
                cut = Cut(frozenset(skip), layer, choose(scenes).to(self.model.device))
                found.append(rows_right(self.model.answers(merged, visual, one, cut), one).cpu().numpy())
        return np.concatenate(found)

    def _tokens(self) -> None:
        for layer in SITES:
            for count in KEPT:
                self._add(f"keep {count} at {layer} random", lambda k=layer, n=count: self._kept(k, _random(n)))
                self._add(f"keep {count} at {layer} FastV", lambda k=layer, n=count: self._fastv(k, n))
                self._add(f"keep {count} at {layer} oracle", lambda k=layer, n=count: self._kept(k, _oracle(n)))

    def _both(self) -> None:
        """Eight static layers and FastV, against FastV with as many token-layers."""
        layer = 4
        gone = [i for i in self.notes.get("greedy", []) if i != layer - 1][:8]  # a layer that is gone has no scores
        for count in KEPT:
            name = f"keep {count} at {layer} FastV"
            self._add(name, lambda n=count: self._fastv(layer, n))
            self._add(f"{name}, skip {len(gone)} greedy", lambda n=count: self._fastv(layer, n, gone))

    @torch.no_grad()
    def _fastv(self, layer: int, count: int, skip: Sequence[int] = ()) -> Right:
        """What the last prompt token attends to in the layer before (FastV, arXiv:2403.06764), for every question."""
        merged, found = self.model.decoder.merged(), []
        for scenes, rows in self.probe.parts:
            whole = asked(rows, self.model.device)
            visual = self.probe.seen(self.model, scenes)
            columns = []
            for one in _by_group(whole):
                many = visual.repeat_interleave(len(one.ids) // len(scenes), 0)
                _, seen = self.model.decoder(
                    merged, self.model.lead, many, one.ids, one.groups, Cut(frozenset(skip)), watch=layer - 1
                )
                assert seen is not None
                last = (one.labels >= 0).int().argmax(1)
                scores = seen[torch.arange(len(seen), device=seen.device), last][:, -TOKENS:]
                keep = scores.topk(count, -1).indices.sort(-1).values
                logits = self.model.answers(merged, many, one, Cut(frozenset(skip), layer, keep))
                columns.append(rows_right(logits, one).view(len(scenes), -1))
            found.append(torch.cat(columns, 1).cpu().numpy())
        return np.concatenate(found)


def _by_group(rows: Asked) -> Iterator[Asked]:
    """Each group's questions as a batch of their own, one a row: `[B * count, length]`."""
    begin = 0
    for count, length in rows.groups:
        part = slice(begin, begin + count * length)
        begin = part.stop
        one: Groups = ((1, length),)
        yield Asked(rows.ids[:, part].reshape(-1, length), rows.labels[:, part].reshape(-1, length), one)


def _none(scenes: Sequence[Scene]) -> Tensor:
    return torch.empty(len(scenes), 0, dtype=torch.int64)


def _random(count: int) -> Callable[[Sequence[Scene]], Tensor]:
    return lambda some: torch.from_numpy(kept(np.random.default_rng([some[0].seed, 7]), len(some), count, "random"))


def _oracle(count: int) -> Callable[[Sequence[Scene]], Tensor]:
    nothing = torch.empty(0)
    return lambda scenes: oracle(View(nothing, nothing, list(scenes)), count)


__all__ = ["Measurements", "OutOfTime"]
