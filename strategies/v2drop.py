"""V2Drop (https://arxiv.org/abs/2509.01552, CVPR 2026): visual tokens that a layer hardly changes leave.

score_i = ||h_i(l) - h_i(l - 1)||_2, of the states that enter layers l and l - 1; by default 1/2 and 1/4 of the original
tokens and then one token stay from 3/32, 17/32 and 22/32 of the layers on.

Rule: xuyang-liu16/V2Drop@219e03e. Deviations: counts round half up, the authors' are truncated; layers scale with the
depth, theirs are 3, 17, 22 of LLaVA's 32; a prompt has visual tokens if it has an image, not if it is long.
"""

from torch import Tensor

from prunekit import ModelShape, Site, Sites, hookimpl, strategy
from prunekit.ops import precise

KEPT = {3: 0.5, 17: 0.25, 22: 1e-9}  # of 32 layers; a stage keeps at least one token


@strategy(
    paper="2509.01552",
    code="xuyang-liu16/V2Drop@219e03e",
    sites=Sites(encoder=False, lowest=1),
    schedule=lambda self, layers: {Site(max((layers * at + 16) // 32, 1)): keep for at, keep in KEPT.items()},
)
class V2Drop:
    """Keep the visual tokens whose states the layer before changed most."""

    @hookimpl
    def score_tokens(self, hidden: Tensor, previous_hidden: Tensor) -> Tensor:
        """The norm of the change, float (B, V)."""
        return (precise(hidden) - precise(previous_hidden)).norm(dim=-1)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """A difference and a norm for each visual token."""
        return 3 * visual * shape.hidden
