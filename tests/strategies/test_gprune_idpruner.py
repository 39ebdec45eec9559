"""G-Prune and the rule of IDPruner: the authors' own choices, naive twins, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from asking import ask, cases, stage_of
from golden_files import drawn
from plain import SEEDS, best, cosine, kept, sample, shares

import prunekit
from prunekit import hookimpl
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent

both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def mosaic(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The whole image, 24 x 24, then joined crops with a newline behind each row."""
    whole = [(0, i // 24, i % 24, 24, 24) for i in range(576)]
    crops = [
        (0, row, column, rows, columns) if column < columns else (0, -1, -1, rows, columns)
        for row in range(rows)
        for column in range(columns + 1)
    ]
    return {
        "coords": torch.tensor(whole + crops),
        "frames": torch.tensor([0] * len(whole) + [1 + (n % 2) for n in range(len(crops))]),
    }


@both
@pytest.mark.parametrize("case", cases("gprune", 2))
def test_gprune_as_its_authors(case, dtype):
    """In each of their graphs the same order; with a ratio of a half, of which no count is rounded, the same set."""
    t, p, expected = drawn(case, dtype), case["params"], case["expected"]
    stage = stage_of("gprune")
    places = mosaic(p["rows"], p["cols"])
    features = t["centres"][torch.arange(len(t["individual"])) % p["clusters"]] + t["individual"]
    shown = (places["coords"][:, 1] >= 0).nonzero()[:, 0]
    tokens = features
    graphs = {"thumbnail": shown[:576], "crops": shown[576:]}
    for name, members in graphs.items():
        authors = expected[f"kept_{name}_in_score_order"]
        assert len(authors) == int(p["ratio"] * len(members))
        order = stage.strategy._importance(tokens[members]).argsort(descending=True, stable=True)
        assert members[order[: len(authors)]].tolist() == authors
    if p["ratio"] == 0.5:
        keep = ask(stage, "select_tokens", hidden=tokens, count=len(expected["kept_all_sorted"]), **places)
        assert kept(keep) == expected["kept_all_sorted"]


def importance(tokens: list[list[float]]) -> list[float]:
    near = [[cosine(x, y) for y in tokens] for x in tokens]
    edges = [[j for j, one in enumerate(row) if one >= 0.5 or i == j] for i, row in enumerate(near)]
    rank = [math.sqrt(sum(a * a for a in x)) for x in tokens]
    flow = [[0.0] * len(tokens) for _ in tokens]
    for i, out in enumerate(edges):
        powers = {j: math.exp((near[i][j] - 1) / 0.03) for j in out}
        for j, power in powers.items():
            flow[i][j] = power / sum(powers.values())
    for _ in range(5):
        rank = [sum(rank[i] * flow[i][j] for i in range(len(tokens))) for j in range(len(tokens))]
    return [one / len(out) for one, out in zip(rank, edges, strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
def test_gprune_as_loops(seed):
    """Tied tokens have three directions and one length, so that in each the importance is the same."""
    one = sample(seed)
    tokens = [[float(k == i % 3) for k in range(8)] for i in range(len(one))] if one.tied else one.vectors()
    stay = one.newlines[: one.count]
    graphs: dict[tuple[int, int], list[int]] = {}
    for i, at in enumerate(one.coords):
        if at[1] >= 0:
            graphs.setdefault((at[0], min(one.frames[i], 1)), []).append(i)
    parts = [graphs[key] for key in sorted(graphs)]
    for members, wanted in zip(parts, shares(one.count - len(stay), [len(part) for part in parts]), strict=True):
        rank = dict(zip(members, importance([tokens[i] for i in members]), strict=True))
        stay = stay + best(members, rank.__getitem__, wanted)
    keep = ask(stage_of("gprune"), "select_tokens", hidden=torch.tensor(tokens).double(), count=one.count, **one.places)
    assert kept(keep) == sorted(stay) and len(stay) == one.count


def test_equal_tokens_of_gprune_stay_in_order_and_zeros_do_no_harm():
    places = {"coords": torch.tensor([(0, 0, i, 1, 6) for i in range(6)]), "frames": torch.zeros(6, dtype=torch.int64)}
    for tokens in (torch.zeros(6, 4), torch.ones(6, 4)):
        assert kept(ask(stage_of("gprune"), "select_tokens", hidden=tokens, count=2, **places)) == [0, 1]


def test_norms_beyond_float16_do_no_harm():
    """The norm of each is above 65504, which float16 ends at."""
    tokens = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3).half() * 2e4
    assert tokens.isfinite().all() and not tokens.norm(dim=-1).isfinite().any()
    places = {"coords": torch.tensor([(0, i // 4, i % 4, 4, 4) for i in range(16)]), "frames": torch.zeros(16).long()}
    stage = stage_of("gprune")
    half, wide = (ask(stage, "select_tokens", hidden=x, count=7, **places) for x in (tokens, tokens.float()))
    assert torch.equal(half, wide)


@both
@pytest.mark.parametrize("case", cases("idpruner_mmr", 3))
def test_idpruner_as_its_authors(case, dtype):
    """Given their raw scores in the place of attention."""
    t, p = drawn(case, dtype), case["params"]
    stage = stage_of("idpruner", balance=p["mmr_lambda"], at_once=p["parallel_k"])
    scores = ask(stage, "score_tokens", encoder_attention=t["raw_score"])
    keep = ask(stage, "select_tokens", scores=scores, hidden=t["tokens"], count=p["keep"])
    assert kept(keep) == case["expected"]["kept_sorted"]


@pytest.mark.parametrize("seed", SEEDS)
def test_idpruner_as_loops(seed):
    one = sample(seed)
    attention, tokens = one.numbers(), one.vectors()
    balance, at_once = one.draw.choice([0.0, 0.5, 0.75, 1.0]), one.draw.choice([1, 1, 4])
    low, high = min(attention), max(attention)
    weight = [(a - low) / (high - low) if high > low else 0.0 for a in attention]
    chosen: list[int] = []
    while len(chosen) < one.count:
        gains = {
            i: balance * weight[i] - (1 - balance) * max(cosine(tokens[i], tokens[j]) for j in chosen)
            if chosen
            else weight[i]
            for i in range(len(one))
            if i not in chosen
        }
        chosen += best(gains, gains.__getitem__, min(at_once, one.count - len(chosen)))
    stage = stage_of("idpruner", balance=balance, at_once=at_once)
    keep = ask(
        stage, "select_tokens", scores=torch.tensor(attention).double(), hidden=torch.tensor(tokens).double(),
        count=one.count,
    )  # fmt: skip
    assert kept(keep) == sorted(chosen)


def test_other_importance_by_a_wrapper():
    """Whoever has a trained scorer puts it in the place of attention."""

    class Scorer:
        @hookimpl(wrapper=True)
        def score_tokens(self, hidden):
            yield
            return -torch.arange(len(hidden), dtype=torch.float64)

    pipeline = prunekit.load({"stages": [{"use": "idpruner", "keep": 0.5, "balance": 1.0}]})
    pipeline.stages[0].manager.register(Scorer())
    model = tiny_llava()
    with prunekit.apply(model, pipeline) as run:
        model(**tiny_inputs())
    assert run.report.events[0].kept == (tuple(range(8)),)


@pytest.mark.parametrize(("family", "query"), [("llava", "cls"), ("llava_onevision", "mean"), ("qwen2_5_vl", "mean")])
def test_idpruner_on_towers_with_and_without_cls(family, query):
    model = tiny_model(family)
    stages = [{"use": "random", "keep": 0.7}, {"use": "idpruner", "keep": 0.4, "query": query}]
    assert_equivalent(model, {"stages": stages}, tiny_batch(model), steps=2)


def test_refusals():
    with pytest.raises(prunekit.SpecError, match="this vision tower has no CLS token"):
        pipeline = prunekit.load({"stages": [{"use": "idpruner", "keep": 0.5, "query": "cls"}]})
        pipeline.bind(shape_of(tiny_model("qwen2_vl")))
    with pytest.raises(prunekit.SpecError, match=r"balance: is 2\.0; it is from 0 to 1"):
        stage_of("idpruner", balance=2.0)
    with pytest.raises(prunekit.SpecError, match="at_once: is 0; take one token at least"):
        stage_of("idpruner", at_once=0)
    with pytest.raises(prunekit.SpecError, match=r"temperature: is 0\.0; it is above 0"):
        stage_of("gprune", temperature=0.0)
    with pytest.raises(prunekit.SpecError, match="steps: is -1; it is a number from 0"):
        stage_of("gprune", steps=-1)
