"""FEATHER: the authors' two cuts, a twin by loops, counts, and the grid of images that are not square."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import cases, stage_of
from golden_files import drawn
from loops import SEEDS, best, heads_of, kept, normed, sizes, some

import prunekit
from prunekit import Rows, SpecError
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


def raster(*grids):
    """Coords of images with these rows and columns, int64 (V, 5)."""
    return torch.tensor(
        [
            [n, r, c, rows, columns]
            for n, (rows, columns) in enumerate(grids)
            for r in range(rows)
            for c in range(columns)
        ]
    )


@pytest.mark.parametrize("case", cases("feather", 4))
def test_the_authors_cuts(case):
    p, t = case["params"], drawn(case, torch.float64)
    stage = stage_of("feather", at=[2, 4], ratio=p["ratio"], stride=p["stride"])
    assert stage.inputs["attention"] == Rows(layer="previous", queries="last", rope=False, domain="visual")
    coords, left = raster([int(p["visual_tokens"] ** 0.5)] * 2), torch.arange(p["visual_tokens"])
    for cut, name in enumerate(("first", "second")):
        start, group = p["image_start"], p["heads"] // p["kv_heads"]
        places = [*range(start), *(start + left).tolist(), *range(start + p["visual_tokens"], p["length"])]
        states = normed(t["hidden"][places], t[f"norm_weight_{cut + 1}"])
        query = heads_of(states[-1:] @ t[f"q_proj_{cut + 1}"].T, p["heads"])
        keys = heads_of(states @ t[f"k_proj_{cut + 1}"].T, p["kv_heads"]).repeat_interleave(group, 0)
        keys = keys[:, start : start + len(left)]
        row = (query @ keys.transpose(1, 2) / p["head_dim"] ** 0.5).softmax(-1)[:, 0].mean(0)
        left = left[kept(stage, None, attention=row, coords=coords[left], cut=cut)]
        assert left.tolist() == case["expected"][f"kept_{name}"]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_what_a_loop_keeps(seed):
    """Of one image and of several, whole or thinned by an earlier stage, with a count and without."""
    rows, columns = (1, 1), (3, 4)
    grids = [(rows,), (columns,), ((5, 2), columns), ((7, 7),), (columns, rows, (4, 4))][seed % 5]
    coords = raster(*grids)
    coords = coords[some(seed + 200, len(coords)) > -1] if len(coords) > 3 and seed % 2 else coords
    attention = some(seed, len(coords), ties=seed % 3 == 0).abs()
    stride, ratio, cut = 1 + seed % 3, (0.3, 0.5, 0.05)[seed % 3], seed % 2
    _, count = sizes(seed)
    stage = stage_of("feather", stride=stride, ratio=ratio)
    points = coords.tolist()
    grid = [i for i, (_, r, c, *_) in enumerate(points) if not cut and r % stride == 0 and c % stride == 0]
    order = best(attention.tolist(), len(points))
    wanted = sorted({*grid, *order[: max(int(len(points) * (ratio**2 if cut else ratio)), 1)]})
    assert kept(stage, None, attention=attention, coords=coords, cut=cut) == wanted
    told = [*(i for i in order if i in grid), *(i for i in order if i not in grid)][:count]
    assert kept(stage, count, attention=attention, coords=coords, cut=cut) == sorted(told)


def test_how_many_stay_of_576():
    """172 to 236 behind the first cut, as the grid has 64 tokens, and 15 to 21 behind the second."""
    stage, coords = stage_of("feather"), raster((24, 24))
    grid = (coords[:, 1] % 3 == 0) & (coords[:, 2] % 3 == 0)
    for attention, first, second in ((grid.double(), 172, 15), ((~grid).double(), 236, 21)):
        left = kept(stage, None, attention=attention, coords=coords, cut=0)
        again = kept(stage, None, attention=attention[left], coords=coords[left], cut=1)
        assert (len(left), len(again)) == (first, second)


def test_separators_are_in_no_grid():
    coords = torch.tensor([[0, 0, 0, 1, 2], [0, 0, 1, 1, 2], [0, -1, -1, 1, 2]])
    assert kept(stage_of("feather", stride=1, ratio=0.1), None, attention=torch.ones(3), coords=coords) == [0, 1]


@pytest.mark.parametrize(("layers", "sites"), [(32, ["8", "16"]), (28, ["7", "14"]), (6, ["1", "3"]), (2, ["1"])])
def test_its_sites_scale_with_depth_and_it_decides_there_by_itself(layers, sites):
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=layers, visual_tokens=576)
    cuts = prunekit.load({"stages": [{"use": "feather"}]}).bind(shape).cuts
    assert [str(cut.site) for cut in cuts] == sites and {cut.keep for cut in cuts} == {None}
    (*_, cut) = prunekit.load({"stages": [{"use": "feather", "at": 1, "keep": 0.25}]}).bind(shape).cuts
    assert cut.keep.count(576, 576) == 144


def test_wrong_options():
    for options, said in (({"ratio": 0.0}, "ratio: is above 0"), ({"stride": 0}, "stride: is at least 1")):
        with pytest.raises(SpecError, match=said.replace(": ", ".*")):
            stage_of("feather", **options)
    with pytest.raises(SpecError, match="needs layer 1 or later"):
        stage_of("feather", at=0)


@pytest.mark.parametrize("keys", [{}, {"at": 2, "keep": 0.25}, {"at": [1, 3], "keep": [0.5, 0.25]}], ids=str)
def test_it_is_exact_behind_another(keys):
    stages = [{"use": "random", "keep": 0.75}, {"use": "feather", **keys}]
    found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2)), steps=3)
    if keys:
        assert [len(one) for one in found.report.events[-1].kept] == [4, 8]


def test_it_decides_by_itself_at_the_sites_of_the_file():
    """Also where they are more or fewer than its schedule has."""
    for at in ([2], [1, 3, 4]):
        stages = [{"use": "feather", "at": at}]
        found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(), steps=1)
        assert [event.site for event in found.report.events] == [str(site) for site in at]
