"""What the study alone brings, as a loose plugin: `PRUNEKIT_PLUGINS=evals/studies/par/plugin.py prunekit sweep ...`."""

from __future__ import annotations

from prunekit import hookimpl
from prunekit.registry import Registry

PLACE = "prunekit_evals.studies.par.strategies"


@hookimpl
def prunekit_register(registry: Registry) -> None:
    """Strategies that stand in the study to be compared with."""
    registry.strategy("noisy_attention", f"{PLACE}:NoisyAttention", summary="FastV's scores, disturbed")
    registry.strategy("chance", f"{PLACE}:Chance", summary="random tokens and random layers")
    registry.strategy("par_another_question", f"{PLACE}:AnotherQuestion", summary="PAR, shown another question")
