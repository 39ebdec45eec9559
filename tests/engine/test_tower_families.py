"""The vision towers of every family: which patches make which visual token, cuts, and rows of attention."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import cache
from typing import ClassVar

import pytest
import torch
from examples import registered
from torch import nn
from torch.overrides import TorchFunctionMode
from tower_cases import ANYWHERE, Merging, Norms, piped

import prunekit
from prunekit import Selection, hookimpl, strategy
from prunekit.engine.tower.patches import Patches
from prunekit.families import find
from prunekit.ops import top_k_mask
from prunekit.strategy.tower_requests import EncoderRows
from prunekit.testing.tiny_families import row_of, takes_video, tiny_batch, tiny_model, tiny_names
from prunekit.upstream import Encoder
from prunekit.verify.precision import Float64Throughout

model_of = cache(tiny_model)


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def encode(model, batch, kind="image"):
    """The features of the pictures, and the arguments of the call."""
    modality = next(one for one in find(model).modalities if one.name == kind)
    encoder = Encoder(getattr(model.model, modality.method), modality.pixels)
    given = {name: tensor for name, tensor in batch.items() if encoder.takes(name)}
    return list(modality.features(given, encoder(given | {"return_dict": True}).pooler_output)), given


@contextmanager
def leaf_after(block):
    """Within the block, the output of a module is a leaf whose gradient can be asked for."""
    found, original = [], block.forward

    def forward(*args, **kwargs):
        found.append(original(*args, **kwargs).detach().requires_grad_())
        return found[-1]

    block.forward = forward
    try:
        yield found
    finally:
        del block.forward


def units_of(model, kind, given, hidden):
    """The units that the family declares, for the tower's states in one call."""
    tower, shape = find(model).tower, hidden.shape if hidden.ndim == 3 else (1, *hidden.shape)
    if tower.patch_groups is None:
        return Patches.plain(*shape[:2], tower.leading)
    return Patches.of(tower.patch_groups(kind, given, shape[0], shape[1] - tower.leading), shape[1], tower.leading)


# Towers of convolutions, of another package, or none: a pool by places, a projector of patches.
WITHOUT = ("fast_vlm", "perception_lm", "gemma3n", "gemma4", "gemma4_unified")
TOWERED = tuple(name for name in tiny_names() if name not in WITHOUT)
KINDS = [(name, kind) for name in TOWERED for kind in ("image", "video") if kind == "image" or takes_video(name)]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_units_are_the_patches_that_a_visual_token_depends_on(name, kind):
    model = model_of(name)
    rows = ((kind,), (kind, kind)) if kind == "image" else ((kind,), (kind,))
    batch = tiny_batch(model, rows)
    tower = find(model).tower
    with leaf_after(tower.layers[tower.feature_block]) as found, torch.enable_grad():
        features, given = encode(model, batch, kind)
    units = units_of(model, kind, given, found[0])
    assert units.counts == tuple(map(len, features))
    mix = torch.linspace(-1, 1, features[0].shape[-1], dtype=torch.float64)
    for picture, shown in enumerate(features):
        for token, value in enumerate((shown * mix).sum(-1)):
            there = bool(units.present[picture, token])
            if not value.requires_grad:
                assert not there
                continue
            (gradient,) = torch.autograd.grad(value, found[0], retain_graph=True)
            moved = gradient.flatten(0, -2).abs().sum(-1).nonzero()[:, 0]
            expected = units.index[picture, token].sort().values if there else moved[:0]
            assert torch.equal(moved, expected), (picture, token)


@strategy(sites=ANYWHERE, keep="refused")
class Fixed:
    """Keeps at the decoder input what a list says."""

    KEPT: ClassVar[tuple] = ()

    @hookimpl
    def select_tokens(self, valid):
        keep = torch.zeros_like(valid)
        for row, kept in enumerate(self.KEPT):
            keep[row, list(kept)] = True
        return Selection(keep)


@contextmanager
def masked(model, units, kept, first):
    """Patches of dropped visual tokens are masked as keys in the tower's blocks from `first` on."""
    tower, handles = find(model).tower, []
    counts, keep = units.counts, kept
    gone = [
        units.index[picture, :count][units.present[picture, :count] & ~keep[sum(counts[:picture]) :][:count]]
        for picture, count in enumerate(counts)
    ]
    gone = torch.cat([cells.flatten() for cells in gone])
    if "cu_seqlens" in inspect.signature(getattr(tower.layers[0], tower.attention).forward).parameters:
        with naive_attention(model, gone, first):
            yield
        return

    def hook(module, args, named):
        hidden = args[0] if args else named["hidden_states"]
        bias = torch.zeros(hidden.shape[:2], dtype=hidden.dtype)
        bias.view(-1)[gone] = torch.finfo(hidden.dtype).min
        mask, given = bias[:, None, None], named.get("attention_mask")
        if given is not None:
            lowest = torch.finfo(hidden.dtype).min
            mask = mask.masked_fill(~given if given.dtype == torch.bool else given < lowest / 2, lowest)
        return args, {**named, "attention_mask": mask}

    for block in tower.layers[first:]:
        handles.append(getattr(block, tower.attention).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, "sdpa") for n in TOWERED] + [("idefics3", "eager"), ("qwen2_5_vl", "eager"), ("mistral3", "eager")],
)
@pytest.mark.parametrize("at", ["vision.0", "vision.0.mid"])
def test_a_cut_equals_masking(name, attention, at):
    model = model_of(name, attention)
    batch = tiny_batch(model)
    with torch.no_grad(), prunekit.apply(model, piped((Norms, {"at": at, "keep": 0.6}))) as run:
        logits = model(**batch).logits
    event = run.report.events[0]
    assert 0 < sum(map(len, event.kept)) < sum(run.report.visual_tokens)
    tower = find(model).tower
    with leaf_after(tower.layers[tower.feature_block]) as found, torch.no_grad():
        _, given = encode(model, batch)
    units = units_of(model, "image", given, found[0])
    starts = [sum(run.report.visual_tokens[:row]) for row in range(len(event.kept))]
    kept = torch.zeros(sum(run.report.visual_tokens), dtype=torch.bool)
    kept[[start + one for start, row in zip(starts, event.kept, strict=True) for one in row]] = True
    Fixed.KEPT = event.kept
    with torch.no_grad(), masked(model, units, kept, 1), prunekit.apply(model, piped((Fixed, {"at": "encoder"}))):
        expected = model(**batch).logits
    assert (logits[:, -1] - expected[:, -1]).abs().max() < 1e-9


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tile_of_which_only_padding_is_kept_is_the_same_in_any_batch(attention):
    """Its patches see each other, and not the slots that are filled up to the length of longer tiles."""
    model = model_of("idefics3", attention)
    batch = tiny_batch(model, (("image",), ("image",)))
    columns = batch["pixel_attention_mask"][0, -1, 0]
    assert columns[:56].any() and not columns[56:].any(), "the last of three columns of visual tokens is padding"
    logits = []
    for inputs, others in ((batch, [range(18)]), (row_of(batch, 0), [])):
        Fixed.KEPT = ([0, 20, 23, 26], *others)  # of the first tile and of the last of three
        with torch.no_grad(), prunekit.apply(model, piped((Fixed, {"at": "vision.0"}))):
            logits.append(model(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() < 1e-9


@contextmanager
def naive_attention(model, gone, first):
    """Packed towers attend by hand, to all of the same part; `gone` are masked from block `first` on."""
    tower, replaced = find(model).tower, []

    def make(module, dropped):
        rotate = inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb_vision"]

        def forward(hidden, cu_seqlens, position_embeddings, **kwargs):
            apart = not hasattr(module, "qkv")
            three = (module.q_proj, module.k_proj, module.v_proj) if apart else (module.qkv,)
            q, k, v = torch.cat([one(hidden) for one in three], -1).view(len(hidden), 3, module.num_heads, -1).unbind(1)
            q, k = rotate(q, k, *position_embeddings)
            part = torch.searchsorted(cu_seqlens[1:], torch.arange(len(hidden)), right=True)
            seen = part[:, None] == part
            seen[:, dropped] = False
            logits = torch.einsum("qad,kad->aqk", q, k) * module.scaling
            # What is left of a part that is gone sees nothing, and is seen by nobody.
            chances = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
            summed = torch.einsum("aqk,kad->qad", chances, v).flatten(1)
            return (module.out_proj(summed), None) if apart else module.proj(summed)

        return forward

    for number, block in enumerate(tower.layers):
        module = getattr(block, tower.attention)
        module.forward = make(module, gone if number >= first else gone[:0])
        replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


class Maps(TorchFunctionMode):
    """Collects what softmax returns over its last dimension."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (nn.functional.softmax, torch.softmax, torch.Tensor.softmax) and result.ndim == 4:
            self.found.append(result)
        return result


@strategy(sites=ANYWHERE, keep="refused", inputs={"encoder_attention": EncoderRows(-1, "mean")})
class Rows:
    """Takes down the mean row of the last block."""

    SEEN: ClassVar[list] = []

    @hookimpl
    def select_tokens(self, encoder_attention, valid):
        self.SEEN.append(encoder_attention)
        return valid


@pytest.mark.parametrize("name", TOWERED)
def test_mean_rows_of_the_last_block(name):
    """Under sdpa, against the maps of eager attention; windows and pictures of packed towers have a map each."""
    model, eager = model_of(name), model_of(name, "eager")
    batch = tiny_batch(model)
    with torch.no_grad(), prunekit.apply(model, piped((Rows, {"at": "encoder"}))) as run:
        model(**batch)
    with leaf_after(find(eager).tower.layers[-1]) as found, torch.no_grad(), Maps() as maps:
        _, given = encode(eager, batch)
    hidden = found[0] if found[0].ndim == 3 else found[0][None]
    received, last = [], [one for one in maps.found if one.shape[2] > 1]  # one query each: pooled behind the tower
    while sum(row.shape[1] for row in received) < hidden.shape[1]:
        chances = last.pop()
        real = (chances > 0).any(2, keepdim=True).transpose(2, 3)  # padding is seen by nobody, and asks for nobody
        received.insert(0, ((chances * real).sum(2) / ((chances > 0) & real).sum(2).clamp_min(1)).mean(1))
    units = units_of(eager, "image", given, hidden)
    table = units.mean(torch.cat(received, 1))
    expected = torch.cat([row[:count] for row, count in zip(table, units.counts, strict=True)])
    taken = torch.cat([r[:n] for r, n in zip(Rows.SEEN.pop(), run.report.visual_tokens, strict=True)])
    assert (taken - expected).abs().max() < 1e-9


def test_sizes_are_refused_where_attention_takes_no_mask():
    model = model_of("qwen2_vl")
    batch = tiny_batch(model)
    with (
        prunekit.apply(model, piped((Merging, {"at": "vision.0.mid"}))),
        pytest.raises(prunekit.Unsupported, match="sizes"),
    ):
        model(**batch)


@pytest.mark.parametrize(("name", "kind"), [(n, "video") for n in ("qwen2_5_vl", "glm4v", "llava_next_video")])
def test_videos_are_cut(name, kind):
    model = model_of(name)
    batch = tiny_batch(model, ((kind,), (kind,)))
    with torch.no_grad(), prunekit.apply(model, piped((Norms, {"at": "vision.0", "keep": 0.5}))) as run:
        model(**batch)
    report = run.report
    assert report.kept_tokens == tuple(len(row) for row in report.events[0].kept)
    assert all(after[1] < after[0] for after in report.tower_tokens)


@strategy(sites=ANYWHERE)
class Places:
    """Takes down all that is not of the tower itself."""

    SEEN: ClassVar[list] = []

    @hookimpl
    def select_tokens(self, coords, frames, sizes, valid, count, cut, seed, hidden):
        self.SEEN.append((coords, frames, sizes, valid, count, cut, seed, hidden))
        return top_k_mask(-frames.double(), count, valid)


@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3", "qwen2_vl", "idefics3"])
def test_places_seeds_and_counts_inside_the_tower(name):
    """As the family's file says of each picture, without newlines; the same picture draws the same seed."""
    model = model_of(name)
    batch = tiny_batch(model)
    modality, tower = find(model).modalities[0], find(model).tower
    pipeline = piped((Places, {"at": ["vision.0.mid", "vision.0"], "keep": [0.75, 0.5]}))
    with torch.no_grad(), prunekit.apply(model, pipeline):
        model(**batch)
        model(**batch)
    with leaf_after(tower.layers[0]) as found, torch.no_grad():
        _, given = encode(model, batch)
    units = units_of(model, "image", given, found[0])
    first, second, again, _ = Places.SEEN[-4:]
    for picture, places in enumerate(modality.coords(given, units.counts)):
        there = units.present[picture, : len(places)]
        made = int(there.sum())
        assert torch.equal(first[0][picture, :made, 1:], places[there][:, 1:5]), "rows and columns"
        assert torch.equal(first[1][picture, :made], places[there][:, 0]), "crops"
        assert first[4][picture] == prunekit.Keep(0.75).count(made, made)
        assert int(second[3][picture].sum()) == first[4][picture], "the second cut sees what the first has left"
    assert (first[5], second[5]) == (0, 1)
    assert first[6] == again[6] and len(set(first[6])) == len(first[6])
    assert bool((first[2] == 1).all()) and first[7].shape[-1] == found[0].shape[-1]


@pytest.mark.parametrize("name", [name for name in tiny_names() if takes_video(name) and "glm" not in name])
def test_images_and_videos_of_one_prompt(name):
    """`generate` encodes them before it calls the model, a forward while it runs; some encode videos as images."""
    model = model_of(name)
    inputs = tiny_batch(model, (("image", "video"), ("video",)))
    inside = [{"use": "ex_loud", "at": "vision.0", "keep": 0.5}] if name in TOWERED else []
    for stage in ({"use": "pool", "keep": 0.25}, *inside):
        with registered(), prunekit.apply(model, {"stages": [stage]}) as run:
            model(**inputs, logits_to_keep=1)
            forward = run.report
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            assert forward is not None and run.report == forward
            assert all(0 < few < many for few, many in zip(forward.kept_tokens, forward.visual_tokens, strict=True))
