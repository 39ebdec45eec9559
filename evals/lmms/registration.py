"""What lmms-eval reads at import through the entry-point group `lmms_eval.models`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> ModelManifest:
    """The model `prunekit`: its chat class, and a simple one for tasks that are not asked in messages."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="prunekit",
        chat_class_path="prunekit_evals.lmms.adapter.PruneKitChat",
        simple_class_path="prunekit_evals.lmms.adapter.PruneKitSimple",
    )
