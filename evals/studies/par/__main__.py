"""Measure what PAR is worth on the bundled model, and write the study part of docs/par.md.

    make study                                    # everything that is missing
    python -m prunekit_evals.studies.par --only table,ablations  # only these parts; the others stay as they were
    python -m prunekit_evals.studies.par --render                # measure nothing, write the text anew

Answers are kept under --cache, by pipeline, model, task and number of questions: a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit_evals.studies.par import page, results, train
from prunekit_evals.studies.par.settings import COMMAND, COMPARED, PAGE, PIPELINE, RESULTS, settings_for

ANY_MODEL = ("overhead", "large", "seven")  # parts that stay when the bundled model changes
BUDGETS = ("keep", "keep_tokens", "keep_of", "keep_layers")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n\n")[0])
    made.add_argument("--questions", type=int, default=200, metavar="N", help="questions a task (200)")
    made.add_argument("--only", default=",".join(page.PARTS), help=f"parts to measure: {', '.join(page.PARTS)}")
    made.add_argument("--pipeline", type=Path, default=PIPELINE, help="whose router is studied, and where it cuts")
    made.add_argument("--router", metavar="DIR", help="another router folder in its place")
    made.add_argument("--routers", type=Path, default=Path("runs/par"), metavar="DIR", help="those of the ablations")
    made.add_argument("--cache", type=Path, default=Path("runs/par-study"), metavar="DIR", help="keeps answers")
    made.add_argument("--rounds", type=int, default=9, help="timed runs of each case (9)")
    made.add_argument("--dtype", default="bfloat16", metavar="T", help="of the model: bfloat16, float32")
    made.add_argument("--fresh", action="store_true", help="answer everything again")
    made.add_argument("--tiny", action="store_true", help="time a toy instead of the larger shape")
    made.add_argument("--render", action="store_true", help="measure nothing; write the text from the results")
    made.add_argument("--results", type=Path, default=RESULTS, help="the JSON file")
    made.add_argument("--page", type=Path, default=PAGE, help="the page with the markers")
    return made


def router_stage(pipeline: Path, router: str | None) -> dict[str, Any]:
    """The one router stage of a pipeline file, without its budgets. Raises ValueError where there is not one."""
    import yaml

    stages = yaml.safe_load(pipeline.read_text(encoding="utf-8"))["stages"]
    if len(stages) != 1 or "weights" not in stages[0]:
        raise ValueError(f"'{pipeline}' has not one stage with a router; name another by --pipeline")
    stage = {key: value for key, value in stages[0].items() if key not in BUDGETS}
    if router is None:
        return stage
    return {key: stage[key] for key in ("use", "at", "eligible", "protect") if key in stage} | {"weights": router}


def measured(arguments: argparse.Namespace, names: Sequence[str], tell: Callable[[dict[str, Any]], None]) -> None:
    """Measure parts one by one; each is written as soon as it is known."""
    import torch
    from prunekit_evals.run.answering import Loaded
    from prunekit_evals.studies.par import costs, parts, seven, times
    from prunekit_evals.studies.par.cells import Bench

    torch.set_num_threads(1)
    loaded = Loaded.load("micro", arguments.dtype, "cpu")
    bench = Bench(loaded, arguments.questions, arguments.cache / "answers", arguments.fresh)
    routers = parts.Routers(router_stage(arguments.pipeline, arguments.router), arguments.routers)
    settings = settings_for(bench.shape.layers)
    size = times.workload.TINY if arguments.tiny else times.workload.FULL
    run: Mapping[str, Callable[[], Any]] = {
        "table": lambda: parts.table(bench, routers, settings),
        "unseen": lambda: parts.unseen(bench, routers, settings[COMPARED[0]]),
        "layers": lambda: parts.layers(bench),
        "boxes": lambda: parts.boxes(bench),
        "correlation": lambda: parts.correlation(bench),
        "ablations": lambda: parts.ablations(bench, routers, [settings[number] for number in COMPARED]),
        "overhead": costs.overhead,
        "micro": lambda: times.micro(bench, routers, settings, arguments.rounds),
        "large": lambda: times.large(size, arguments.rounds),
        "seven": lambda: seven.seven(size if arguments.tiny else seven.SHAPE, min(arguments.rounds, 3)),
    }
    figures = results.load(arguments.results)
    if figures.get("about", {}).get("model") not in (None, bench.loaded.identity):
        figures = {name: figures[name] for name in ANY_MODEL if name in figures}
    figures["about"] = results.about(routers, arguments.questions) | {"dtype": bench.loaded.dtype}
    for name in names:
        figures[name] = run[name]()
        tell(figures)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, and put the text into the page."""
    made = parser()
    arguments = made.parse_args(argv)
    names = [name for name in arguments.only.split(",") if name]
    if unknown := set(names) - set(page.PARTS):
        made.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(page.PARTS)}")
    if arguments.questions < 2 or arguments.questions % 2:
        made.error("--questions must be even: one task asks twice about each image")
    if not (arguments.page.is_file() and page.BLOCK.search(arguments.page.read_text(encoding="utf-8"))):
        made.error(f"'{arguments.page}' is no page with '<!-- study -->' and '<!-- /study -->'")
    if not arguments.render:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ.setdefault(name, "1")
        if "ablations" in names and (code := train.main(["--routers", str(arguments.routers)])):
            return code
        measured(arguments, names, lambda figures: results.save(arguments.results, figures))
    text = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(page.into(text, results.load(arguments.results), results.now()), encoding="utf-8")
    print(f"results: {arguments.results}; text: {arguments.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
