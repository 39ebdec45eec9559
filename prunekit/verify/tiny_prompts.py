"""Prompt batches for tiny models: no processor, milliseconds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Generator, Tensor

from prunekit import families
from prunekit.errors import Unsupported
from prunekit.families.features import Features, each
from prunekit.families.generic import base_of, token_of
from prunekit.families.images import PIXELS
from prunekit.upstream import Encoder
from prunekit.verify import tiny_visual_inputs as draw
from prunekit.verify.tiny_models import BOS, FIRST_WORD, PAD, VIDEO

Row = Sequence[str]
# Two rows of different length, one image against two, and none of equal size where sizes are free.
ROWS: tuple[Row, ...] = (("image",), ("image", "image"))
METHODS = {"image": "get_image_features", "video": "get_video_features"}


@dataclass(frozen=True)
class Recipe:
    """What the prompts of a model are made of.

    image, video: draw one; video is None for a model that takes none. around: ids before and after each run of visual
    tokens. runs: into how many equal runs the visual tokens of one image or video are split, from its kind and
    tensors. stamped: a word of text stands before each of several runs. types: arguments that say what each token
    is, and their values for text, image and video. stacked: the images of a row share one entry of the first
    dimension. counted: `batch_num_images` is given. shared_id: videos stand behind the id of images, and no batch
    may hold both.
    """

    image: draw.Draw
    video: draw.Draw | None = None
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    runs: Callable[[str, Mapping[str, Tensor]], int] = lambda kind, tensors: 1
    stamped: bool = False
    types: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    stacked: bool = False
    counted: bool = False
    shared_id: bool = False


def video_frames(kind: str, tensors: Mapping[str, Tensor]) -> int:
    """Frames of a video stand apart; as `Recipe.runs`."""
    return int(tensors["video_grid_thw"][0, 0]) if kind == "video" else 1


def image_tiles(kind: str, tensors: Mapping[str, Tensor]) -> int:
    """Tiles of an image stand apart; as `Recipe.runs`."""
    return len(tensors["pixel_values"])


class TinyBatch(dict[str, Tensor]):
    """A prompt batch that knows its rows.

    visual_inputs: the number of images and videos of each row. shares: for each tensor of them, how many entries of its
    first dimension belong to each row.
    """

    visual_inputs: tuple[int, ...]
    shares: dict[str, tuple[int, ...]]


def tiny_batch(
    model: Any, recipe: Recipe, rows: Sequence[Row] = ROWS, seed: int = 0, text: Sequence[int] | int | None = None
) -> TinyBatch:
    """A left-padded prompt batch for a tiny model, with what `generate` needs besides ids.

    recipe: what its prompts are made of. rows: for each row its visual inputs in order, `image` or `video`; an empty
    row is text alone. text: words of each row, one number for all, or None for 9, 12, 15 ...; they stand before,
    between and after the visual inputs. Row b depends on `seed`, b, `rows[b]` and its number of words alone;
    `row_of` cuts it out. Floats have the model's dtype. How many tokens a visual input has is asked of the model
    itself.
    """
    words = [9 + 3 * b for b in range(len(rows))] if text is None else text
    lengths = [words] * len(rows) if isinstance(words, int) else list(words)
    made = [
        _row(model, recipe, row, length, torch.Generator().manual_seed(1000 * seed + b))
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    ids, sorts = [one.ids for one in made], [one.kinds for one in made]
    longest = max(map(len, ids))
    batch = TinyBatch()
    batch["input_ids"] = torch.stack([_padded(prompt, longest, PAD) for prompt in ids])
    batch["attention_mask"] = torch.stack([_padded(torch.ones_like(prompt), longest, 0) for prompt in ids])
    for name, values in recipe.types.items():
        batch[name] = torch.stack([_padded(torch.tensor(values)[kinds], longest, 0) for kinds in sorts])
    batch.visual_inputs, batch.shares = tuple(map(len, rows)), {}
    for name in sorted({name for one in made for name in one.tensors}):
        pieces = [one.tensors.get(name) for one in made]
        batch.shares[name] = tuple(0 if piece is None else len(piece) for piece in pieces)
        batch[name] = _joined(name, [one.tensors for one in made if name in one.tensors])
    return batch


def row_of(batch: TinyBatch, row: int) -> TinyBatch:
    """Row `row` of a batch of `tiny_batch` as a batch of its own, without padding."""
    present = batch["attention_mask"][row].bool()
    single = TinyBatch()
    single.shares = {}
    single.visual_inputs = (batch.visual_inputs[row],)
    for name, tensor in batch.items():
        if name not in batch.shares:
            single[name] = tensor[row : row + 1, present]
        elif (count := batch.shares[name][row]) and batch.visual_inputs[row]:
            first = sum(batch.shares[name][:row])
            single[name] = tensor[first : first + count]
            if name in draw.NUMBERS:
                single[name] = torch.where(
                    single[name] < 0, single[name], single[name] - single[name].clamp(min=0).min()
                )
            single.shares[name] = (count,)
    return single


def encode(model: Any, kind: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """The visual tokens, float (tokens, H), that the model's encoder makes of each input of one kind in `inputs`.

    Where they are not under their usual name: what later decoder layers get of them, or of models without a tower the
    patches themselves.
    """
    given, output = output_of(model, kind, inputs)
    if getattr(output, "pooler_output", None) is not None:
        return _features(model, kind)(given, output.pooler_output)
    deep = getattr(output, "deepstack_features", None)
    return each(given, deep[0][1] if deep else output.last_hidden_state)


def output_of(model: Any, kind: str, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Any], Any]:
    """What the model's encoder takes of `inputs` by name, and what it returns for the inputs of one kind among them."""
    encoder = Encoder(getattr(base_of(model), METHODS[kind]), PIXELS[kind])
    given: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if encoder.takes(name)}
    return given, encoder(given | {"return_dict": True})


def _features(model: Any, kind: str) -> Features:
    """As `Modality.features`, of the model's family; of none, or of a decoder that is refused, the usual."""
    try:
        modalities = families.find(model).modalities
    except Unsupported:
        return each
    return next((one.features for one in modalities if one.name == kind), each)


@dataclass(frozen=True)
class _Prompt:
    """One row: ids (S,), kinds (S,) (0 text, 1 image, 2 video), and the tensors of its visual inputs."""

    ids: Tensor
    kinds: Tensor
    tensors: dict[str, Tensor]


def _row(model: Any, recipe: Recipe, row: Row, words: int, generator: Generator) -> _Prompt:
    """One prompt: the words between its visual inputs."""
    makers = {"image": recipe.image, "video": recipe.video or recipe.image}
    drawn = [makers[kind](model.config, generator) for kind in row]
    tensors = tensors_of(model, recipe, drawn)
    counts = {kind: iter(_counts(model, kind, drawn, tensors)) for kind in sorted(set(row))}
    vocabulary = model.config.get_text_config().vocab_size
    said = torch.randint(FIRST_WORD, vocabulary, (words,), generator=generator)
    ids, kinds = [BOS], [0]
    for number, part in enumerate(said.tensor_split(len(row) + 1)):
        if number:
            kind, one = row[number - 1], drawn[number - 1]
            runs = recipe.runs(kind, one)
            stamps = torch.randint(FIRST_WORD, vocabulary, (runs,), generator=generator).tolist()
            run = [_id(model, recipe, kind)] * (next(counts[kind]) // runs)
            for stamp in stamps:
                before = [stamp] * (recipe.stamped and runs > 1) + list(recipe.around[0])
                ids += [*before, *run, *recipe.around[1]]
                kinds += [0] * len(before) + [1 + (kind == "video")] * len(run) + [0] * len(recipe.around[1])
        ids += part.tolist()
        kinds += [0] * len(part)
    return _Prompt(torch.tensor(ids), torch.tensor(kinds), tensors)


def tensors_of(model: Any, recipe: Recipe, drawn: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a row's visual inputs, floats in the model's dtype."""
    tensors: dict[str, Tensor] = {}
    for name in sorted({name for one in drawn for name in one}):
        whole = _joined(name, [one for one in drawn if name in one])
        whole = whole.unsqueeze(0) if recipe.stacked else whole
        tensors[name] = whole.to(model.dtype) if whole.is_floating_point() else whole
    if recipe.stacked and not drawn:
        # A row without visual inputs has an entry too, of nothing.
        empty = recipe.image(model.config, torch.Generator())
        tensors = {
            name: tensor[None, :0].to(model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in empty.items()
        }
    if recipe.counted and "pixel_values" in tensors:
        tensors["batch_num_images"] = torch.tensor([len(tensors["pixel_values"])])
    return tensors


def _joined(name: str, inputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """One tensor of several inputs."""
    pieces = [one[name] for one in inputs]
    if name in draw.NUMBERS:
        pieces = draw.numbered(pieces, [one["pixel_values"].shape[:2].numel() for one in inputs])
    if name in draw.PIXELS and draw.IN_A_ROW in inputs[0]:
        return torch.cat(pieces, dim=-1)
    return draw.concatenate(pieces)


@torch.no_grad()
def _counts(model: Any, kind: str, drawn: Sequence[Mapping[str, Tensor]], tensors: Mapping[str, Tensor]) -> list[int]:
    """The visual tokens of each image or video of one kind; one of several tiles has the same number for each."""
    every, pixels = list(map(len, encode(model, kind, tensors))), PIXELS[kind]
    parts = [len(one[pixels]) if one[pixels].ndim == 4 else 1 for one in drawn if pixels in one]
    if len(every) not in (len(parts), sum(parts)):
        every = [sum(every) // sum(parts)] * sum(parts)
    if len(every) == len(parts):
        return every
    ends = list(accumulate(parts))
    return [sum(every[end - part : end]) for part, end in zip(parts, ends, strict=True)]


def _id(model: Any, recipe: Recipe, kind: str) -> int:
    image = token_of(model.config, "image")
    assert image is not None, "it was recognised"
    return VIDEO if kind == "video" and not recipe.shared_id else image


def _padded(row: Tensor, length: int, filler: int) -> Tensor:
    return torch.cat([row.new_full((length - len(row),), filler), row])
