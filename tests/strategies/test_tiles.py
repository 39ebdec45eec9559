"""HiRED and GlobalCom2: authors' choices, loops over lists, images in tiles on a real layout, what is refused."""

from __future__ import annotations

import math
from random import Random

import naive
import pytest
import torch
from asking import ask, cases, stage_of
from golden_files import drawn
from layouts import Layout, drawn_count, drawn_layout, drawn_scores, grid, layout, tiled
from selection_cost import share_of_prefill

import prunekit
from prunekit import EncoderRows, SpecError
from prunekit.testing.contract import contract
from prunekit.testing.subject import BATCHES
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
seeds = pytest.mark.parametrize("seed", range(60))


def select(use: str, where: Layout, count: int | None, attention, options: dict | None = None) -> list[int]:
    stage = stage_of(use, **(options or {}))
    keep = ask(stage, "select_tokens", **where.places_as_named, encoder_attention=attention, count=count)
    return keep.nonzero()[:, 0].tolist()


def of_view(where: Layout, chosen: list[int], frame: int) -> list[int]:
    """Numbers within a complete view."""
    return [
        int(where.coords[i, 1] * where.coords[i, 4] + where.coords[i, 2])
        for i in chosen
        if where.frames[i] == frame and where.coords[i, 1] >= 0
    ]


def by_frames(where: Layout, views: torch.Tensor) -> torch.Tensor:
    """One number for each token of a layout from those of each view's raster, (views, N); newlines get 0."""
    places = (where.coords[:, 1] * where.coords[:, 4] + where.coords[:, 2]).clamp(min=0)
    return torch.where(where.coords[:, 1] < 0, 0.0, views[where.frames, places])


SHAPES = {"n576-2x2-0.2": (2, 2), "n144-2x2-odd": (2, 2), "n144-1x2": (1, 2), "n144-1x3": (1, 3)}


# HiRED


@both_precisions
@pytest.mark.parametrize("case", cases("hired", 4))
def test_hired_as_its_authors(case, dtype):
    """`grid: official`: stripes of the whole view's raster, quotas rounded down."""
    tensors, params, expected = drawn(case, dtype), case["params"], case["expected"]
    assert stage_of("hired").inputs["encoder_attention"] == (EncoderRows(0, heads="sum"), EncoderRows(heads="sum"))
    down, across = SHAPES[case["id"]]
    side = math.isqrt(params["patches"])
    where = layout(tiled(side, [side] * down, [side] * across))
    rows = tuple(by_frames(where, tensors[name][:, :, 1:].sum(1)) for name in ("cls_row_first", "cls_row_late"))
    count = int(params["views"] * params["patches"] * params["rate"])
    chosen = select("hired", where, count, rows, {"alpha": params["alpha"], "grid": "official"})
    assert len(chosen) == int(expected["count"])
    for view, quota in enumerate(expected["quotas"]):
        kept = of_view(where, chosen, view)
        assert len(kept) == quota and kept == expected["kept_sorted"][str(view)]


def test_hired_gives_the_whole_image_half():
    """LLaVA-NeXT with four tiles at a fifth: 288 tokens of the whole and 288 of the tiles."""
    where = layout(tiled(24, [24, 24], [24, 24]))
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(len(where), generator=generator), torch.rand(len(where), generator=generator)
    chosen = select("hired", where, 576, rows)
    assert len(chosen) == 576 and len(of_view(where, chosen, 0)) == 288


def hired(where, tokens, share, first, late, alpha, official):
    """Tokens of one image that stay."""
    frames, coords = where.frames.tolist(), where.coords.tolist()
    views = {frame: [i for i in tokens if frames[i] == frame] for frame in sorted({frames[i] for i in tokens})}
    groups = {frame: number for number, frame in enumerate(views)}
    under = naive.tile_of(
        [coords[i] for i in tokens], where.places[tokens].tolist(), [groups[frames[i]] for i in tokens]
    )
    seen = {i: list(views)[number] for i, number in zip(tokens, under, strict=True) if number >= 0}
    if not seen:
        sizes = list(map(len, views.values()))
        quota = dict(zip(views, naive.quotas(sizes, share, sizes), strict=True))
    else:
        own = frames[next(iter(seen))]
        whole, tiles = views[own], {frame: of for frame, of in views.items() if frame != own}
        room = sum(map(len, tiles.values()))
        mine = int(share * alpha) if official else max(int(share * alpha), share - room)
        mine = min(mine, len(whole))
        marked = naive.best_first(whole, lambda i: first[i])[: int(len(whole) * (1 - alpha) + 1e-9)]
        if official:
            _, _, _, rows, columns = coords[whole[0]]
            stripe = [
                frame
                for k, frame in enumerate(tiles)
                for _ in range(
                    math.ceil(rows * columns * (k + 1) / len(tiles)) - math.ceil(rows * columns * k / len(tiles))
                )
            ]
            seen = {i: stripe[coords[i][1] * columns + coords[i][2]] for i in whole}
        hits = [sum(seen.get(i) == frame for i in marked) for frame in tiles]
        if official:
            shared = [
                min(int(hit / max(sum(hits), 1) * min(share - mine, room)), len(of))
                for hit, of in zip(hits, tiles.values(), strict=True)
            ]
        else:
            shared = naive.quotas(hits, share - mine, list(map(len, tiles.values())))
        quota = {own: mine, **dict(zip(tiles, shared, strict=True))}
    return [i for frame, of in views.items() for i in naive.best_first(of, lambda i: late[i])[: quota[frame]]]


@seeds
@pytest.mark.parametrize("official", [False, True])
def test_hired_as_loops(seed, official):
    rng = Random(seed)
    where, alpha = drawn_layout(rng), rng.choice([0.0, 0.25, 0.5, 1.0])
    first, late = drawn_scores(rng, len(where)), drawn_scores(rng, len(where))
    count = drawn_count(rng, len(where))
    _, quota = naive.crop_quotas(where.coords.tolist(), [0] * len(where), count)
    images = sorted({place[0] for place in where.coords.tolist() if place[1] >= 0})
    expected = []
    for number, share in enumerate(quota):
        if number == len(images):
            expected += naive.best_first(where.newlines(), lambda i: late[i])[:share]
            continue
        tokens = [i for crop in where.crops() for i in crop if where.coords[i, 0] == images[number]]
        expected += hired(where, tokens, share, first, late, alpha, official)
    options = {"alpha": alpha, "grid": "official" if official else "geometric"}
    assert select("hired", where, count, (first, late), options) == sorted(expected)
    assert len(expected) <= count if official else len(expected) == count


# GlobalCom2


GRIDS = {"12x12-2x2": ([12, 12], [12, 12]), "24x24-2x2": ([24, 24], [24, 24]), "12x12-3x1": ([12], [12, 12, 12])}
GRIDS["12x12-2x2-padded"] = ([9, 9], [12, 12])  # 640 x 480 in 24 x 24 tokens: three rows above and below are padding


@both_precisions
@pytest.mark.parametrize("case", cases("globalcom2", 4))
def test_globalcom2_as_its_authors(case, dtype):
    """The whole view and every tile keep what theirs do; newlines stay, in tiles that are there."""
    params, expected = case["params"], case["expected"]
    assert stage_of("globalcom2").inputs["encoder_attention"] == EncoderRows(layer=-1, domain="logits")
    side, (rows, columns) = params["side"], GRIDS[case["id"]]
    where = layout(tiled(side, rows, columns))
    logits = drawn(case, dtype)["cls_logits"].view(-1, side, side)
    unpadded = torch.zeros(len(logits), side, side, dtype=dtype)
    unpadded[0] = logits[0]
    for tile in range(1, len(logits)):
        i = (tile - 1) // len(columns)
        top = side - rows[i] if i == 0 else 0  # padding lies outside
        unpadded[tile].flatten()[: rows[i] * side] = logits[tile, top : top + rows[i]].flatten()
    chosen = select("globalcom2", where, None, by_frames(where, unpadded.flatten(1)), {"base": params["base"]})
    assert of_view(where, chosen, 0) == sorted(expected["thumbnail_in_score_order"])
    for tile, picks in expected["crop_picks_unpadded_in_score_order"].items():
        assert of_view(where, chosen, int(tile) + 1) == sorted(picks)
    assert [i for i in chosen if where.coords[i, 1] < 0] == where.newlines()
    padding = 24 - sum(rows) if "padded" in case["id"] else 0  # of which the authors keep newlines
    assert len(chosen) == expected["count"] - padding


def bilinear(
    table: dict[tuple[int, int], float], size: tuple[int, int], wide: tuple[int, int], y: int, x: int
) -> float:
    """Half-pixel centres, edges repeated."""

    def line(place: int, length: int, to: int) -> list[tuple[int, float]]:
        centre = max((place + 0.5) * length / to - 0.5, 0.0)
        low = min(int(centre), length - 1)
        return [(low, 1 - (centre - low)), (min(low + 1, length - 1), centre - low)]

    return sum(
        table[row, column] * a * b for row, a in line(y, size[0], wide[0]) for column, b in line(x, size[1], wide[1])
    )


def globalcom2(where: Layout, count: int | None, logits: list[float], base: float) -> list[int]:
    coords, places = where.coords.tolist(), where.places.tolist()
    crops = where.crops()
    groups = {i: number for number, crop in enumerate(crops) for i in crop}
    shown = [i for crop in crops for i in crop]
    under = dict(
        zip(
            shown,
            naive.tile_of([coords[i] for i in shown], [places[i] for i in shown], [groups[i] for i in shown]),
            strict=True,
        )
    )
    ratio, score = [1.0] * len(crops), list(logits)
    for whole, crop in enumerate(crops):
        if all(under[i] < 0 for i in crop):
            continue
        tiles = [
            number for number, one in enumerate(crops) if number != whole and coords[one[0]][0] == coords[crop[0]][0]
        ]
        sums = [math.exp(sum(logits[i] for i in crop if under[i] == tile) / 10) for tile in tiles]
        mean = 1 / len(tiles)
        for tile, one in zip(tiles, sums, strict=True):
            ratio[tile] = 1 + one / sum(sums) - mean
        size = tuple(coords[crop[0]][3:])
        table = {(y, x): sum(logits[i] for i in crop) / len(crop) for y in range(size[0]) for x in range(size[1])}
        table |= {tuple(coords[i][1:3]): logits[i] for i in crop}
        for tile in tiles:
            wide = {i: bilinear(table, size, tuple(places[i][2:]), *places[i][:2]) for i in crops[tile]}
            own, other = (math.hypot(*[one[i] for i in crops[tile]]) for one in (logits, wide))
            score = [logits[i] / own + wide[i] / other if i in wide else one for i, one in enumerate(score)]
    newlines = where.newlines() if count is None else where.newlines()[:count]
    if count is None:
        quota = [int(len(crop) * min(1.0, base * one) + 1e-9) for crop, one in zip(crops, ratio, strict=True)]
    else:
        sizes = list(map(len, crops))
        quota = naive.quotas([n * one for n, one in zip(sizes, ratio, strict=True)], count - len(newlines), sizes)
    chosen = [
        i for crop, most in zip(crops, quota, strict=True) for i in naive.best_first(crop, lambda i: score[i])[:most]
    ]
    return sorted([*chosen, *newlines])


@seeds
@pytest.mark.parametrize("budget", [True, False])
def test_globalcom2_as_loops(seed, budget):
    rng = Random(seed)
    where, base = drawn_layout(rng), rng.choice([0.1, 0.25, 0.9])
    logits = torch.tensor([rng.gauss(0, 2) for _ in range(len(where))], dtype=torch.float64)
    count = drawn_count(rng, len(where)) if budget else None
    found = select("globalcom2", where, count, logits, {"base": base})
    assert found == globalcom2(where, count, logits.tolist(), base)
    assert count is None or len(found) == count


def test_globalcom2_breaks_ties_by_the_lower_index():
    where = layout(grid(4, 4))
    assert select("globalcom2", where, 5, torch.ones(16)) == [0, 1, 2, 3, 4]
    assert select("globalcom2", where, None, torch.ones(16)) == [0, 1, 2, 3]


class TestGlobalCom2ByItsBase(contract("globalcom2", keep={})):
    """Without a budget `base` says how much stays."""


class TestHiREDAsItsCode(contract("hired", {"grid": "official"}, at_most=True)):
    """May leave fewer tokens."""


# Both


@pytest.mark.parametrize("use", ["hired", "globalcom2"])
@pytest.mark.parametrize("at", ["encoder", 3])
def test_tiles_of_llava_next(use, at):
    """Rows of one and two images in tiles, left padding; what stays is that of the row alone, and exact."""
    model = tiny_model("llava_next")
    batch = tiny_batch(model, [("image",), ("image", "image")])
    for stages in ([], [{"use": "random", "keep": 0.7}]):
        pipeline = {"stages": [*stages, {"use": use, "keep": 0.4, "at": at}]}
        result = assert_equivalent(model, pipeline, dict(batch), steps=2)
        assert [
            len(one) / n for one, n in zip(result.report.events[-1].kept, result.report.visual_tokens, strict=True)
        ] == pytest.approx([0.4, 0.4], abs=0.05)


@pytest.mark.parametrize("use", ["hired", "globalcom2"])
def test_what_is_refused_and_what_it_costs(use):
    with pytest.raises(SpecError, match="this vision tower has no CLS token"):
        prunekit.apply(tiny_model("llava_onevision"), {"stages": [{"use": use, "keep": 0.5}]}).__enter__()
    for option, value in (("alpha", 1.5), ("grid", "round")) if use == "hired" else (("base", 0.0),):
        with pytest.raises(SpecError, match=option):
            stage_of(use, **{option: value})
    assert 0 < share_of_prefill(use) < 0.02
    stages = [{"use": "random", "keep": 0.7}, {"use": use, "keep": 0.3}]
    assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(**BATCHES["ragged"]), steps=2)
