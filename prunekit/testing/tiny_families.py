"""Tiny random models of every family, and prompt batches for them: no download, no processor, milliseconds a forward.

`tiny_model("qwen2_5_vl")` and `tiny_batch(model)` go straight into `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from prunekit.testing import tiny_pictures as draw
from prunekit.testing.tiny_configs import BEGIN, BOS, CONFIGS, END, FIRST_WORD, PAD, VIDEO

Row = Sequence[str]
# Two rows of different length, one picture against two, and none of equal size where sizes are free.
ROWS: tuple[Row, ...] = (("image",), ("image", "image"))
METHODS = {"image": "get_image_features", "video": "get_video_features"}


@dataclass(frozen=True)
class Recipe:
    """What a family's prompts are made of.

    image, video: draw one picture; video is None where the family takes none. around: ids before and after each run of
    visual tokens. types: arguments that say which tokens are visual, from their name to the value of each kind.
    stacked: pictures of a row share one entry of the first dimension. single: names of arguments that hold for the
    whole row, made from the number of its pictures. runs: into how many runs of equal length the tokens of one picture
    are split, from its tensors.
    """

    image: draw.Draw
    video: draw.Draw | None = None
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    types: Mapping[str, Mapping[str, int]] | None = None
    stacked: bool = False
    single: Mapping[str, Callable[[int], Tensor]] | None = None
    runs: Callable[[str, Mapping[str, Tensor]], int] = lambda kind, picture: 1


M_ROPE = {"mm_token_type_ids": {"image": 1, "video": 2}}
FENCED = ((BEGIN,), (END,))


def _frames_apart(kind: str, picture: Mapping[str, Tensor]) -> int:
    """Frames stand apart in the prompt, each behind its time stamp."""
    return int(picture["video_grid_thw"][0, 0]) if kind == "video" else 1


QWEN2 = Recipe(draw.patches, draw.video_patches, FENCED, M_ROPE)
QWEN3 = Recipe(draw.patches, draw.video_patches, FENCED, M_ROPE, runs=_frames_apart)
RECIPES: dict[str, Recipe] = {
    "llava": Recipe(draw.square),
    "llava_next": Recipe(draw.anyres),
    "llava_onevision": Recipe(
        draw.anyres, draw.frames, single={"batch_num_images": lambda count: torch.tensor([count])}
    ),
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
}


class TinyBatch(dict[str, Tensor]):
    """A prompt batch. `shares` says how many entries of the first dimension of each tensor belong to each row."""

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
    model: Any, rows: Sequence[Row] = ROWS, seed: int = 0, text: Sequence[int] | int | None = None
) -> TinyBatch:
    """A left-padded prompt batch for a model of `tiny_model`, with what `generate` needs besides ids.

    rows: for each row its pictures in order, `image` or `video`; an empty row is text alone. text: words of each row,
    one number for all, or None for 9, 12, 15 ...; they stand before, between and after the pictures. Row b depends on
    `seed`, b, `rows[b]` and its number of words alone; `row_of` cuts it out. Floats have the model's dtype.
    The number of visual tokens of a picture is asked of the model itself.
    """
    words = [9 + 3 * b for b in range(len(rows))] if text is None else text
    lengths = [words] * len(rows) if isinstance(words, int) else list(words)
    made = [
        _row(model, row, length, torch.Generator().manual_seed(1000 * seed + b))
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    ids = [prompt for prompt, _ in made]
    longest = max(map(len, ids))
    batch = TinyBatch()
    batch["input_ids"] = torch.stack([_left(prompt, longest, PAD) for prompt in ids])
    batch["attention_mask"] = torch.stack([_left(torch.ones_like(prompt), longest, 0) for prompt in ids])
    recipe = RECIPES[model.config.model_type]
    for name, values in (recipe.types or {}).items():
        marks = [sum((value * (row == _id(model, kind)) for kind, value in values.items()), 0 * row) for row in ids]
        batch[name] = torch.stack([_left(mark, longest, 0) for mark in marks])
    batch.shares = {}
    for name in sorted({name for _, pictures in made for name in pictures}):
        pieces = [pictures.get(name) for _, pictures in made]
        batch.shares[name] = tuple(0 if piece is None else len(piece) for piece in pieces)
        batch[name] = draw.concatenate([piece for piece in pieces if piece is not None])
    return batch


def row_of(batch: TinyBatch, row: int) -> TinyBatch:
    """Row `row` of a batch of `tiny_batch` as a batch of its own, without padding."""
    present = batch["attention_mask"][row].bool()
    single = TinyBatch()
    single.shares = {}
    for name, tensor in batch.items():
        if name not in batch.shares:
            single[name] = tensor[row : row + 1, present]
        elif count := batch.shares[name][row]:
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


def _row(model: Any, row: Row, words: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids of one prompt, and the tensors of its pictures."""
    recipe = RECIPES[model.config.model_type]
    pictures = [(recipe.video if kind == "video" else recipe.image)(model.config, generator) for kind in row]  # type: ignore[misc]
    tensors = _gather(model, recipe, pictures)
    counts = {kind: iter(_counts(model, kind, row.count(kind), tensors)) for kind in sorted(set(row))}
    vocabulary = model.config.get_text_config().vocab_size
    said = torch.randint(FIRST_WORD, vocabulary, (words,), generator=generator)
    pieces = [torch.tensor([BOS])]
    for number, part in enumerate(said.tensor_split(len(row) + 1)):
        if number:
            kind, picture = row[number - 1], pictures[number - 1]
            runs = recipe.runs(kind, picture)
            run = torch.full((next(counts[kind]) // runs,), _id(model, kind))
            before, after = (torch.tensor(ids, dtype=torch.long) for ids in recipe.around)
            stamps = torch.randint(FIRST_WORD, vocabulary, (runs,), generator=generator)
            for stamp in stamps:
                pieces += [stamp[None]] * (runs > 1) + [before, run, after]
        pieces.append(part)
    return torch.cat(pieces), tensors


def _gather(model: Any, recipe: Recipe, pictures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a row's pictures, floats in the model's dtype."""
    found: dict[str, Tensor] = {}
    for name in sorted({name for picture in pictures for name in picture}):
        pieces = [picture[name] for picture in pictures if name in picture]
        whole = draw.concatenate(pieces)
        whole = whole.unsqueeze(0) if recipe.stacked else whole
        found[name] = whole.to(model.dtype) if whole.is_floating_point() else whole
    images = sum("pixel_values" in picture for picture in pictures)
    return found | {name: make(images) for name, make in (recipe.single or {}).items() if images}


@torch.no_grad()
def _counts(model: Any, kind: str, pictures: int, tensors: Mapping[str, Tensor]) -> list[int]:
    """The visual tokens of each picture of one kind."""
    counts = [len(features) for features in encode(model, kind, tensors).pooler_output]
    each = len(counts) // pictures
    return [sum(counts[n * each : (n + 1) * each]) for n in range(pictures)]


def _id(model: Any, kind: str) -> int:
    return int(VIDEO if kind == "video" else model.config.image_token_id)


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
