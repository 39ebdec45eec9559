"""What this package adds to prunekit: the bundled model's name."""

from __future__ import annotations

from prunekit import hookimpl


@hookimpl
def prunekit_models() -> dict[str, str]:
    """`micro`, the bundled LVLM."""
    return {"micro": "prunekit_evals.micro:model_path"}
