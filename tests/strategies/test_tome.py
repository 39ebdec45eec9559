"""ToMe: the authors' own merges, a naive twin over several blocks, exactness in a deep tower, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from asking import ask, cases, stage_of
from golden_files import drawn
from plain import SEEDS, best, cosine, kept, shares

import prunekit
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.testing.tiny_families import tiny_batch, tiny_from_config, tiny_model
from prunekit.verify.equivalence import assert_equivalent


def merged(selection, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """The tokens that leave, by the slot they stand in."""
    owners = selection.weights
    assert owners.mode == "sum"
    parts = tokens * owners.amounts[:, None].to(tokens)
    return {i: parts[owners.owner == i].sum(0) for i in kept(selection.keep)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [one for one in cases("tome", 4) if one.values[0]["params"]["class_token"]])
def test_as_its_authors(case, dtype):
    """With a class token; towers without one are split as with one (`tests/ops` has the authors' other two cases)."""
    t, p, expected = drawn(case, dtype), case["params"], case["expected"]
    patches = p["tokens"] - 1
    sizes = 1 + (4 * t["size_draw"]).floor()
    found = ask(
        stage_of("tome"), "select_tokens", encoder_keys=t["keys"].mean(0)[1:], sizes=sizes[1:], count=patches - p["r"],
        coords=torch.tensor([[0, 0, 0, 1, patches]]).expand(patches, 5), frames=torch.zeros(patches).long(),
        index=torch.arange(patches), state={},
    )  # fmt: skip
    owner, tokens = found.weights.owner, merged(found, t["features"][1:])
    groups = {frozenset(group): n for n, group in enumerate(expected["groups"]) if group != [0]}
    ours = {frozenset(i + 1 for i in kept(owner == slot)): slot for slot in kept(found.keep)}
    assert ours.keys() == groups.keys()
    for group, slot in ours.items():
        assert float(found.sizes[slot]) == expected["sizes"][groups[group]]
        authors = torch.tensor(expected["features"][groups[group]], dtype=dtype)
        torch.testing.assert_close(tokens[slot], authors, rtol=2e-5, atol=2e-5)


class Line:
    """A naive crop: groups of original tokens in ToMe's line, each with the slot of its B."""

    def __init__(self, tokens):
        self.groups = [([i], i) for i in tokens]

    def block(self, keys, sizes, wanted):
        """keys, sizes: by slot. Merges until `wanted` groups are left."""
        keys, sizes = dict(keys), dict(sizes)
        if wanted == 0:
            self.groups = []
        while len(self.groups) > wanted:
            with_class = [None, *self.groups]
            a, b = with_class[::2], with_class[1::2]  # the class token is the first of A
            to, strength = {}, {}
            for n, group in enumerate(a):
                if group is not None:
                    likeness = [cosine(keys[group[1]], keys[slot]) for _, slot in b]
                    to[n] = best(range(len(b)), likeness.__getitem__, 1)[0]
                    strength[n] = likeness[to[n]]
            many = min(len(self.groups) - wanted, len(self.groups) // 2)
            gone = best(strength, strength.__getitem__, many)
            joined = {}
            for n in gone:
                joined.setdefault(to[n], []).append(a[n])
            for m, sources in joined.items():
                members, slot = b[m]
                slots = [slot, *(one for _, one in sources)]
                total = sum(sizes[one] for one in slots)
                width = range(len(keys[slot]))
                keys[slot] = [sum(keys[one][k] * sizes[one] for one in slots) / total for k in width]
                sizes[slot] = total
                b[m] = ([*members, *(i for group, _ in sources for i in group)], slot)
            self.groups = [group for n, group in enumerate(a) if group is not None and n not in gone] + b
        return sizes


@pytest.mark.parametrize("seed", SEEDS)
def test_as_loops(seed):
    """One to three crops over one to three blocks; every second seed has keys whose cosines are 0, a half or 1."""
    draw = random.Random(seed)
    grids = [(draw.randint(1, 4), draw.randint(1, 5)) for _ in range(draw.randint(1, 3))]
    coords = [(0, r, c, *grid) for grid in grids for r in range(grid[0]) for c in range(grid[1])]
    frames = [crop for crop, (rows, columns) in enumerate(grids) for _ in range(rows * columns)]
    lines = [Line([i for i, one in enumerate(frames) if one == crop]) for crop in range(len(grids))]
    features = [[draw.gauss(0.0, 1.0) for _ in range(3)] for _ in coords]
    sizes = dict.fromkeys(range(len(coords)), 1.0)
    stage, state, present, count = stage_of("tome"), {}, torch.arange(len(coords)), len(coords)
    tokens = torch.tensor(features, dtype=torch.float64)
    for _ in range(draw.randint(1, 3)):
        count = draw.randint(1, count) if draw.random() < 0.3 else draw.randint((count + 1) // 2, count)
        keys = [[float(draw.choice((-1, 1))) for _ in range(4)] for _ in coords]
        if seed % 2:
            keys = [[draw.gauss(0.2, 1.0) for _ in range(6)] for _ in coords]
        alive = [line for line in lines if line.groups]
        for line, wanted in zip(alive, shares(count, [len(line.groups) for line in alive]), strict=True):
            sizes |= line.block(dict(enumerate(keys)), sizes, wanted)
        found = ask(
            stage, "select_tokens", encoder_keys=torch.tensor(keys, dtype=torch.float64)[present], count=count,
            coords=torch.tensor(coords)[present], frames=torch.tensor(frames)[present], index=present, state=state,
            sizes=torch.tensor([sizes[i] for i in present.tolist()]) * 0 + 1,
        )  # fmt: skip
        tokens = torch.stack(list(merged(found, tokens).values()))
        left, present = found.sizes[found.keep].tolist(), present[found.keep]
        groups = {slot: members for line in lines for members, slot in line.groups}
        assert present.tolist() == sorted(groups) and len(present) == count
        assert left == [len(groups[slot]) for slot in present.tolist()]
        means = [torch.tensor([features[i] for i in groups[slot]]).double().mean(0) for slot in present.tolist()]
        torch.testing.assert_close(tokens, torch.stack(means), rtol=1e-6, atol=1e-6)


def test_a_budget_is_spread_over_all_blocks():
    """576 to 192 over the 23 blocks that make LLaVA-1.5's features: 17 tokens a block, then 16."""
    placements = stage_of("tome", keep_tokens=192).placements(32, 23)
    assert [str(site) for site, _ in placements] == [f"vision.{block}.mid" for block in range(23)]
    left = [576]
    for _, keep in placements:
        left.append(keep.count(576, left[-1]))
    assert left[-1] == 192 and {a - b for a, b in itertools.pairwise(left)} == {16, 17}
    default = prunekit.load({"stages": [{"use": "tome"}]}).stages[0].placements(32, 23)
    assert [keep.count(576, 576) for _, keep in default][-1] == 192


def deep(depth: int, family: str = "llava"):
    config = CONFIGS[family](3)
    config.vision_config.num_hidden_layers = depth
    return tiny_from_config(config)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_it_is_exact_in_a_deep_tower(family, proportional):
    """Without a class token as well, and crop by crop."""
    model, stage = deep(6, family), {"use": "tome", "keep": 0.3, "proportional": proportional}
    found = assert_equivalent(model, {"stages": [stage, {"use": "random", "keep": 0.2}]}, tiny_batch(model), steps=2)
    sites = [event.site for event in found.report.events]
    assert sites == [*(f"vision.{block}.mid" for block in range(len(sites) - 1)), "encoder"] and len(sites) > 5
    assert all((event.sizes is not None) == proportional for event in found.report.events[:-1])


def test_it_is_exact_behind_another_cut_of_the_tower():
    model = deep(6)
    stages = [{"use": "idpruner", "keep": 0.9}, {"use": "fastv", "at": 2, "keep": 0.2}]
    tower = [
        {"use": "flowcut", "at": ["vision.0"], "keep": 0.8},
        {"use": "tome", "at": ["vision.1.mid", "vision.2.mid"], "keep": 0.5},
    ]
    inputs = tiny_inputs(images=(1, 2), text=(9, 5))
    assert_equivalent(model, {"stages": [*tower, *stages[1:]]}, inputs, steps=2)
    with pytest.raises(prunekit.SpecError, match=r"asks for 0\.9 of original"):
        assert_equivalent(model, {"stages": [*tower, *stages]}, inputs, steps=2)


def test_towers_that_take_no_masks():
    """Qwen2-VL's attends image by image: sizes are refused, merging without them is exact."""
    model = tiny_model("qwen2_vl")
    with pytest.raises(prunekit.Unsupported, match="sizes add to attention logits"):
        assert_equivalent(model, {"stages": [{"use": "tome"}]}, tiny_batch(model), steps=1)
    assert_equivalent(model, {"stages": [{"use": "tome", "proportional": False}]}, tiny_batch(model), steps=2)


def test_refusals():
    shape = dataclasses.replace(shape_of(tiny_llava()), tower=None)
    with pytest.raises(prunekit.SpecError, match="this model's vision tower cannot be cut"):
        prunekit.load({"stages": [{"use": "tome"}]}).bind(shape)
    with pytest.raises(prunekit.SpecError, match="cannot act at 'encoder': it needs a tower site"):
        stage_of("tome", at="encoder")
