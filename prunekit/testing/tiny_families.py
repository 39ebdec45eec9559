"""Tiny random models of every family, and prompt batches for them: no download, no processor, milliseconds a forward.

`tiny_model("qwen2_5_vl")` and `tiny_batch(model)` go straight into `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Generator, Tensor, nn

from prunekit.testing import tiny_pictures as draw
from prunekit.testing.tiny_configs import BEGIN, BOS, CONFIGS, END, FIRST_WORD, NEWLINE, PAD, PATCH, VIDEO

Row = Sequence[str]
# Two rows of different length, one picture against two, and none of equal size where sizes are free.
ROWS: tuple[Row, ...] = (("image",), ("image", "image"))
METHODS = {"image": "get_image_features", "video": "get_video_features"}


@dataclass(frozen=True)
class Recipe:
    """What a family's prompts are made of.

    image, video: draw one picture; video is None where the family takes none. around: ids before and after each run of
    visual tokens. runs: into how many equal runs the visual tokens of one picture are split, from its kind and tensors.
    stamped: a word of text stands before each of several runs. types: arguments that say what each token is, and their
    values for text, image and video. stacked: the pictures of a row share one entry of the first dimension.
    counted: `batch_num_images` is given. shared_id: videos stand behind the id of images, and no batch may hold both.
    """

    image: draw.Draw
    video: draw.Draw | None = None
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    runs: Callable[[str, Mapping[str, Tensor]], int] = lambda kind, picture: 1
    stamped: bool = False
    types: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    stacked: bool = False
    counted: bool = False
    shared_id: bool = False


def video_frames(kind: str, picture: Mapping[str, Tensor]) -> int:
    """Frames of a video stand apart."""
    return int(picture["video_grid_thw"][0, 0]) if kind == "video" else 1


def _rows(kind: str, picture: Mapping[str, Tensor]) -> int:
    """Each row of merged patches ends with a token of its own."""
    return int(picture["image_sizes"][0, 0]) // (2 * PATCH)


def _tiles(kind: str, picture: Mapping[str, Tensor]) -> int:
    """Tiles of a picture stand apart."""
    return len(picture["pixel_values"])


FENCED = ((BEGIN,), (END,))
M_ROPE = {"mm_token_type_ids": (0, 1, 2)}
QWEN2 = Recipe(draw.patches, draw.video_patches, FENCED, types=M_ROPE)
STAMPED = replace(QWEN2, runs=video_frames, stamped=True)
GLM = replace(STAMPED, shared_id=True)
IDEFICS = Recipe(draw.masked_tiles, None, FENCED, _tiles, stamped=True, stacked=True)
RECIPES: dict[str, Recipe] = {
    "llava": Recipe(draw.square),
    "llava_next": Recipe(draw.anyres),
    "llava_next_video": Recipe(draw.anyres, draw.frames),
    "llava_onevision": Recipe(draw.anyres, draw.frames, counted=True),
    "vipllava": Recipe(draw.square),
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": STAMPED,
    "qwen3_vl_moe": STAMPED,
    "internvl": Recipe(draw.tiles, None, FENCED),
    "gemma3": Recipe(draw.square, None, FENCED, types={"token_type_ids": (0, 1, 0)}),
    "paligemma": Recipe(draw.square, types={"token_type_ids": (0, 0, 0)}),
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "mistral3": Recipe(draw.any_size, None, ((), (NEWLINE,)), _rows),
    "glm4v": GLM,
    "glm46v": GLM,
    "glm4v_moe": GLM,
    "aya_vision": Recipe(draw.tiles, None, FENCED, _tiles),
    "cohere2_vision": Recipe(draw.tiles, None, FENCED, _tiles),
}


class TinyBatch(dict[str, Tensor]):
    """A prompt batch that knows its rows.

    pictures: the number of pictures of each row. shares: for each tensor of pictures, how many entries of its first
    dimension belong to each row.
    """

    pictures: tuple[int, ...]
    shares: dict[str, tuple[int, ...]]


def tiny_names() -> tuple[str, ...]:
    """The `model_type` of every family that has a tiny model."""
    return tuple(RECIPES)


def takes_video(family: str) -> bool:
    """Whether prompts of this family may hold videos."""
    return RECIPES[family].video is not None


def tiny_model(
    family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, layers: int = 6, seed: int = 0
) -> Any:
    """A model with random weights that are large enough for peaked attention, so that a wrong mask or position shows.

    family: a `model_type`, one of `tiny_names()`. attention: `sdpa` or `eager`. Equal arguments give equal weights, and
    another `attention` gives the same weights. It has no end-of-text token, so `generate` runs to its limit, and never
    generates the id of a visual token, as its head gives those the logit 0. Raises KeyError for an unknown family.
    """
    return tiny_from_config(CONFIGS[family](layers), attention, dtype, seed)


def tiny_from_config(config: Any, attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """As `tiny_model`, from a config. The weights are the same in every dtype, up to its rounding."""
    import transformers

    auto: Any = transformers.AutoModelForImageTextToText
    # The usual kernel of experts takes no float64.
    model = auto.from_config(config, attn_implementation=attention, experts_implementation="eager")
    _randomise(model, seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[:FIRST_WORD] = 0
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    return model.eval().requires_grad_(False).to(dtype)


def tiny_batch(
    model: Any,
    rows: Sequence[Row] = ROWS,
    seed: int = 0,
    text: Sequence[int] | int | None = None,
    recipe: Recipe | None = None,
) -> TinyBatch:
    """A left-padded prompt batch for a model of `tiny_model`, with what `generate` needs besides ids.

    rows: for each row its pictures in order, `image` or `video`; an empty row is text alone. text: words of each row,
    one number for all, or None for 9, 12, 15 ...; they stand before, between and after the pictures. Row b depends on
    `seed`, b, `rows[b]` and its number of words alone; `row_of` cuts it out. Floats have the model's dtype.
    The number of visual tokens of a picture is asked of the model itself. recipe: how prompts are made; None takes that
    of the model's family. Raises KeyError for an unknown family without one.
    """
    recipe = recipe or RECIPES[model.config.model_type]
    words = [9 + 3 * b for b in range(len(rows))] if text is None else text
    lengths = [words] * len(rows) if isinstance(words, int) else list(words)
    made = [
        _row(model, recipe, row, length, torch.Generator().manual_seed(1000 * seed + b))
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    ids, sorts = [one.ids for one in made], [one.kinds for one in made]
    longest = max(map(len, ids))
    batch = TinyBatch()
    batch["input_ids"] = torch.stack([_left(prompt, longest, PAD) for prompt in ids])
    batch["attention_mask"] = torch.stack([_left(torch.ones_like(prompt), longest, 0) for prompt in ids])
    for name, values in recipe.types.items():
        batch[name] = torch.stack([_left(torch.tensor(values)[kinds], longest, 0) for kinds in sorts])
    batch.pictures, batch.shares = tuple(map(len, rows)), {}
    for name in sorted({name for one in made for name in one.tensors}):
        pieces = [one.tensors.get(name) for one in made]
        batch.shares[name] = tuple(0 if piece is None else len(piece) for piece in pieces)
        batch[name] = draw.concatenate([piece for piece in pieces if piece is not None])
    return batch


def row_of(batch: TinyBatch, row: int) -> TinyBatch:
    """Row `row` of a batch of `tiny_batch` as a batch of its own, without padding."""
    present = batch["attention_mask"][row].bool()
    single = TinyBatch()
    single.shares = {}
    single.pictures = (batch.pictures[row],)
    for name, tensor in batch.items():
        if name not in batch.shares:
            single[name] = tensor[row : row + 1, present]
        elif (count := batch.shares[name][row]) and batch.pictures[row]:
            first = sum(batch.shares[name][:row])
            single[name] = tensor[first : first + count]
            single.shares[name] = (count,)
    return single


def encode(model: Any, kind: str, given: Mapping[str, Tensor]) -> Any:
    """What the model's encoder gives for the pictures of one kind among the inputs `given`."""
    import inspect

    method = getattr(model.model, METHODS[kind])
    known = inspect.signature(method).parameters
    return method(**{name: tensor for name, tensor in given.items() if name in known}, return_dict=True)


@dataclass(frozen=True)
class _Prompt:
    """One row: ids (S,), kinds (S,) (0 text, 1 image, 2 video), and the tensors of its pictures."""

    ids: Tensor
    kinds: Tensor
    tensors: dict[str, Tensor]


def _row(model: Any, recipe: Recipe, row: Row, words: int, generator: Generator) -> _Prompt:
    """One prompt: the words between its pictures."""
    makers = {"image": recipe.image, "video": recipe.video or recipe.image}
    pictures = [makers[kind](model.config, generator) for kind in row]
    tensors = _gather(model, recipe, pictures)
    counts = {kind: iter(_counts(model, kind, pictures, tensors)) for kind in sorted(set(row))}
    vocabulary = model.config.get_text_config().vocab_size
    said = torch.randint(FIRST_WORD, vocabulary, (words,), generator=generator)
    ids, kinds = [BOS], [0]
    for number, part in enumerate(said.tensor_split(len(row) + 1)):
        if number:
            kind, picture = row[number - 1], pictures[number - 1]
            runs = recipe.runs(kind, picture)
            stamps = torch.randint(FIRST_WORD, vocabulary, (runs,), generator=generator).tolist()
            run = [_id(model, recipe, kind)] * (next(counts[kind]) // runs)
            for stamp in stamps:
                before = [stamp] * (recipe.stamped and runs > 1) + list(recipe.around[0])
                ids += [*before, *run, *recipe.around[1]]
                kinds += [0] * len(before) + [1 + (kind == "video")] * len(run) + [0] * len(recipe.around[1])
        ids += part.tolist()
        kinds += [0] * len(part)
    return _Prompt(torch.tensor(ids), torch.tensor(kinds), tensors)


def _gather(model: Any, recipe: Recipe, pictures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a row's pictures, floats in the model's dtype."""
    found: dict[str, Tensor] = {}
    for name in sorted({name for picture in pictures for name in picture}):
        whole = draw.concatenate([picture[name] for picture in pictures if name in picture])
        whole = whole.unsqueeze(0) if recipe.stacked else whole
        found[name] = whole.to(model.dtype) if whole.is_floating_point() else whole
    if recipe.stacked and not pictures:
        # A row without pictures has an entry too, of nothing.
        empty = recipe.image(model.config, torch.Generator())
        found = {
            name: tensor[None, :0].to(model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in empty.items()
        }
    if recipe.counted and "pixel_values" in found:
        found["batch_num_images"] = torch.tensor([len(found["pixel_values"])])
    return found


@torch.no_grad()
def _counts(
    model: Any, kind: str, pictures: Sequence[Mapping[str, Tensor]], tensors: Mapping[str, Tensor]
) -> list[int]:
    """The visual tokens of each picture of one kind; a picture of several tiles has the same number for each."""
    every = [len(features) for features in encode(model, kind, tensors).pooler_output]
    pixels = "pixel_values_videos" if kind == "video" else "pixel_values"
    parts = [len(picture[pixels]) if picture[pixels].ndim == 4 else 1 for picture in pictures if pixels in picture]
    if len(every) not in (len(parts), sum(parts)):
        every = [sum(every) // sum(parts)] * sum(parts)
    if len(every) == len(parts):
        return every
    ends = list(accumulate(parts))
    return [sum(every[end - part : end]) for part, end in zip(parts, ends, strict=True)]


def _id(model: Any, recipe: Recipe, kind: str) -> int:
    return VIDEO if kind == "video" and not recipe.shared_id else int(model.config.image_token_id)


def _left(row: Tensor, length: int, filler: int) -> Tensor:
    return torch.cat([row.new_full((length - len(row),), filler), row])


def _randomise(model: nn.Module, seed: int) -> None:
    """Norms around 1, those of queries and keys larger; matrices that enlarge by 1.5 whatever they multiply."""
    generator = torch.Generator().manual_seed(seed)
    tables = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if ("norm" in name and name.endswith("weight")) or "lambda" in name:
                weight.copy_((1.7 if "q_norm" in name or "k_norm" in name else 1.0) + 0.1 * noise)
            elif name in tables or name.endswith(("token", "embedding", "embeddings", "newline")):
                weight.copy_(noise)
            elif weight.ndim > 1:
                inputs = weight.shape[1] if "experts" in name and weight.ndim == 3 else weight[0].numel()
                weight.copy_(1.5 * noise / inputs**0.5)
            else:
                weight.copy_(0.1 * noise)
