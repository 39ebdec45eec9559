"""ShortV (https://arxiv.org/abs/2504.00502, ICCV 2025): visual tokens pass unchanged where that hardly shows.

Rule: icip-cas/ShortV@737c28c. In a frozen layer visual tokens are no queries and skip the MLP; the other tokens attend
to their keys and values as before. Which layers: with P_l the distribution of the token behind the prompt when layer l
alone is frozen and P that of the dense model, the contribution of l is KL(P_l || P), averaged over prompts; the
`freeze` layers that contribute least are frozen. The authors freeze 19 of 32 layers, and 24 of 40, and rank them on 20
samples each of GQA and Flickr30k.
Deviations: all visual tokens of a prompt are frozen, in any number of images, where the authors' code has 576 of one;
layers with a recurrent state, which cannot be frozen, are not ranked. `freeze_layers` takes a list, such as theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prunekit import Artefact, CalibrationPrompt, LayerAction, LayerPlan, ModelShape, hookimpl, read_artefact, strategy


@strategy(paper="2504.00502", code="icip-cas/ShortV@737c28c")
class ShortV:
    """Freeze visual tokens in the decoder layers that need them least, as a calibration measured.

    calibration: a file of `prunekit calibrate`; null only until it is written. freeze: how many layers; null: 0.6 of
    all, the authors' 19 of 32 and 24 of 40.
    """

    calibration: Path | None = None
    freeze: int | None = None

    def __post_init__(self) -> None:
        if self.freeze is not None and self.freeze < 1:
            raise ValueError("freeze: freeze at least one layer")
        self._artefact()

    @hookimpl
    def plan_layers(self, shape: ModelShape) -> LayerPlan:
        """The same plan for every sample; of layers that contribute equally the later ones are frozen."""
        artefact = self._artefact()
        if artefact is None:
            raise ValueError("calibration: is missing; `prunekit calibrate` writes one")
        if wrong := artefact.refusal(shape):
            raise ValueError(f"calibration: {wrong}")
        divergence = {int(layer): value for layer, value in artefact.result["divergence"].items()}
        number = max(int(0.6 * shape.layers + 0.5), 1) if self.freeze is None else self.freeze
        if number > len(divergence):
            raise ValueError(f"freeze: {number} layers are more than the {len(divergence)} that can be frozen")
        least = sorted(divergence, key=lambda layer: (divergence[layer], -layer))[:number]
        return LayerPlan(dict.fromkeys(sorted(least), LayerAction.FREEZE))

    @hookimpl
    def calibrate(self, prompts: Iterable[CalibrationPrompt], shape: ModelShape) -> Mapping[str, Any]:
        """The mean KL of the next token's distribution with each layer frozen alone."""
        sums = {layer: 0.0 for layer in range(shape.layers) if layer not in shape.recurrent}
        count = 0
        for prompt in prompts:
            full, count = prompt.logits().double().log_softmax(-1), count + 1
            for layer in sums:
                frozen = prompt.logits([{"use": "freeze_layers", "layers": [layer]}]).double().log_softmax(-1)
                sums[layer] += float((frozen.exp() * (frozen - full)).sum())
        return {"divergence": {str(layer): total / count for layer, total in sums.items()}}

    def _artefact(self) -> Artefact | None:
        if self.calibration is None:
            return None
        try:
            return read_artefact(self.calibration, "shortv")
        except ValueError as error:
            raise ValueError(f"calibration: {error}") from error
