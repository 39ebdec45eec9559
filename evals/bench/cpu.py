"""What prunekit costs when it prunes nothing, how much of the promised time and memory it saves, and what others pay.

A random LLaVA with 576 visual and 64 text tokens runs on one thread, in float32. What is timed is the language model;
image features are given, so the vision tower does not run. Runs are interleaved, so that whatever else the machine does
meets all of them alike; times are CPU times of the process, with wall times beside them where there is room.

    python -m prunekit_evals.bench.cpu --rounds 9             # everything; some twenty minutes on a quiet core
    python -m prunekit_evals.bench.cpu --only prefill,memory  # only these; the others stay as they were in the file
    python -m prunekit_evals.bench.cpu --docs                 # put the figures of the file into docs/performance.md

"saved of promised" is (1 - time / dense time) / (1 - FLOPs / dense FLOPs), with FLOPs as in prunekit/cost.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from prunekit_evals.bench import launch, llava_7b, sections, selection
from prunekit_evals.bench.workload import BATCH, FULL, PRUNES_NOTHING, TINY

import prunekit

DOCS = Path(__file__).resolve().parents[2] / "docs"  # of a checkout
FIGURES, PAGE = DOCS / "performance.json", DOCS / "performance.md"
SECTIONS = ("prefill", "par", "scoring", "selection", "peers", "decode", "launch", "batch", "memory")


def measure(section: str, rounds: int, tiny: bool) -> Any:
    """The rows of one section as plain data."""
    size = TINY if tiny else FULL
    run: dict[str, Callable[[], Any]] = {
        "prefill": lambda: sections.prefill_rows(size, rounds),
        "par": lambda: sections.par_rows(size, rounds),
        "scoring": lambda: sections.scoring_share(size, rounds),
        "selection": lambda: selection.selection_rows(rounds, tiny),
        "peers": lambda: sections.peers(size, rounds),
        "decode": lambda: sections.decode_rows(size, rounds),
        "launch": lambda: launch.launch_rows(rounds, ("dense", "fastv-k2-r25") if tiny else None),
        "batch": lambda: sections.batch_rows(TINY if tiny else BATCH, max(rounds // 3, 1)),
        "memory": lambda: sections.memory_rows(size),
    }
    rows = run[section]()
    return [asdict(row) for row in rows] if isinstance(rows, list) else rows


@dataclass(frozen=True)
class Target:
    """A figure and what is asked of it. limit: `value` must be below (or above, where `above`) it or equal to it."""

    figure: str
    value: float
    limit: float
    above: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is as asked."""
        return self.value >= self.limit if self.above else self.value <= self.limit


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """Every target whose section was measured, by its worst row."""
    listed = []
    if rows := figures.get("prefill"):
        idle = max(row["cpu_ratio"] for row in rows if row["pipeline"] in PRUNES_NOTHING)
        listed.append(Target("prefill of a pipeline that prunes nothing / dense", idle, 1.01))
        saved = min(row["saved_of_promised"] for row in rows if row["saved_of_promised"] is not None)
        listed.append(Target("time saved / FLOPs saved, the worst of four pipelines", saved, 0.97, above=True))
    if "par" in figures:
        whole = figures["par"][0]
        kept = whole["speedup"] / whole["promised_speedup"]
        listed.append(Target("PAR's speed-up, measured / promised by its FLOPs", kept, 0.9, above=True))
    if "decode" in figures:
        slowest = max(row["ratio"] for row in figures["decode"] if row["pipeline"] != "dense")
        listed.append(Target("decoding step, pruned / dense, the slowest of four", slowest, 1.0))
    if "launch" in figures:
        slowest = max(row["ratio"] for row in figures["launch"])
        listed.append(Target("launch-bound decoding step, pruned / dense, the slowest shipped pipeline", slowest, 1.03))
    if "scoring" in figures:
        listed.append(Target("FastV's scoring under sdpa / dense prefill", figures["scoring"], 0.01))
    if rows := figures.get("selection"):
        dearest = max(row["flops"] or 0.0 for row in rows if row["strategy"] not in llava_7b.DEAR)
        listed.append(Target("FLOPs of decisions / dense prefill at 7B, the dearest strategy", dearest, llava_7b.LIMIT))
    if "batch" in figures:
        lowest = min(row["ratio"] for row in figures["batch"])
        listed.append(Target("tokens a second, ragged batch of 8 / all rows as the longest", lowest, 0.9, above=True))
    if "memory" in figures:
        off = max(abs(row["kv"] / row["kv_stated"] - 1) for row in figures["memory"])
        listed.append(Target("KV bytes held / KV bytes of the report, less one", off, 0.0))
        peak = max(row["peak_ratio"] for row in figures["memory"] if row["pipeline"] not in ("dense", *PRUNES_NOTHING))
        listed.append(Target("peak memory of a prefill that prunes / dense, the highest of four", peak, 1.0))
    return listed


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; `head` has its column names, parted by bars. The first column stands left."""
    columns = head.count("|") + 1
    lines = [f"| {head} |", "| --- |" + " ---: |" * (columns - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def rendered(figures: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the page, by the name of their marker."""

    def rows(section: str, *formats: str) -> list[list[str]]:
        return [[one.format(**row) for one in formats] for row in _printable(figures[section])]

    times = ("{pipeline}", "{cpu:.3f}", "{cpu_ratio:.3f}", "{wall_ratio:.3f}")
    shown = {
        "targets": lambda: table(
            "figure | target | measured | met",
            [[t.figure, _limit(t), f"{t.value:.4g}", "yes" if t.met else "no"] for t in targets(figures)],
        ),
        "prefill": lambda: table(
            "pipeline | CPU s | of dense | wall, of dense | FLOPs, of dense | saved of promised | speed-up (promised)",
            rows("prefill", *times, "{flops_fraction:.3f}", "{saved}", "{speedup:.2f} ({promised_speedup:.2f})"),
        ),
        "par": lambda: table(
            "pipeline | CPU s | of dense | wall, of dense | FLOPs, of dense | speed-up (promised)",
            rows("par", *times, "{flops_fraction:.3f}", "{speedup:.2f} ({promised_speedup:.2f})"),
        ),
        "selection": lambda: table(
            "strategy | acts | FLOPs, % of dense prefill | ms to decide | time, % of dense prefill | not timed because",
            [_selection(row) for row in figures["selection"]],
        ),
        "peers": lambda: table("run | CPU s | of dense | wall, of dense", rows("peers", *times)),
        "decode": lambda: table(
            "pipeline | ms a step | of dense", rows("decode", "{pipeline}", "{ms:.1f}", "{ratio:.3f}")
        ),
        "launch": lambda: table(
            "pipeline | ms a step | of dense | Python calls beyond dense",
            rows("launch", "{pipeline}", "{ms:.2f}", "{ratio:.3f}", "{calls:.0f}"),
        ),
        "batch": lambda: table(
            "pipeline | tokens a second | of equal rows | slots filled: prompt | and in the last layer",
            rows(
                "batch", "{pipeline}", "{tokens_per_second:.0f}", "{ratio:.3f}", "{filled:.3f}", "{filled_pruned:.3f}"
            ),
        ),
        "memory": lambda: table(
            "pipeline | peak MB | of dense | KV MB | of dense",
            rows("memory", "{pipeline}", "{peak_mb:.1f}", "{peak_ratio:.3f}", "{kv_mb:.1f}", "{kv_ratio:.3f}"),
        ),
    }
    return {name: make() for name, make in shown.items() if name == "targets" or name in figures}


def _printable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what tables show in other units."""
    shown = []
    for row in rows:
        saved = row.get("saved_of_promised")
        units = {"ms": 1e3 * row.get("step", 0), "peak_mb": row.get("peak", 0) / 1e6, "kv_mb": row.get("kv", 0) / 1e6}
        text = "" if saved is None else f"{saved:.3f}"
        shown.append({**row, **units, "saved": text, "speed": row.get("tokens_per_second", 0)})
    return shown


def _selection(row: Mapping[str, Any]) -> list[str]:
    """A row of the table of selections; cells are empty where nothing was measured."""
    flops = "" if row["flops"] is None else f"{100 * row['flops']:.3f}"
    taken = ("", "") if row["seconds"] is None else (f"{1e3 * row['seconds']:.1f}", f"{100 * row['time']:.3f}")
    return [row["strategy"], row["group"], flops, *taken, row["why"]]


def _limit(target: Target) -> str:
    return f"{'>=' if target.above else '<='} {target.limit:g}"


def into(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its markers. Raises ValueError for a marker that is not there."""
    for name, text in tables.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not block.search(page):
            raise ValueError(f"the page has no '<!-- {name} --> ... <!-- /{name} -->'")
        page = block.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


def about(rounds: int, tiny: bool) -> dict[str, Any]:
    """What was run, on what."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, prunekit)}
    size = asdict(TINY if tiny else FULL)
    return {"size": size, "rounds": rounds, "threads": 1, "machine": platform.machine(), **versions}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write them as JSON, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each case (9); a third of it for batches")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections to measure: {', '.join(SECTIONS)}")
    parser.add_argument("--tiny", action="store_true", help="a toy model: shows that the benchmark runs, nothing else")
    parser.add_argument("--out", type=Path, default=Path("runs/cpu.json"), help="where the figures go")
    parser.add_argument("--docs", action="store_true", help=f"measure nothing; put {FIGURES.name} into {PAGE.name}")
    arguments = parser.parse_args(argv)
    if arguments.docs:
        PAGE.write_text(into(PAGE.read_text(encoding="utf-8"), rendered(json.loads(FIGURES.read_text()))))
        return 0
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    figures = json.loads(arguments.out.read_text()) if arguments.out.exists() and not arguments.tiny else {}
    figures["about"] = about(arguments.rounds, arguments.tiny)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for section in chosen:
        figures[section] = measure(section, arguments.rounds, arguments.tiny)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")  # a run that is cut short leaves what it has
    for name, text in rendered(figures).items():
        print(f"{name}\n\n{text}\n")
    missed = [target.figure for target in targets(figures) if not target.met]
    print("targets met" if not missed else f"targets missed: {'; '.join(missed)}")
    print(f"figures: {arguments.out}")
    return 1 if missed and not arguments.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
