"""Train prunekit-smol: `python -m prunekit_evals.studies.smol.train --out runs/smol --minutes 360`.

One command, five stages, on a GPU (bfloat16) or on CPU cores (float32). `--minutes` is the time for all stages
together; rates follow the clock. After every stage `--out` gets what training changed, in float16
(`<stage>.safetensors`), and `curve.jsonl` a line with held-out accuracy; `--state` holds what `--resume` goes on from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked

import torch
from prunekit_evals.studies.smol.feed import Feed
from prunekit_evals.studies.smol.model import Smol, load_base
from prunekit_evals.studies.smol.probe import Probe
from prunekit_evals.studies.smol.rows import Encoder
from prunekit_evals.studies.smol.stages import SHARES, SIZES, Sizes, Steps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ADAPTER, VISION, LATER = 1e-3, 1.5e-3, 2e-4  # peak rates: adapters, vision in `see`, vision in later stages
SEEDS = range(1 << 9)
LOG_EVERY, SAVE_EVERY = 10.0, 60.0  # seconds
PROBES = 4  # times that `all` and `joint` measure what each layer's removal does


def rates(stage: str, progress: float) -> dict[str, float]:
    """Learning rates of the adapters and of vision."""
    if stage == "see":
        return {"adapters": 0.0, "vision": VISION * min(1.0, progress / 0.02, max(0.03, (1 - progress) / 0.4))}
    if stage == "joint":
        left = max(0.02, 1 - progress)
        return {"adapters": 0.5 * ADAPTER * left, "vision": LATER * left}
    warm = min(1.0, progress / 0.05) if stage == "words" else 1.0
    late = 1.0 if stage != "all" else min(1.0, 1.5 - progress)
    return {"adapters": ADAPTER * warm * late, "vision": LATER}


class Optimizer:
    """AdamW; adapters and vision are clipped apart, and each has its rate."""

    def __init__(self, model: Smol) -> None:
        self.named: dict[str, dict[str, nn.Parameter]] = {
            "adapters": {f"decoder.{n}": p for n, p in model.decoder.named_parameters()},
            "vision": {n: p for n, p in model.named_parameters() if not n.startswith("decoder.")},
        }
        groups = []
        for kind, named in self.named.items():
            for decayed in (True, False):
                chosen = [p for p in named.values() if (p.ndim >= 2) == decayed]
                decay = 0.03 if decayed and kind == "vision" else 0.0
                if chosen:
                    groups.append({"params": chosen, "weight_decay": decay, "kind": kind, "lr": 0.0})
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def step(self, lr: dict[str, float]) -> Tensor:
        """Clip each kind to norm 1, step, forget gradients; returns the adapters' norm. Not finite: no step."""
        norms = {kind: nn.utils.clip_grad_norm_(list(named.values()), 1.0) for kind, named in self.named.items()}
        for group in self.adam.param_groups:
            group["lr"] = lr[group["kind"]]
        if all(math.isfinite(float(norm)) for norm in norms.values()):
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norms["adapters"]

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, p in (pair for named in self.named.values() for pair in named.items()):
            found[f"value.{name}"] = p.detach()
            found |= {f"{key}.{name}": value for key, value in self.adam.state.get(p, {}).items()}
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, p in (pair for named in self.named.values() for pair in named.items()):
            p.copy_(tensors[f"value.{name}"])
            keys = [key for key in ("exp_avg", "exp_avg_sq", "step") if f"{key}.{name}" in tensors]
            if keys:
                # Adam's step counter stays where the fused kernel wants it: with the parameter.
                self.adam.state[p] = {key: tensors[f"{key}.{name}"].to(p.device) for key in keys}


@dataclass(frozen=True)
class Place:
    """How far a run is: stages done, progress of the next, and the level of its letters."""

    done: int = 0
    progress: float = 0.0
    level: int = 0


class Run:
    """One run of the recipe."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes) -> None:
        self.options, self.began = options, time.monotonic()
        options.out.mkdir(parents=True, exist_ok=True)
        options.state.mkdir(parents=True, exist_ok=True)
        weights, tokenizer = load_base(options.gguf)
        self.log("loaded", seconds=time.monotonic() - self.began)
        encoder = Encoder(tokenizer)
        self.feed = Feed(encoder, options.seed, sizes.workers, sizes.scenes)
        self.probe = Probe(encoder, options.checks, sizes.scenes)
        self.model = Smol(weights, tokenizer, encoder.lead, options.seed, options.device)
        self.optimizer = Optimizer(self.model)
        self.steps = Steps(self.model, self.feed, sizes, options.seed)
        self.place = self._resumed() if options.resume else Place()
        self.sizes = sizes

    def log(self, stage: str, **values: float | Tensor) -> None:
        line = {"stage": stage, "at": round(time.monotonic() - self.began, 1)}
        line |= {key: round(value.item() if isinstance(value, Tensor) else value, 4) for key, value in values.items()}
        with (self.options.out / "curve.jsonl").open("a") as curve:
            curve.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def train(self) -> None:
        """All stages that are not done; a stage that ends early leaves its time to those after it."""
        names = list(SHARES)
        left = {n: SHARES[n] * (1 - self.place.progress * (i == self.place.done)) for i, n in enumerate(names)}
        deadline = time.monotonic()
        for number, stage in enumerate(names):
            if number < self.place.done:
                continue
            deadline += left[stage] * self.options.minutes * 60
            self._stage(stage, deadline)
            self.place = Place(number + 1, 0.0, self.steps.level)
            self._save()
            self.model.ship(self.options.out / f"{stage}.safetensors", adapters=stage != "see")
            self.log(stage, **self.probe.measure(self.model, see_only=stage == "see"))

    def _stage(self, stage: str, deadline: float) -> None:
        start, first, probed = time.monotonic(), self.place.progress, -1
        logged = saved = start
        count, budget = 0, max(deadline - start, 1e-3)
        while not self.steps.finished(stage):
            now = time.monotonic()
            # What is left of a stage that was broken off runs from where it was.
            progress = first + (1 - first) * (now - start) / budget
            if progress >= 1 or (self.options.steps and count >= self.options.steps):
                break
            if stage in ("all", "joint") and int(progress * PROBES) > probed:
                probed = int(progress * PROBES)
                self._probe_depth(stage)
            loss, metrics = self.steps.loss(stage, progress)
            loss.backward()
            norm = self.optimizer.step(rates(stage, progress))
            count += 1
            if now - logged > LOG_EVERY or count == 1:
                logged = now
                self._check(loss)
                self.log(stage, step=count, progress=progress, loss=loss.detach(), norm=norm, **metrics)
            if now - saved > SAVE_EVERY:
                saved = now
                self.place = replace(self.place, progress=progress, level=self.steps.level)
                self._save()
        self.log(stage, step=count, ended=1)

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite; --resume goes on from the last checkpoint")

    def _probe_depth(self, stage: str) -> None:
        harm = self.steps.probe_depth(self.probe.batches(self.model, self.sizes.probe))
        self.log(f"{stage}: harm", **{str(i): kl for i, kl in enumerate(harm)})

    def _save(self) -> None:
        """Replace the checkpoint whole: a run that is killed while it writes keeps the one before."""
        folder = self.options.state
        tensors = {k: v.to("cpu").contiguous() for k, v in self.optimizer.tensors().items()}
        place = {"done": self.place.done, "progress": self.place.progress, "level": self.place.level}
        save_file(tensors, folder / "state.partial", {"place": json.dumps(place)})
        (folder / "state.partial").replace(folder / "state.safetensors")

    def _resumed(self) -> Place:
        file = self.options.state / "state.safetensors"
        if not file.exists():
            return Place()
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            place = Place(**json.loads(opened.metadata()["place"]))
        self.optimizer.load(load_file(file))
        self.steps.level = place.level
        return place


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smol"), help="gets results")
    parser.add_argument("--state", type=Path, help="gets the checkpoint, 90 MB; default: OUT/state")
    parser.add_argument("--minutes", type=float, default=360.0, help="for all stages together")
    parser.add_argument("--measure", type=float, default=30.0, metavar="MINUTES", help="at most, at the end; 0: none")
    parser.add_argument("--steps", type=int, default=0, help="at most, in every stage; 0: as many as the time allows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checks", type=int, default=64, metavar="SCENES", help="held out, asked after every stage")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gguf", type=Path, help="the language model's file; default: that of the installed package")
    parser.add_argument("--resume", action="store_true")
    for name in ("scenes", "see", "pool", "probe", "workers"):
        parser.add_argument(f"--{name}", type=int, help="a size, instead of the device's own")
    options = parser.parse_args(arguments)
    if options.seed not in SEEDS:
        parser.error(f"--seed must be from 0 to {SEEDS[-1]}: others would meet scenes that are held out")
    if options.minutes <= 0 or options.measure < 0 or options.steps < 0 or options.checks < 1:
        parser.error("--minutes and --checks must be positive, --measure and --steps not negative")
    options.state = options.state or options.out / "state"
    return options


def main() -> None:
    options = parse()
    sizes = SIZES["cuda" if options.device.startswith("cuda") else "cpu"]
    given = {name: getattr(options, name) for name in ("scenes", "see", "pool", "probe", "workers")}
    run = Run(options, replace(sizes, **{name: value for name, value in given.items() if value is not None}))
    try:
        run.train()
    finally:
        run.feed.close()
    if options.measure:
        from prunekit_evals.studies.smol.measure import Measurements

        Measurements(run.model, run.probe, options.out / "measured.json", 60 * options.measure).run()


if __name__ == "__main__":
    main()
