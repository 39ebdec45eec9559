"""The masked reference checked against itself and against forwards that are shortened by hand, without the engine."""

from __future__ import annotations

import pytest
import torch

from prunekit.cost import Cost
from prunekit.decisions import LayerAction
from prunekit.report import RunReport, StageEvent
from prunekit.testing.equivalence import generate
from prunekit.testing.oracle import MaskedReference
from prunekit.testing.precision import Float64Throughout
from prunekit.testing.tiny import IMAGE, PER_IMAGE, row_of, tiny_inputs, tiny_llava

RAGGED = {"images": (1, 2, 0), "text": (12, 9, 15)}


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def decided(batch, *events, actions=None):
    """A report by hand; events are (site, kept indices per row)."""
    counts = tuple(int((row == IMAGE).sum()) for row in batch["input_ids"])
    entered, records = counts, []
    for site, kept in events:
        records.append(StageEvent("by hand", site, entered, kept))
        entered = tuple(map(len, kept))
    return RunReport(
        "by hand", "0", len(counts), tuple(batch["attention_mask"].sum(1).tolist()), counts, entered, tuple(records),
        (), (), actions or {}, (), Cost((1,), (1,), (1,), (1,)),
    )  # fmt: skip


def ones_by_hand(model, batch, cut, kept, actions=None, merge=None):
    """Logits of the last token of one unpadded prompt, in a loop over the layers that really shortens the sequence."""
    decoder = model.get_decoder()
    state = decoder.embed_tokens(batch["input_ids"])
    slots = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
    state[0, slots] = torch.cat(list(model.get_image_features(batch["pixel_values"]).pooler_output))
    positions = torch.arange(state.shape[1])[None]
    for number, layer in enumerate(decoder.layers):
        if number == cut:
            keep = torch.ones(state.shape[1], dtype=torch.bool)
            keep[slots] = False
            keep[slots[list(kept)]] = True
            if merge is not None:
                state[0, slots[list(kept)]] = merge @ state[0, slots]
            state, positions = state[:, keep], positions[:, keep]
        action = (actions or {}).get(number, LayerAction.RUN)
        if action is LayerAction.SKIP:
            continue
        if action is not LayerAction.SKIP_ATTENTION:
            rope = decoder.rotary_emb(state, positions)
            causal = torch.ones(1, 1, state.shape[1], state.shape[1], dtype=torch.bool).tril()
            state = state + layer.self_attn(layer.input_layernorm(state), rope, causal)[0]
        if action is not LayerAction.SKIP_MLP:
            state = state + layer.mlp(layer.post_attention_layernorm(state))
    return model.lm_head(decoder.norm(state[:, -1]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [{"images": (1,)}, RAGGED], ids=["one", "ragged"])
def test_without_decisions_it_is_the_stock_model_with_its_cache(attention, rows):
    model, batch = tiny_llava(attention), tiny_inputs(**rows)
    output = generate(model, batch, max_new_tokens=9)
    tokens = output.sequences[:, batch["input_ids"].shape[1] :]
    reference = MaskedReference(model, batch, decided(batch)).logits(tokens)
    assert (reference - torch.stack(output.logits, 1)).abs().max() < 1e-12


@pytest.mark.parametrize("cut", [0, 2, 5])
@pytest.mark.parametrize("kept", [(0, 3, 7, 15), ()], ids=["four", "none"])
def test_masking_is_dropping_by_hand(cut, kept):
    model, batch = tiny_llava(), tiny_inputs()
    actions = {1: LayerAction.SKIP, 3: LayerAction.SKIP_ATTENTION, 4: LayerAction.SKIP_MLP}
    report = decided(batch, (str(cut), (kept,)), actions=actions)
    reference = MaskedReference(model, batch, report).logits(torch.zeros(1, 1, dtype=torch.long))[:, 0]
    assert (reference - ones_by_hand(model, batch, cut, kept, actions)).abs().max() < 1e-12


@pytest.mark.parametrize("site", ["encoder", "3"])
def test_a_merge_is_a_merge_by_hand(site):
    model, batch = tiny_llava(), tiny_inputs()
    merge = torch.rand(3, PER_IMAGE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merge /= merge.sum(1, keepdim=True)
    report = decided(batch, (site, ((2, 6, 11),)))
    reference = MaskedReference(model, batch, report, {0: (merge,)}).logits(torch.zeros(1, 1, dtype=torch.long))[:, 0]
    cut = 0 if site == "encoder" else int(site)
    assert (reference - ones_by_hand(model, batch, cut, (2, 6, 11), merge=merge)).abs().max() < 1e-12
    plain = MaskedReference(model, batch, report).logits(torch.zeros(1, 1, dtype=torch.long))[:, 0]
    assert (reference - plain).abs().max() > 1e-3, "the merge must matter"


def test_rows_of_a_ragged_batch_are_their_own_runs():
    model, batch = tiny_llava(), tiny_inputs(**RAGGED)
    tokens = torch.randint(4, 100, (3, 5), generator=torch.Generator().manual_seed(1))
    first, second = ((1, 4, 9, 12), (0, 3, 17, 20, 31), ()), ((4, 9), (3, 31), ())
    together = MaskedReference(model, batch, decided(batch, ("1", first), ("3", second))).logits(tokens)
    for row in range(3):
        single = row_of(batch, row)
        report = decided(single, ("1", first[row : row + 1]), ("3", second[row : row + 1]))
        alone = MaskedReference(model, single, report).logits(tokens[row : row + 1])
        assert (together[row] - alone[0]).abs().max() < 1e-12


def test_sdpa_and_eager_agree_and_rows_of_attention_sum_to_one():
    batch = tiny_inputs(**RAGGED)
    report = decided(batch, ("2", ((1, 4), (0, 30), ())))
    tokens = torch.zeros(3, 2, dtype=torch.long)
    eager = MaskedReference(tiny_llava("eager"), batch, report)
    assert (MaskedReference(tiny_llava(), batch, report).logits(tokens) - eager.logits(tokens)).abs().max() < 1e-12
    row = eager.attention(4)[0, :, -1]
    assert (row.sum(-1) - 1).abs().max() < 1e-12
    assert (row > 0).sum(-1).tolist() == [int(batch["attention_mask"][0].sum()) - PER_IMAGE + 2] * row.shape[0]


def test_it_refuses_reports_that_contradict_themselves():
    model, batch = tiny_llava(), tiny_inputs()
    with pytest.raises(ValueError, match="kept"):
        MaskedReference(model, batch, decided(batch, ("1", ((1, 2),)), ("2", ((3,),))))
    with pytest.raises(ValueError, match="inputs have"):
        MaskedReference(model, tiny_inputs((2,)), decided(batch))


def test_hooks_are_gone_afterwards():
    model, batch = tiny_llava(), tiny_inputs()
    actions = {1: LayerAction.SKIP, 2: LayerAction.SKIP_MLP, 3: LayerAction.SKIP_ATTENTION}
    tokens = torch.zeros(1, 1, dtype=torch.long)

    def hooks():
        return [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()]

    generate(model, batch, max_new_tokens=1)  # transformers puts hooks of its own on
    before = hooks()
    MaskedReference(model, batch, decided(batch, actions=actions)).logits(tokens)
    assert hooks() == before
