"""ShortGPT (https://arxiv.org/abs/2403.03853): decoder layers that hardly change their input are left out.

Rule: icip-cas/ShortGPT@9a2ee8d. Block influence of layer l is BI_l = mean over tokens of 1 - cos(input_l, output_l);
the `drop` layers with the least influence go. `phase: prefill` is the variant for generation: the prefill leaves them
out but writes their keys and values, and decoding runs them. Deviation: the output of the last layer is taken before
the final norm, where the authors' last hidden state is behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch.nn.functional import cosine_similarity

from prunekit import Artefact, CalibrationPrompt, LayerAction, LayerPlan, ModelShape, hookimpl, read_artefact, strategy


@strategy(paper="2403.03853", code="icip-cas/ShortGPT@9a2ee8d")
class ShortGPT:
    """Leave out the `drop` decoder layers that change hidden states least, as a calibration measured.

    calibration: a file of `prunekit calibrate`; null only until it is written. phase: when they are left out.
    """

    drop: int
    calibration: Path | None = None
    phase: Literal["both", "prefill"] = "both"

    def __post_init__(self) -> None:
        if self.drop < 1:
            raise ValueError("drop: leave out at least one layer")
        self._artefact()

    @hookimpl
    def plan_layers(self, shape: ModelShape) -> LayerPlan:
        """The same plan for every sample; of equally influential layers the later ones go."""
        artefact = self._artefact()
        if artefact is None:
            raise ValueError("calibration: is missing; `prunekit calibrate` writes one")
        if self.drop >= shape.layers:
            raise ValueError(f"drop: the model has {shape.layers} layers, and one at least has to run")
        if wrong := artefact.refusal(shape):
            raise ValueError(f"calibration: {wrong}")
        influence = artefact.result["influence"]
        least = sorted(range(shape.layers), key=lambda layer: (influence[layer], -layer))[: self.drop]
        if self.phase == "prefill":
            return LayerPlan(dict.fromkeys(sorted(least), LayerAction.FILL_KV), {})
        return LayerPlan(dict.fromkeys(sorted(least), LayerAction.SKIP))

    @hookimpl
    def calibrate(self, prompts: Iterable[CalibrationPrompt], shape: ModelShape) -> Mapping[str, Any]:
        """The block influence of every layer, over all tokens of all prompts."""
        sums, tokens = [0.0] * shape.layers, 0
        for prompt in prompts:
            states = [one.double() for one in prompt.states()]
            tokens += len(states[0])
            for layer in range(shape.layers):
                sums[layer] += float((1 - cosine_similarity(states[layer], states[layer + 1], dim=-1)).sum())
        return {"influence": [total / tokens for total in sums]}

    def _artefact(self) -> Artefact | None:
        if self.calibration is None:
            return None
        try:
            return read_artefact(self.calibration, "shortgpt")
        except ValueError as error:
            raise ValueError(f"calibration: {error}") from error
