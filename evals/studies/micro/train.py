"""Train prunekit-micro from nothing: `python -m prunekit_evals.studies.micro.train --stage all --out runs/micro`.

Two single-thread processes share the work over gloo. A run writes `<stage>.safetensors` (float32 masters
and optimizer state, replaced at every checkpoint) and `curve.jsonl` into `--out`; `--resume` continues.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

# Large blocks must come from the heap and stay there: returning activations to the kernel at every step
# costs a third of the time. malloc reads these at process start, so the workers inherit them.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 32))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 34))
os.environ.setdefault("OMP_NUM_THREADS", "1")

TRAIN_SEEDS = 1 << 40  # training scenes lie above; everything held out lies below
SEEDS = range(1 << 12)  # of runs; each has 1 << 37 scenes of its own, and all lie below 1 << 50


@dataclass(frozen=True)
class Plan:
    """Steps and peak rate of a stage, and where in a seed's share of the training scenes its own begin."""

    steps: int
    rate: float
    scenes: int


STAGES = {"see": Plan(2600, 1.5e-3, 0), "read": Plan(4800, 1.2e-3, 1 << 36), "glance": Plan(720, 6e-4, 3 << 35)}


@dataclass(frozen=True)
class Run:
    """One stage of one run, as its workers see it."""

    stage: str
    out: Path
    steps: int
    rate: float
    minutes: float
    seed: int
    resume: bool
    world: int


def worker(rank: int, run: Run) -> None:
    """Train one stage in one process of `run.world`."""
    import torch
    import torch.distributed as dist
    from prunekit_evals.studies.micro.optim import Masters, schedule
    from prunekit_evals.studies.micro.stages import build

    torch.set_num_threads(1)
    if run.world > 1:
        dist.init_process_group("gloo", init_method=f"file://{run.out}/rendezvous", rank=rank, world_size=run.world)
    stage = build(run.stage, run.out, run.seed)
    optimizer = Masters(stage.trained(), weight_decay=0.03, betas=(0.9, 0.97), slow=stage.slow)
    saved, first = run.out / f"{run.stage}.safetensors", 0
    if run.resume and saved.exists():
        optimizer.load(saved)
        first = json.loads((run.out / f"{run.stage}.json").read_text())["step"]
    if first >= run.steps > 0:
        return  # it is finished
    start, lost, done = time.monotonic(), 0.0, first
    for step in range(first, run.steps):
        elapsed = (time.monotonic() - start) / 60 / run.minutes if run.minutes else 0.0
        # Every process must see the same clock, or their learning rates and last steps drift apart.
        progress = _agree(max(step / run.steps, elapsed))
        if progress >= 1:
            break
        base = TRAIN_SEEDS + (run.seed << 37) + STAGES[run.stage].scenes + (step * run.world + rank) * stage.scenes
        loss, metrics = stage.loss(range(base, base + stage.scenes), progress)
        loss.backward()
        norm = optimizer.step(schedule(progress, run.rate), stage.pace(progress))
        done = step + 1
        lost = loss.item() if step == first else 0.98 * lost + 0.02 * loss.item()
        if rank == 0 and step % 50 == 0:
            if step % (1000 if run.stage == "see" else 500) == 0 and step > first:
                metrics |= stage.evaluate()
            _log(run, step, time.monotonic() - start, loss=lost, norm=norm, progress=progress, **metrics)
        if rank == 0 and step % 250 == 249:
            _save(run, optimizer, step + 1)
    if rank == 0:
        _log(run, done, time.monotonic() - start, loss=lost, **stage.evaluate())
        _save(run, optimizer, done)


def _agree(value: float) -> float:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor.item()


def _log(run: Run, step: int, seconds: float, **values: float) -> None:
    line = {"stage": run.stage, "step": step, "seconds": round(seconds)}
    line |= {k: round(v, 4) for k, v in values.items()}
    with (run.out / "curve.jsonl").open("a") as curve:
        curve.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def _save(run: Run, optimizer: object, step: int) -> None:
    target = run.out / f"{run.stage}.safetensors"
    optimizer.save(target.with_suffix(".partial"))  # type: ignore[attr-defined]
    target.with_suffix(".partial").replace(target)
    (run.out / f"{run.stage}.json").write_text(json.dumps({"step": step}))


def missing(run: Path, before: str | None = None) -> list[str]:
    """The files of the stages before this one (None: of all stages) that a run lacks."""
    stages = list(STAGES)
    needed = stages[: stages.index(before)] if before else stages
    return [f"{stage}.safetensors" for stage in needed if not (run / f"{stage}.safetensors").exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/micro"))
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--steps", type=float, default=1.0, help="scale of every stage's number of steps")
    parser.add_argument("--minutes", type=float, default=0.0, help="end a stage, decayed, after so much time")
    parser.add_argument("--rate", type=float, default=0.0, help="peak learning rate, instead of the stage's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.processes < 1 or args.steps < 0 or args.minutes < 0 or args.rate < 0:
        parser.error("--processes must be at least 1, and --steps, --minutes and --rate not negative")
    if args.seed not in SEEDS:
        parser.error(f"--seed must be from 0 to {SEEDS[-1]}: others would meet scenes that are held out")
    if args.stage != "all" and (lacking := missing(args.out, args.stage)):
        parser.error(
            f"stage {args.stage} goes on from {', '.join(lacking)} in '{args.out}'; run --stage all --resume there"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    import torch.multiprocessing as mp

    for stage, plan in STAGES.items():
        if args.stage not in (stage, "all"):
            continue
        (args.out / "rendezvous").unlink(missing_ok=True)
        run = Run(
            stage, args.out.resolve(), round(plan.steps * args.steps), args.rate or plan.rate, args.minutes,
            args.seed, args.resume, args.processes,
        )  # fmt: skip
        mp.spawn(worker, (run,), nprocs=args.processes)


if __name__ == "__main__":
    main()
