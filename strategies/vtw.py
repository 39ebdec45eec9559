"""VTW, Visual Tokens Withdrawal (https://arxiv.org/abs/2405.05803): deep layers no longer need visual tokens.

Rule: lzhxmu/VTW@a3d8cfc with `keep` positions. K is the first layer before which all visual tokens may leave while the
mean KL(withdrawn || full) of the next token's distribution stays within eta; the paper's K is 15 of 32 layers for
LLaVA-1.5, hence the default of half the depth where nothing was calibrated. The authors' search begins at layer 5, this
one at layer 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit import CalibrationPrompt, ModelShape, Site, Sites, hookimpl, read_artefact, strategy

if TYPE_CHECKING:
    from torch import Tensor


@strategy(
    paper="2405.05803",
    code="lzhxmu/VTW@a3d8cfc",
    sites=lambda self: Sites(default=self._default(), encoder=False),
    keep="refused",
    drops_all=True,
)
class VTW:
    """Drop every visual token before decoder layer `at`.

    calibration: a file of `prunekit calibrate`, from which `at` follows; null: the middle of the decoder. eta: the
    largest KL that is allowed, the authors' 0.003 for 7B models.
    """

    calibration: Path | None = None
    eta: float = 0.003

    @hookimpl
    def select_tokens(self, valid: Tensor) -> Tensor:
        """Keep nothing: bool (B, V), all False."""
        return valid & False

    @hookimpl
    def check(self, shape: ModelShape) -> None:
        """Refuse the calibration of another model."""
        if self.calibration is not None and (wrong := read_artefact(self.calibration, "vtw").refusal(shape)):
            raise ValueError(f"calibration: {wrong}")

    @hookimpl
    def calibrate(self, prompts: Iterable[CalibrationPrompt], shape: ModelShape) -> Mapping[str, Any]:
        """Mean KL of the next token's distribution for each layer before which visual tokens could leave."""
        sums = dict.fromkeys(range(1, shape.layers), 0.0)
        count = 0
        for prompt in prompts:
            full, count = prompt.logits().log_softmax(-1), count + 1
            for layer in sums:
                withdrawn = prompt.logits([{"use": "vtw", "at": layer}]).log_softmax(-1)
                sums[layer] += float((withdrawn.exp() * (withdrawn - full)).sum())
        return {"divergence": {str(layer): total / count for layer, total in sums.items()}}

    def _default(self) -> Any:
        if self.calibration is None:
            return lambda layers: Site(layers // 2)
        try:
            divergence = read_artefact(self.calibration, "vtw").result["divergence"]
        except ValueError as error:
            raise ValueError(f"calibration: {error}") from error
        allowed = [int(layer) for layer, value in divergence.items() if value <= self.eta]
        if not allowed:
            least = f"the least KL in the calibration is {min(divergence.values()):.4g}"
            raise ValueError(f"eta: no layer stays within {self.eta:.4g}; {least}")
        return Site(min(allowed))
