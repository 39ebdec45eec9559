"""The masked reference checked against itself and against runs that are shortened by hand, without the engine."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from by_hand import ByHand

from prunekit.cost import Cost
from prunekit.records import RunReport, StageEvent
from prunekit.strategy.decisions import LayerAction, LayerPlan
from prunekit.testing.tiny import IMAGE, PER_IMAGE, row_of, tiny_inputs, tiny_llava
from prunekit.verify.equivalence import generate
from prunekit.verify.oracle import MaskedReference, Merge
from prunekit.verify.precision import Float64Throughout

RAGGED = {"images": (1, 2, 0), "text": (12, 9, 15)}
STEPS = 5
RUN, SKIP, NO_ATTENTION, NO_MLP, FILL, FREEZE = (
    LayerAction.RUN, LayerAction.SKIP, LayerAction.SKIP_ATTENTION, LayerAction.SKIP_MLP, LayerAction.FILL_KV,
    LayerAction.FREEZE,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def decided(batch, *events, plans=None, positions="keep"):
    """A report by hand; events are (site, kept indices per row, further fields of the event)."""
    counts = tuple(int((row == IMAGE).sum()) for row in batch["input_ids"])
    entered, records = counts, []
    for site, kept, *more in events:
        records.append(StageEvent("by hand", 0, site, entered, kept, **(more[0] if more else {})))
        entered = tuple(map(len, kept))
    ones = (1,) * len(counts)
    return RunReport(
        pipeline="by hand", sha="0", samples=len(counts), prompt_tokens=tuple(batch["attention_mask"].sum(1).tolist()),
        visual_tokens=counts, kept_tokens=entered, events=tuple(records), layer_tokens=(), mlp_tokens=(), kv_tokens=(),
        plans=plans or (LayerPlan(),) * len(counts), positions=positions, notes=(), cost=Cost(ones, ones, ones, ones),
    )  # fmt: skip


def some_tokens(rows=1, steps=STEPS):
    return torch.randint(IMAGE + 1, 100, (rows, steps), generator=torch.Generator().manual_seed(1))


def same_as_by_hand(*events, plan=None, positions="keep"):
    """Reference and hand agree on prefill and decoding; returns the logits. Events as `ByHand` takes them."""
    model, batch, tokens = tiny_llava(), tiny_inputs(), some_tokens()
    told, merges = [], {}
    for number, (site, kept, options) in enumerate(events):
        more = {"crop": options.get("crop", False)}
        if "sizes" in options:
            more["sizes"] = (tuple(options["sizes"]),)
        if "weights" in options:
            extras = options.get("extras")
            merges[number] = Merge((options["weights"],), None if extras is None else (extras,))
        told.append((site, (tuple(kept),), more))
    report = decided(batch, *told, plans=(plan or LayerPlan(),), positions=positions)
    reference = MaskedReference(model, batch, report, merges)
    logits = reference.logits(tokens)[0]
    by_hand = ByHand(model, batch, events, plan, positions)
    assert (logits - by_hand.logits(tokens[0])).abs().max() < 1e-12
    held = [sum(slot is not None for slot, *_ in layer) for layer in by_hand.kv]
    assert reference.tables.kv_tokens() == (tuple(held),)
    return logits


def averages(kept, entered, extras=0):
    """Rows that sum to one, all different."""
    weights = torch.rand(kept, entered + extras, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return weights / weights.sum(1, keepdim=True)


FOUR, TWO = (0, 3, 7, 15), (3, 15)
EXTRA = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
CUTS = {
    "dense": [],
    "encoder": [("encoder", FOUR, {})],
    "before": [("2", FOUR, {})],
    "before-the-first": [("0", (), {})],
    "mid": [("2.mid", FOUR, {})],
    "after": [("2.after", FOUR, {})],
    "after-the-last": [("5.after", FOUR, {})],
    "prefill-end": [("prefill_end", FOUR, {})],
    "crop": [("3", FOUR, {"crop": True})],
    "crop-mid": [("3.mid", FOUR, {"crop": True})],
    "merge": [("3", FOUR, {"weights": averages(4, PER_IMAGE)})],
    "merge-mid": [("3.mid", FOUR, {"weights": averages(4, PER_IMAGE)})],
    "merge-extras": [("encoder", FOUR, {"weights": averages(4, PER_IMAGE, 2), "extras": EXTRA})],
    "sizes": [("2", FOUR, {"sizes": (2.0, 6.0, 1.0, 7.0)})],
    "sizes-mid": [("2.mid", FOUR, {"sizes": (2.0, 6.0, 1.0, 7.0), "weights": averages(4, PER_IMAGE)})],
    "two": [("1", FOUR, {"sizes": (2.0, 6.0, 1.0, 7.0)}), ("3", TWO, {"weights": averages(2, 4), "sizes": (9.0, 7.0)})],
    "everywhere": [
        ("encoder", (0, 1, 3, 7, 9, 15), {}), ("1.mid", FOUR, {"crop": True}), ("4.after", TWO, {"sizes": (4.0, 2.0)}),
        ("prefill_end", (15,), {}),
    ],
}  # fmt: skip
PLANS = {
    "run": LayerPlan(),
    "skip": LayerPlan({1: SKIP, 3: NO_ATTENTION, 4: NO_MLP}),
    "fill": LayerPlan({2: FILL, 5: FILL}),
    "freeze": LayerPlan({2: FREEZE, 3: FREEZE}),
    "prefill-only": LayerPlan({1: SKIP, 2: NO_ATTENTION, 4: NO_MLP}, decode={}),
    "decode-only": LayerPlan({}, decode={0: SKIP, 3: NO_ATTENTION, 5: NO_MLP}),
    "fill-and-skip": LayerPlan({2: FILL, 4: FREEZE}, decode={2: SKIP, 4: NO_MLP}),
}


@cache
def without_plan(cut, positions):
    return same_as_by_hand(*CUTS[cut], positions=positions)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("cut", CUTS)
def test_cuts_are_cuts_by_hand(cut, positions):
    logits = without_plan(cut, positions)
    if cut not in ("dense", "after-the-last"):
        assert (logits - without_plan("dense", "keep")).abs().max() > 1e-3, "it must matter"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("cut", ["dense", "crop", "two", "merge-mid"])
def test_plans_are_plans_by_hand(plan, cut):
    if plan == "freeze" and cut == "merge-mid":
        cut = "merge"  # what a frozen token becomes inside its layer is nobody's business
    logits = same_as_by_hand(*CUTS[cut], plan=PLANS[plan], positions="renumber" if cut == "two" else "keep")
    if plan != "run":
        run = without_plan(cut, "renumber" if cut == "two" else "keep")
        assert (logits - run).abs().max() > 1e-3, "it must matter"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [{"images": (1,)}, RAGGED], ids=["one", "ragged"])
def test_without_decisions_it_is_the_stock_model_with_its_cache(attention, rows):
    model, batch = tiny_llava(attention), tiny_inputs(**rows)
    output = generate(model, batch, max_new_tokens=9)
    tokens = output.sequences[:, batch["input_ids"].shape[1] :]
    reference = MaskedReference(model, batch, decided(batch)).logits(tokens)
    assert (reference - torch.stack(output.logits, 1)).abs().max() < 1e-12


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_rows_of_a_ragged_batch_are_their_own_runs(positions):
    model, batch, tokens = tiny_llava(), tiny_inputs(**RAGGED), some_tokens(3)
    first, second = ((1, 4, 9, 12), (0, 3, 17, 20, 31), ()), ((4, 9), (3, 31), ())
    sizes = ((2.0, 3.0), (1.5, 7.0), ())
    plans = (LayerPlan({1: SKIP}), LayerPlan({1: FILL, 4: FREEZE}), LayerPlan({}, {2: SKIP}))

    def report(batch, rows):
        events = (("1", first[rows]), ("3", second[rows], {"sizes": sizes[rows], "crop": True}))
        return decided(batch, *events, plans=plans[rows], positions=positions)

    together = MaskedReference(model, batch, report(batch, slice(None))).logits(tokens)
    for row in range(3):
        single = row_of(batch, row)
        alone = MaskedReference(model, single, report(single, slice(row, row + 1))).logits(tokens[row : row + 1])
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


def test_it_counts_what_passes_the_mlps():
    model, batch = tiny_llava(), tiny_inputs()
    plan = LayerPlan({0: SKIP, 1: FREEZE, 4: NO_MLP, 5: FILL})
    report = decided(batch, ("2.mid", (FOUR,)), plans=(plan,))
    prompt, words = batch["input_ids"].shape[1], batch["input_ids"].shape[1] - PER_IMAGE
    tables = MaskedReference(model, batch, report).tables
    assert tables.layer_tokens() == ((prompt, prompt, prompt, words + 4, words + 4, words + 4),)
    assert tables.mlp_tokens() == ((0, words, words + 4, words + 4, 0, 0),)
    assert tables.kv_tokens() == ((0, prompt, prompt, words + 4, words + 4, words + 4),)


def test_it_refuses_reports_that_contradict_themselves():
    model, batch = tiny_llava(), tiny_inputs()
    with pytest.raises(ValueError, match="kept"):
        MaskedReference(model, batch, decided(batch, ("1", ((1, 2),)), ("2", ((3,),))))
    with pytest.raises(ValueError, match="inputs have"):
        MaskedReference(model, tiny_inputs((2,)), decided(batch))
    with pytest.raises(ValueError, match="plans for"):
        MaskedReference(model, batch, decided(batch, plans=(LayerPlan(), LayerPlan())))


def test_hooks_are_gone_afterwards():
    model, batch = tiny_llava(), tiny_inputs()
    plans = (LayerPlan({1: SKIP, 2: NO_MLP, 3: NO_ATTENTION}),)

    def hooks():
        return [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()]

    generate(model, batch, max_new_tokens=1)  # transformers puts hooks of its own on
    before = hooks()
    MaskedReference(model, batch, decided(batch, plans=plans)).logits(some_tokens(steps=1))
    assert hooks() == before
