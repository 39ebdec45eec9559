"""A copy of an LVLM's config with small numbers that still fit each other.

Widths are renamed consistently: numbers that are equal in the config, such as the width of the tower and what its
projector takes, are equal in the copy. Sizes of heads stay, as rotary positions divide them in many ways; so does the
depth of a tower whose blocks a config names. Every kind of decoder layer that the config lists is kept.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prunekit.verify.tiny_models import BEGIN, END, FIRST_WORD, HEADS, IMAGE, PAD, VIDEO, VOCABULARY, WINDOW

CHANNELS, CODES, SOUND = 32, 64, FIRST_WORD - 1
LAYERS, TOWER_WIDTH, TOWER_BLOCKS = 6, 64, 4
# Numbers that only make a decoder larger: patterns of their names, and the most that the copy has.
LIMITS = (
    (re.compile(r"(num|n|moe)_(\w+_)?(experts|expert)"), 4),
    (re.compile(r"(\w*experts_per_tok\w*|moe_k|moe_topk|top_?k\w*|num_experts_top_k)"), 2),
    (re.compile(r"(\w*moe_intermediate_size|shared_expert_intermediate_size|share_expert_dim)"), 32),
    (re.compile(r"(n_group|num_group|topk_group|first_k_dense_replace)"), 1),
    (re.compile(r"(sliding_window|attention_chunk_size|keep_window_size)"), WINDOW),
    (re.compile(r"vocab_size_per_layer_input"), VOCABULARY),
    (re.compile(r"linear_num_(key_)?heads"), 2),
    (re.compile(r"linear_num_value_heads"), 4),
    (re.compile(r"linear_(key_|value_)?head_dim"), 16),
)
SHARED_EXPERTS = re.compile(r"shared")
INDICES = re.compile(r"ind(ex|ices)|deepstack|feature_layers?$|insert_layer")
TOKENS_OF_IMAGE = re.compile(r"image_seq_len(gth)?|num_image_tokens|mm_tokens_per_image|tokens_per_image")
# What feeds the decoder is as wide as it is, also in the defaults of configs, which do not always say so.
OUTPUT_WIDTH = re.compile(
    r"out_hidden_size|projection_dim|text_hidden_size|vision_output_dim|image_token_embed_dim|projector_(in|out)put_dim"
)
WIDTH = re.compile(r"hidden|dim|width|d_model|in_features|out_features")
TOKENS = {
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None, "image_token_id": IMAGE, "video_token_id": VIDEO,
}  # fmt: skip


def shrunken(config: Any, side: int | None = 12) -> Any:
    """A copy of an LVLM's config, as the module says.

    side: patches of a side of its images, where the config says how large they are; None: as they are.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    every = _take_apart(text)
    configs = list(configs_in(small))
    books = [part for part in configs if hasattr(part, "base_channels")]
    towers = [part for part in configs if part not in (text, small, *books) and _heads(part)]
    _rename_widths(configs, text, towers)
    _shrink_text(text, every, max([LAYERS, *(number + 3 for number in _fed_layers(small))]))
    for tower in towers:
        _shrink_tower(tower, _names_blocks(part for part in configs if part is not text))
    for book in books:
        _shrink_codebook(small, book)
    if side is not None:
        _shrink_images(configs, small, side)
    for part in configs:
        _rename_tokens(part)
        part.tie_word_embeddings = False
        if getattr(part, "dtype", None) is not None:
            part.dtype = None
    if getattr(small, "vocab_size", None) is not None and small is not text:
        small.vocab_size = VOCABULARY
    if getattr(small, "quantization_config", None) is not None:
        del small.quantization_config
    return small


def configs_in(config: Any) -> Iterator[Any]:
    """`config` and the configs of its parts, of theirs, and so on."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from configs_in(value)


def _heads(part: Any) -> str:
    return next((name for name in HEADS if isinstance(vars(part).get(name), int)), "")


def _width_name(tower: Any) -> str:
    return next(
        (name for name in ("embed_dim", "hidden_size", "d_model") if isinstance(vars(tower).get(name), int)), ""
    )


def _rename_widths(configs: Sequence[Any], text: Any, towers: Sequence[Any]) -> None:
    """The decoder two heads wide, towers `TOWER_WIDTH`, and every other number that is one of these follows."""
    heads = getattr(text, "num_attention_heads", None)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    width = 2 * size or text.hidden_size  # a decoder without attention stays as wide as it is
    renamed = {text.hidden_size: width}
    for tower in towers:
        if name := _width_name(tower):
            renamed.setdefault(getattr(tower, name), TOWER_WIDTH)
    for part in configs:
        for name, value in _named(part):
            if "channels" in name and isinstance(value, (list, tuple)):
                setattr(part, name, [renamed.get(one, one) for one in value])
            if isinstance(value, bool) or not isinstance(value, int) or not value or name == "head_dim":
                continue
            if part is not text and OUTPUT_WIDTH.fullmatch(name):
                setattr(part, name, width)
            elif hasattr(part, "base_channels"):
                continue
            elif "intermediate" in name:  # several patches side by side go through the projector of Llama 4
                shuffled = hasattr(part, "pixel_shuffle_ratio")
                setattr(part, name, _renamed(value, renamed) if shuffled else renamed.get(value, 96))
            elif part is configs[0] and part is not text and name == "hidden_size":
                part.hidden_size = width
            elif WIDTH.search(name):
                setattr(part, name, _renamed(value, renamed))
    for tower in towers:  # Qwen2-VL calls what its tower gives `hidden_size`
        if _width_name(tower) == "embed_dim" and hasattr(tower, "hidden_size"):
            tower.hidden_size = width


def _named(config: Any) -> list[tuple[str, Any]]:
    """What a config says, under the usual names: GPT's `n_embd` is its `hidden_size`."""
    usual = {own: name for name, own in getattr(config, "attribute_map", {}).items()}
    return [(usual.get(own, own), value) for own, value in vars(config).items()]


def _renamed(value: int, renamed: Mapping[int, int]) -> int:
    """A width that is one of `renamed`, or some of them side by side, in the copy."""
    for before, after in sorted(renamed.items(), reverse=True):
        if value % before == 0 and value // before <= 16:
            return value // before * after
    return value


def _take_apart(text: Any) -> list[dict[str, Any]]:
    """Takes out of a config the numbers in which its layers differ, and returns those of each; empty: in none.

    While they are inside, such a config refuses to be asked for them.
    """
    if not getattr(text, "is_heterogeneous", False):
        return []
    names = [name for name in text.per_layer_attributes if name not in ("intermediate_size", "num_attention_heads")]
    every = [{name: getattr(one, name) for name in names} for one in text.per_layer_config]
    text.per_layer_config = None
    return [one | ({"num_key_value_heads": 1} if "num_key_value_heads" in one else {}) for one in every]


def _shrink_text(text: Any, every: Sequence[Mapping[str, Any]], least: int) -> None:
    """Two heads of their own size, few layers, experts and words.

    every: numbers of each layer, where they differ. least: how many layers it needs.
    """
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = 2 if text.num_key_value_heads == text.num_attention_heads else 1
    if getattr(text, "num_attention_heads", None):
        text.num_attention_heads = 2
    many = isinstance(getattr(text, "intermediate_size", None), (list, tuple))
    text.intermediate_size = [2 * text.hidden_size] * text.num_hidden_layers if many else 2 * text.hidden_size
    text.vocab_size = VOCABULARY
    chosen = _shrink_layers(text, every, least)
    if every:
        text.per_layer_config = {number: every[layer] for number, layer in enumerate(chosen)}
    for name, value in list(vars(text).items()):
        for pattern, most in LIMITS:
            if pattern.fullmatch(name):
                setattr(text, name, _limited(value, 1 if SHARED_EXPERTS.search(name) and most == 4 else most))
    if shared := getattr(text, "num_kv_shared_layers", 0):
        _share(text, min(shared, text.num_hidden_layers // 2))


def _share(text: Any, shared: int) -> None:
    """Let the last layers read keys and values of earlier ones, of each kind one, as in the whole."""
    kinds = list(dict.fromkeys(reversed(text.layer_types)))
    layers = range(text.num_hidden_layers)
    text.layer_types = [kinds[(layers[-1] - layer) % len(kinds)] for layer in layers]
    text.num_kv_shared_layers = shared


def _fed_layers(small: Any) -> list[int]:
    """Decoder layers that a config names, as they get features of the tower in between."""
    mapped = [pair[1] for pair in getattr(small, "deepstack_layer_map", None) or ()]
    return [*mapped, *(getattr(small, "spatial_target_layers", None) or ())]


def _limited(value: Any, most: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_limited(one, most) for one in value)
    return min(value, most) if isinstance(value, int) and not isinstance(value, bool) else value


def _shrink_layers(text: Any, every: Sequence[Mapping[str, Any]], least: int) -> list[int]:
    """At least so many of the first layers, and one of each other kind, by what the config lists; their numbers."""
    layers = text.num_hidden_layers
    listed = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, (list, tuple, str)) and len(value) == layers
    }
    kinds = [repr(kind) for kind in zip(range(layers), *listed.values(), *([every] if every else []), strict=True)]
    kinds = [kind.partition(",")[2] for kind in kinds]
    chosen = list(range(min(layers, least)))
    for number in range(len(chosen), layers):
        if kinds[number] not in [kinds[one] for one in chosen]:
            chosen.append(number)
    text.num_hidden_layers = len(chosen)
    for name, value in listed.items():
        some = [value[number] for number in chosen]
        setattr(text, name, "".join(some) if isinstance(value, str) else type(value)(some))
    return chosen


def _shrink_tower(tower: Any, named: bool) -> None:
    """Two heads, and few blocks unless they are `named`."""
    setattr(tower, _heads(tower), 2)
    width = getattr(tower, _width_name(tower)) if _width_name(tower) else TOWER_WIDTH
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(tower, name, None) is not None:
            setattr(tower, name, 2)
    if getattr(tower, "head_dim", None) is not None:
        tower.head_dim = width // 2
    if named:
        return
    for name in ("num_hidden_layers", "depth", "num_layers", "encoder_layers"):
        layers = getattr(tower, name, None)
        if isinstance(layers, int) and layers > TOWER_BLOCKS:
            for key, value in list(vars(tower).items()):
                if isinstance(value, (list, tuple)) and len(value) == layers:
                    setattr(tower, key, value[:TOWER_BLOCKS])
            setattr(tower, name, TOWER_BLOCKS)


def _shrink_codebook(small: Any, book: Any) -> None:
    """An encoder of images as words of a codebook: few channels and blocks, and words that the decoder has."""
    scales = book.channel_multiplier
    if getattr(book, "hidden_size", None) == book.base_channels * scales[-1]:
        book.hidden_size = CHANNELS * scales[-1]
    book.base_channels, book.num_res_blocks = CHANNELS, 1
    if getattr(book, "resolution", None):
        book.resolution = 4 * 2 ** (len(scales) - 1)
    words = getattr(small, "vocabulary_map", None)
    if not words:
        return
    for name in ("num_embeddings", "codebook_size"):
        if getattr(book, name, None):
            setattr(book, name, CODES)
    kinds = Counter(word[:6] for word in words)
    code = max(kinds, key=lambda kind: kinds[kind])
    codes = sorted((word for word in words if word.startswith(code)), key=lambda word: words[word])[:CODES]
    others = {word: END for word in words if not word.startswith(code)}
    small.vocabulary_map = others | {"<image>": IMAGE} | {word: FIRST_WORD + n for n, word in enumerate(codes)}


def _names_blocks(parts: Iterable[Any]) -> bool:
    """Whether configs name blocks of a tower that a tower of few blocks would not have."""
    numbers: list[Any] = []
    for name, value in (pair for part in parts for pair in vars(part).items()):
        if INDICES.search(name) and "token" not in name:
            numbers += list(_flat(value))
    return any(not -TOWER_BLOCKS <= number < TOWER_BLOCKS for number in numbers)


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, Mapping):
        yield from _flat(list(value.values()))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _shrink_images(configs: Sequence[Any], small: Any, patches: int) -> None:
    """Images of `patches` x `patches` patches, and the numbers that count their tokens."""
    scales: list[tuple[int, int]] = []
    for part in configs:
        size, patch = getattr(part, "image_size", None), getattr(part, "patch_size", None)
        side, cell = (one[0] if isinstance(one, (list, tuple)) and one else one for one in (size, patch))
        if isinstance(side, int) and isinstance(cell, int) and side != patches * cell:
            part.image_size = [patches * cell] * len(size) if isinstance(size, (list, tuple)) else patches * cell
            scales.append((patches * cell, side))
            if getattr(part, "num_position_embeddings", None) == (side // cell) ** 2:
                part.num_position_embeddings = patches**2
    if not scales:
        return
    new, old = scales[0]
    for part in configs:
        for name, value in list(vars(part).items()):
            if TOKENS_OF_IMAGE.fullmatch(name) and isinstance(value, int):
                count = value * new**2 // old**2
                # A default that no image of this tower has, as in Gemma 3, becomes 2 x 2 patches in a token.
                setattr(part, name, count if patches % math.isqrt(count or patches + 1) == 0 else (patches // 2) ** 2)
    if getattr(small, "projector_patch_to_query_dict", None):  # of Aria: queries for each number of patches
        small.projector_patch_to_query_dict = {patches**2: patches}
        small.max_value_projector_patch_to_query_dict = patches
    points = getattr(small, "image_grid_pinpoints", None)
    if points:
        small.image_grid_pinpoints = [[edge * new // old for edge in one] for one in points]


def _rename_tokens(config: Any) -> None:
    """Ids below the first word, so that the small vocabulary holds them and none is generated.

    Those of sounds are apart, as no prompt holds any.
    """
    for given, value in _named(config):
        name = given.replace("_token_index", "_token_id")
        if name in TOKENS and (value is not None or name in ("image_token_id", "video_token_id")):
            setattr(config, given, TOKENS[name])
        elif re.search(r"token_id$|^im_\w+_id$", name) and isinstance(value, int):
            kind = SOUND if "audio" in name else BEGIN if "start" in name or "begin" in name else END
            setattr(config, given, kind)
        elif name.endswith("token_ids") and isinstance(value, (list, tuple)):
            setattr(config, given, [END + 1 + n % (SOUND - END - 1) for n in range(len(value))])
