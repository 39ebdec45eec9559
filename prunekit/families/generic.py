"""A model of no known family: recognised by what it has, or refused with all that it lacks.

There is no list of models here. What looks right is only believed after `prunekit.verify.proof` has run a shrunken copy
of the model against the masked reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from prunekit.errors import Unsupported
from prunekit.families.base import Modality, Parts
from prunekit.families.decoders import decoder

METHOD, VIDEO_METHOD = "get_image_features", "get_video_features"


def recognise(model: PreTrainedModel) -> Parts:
    """The parts of `model`, which may live on the meta device, as they look; nothing has been proved.

    Raises Unsupported that lists all that is missing.
    """
    live: Any = model
    base = getattr(live, "model", None)
    text = live.get_decoder() if hasattr(live, "get_decoder") else None
    token = _token(live.config, "image")
    missing = [reason for reason, there in _wanted(live, base, text, token).items() if not there]
    stack: dict[str, Any] = {}
    if isinstance(text, nn.Module) and text is not live:
        try:
            stack = decoder(text)
        except Unsupported as reason:
            missing.append(str(reason))
    if missing or token is None or not isinstance(base, nn.Module):
        raise Unsupported(
            f"no family file for models of type '{live.config.model_type}' ({type(model).__name__}), and it was not "
            f"recognised as a plain LVLM: {'; '.join(missing)}. A family is one short file: docs/families.md"
        )
    modalities = [Modality("image", METHOD, "pixel_values", (token,), _no_coords)]
    if callable(getattr(base, VIDEO_METHOD, None)):
        ids = (_token(live.config, "video") or token,)
        modalities.append(Modality("video", VIDEO_METHOD, "pixel_values_videos", ids, _no_coords))
    return Parts(family=f"generic:{live.config.model_type}", base=base, modalities=tuple(modalities), **stack)


def _wanted(live: Any, base: Any, text: Any, token: int | None) -> dict[str, bool]:
    """Everything that a plain LVLM has, and whether `live` has it."""
    return {
        "it cannot generate (no GenerationMixin)": isinstance(live, GenerationMixin),
        "it has no base model in `model`": isinstance(base, nn.Module),
        f"its base model has no `{METHOD}`": callable(getattr(base, METHOD, None)),
        "`get_decoder` gives no decoder stack": isinstance(text, nn.Module) and text is not live,
        "its decoder is not inside its base model": isinstance(base, nn.Module)
        and any(module is text for module in base.modules() if module is not base),
        "its config names no `image_token_id`": token is not None,
        "it has an encoder-decoder or cross-attention decoder": not _crosses(live.config),
    }


def _crosses(config: Any) -> bool:
    text = config.get_text_config()
    return bool(getattr(config, "is_encoder_decoder", False) or getattr(text, "cross_attention_layers", None))


def _token(config: Any, kind: str) -> int | None:
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _no_coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
    raise Unsupported(
        "where visual tokens are in their images is not known of a model without a family file; strategies that ask "
        "for `coords` or `frames` cannot run on it"
    )
