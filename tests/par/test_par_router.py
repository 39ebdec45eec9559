"""The network of PAR: padding, directions of attention, noise, and what it costs."""

from __future__ import annotations

import pytest
import torch
from prunekit_strategies.par.config import ATTENTION, RouterConfig, config_of
from prunekit_strategies.par.router import Noise, Router
from prunekit_strategies.par.starting import random_router, router_of_layers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunekit import ModelShape, Unsupported
from prunekit.cost import prefill_flops
from prunekit.families import find
from prunekit.testing.tiny import tiny_llava

LAYERS, HIDDEN = 5, 12
SHAPE_7B = ModelShape("llava", 32, 4096, 32, 128, 4 * 4096**2, 3 * 4096 * 11008, 2 * 4096, 576, 4096**2)


def router(attention="bidirectional", depth=2, width=16, seed=0) -> Router:
    config = RouterConfig(HIDDEN, LAYERS, depth, width, 2, 1, width // 2, 24, attention)
    made = random_router(config, seed).double().requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)  # peaked attention, which notices a wrong mask
    return made


def prompt(before=3, visual=6, after=4, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (1, S, H), visual and valid (1, S) of: text, one image, the question."""
    total = before + visual + after
    embeds = torch.randn(1, total, HIDDEN, generator=torch.Generator().manual_seed(seed)).double()
    shown = torch.zeros(1, total, dtype=torch.bool)
    shown[:, before : before + visual] = True
    return embeds, shown, torch.ones_like(shown)


def padded(parts, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(part[0].shape[1] for part in parts)
    rows = []
    for part in parts:
        missing = longest - part[0].shape[1]
        pad = (missing, 0) if left else (0, missing)
        embeds = nn.functional.pad(part[0], (0, 0, *pad), value=7.0)
        rows.append((embeds, *(nn.functional.pad(one, pad, value=False) for one in part[1:])))
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("noise", [None, 1.0], ids=["plain", "noisy"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_changes_nothing(attention, noise, left):
    parts = [prompt(), prompt(visual=9, after=2, seed=1), prompt(before=1, visual=1, after=1, seed=2)]
    model, (embeds, visual, valid) = router(attention), padded(parts, left)
    given = None if noise is None else Noise(noise, (3, 4, 5))
    tokens, layers = model(embeds, visual, valid, given)
    for row, part in enumerate(parts):
        alone = None if noise is None else Noise(noise, (3 + row,))
        single, own = model(*part, alone)
        assert (tokens[row, valid[row]] - single[0]).abs().max() < 1e-12
        assert (layers[row] - own[0]).abs().max() < 1e-12


def test_causal_scores_of_tokens_do_not_depend_on_the_question_and_the_others_do():
    embeds, visual, valid = prompt()
    other = embeds.clone()
    other[:, -4:] += 1
    for attention, blind in (("causal", True), ("bidirectional", False), ("text_first", False)):
        model = router(attention)
        (tokens, layers), (moved, shifted) = model(embeds, visual, valid), model(other, visual, valid)
        assert torch.equal(tokens[visual], moved[visual]) is blind, attention
        assert (layers - shifted).abs().max() > 1e-3


def test_text_first_equals_causal_on_the_reordered_prompt():
    embeds, visual, valid = prompt()
    order = (visual[0].long()).argsort(stable=True)
    tokens, layers = router("text_first")(embeds, visual, valid)
    again, own = router("causal")(embeds[:, order], visual[:, order], valid)
    assert (tokens[:, order] - again).abs().max() < 1e-12 and (layers - own).abs().max() < 1e-12


def test_causal_equals_a_plain_loop_over_prefixes():
    embeds, visual, valid = prompt()
    tokens, _ = router("causal")(embeds, visual, valid)
    plain = router("bidirectional", depth=1)
    causal = router("causal", depth=1)
    scores, _ = causal(embeds, visual, valid)
    # One block: a position sees exactly the positions before it, so the last one of a prefix sees all of that prefix.
    for end in range(1, embeds.shape[1] + 1):
        part = [one[:, :end] for one in (embeds, visual, valid)]
        cut, _ = causal(*part)
        assert (cut[:, end - 1] - scores[:, end - 1]).abs().max() < 1e-12
    assert (plain(embeds, visual, valid)[0] - scores).abs().max() > 1e-3
    assert tokens.shape == (1, embeds.shape[1])


def test_noise_is_seeded_and_there_under_every_kernel():
    model, given = router(), prompt()
    plain = torch.cat(model(*given), 1)
    one, same, other = (torch.cat(model(*given, Noise(1.0, (seed,))), 1) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert (one - plain).abs().max() > 1e-3
    assert torch.equal(plain, torch.cat(model(*given), 1)), "without a request there is none"
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        assert (torch.cat(model(*given, Noise(1.0, (1,))), 1) - one).abs().max() < 1e-12


def test_a_larger_deviation_moves_scores_further():
    model, given = router(), prompt()
    plain = torch.cat(model(*given), 1)
    small, large = (
        sum(float((torch.cat(model(*given, Noise(std, (seed,))), 1) - plain).abs().mean()) for seed in range(8))
        for std in (0.1, 2.0)
    )
    assert 0 < small < large


def test_scatter_sets_visual_tokens_apart_by_their_place_among_each_other():
    """What is kept of tokens that are all alike covers the image evenly: no gap is much longer than the mean."""
    plain, apart = (
        RouterConfig(HIDDEN, LAYERS, 1, 16, 2, 2, 8, 24, "bidirectional", scatter=one) for one in (0.0, 3.0)
    )
    given = prompt()
    made, other = (random_router(one, 0).double().requires_grad_(False) for one in (plain, apart))
    (tokens, layers), (moved, same) = made(*given), other(*given)
    visual = given[1]
    assert torch.equal(layers, same)
    for row in range(len(visual)):
        offset = (moved - tokens)[row][visual[row]]
        golden = [3 * ((place + 1) * (5**0.5 - 1) / 2 % 1) for place in range(len(offset))]
        assert torch.allclose(offset, torch.tensor(golden, dtype=offset.dtype), atol=1e-5)
    alike = torch.ones(1, 145).bool()
    kept = other._apart(alike, torch.zeros(1, 145))[0].topk(36).indices.sort().values
    assert int(kept.diff().max()) <= 8


def test_distinct_layer_tokens_give_layers_scores_of_their_own():
    """From the start: the same order for every prompt, where small ones are scored by what they attend to."""
    config = RouterConfig(HIDDEN, LAYERS, 1, 16, 2, 2, 8, 24, "bidirectional")
    spread = {}
    for kind in ("normal", "distinct"):
        made = random_router(config, 0, kind).requires_grad_(False)
        _, layers = made(torch.randn(64, 9, HIDDEN), torch.ones(64, 9).bool(), torch.ones(64, 9).bool())
        spread[kind] = float(layers.mean(0).std() / layers.std(0).mean())
    assert spread["distinct"] > 3 * spread["normal"]


def test_zero_layer_tokens_differ_by_position():
    config = RouterConfig(HIDDEN, LAYERS, 2, 16, 2, 2, 8, 24, "causal")
    made = random_router(config, 0, "zeros").double()
    assert not made.layer_tokens.any()
    for parameter in made.parameters():
        parameter.data *= 20 if parameter.ndim == 2 else 1
    _, layers = made(*prompt())
    assert layers.unique().numel() == LAYERS


@pytest.mark.parametrize("width", [256, 512, "model"])
@pytest.mark.parametrize("depth", [1, 2])
def test_flops_are_what_torch_counts(width, depth):
    config = config_of(SHAPE_7B, depth, width)
    with torch.device("meta"):
        model, prompt = Router(config), 640
        embeds, visual = torch.empty(1, prompt, 4096), torch.empty(1, prompt, dtype=torch.bool)
    config_there = torch.ones(1, prompt, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        x = embeds if model.project is None else model.project(embeds)
        x = torch.cat([x, model.layer_tokens.expand(1, -1, -1)], 1)
        rotation = torch.empty(1, 1, x.shape[1], config.head_dim), torch.empty(1, 1, x.shape[1], config.head_dim)
        for block in model.blocks:
            x = block(x, rotation, torch.empty(1, 1, x.shape[1], x.shape[1]))
        model.score(model.norm(x))
    assert counter.get_total_flops() == config.flops(prompt) and visual.shape == config_there.shape


def test_the_default_router_costs_less_than_three_per_cent_of_a_7b_prefill():
    for prompt in (640, 700, 1200):
        dense = prefill_flops(SHAPE_7B, [prompt] * 32)
        assert config_of(SHAPE_7B).flops(prompt) < 0.002 * dense
        assert 0.03 < config_of(SHAPE_7B, width="model").flops(prompt) / dense < 0.04


def test_copied_blocks_compute_what_the_models_layers_compute():
    lvlm = tiny_llava(layers=6)
    parts = find(lvlm)
    config = config_of(parts.shape(), depth=2, width="model", attention="causal")
    made = router_of_layers(config, parts.layers, 10000.0, seed=0).double().requires_grad_(False)
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.arange(9)[None]
    mine = x
    angles = made._rotation(ids, mine)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    for block in made.blocks:
        mine = block(mine, angles, mask)
    theirs = x
    rotary = parts.text.rotary_emb(theirs, ids)
    for layer in parts.layers[:2]:
        found = layer(theirs, attention_mask=mask, position_ids=ids, position_embeddings=rotary)
        theirs = found[0] if isinstance(found, tuple) else found
    assert (mine - theirs).abs().max() < 1e-5  # the copies are float32


def test_copies_are_refused_where_they_cannot_be_made():
    parts = find(tiny_llava())
    shape = parts.shape()
    with pytest.raises(Unsupported, match="width: model"):
        router_of_layers(config_of(shape, width=16), parts.layers, 1e4, 0)
    with pytest.raises(Unsupported, match="copies 9 blocks, but the model has 6"):
        router_of_layers(config_of(shape, 9, "model"), parts.layers, 1e4, 0)
    with pytest.raises(Unsupported, match="Llama's type"):
        router_of_layers(config_of(shape, 1, "model"), [nn.Linear(2, 2)], 1e4, 0)
    parts.layers[0].self_attn.q_norm = nn.LayerNorm(8)
    with pytest.raises(Unsupported, match="Llama's type"):
        router_of_layers(config_of(shape, 1, "model"), parts.layers, 1e4, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth: must be"), ({"heads": 3, "kv_heads": 2}, "heads: heads"),
        ({"head_dim": 7}, "even width"), ({"attention": "both"}, "attention: must be one of"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_router(change, message):
    given = {"hidden": 8, "layers": 2, "depth": 1, "width": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "mlp": 8}
    with pytest.raises(ValueError, match=message):
        RouterConfig(**{**given, "attention": "causal", **change})
