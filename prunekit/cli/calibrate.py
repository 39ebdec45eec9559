"""`prunekit calibrate`: what a strategy finds out about a model on some prompts, written as an artefact."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.arguments import add_common, add_data, add_loading, load, positive

if TYPE_CHECKING:
    from prunekit.pipeline.build import Pipeline
    from prunekit.strategy.artefact import Artefact


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "calibrate",
        help="let a strategy find out what it needs of a model",
        description="Run the calibration of a pipeline's stage, or of its budget of risk, on a frozen model and write "
        "what it finds as a JSON file, which the stage or the budget then names.",
        epilog="example: prunekit calibrate vtw-half --model micro --data micro-scenes --out vtw-micro.json; then "
        "prunekit show vtw-half --model micro --set stages[0].calibration=vtw-micro.json",
    )
    command.add_argument("pipeline", help="a pipeline file or name with a stage that can be calibrated")
    add_data(command)
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="where the artefact is written")
    command.add_argument("--prompts", type=positive, default=20, metavar="N", help="prompts to use; default: 20")
    command.add_argument("--stage", type=int, metavar="I", help="number of the stage, from 0, where several could be")
    command.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N",
        help="length of the answers that a budget of risk compares; default: 32",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, metavar="S", help="which prompts are drawn; default: 0")
    add_common(command, model=True)
    add_loading(command)
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Calibrate. What can be checked without the weights is checked before they are loaded."""
    from prunekit import loading
    from prunekit.errors import InputError
    from prunekit.pipeline.build import build
    from prunekit.spec.risk_keys import RiskBudget
    from prunekit.training.calibrate import calibrate, stage_of
    from prunekit.training.data import source
    from prunekit.training.risk import calibrate_risk

    pipeline = build(namespace.pipeline, namespace.overrides)
    risky = isinstance(pipeline.budget, RiskBudget) and namespace.stage is None
    stage = None if risky else stage_of(pipeline, namespace.stage)
    where, data = loading.resolve(namespace.model), source(namespace.data)
    if namespace.out.is_dir():
        raise InputError(f"'{namespace.out}' is a folder (name a file, such as {namespace.out / 'calibration.json'})")
    model, processor = load(namespace)
    about = {"model_id": loading.model_identity(where) or str(where), "name": namespace.data, "seed": namespace.seed}
    if stage is None:
        length = namespace.max_new_tokens
        artefact = calibrate_risk(pipeline, model, processor, data, namespace.prompts, max_new_tokens=length, **about)
    else:
        artefact = calibrate(stage, model, processor, data, namespace.prompts, **about)
    try:
        artefact.write(namespace.out)
    except OSError as error:
        raise InputError(f"cannot write '{namespace.out}': {error.strerror} (name another file with --out)") from error
    if namespace.json:
        print(json.dumps({"file": str(namespace.out), "digest": artefact.digest, "result": artefact.result}, indent=2))
        return 0
    if stage is None:
        _print_risk(namespace, pipeline, artefact)
        return 0
    print(f"{stage.use} calibrated on {namespace.prompts} prompts of {namespace.data}: {namespace.out}")
    print(f"name it in the stage: calibration: {namespace.out}")
    return 0


def _print_risk(namespace: argparse.Namespace, pipeline: Pipeline, artefact: Artefact) -> None:
    from prunekit.pipeline import risk

    budget: Any = pipeline.budget
    print(f"budget of risk of {pipeline.name} calibrated on {namespace.prompts} prompts of {namespace.data}")
    for rung, agreement in zip(artefact.result["ladder"], artefact.result["agreement"], strict=True):
        kept = ", ".join(f"{key} {value}" for key, value in rung.items())
        print(f"  {kept}: {agreement:.1%} of the answers are those of the dense model")
    limit = risk.threshold(risk.critical_of(artefact), budget.risk, budget.confidence)
    if limit == 0:
        print(f"  {risk.uncertified(budget, artefact)}")
    else:
        promise = f"risk {budget.risk:g} with confidence {budget.confidence:g}"
        print(f"  {promise}: a sample takes rungs while their predicted harm is below {limit:.4g}")
    print(f"name it in the pipeline: budget.calibration={namespace.out}")
