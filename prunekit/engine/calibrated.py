"""A budget of risk and the model that it was calibrated on."""

from __future__ import annotations

from transformers import PreTrainedModel

from prunekit.errors import Unsupported
from prunekit.loading import identity_of
from prunekit.pipeline.bound import BoundPipeline


def check_calibration(bound: BoundPipeline, model: PreTrainedModel) -> None:
    """Raise Unsupported where a risk was calibrated on other weights or in another dtype, which answer otherwise.

    A model that was made in memory has no identity to compare.
    """
    found = None if bound.ladder is None else bound.ladder.calibration
    if found is None:
        return
    calibrated = found.model.get("id"), found.result.get("dtype")
    this = identity_of(model) or calibrated[0], str(model.dtype).removeprefix("torch.")
    if this != calibrated:
        raise Unsupported(
            f"the risk of '{bound.name}' was calibrated on model {calibrated[0]} in {calibrated[1]}; this is model "
            f"{this[0]} in {this[1]} (load that one, or calibrate on this with `prunekit calibrate`)"
        )
