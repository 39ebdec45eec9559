"""DyCoke, FlashVID, HoliTom, FastVID and FrameFusion keep what their authors' own functions kept, in the same states.

The files hold seeded clips and what those functions returned, at the commits that they name; of several seeds the first
at which the authors' random noise, and as much noise on the clip, changes no index.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from asking import ask, cases
from clips import grid_of
from golden_files import drawn
from plain import kept
from prunekit_evals.bench import llava_7b

import prunekit
from prunekit import Selection

both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def answer(use: str, case: dict[str, Any], dtype: torch.dtype, **options: Any) -> tuple[Any, torch.Tensor]:
    """What the strategy decides of a case without a budget, and the clip's tokens, (V, H)."""
    p, t = case["params"], drawn(case, torch.float32)
    tokens = (t["scene"] + t["change"] ** 4 * t["step"]).flatten(0, 1).to(dtype)
    given = {"encoder_attention": t["attention"].flatten().to(dtype)} if "attention" in t else {}
    stage = prunekit.load({"stages": [{"use": use, **options}]}).stages[0]
    found = ask(stage, "select_tokens", hidden=tokens, **given, **grid_of(p["frames"], 1, p["tokens_per_frame"]))
    return found, tokens


def same(found: Selection, made: torch.Tensor, case: dict[str, Any]) -> None:
    expected = case["expected"]
    assert kept(found.keep) == expected["kept_sorted"]
    authors = torch.tensor(expected["features"], dtype=made.dtype)
    torch.testing.assert_close(made[found.keep], authors, rtol=2e-5, atol=2e-5)


def summed(found: Selection, tokens: torch.Tensor) -> torch.Tensor:
    """The states in the slots of kept tokens, (V, H), by their owners."""
    owner, amounts = found.weights.owner, found.weights.amounts
    joined = owner >= 0
    return torch.zeros_like(tokens).index_add(0, owner[joined], (tokens * amounts[:, None])[joined])


@both
@pytest.mark.parametrize("case", cases("dycoke", 3))
def test_dycoke(case, dtype):
    found, _ = answer("dycoke", case, dtype, k=case["params"]["k"], groups="official")
    assert kept(found) == case["expected"]["kept_sorted"]


@both
@pytest.mark.parametrize("case", cases("flashvid", 3))
def test_flashvid(case, dtype):
    names = ("segment", "segments", "ratio", "expansion", "alpha", "temporal", "method")
    found, tokens = answer("flashvid", case, dtype, **{name: case["params"][name] for name in names})
    same(found, summed(found, tokens), case)


@both
@pytest.mark.parametrize("case", cases("holitom", 3))
def test_holitom(case, dtype):
    found, tokens = answer("holitom", case, dtype, **{name: case["params"][name] for name in ("ratio", "tau", "beta")})
    same(found, summed(found, tokens), case)
    assert any(end > start for start, end in case["expected"]["windows"])


@both
@pytest.mark.parametrize("case", cases("fastvid", 3))
def test_fastvid(case, dtype):
    names = ("segments", "tau", "ratio", "d", "every", "beta")
    found, tokens = answer("fastvid", case, dtype, **{name: case["params"][name] for name in names})
    same(found, found.weights @ tokens, case)


@both
@pytest.mark.parametrize("case", cases("framefusion", 3))
def test_framefusion(case, dtype):
    """Site after site, of a model with as many layers as the authors' code counts."""
    p, t = case["params"], drawn(case, torch.float32)
    stage = prunekit.load(
        {"stages": [{"use": "framefusion", **{name: p[name] for name in ("cost", "similarity", "least")}}]}
    ).stages[0]
    places, shape = grid_of(p["frames"], 1, p["tokens_per_frame"]), replace(llava_7b.shape(), layers=p["layers"])
    there, state = torch.arange(len(places["frames"])), {}
    for site, left in enumerate(case["expected"]["kept_sorted"]):
        tokens = (t["scene"] + t["change"] ** 4 * t[f"step_{site}"]).flatten(0, 1).to(dtype)[there]
        found = ask(
            stage, "select_tokens", hidden=tokens, attention=t[f"attention_{site}"].to(dtype)[there] if site else None,
            shape=shape, state=state, **{name: table[there] for name, table in places.items()},
        )  # fmt: skip
        merged = isinstance(found, Selection)
        keep = found.keep if merged else found
        owner = found.weights.owner if merged else torch.arange(len(there))
        made = torch.stack([tokens[owner == i].mean(0) for i in kept(keep)])
        there = there[keep]
        assert there.tolist() == left
    torch.testing.assert_close(made, torch.tensor(case["expected"]["features"], dtype=dtype), rtol=2e-5, atol=2e-5)
