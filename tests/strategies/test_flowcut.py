"""FlowCut: the authors' own schedule over 22 blocks, a naive twin, exactness in a deep tower, refusals."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from asking import ask, cases, stage_of
from golden_files import drawn
from plain import SEEDS, best, shares, softmax

import prunekit
from prunekit import Site
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.testing.tiny_families import tiny_batch, tiny_from_config, tiny_model
from prunekit.verify.equivalence import assert_equivalent


def blocks(*numbers: int) -> tuple[Site, ...]:
    return tuple(Site(number, "vision", "after") for number in numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("flowcut", 3))
def test_as_its_authors(case, dtype, monkeypatch):
    """Attention and the attention of values are drawn, both of what is still there; the rest is the strategy's."""
    t, p = drawn(case, dtype), case["params"]
    stage, state, present, after = stage_of("flowcut"), {}, torch.arange(p["patches"]), []
    sites = blocks(*range(p["vit_layers_used"]))
    for layer in range(len(sites)):
        seen = torch.cat([torch.tensor([0]), present + 1])
        flow = t[f"cls_logits_{layer}"][:, seen].softmax(-1).mean(0)[1:]
        own = t[f"value_logits_{layer}"][seen].softmax(-1)[1:]
        monkeypatch.setattr(type(stage.strategy), "_value_attention", lambda *_, own=own: own)
        values = t[f"values_{layer}"][present + 1][:, None]
        keep = ask(
            stage, "select_tokens", encoder_attention=flow, encoder_values=(values, torch.zeros(1, 1, p["value_dim"])),
            coords=torch.tensor([[0, 0, 0, 1, p["patches"]]]).expand(len(present), 5), index=present, sites=sites,
            frames=torch.zeros(len(present), dtype=torch.int64), cut=layer, state=state, count=p["keep"],
        )  # fmt: skip
        present = present[keep]
        after.append(len(present))
    assert after == case["expected"]["patches_after_layer"]
    assert present.tolist() == case["expected"]["kept_sorted"]


def loops(crops, keep, values, attention, cls, last):
    """Indices that stay behind each block. crops: (tokens, grid size) each; values, attention: of every block."""
    wanted = shares(keep, [size for _, size in crops])
    present, running, left = [list(tokens) for tokens, _ in crops], {}, []
    for block in range(last + 1):
        for crop, tokens in enumerate(present):
            if not tokens:
                continue
            flow = {i: attention[block][i] / sum(attention[block][j] for j in tokens) for i in tokens}
            heads = range(len(cls[block][crop]))
            own = dict.fromkeys(tokens, 0.0)
            for head in heads:
                query = cls[block][crop][head]
                keys = [query, *(values[block][i][head] for i in tokens)]
                chances = softmax([sum(a * b for a, b in zip(query, key, strict=True)) for key in keys])
                for i, chance in zip(tokens, chances[1:], strict=True):
                    own[i] += chance / len(heads)
            for i in tokens:
                mean = [sum(one) / len(heads) for one in zip(*values[block][i], strict=True)]
                score = (flow[i] + own[i] / sum(own.values())) * sum(map(abs, mean))
                running[i] = (running[i] + score) / 2 if i in running else score
            here, target = len(tokens), wanted[crop]
            if block == last:
                here = target
            elif (last - block) % 2 == 0 and here > target:
                entropy = -sum(p * math.log(p) for p in flow.values())
                ratio = (here - target) / math.sqrt(last - block) * (1 - (entropy / math.log(max(here, 2))) ** 2)
                here = max(here - round(ratio), target)
            present[crop] = sorted(best(tokens, running.__getitem__, here))
        left.append(sorted(i for tokens in present for i in tokens))
    return left


@pytest.mark.parametrize("seed", SEEDS)
def test_as_loops(seed):
    """One to three crops of unequal grids, one to five blocks; every second seed has equal tokens in each crop."""
    draw = random.Random(seed)
    grids = [(draw.randint(1, 4), draw.randint(1, 4)) for _ in range(draw.randint(1, 3))]
    coords = [(0, r, c, *grid) for grid in grids for r in range(grid[0]) for c in range(grid[1])]
    frames = [crop for crop, (rows, columns) in enumerate(grids) for _ in range(rows * columns)]
    crops = [([i for i, one in enumerate(frames) if one == crop], r * c) for crop, (r, c) in enumerate(grids)]
    count, last = draw.randint(1, len(coords)), draw.randint(0, 4)

    def numbers(many):
        return [draw.gauss(0.0, 1.5) for _ in range(many)]

    values = [[[numbers(3) for _ in range(2)] for _ in coords] for _ in range(last + 1)]
    cls = [[[numbers(3) for _ in range(2)] for _ in grids] for _ in range(last + 1)]
    attention = [[draw.random() ** 3 for _ in coords] for _ in range(last + 1)]
    if seed % 2:
        values = [[[[1.0, 0.0, -1.0]] * 2 for _ in coords] for _ in range(last + 1)]
        cls = [[[[0.0, 0.0, 0.0]] * 2 for _ in grids] for _ in range(last + 1)]
        attention = [[draw.choice([0.25, 0.5]) for _ in coords] for _ in range(last + 1)]
    expected = loops(crops, count, values, attention, cls, last)
    stage, state, present, left = stage_of("flowcut"), {}, torch.arange(len(coords)), []
    for block in range(last + 1):
        flow, value, query = (torch.tensor(x[block], dtype=torch.float64) for x in (attention, values, cls))
        keep = ask(
            stage, "select_tokens", encoder_attention=flow[present], index=present, count=count, state=state,
            encoder_values=(value[present], query), cut=block,
            coords=torch.tensor(coords)[present], frames=torch.tensor(frames)[present], sites=blocks(*range(last + 1)),
        )  # fmt: skip
        present = present[keep]
        left.append(present.tolist())
    assert left == expected and len(left[-1]) == count


def deep(depth: int, family: str = "llava"):
    config = CONFIGS[family](3)
    config.vision_config.num_hidden_layers = depth
    return tiny_from_config(config)


def test_default_sites_are_all_blocks_before_the_features():
    """Of LLaVA-1.5, whose projector gets block 22 of 24, the last that prunes is 21."""
    placements = stage_of("flowcut", keep_tokens=192).placements(32, 23)
    assert [str(site) for site, _ in placements] == [f"vision.{block}" for block in range(22)]
    assert {keep.count(576, 576) for _, keep in placements} == {192}
    default = prunekit.load({"stages": [{"use": "flowcut"}]}).stages[0].placements(32, 23)
    assert default[-1][1].count(576, 576) == 192


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_it_is_exact_in_a_deep_tower(family):
    """Blocks 0 to 5 of eight, of which 1, 3 and 5 prune; crops are counted for themselves."""
    model = deep(8, family)
    found = assert_equivalent(model, {"stages": [{"use": "flowcut", "keep": 0.25}]}, tiny_batch(model), steps=2)
    kept_each = [sum(map(len, event.kept)) for event in found.report.events]
    assert len(kept_each) == 6 and kept_each[0] == sum(found.report.visual_tokens)
    assert kept_each[2] == kept_each[1] < kept_each[0] and kept_each[3] <= kept_each[2] and kept_each[5] < kept_each[4]


def test_it_is_exact_behind_another_stage():
    model = deep(6)
    stages = [
        {"use": "tome", "at": "vision.0.mid", "keep": 0.8},
        {"use": "flowcut", "at": ["vision.0", "vision.1", "vision.2"], "keep": 0.4},
        {"use": "random", "keep": 0.2},
    ]
    assert_equivalent(model, {"stages": stages}, tiny_inputs(images=(1, 2), text=(9, 5)), steps=2)


def test_refusals():
    pipeline = prunekit.load({"stages": [{"use": "flowcut"}]})
    with pytest.raises(prunekit.SpecError, match="this vision tower has no CLS token"):
        pipeline.bind(shape_of(tiny_model("qwen2_vl")))
    with pytest.raises(prunekit.SpecError, match="this model's vision tower cannot be cut"):
        pipeline.bind(dataclasses.replace(shape_of(tiny_llava()), tower=None))
    with pytest.raises(prunekit.SpecError, match="cannot act at 'encoder': it needs a tower site"):
        stage_of("flowcut", at="encoder")
