"""Further arguments of decoder layers: cut along where they have an entry for each token, or refused."""

from __future__ import annotations

import pytest
import torch

from prunekit.engine.tokens.arguments import cut_along
from prunekit.engine.tokens.layout import Layout
from prunekit.errors import Unsupported

B, S, K = 3, 7, 4
ROWS = torch.tensor([2, 0])
INDEX = torch.tensor([[0, 2, 3, 6], [1, 2, 5, 6], [0, 1, 4, 6]])
ALONG = {"types": (B, S), "inputs": (B, S, 5), "as wide as long": (B, S, S), "for all rows": (1, S, 5),
         "scales": (B, 1, S, 1), "by heads": (B, S, 2, 5), "scales for all rows": (1, 1, S, 1)}  # fmt: skip
BESIDE = {"a number": (), "of heads": (4,), "a matrix": (4, 5), "of rows": (B, 4), "of rows and more": (B, 1, 4)}
UNKNOWN = {"a mask": (B, 1, S, S), "no batch": (S,), "of layers": (4, S), "tokens first": (S, B, 5)}


def drawn(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("name", ALONG)
def test_an_entry_for_each_token(name, rows):
    value = drawn(ALONG[name])
    who = range(B) if rows is None else rows.tolist()
    found = cut_along(name, value, (B, S), rows, Layout(INDEX[list(who)], None, S))
    axis = ALONG[name].index(S, 1)
    for mine, row in enumerate(who):
        for slot, token in enumerate(INDEX[row].tolist()):
            of_row = value[row if len(value) == B else 0]
            assert torch.equal(found[mine].select(axis - 1, slot), of_row.select(axis - 1, token))
    assert found.shape[axis] == K


@pytest.mark.parametrize("name", BESIDE)
def test_no_entries_of_tokens(name):
    value = drawn(BESIDE[name])
    assert torch.equal(cut_along(name, value, (B, S), None, Layout(INDEX, None, S)), value)
    found = cut_along(name, value, (B, S), ROWS, Layout(INDEX[ROWS], None, S))
    assert torch.equal(found, value[ROWS] if name.startswith("of rows") else value)


@pytest.mark.parametrize("name", ALONG)
def test_all_tokens_of_some_rows(name):
    """As in decoding, where new tokens have all their entries."""
    value = drawn(ALONG[name])
    assert cut_along(name, value, (B, S), None, None) is value
    assert torch.equal(cut_along(name, value, (B, S), ROWS, None), value[ROWS] if len(value) == B else value)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused(name):
    value = drawn(UNKNOWN[name])
    with pytest.raises(Unsupported, match=rf"are given `{name}`, of shape .*, which depends on the {S} tokens"):
        cut_along(name, value, (B, S), None, Layout(INDEX, None, S))


@pytest.mark.parametrize("inside", [[drawn((B, S))], (None, {"a": drawn((2, S))})])
def test_tensors_inside_of_others(inside):
    with pytest.raises(Unsupported, match=rf"`states`, in a (list|tuple), which depends on the {S} tokens"):
        cut_along("states", inside, (B, S), None, Layout(INDEX, None, S))
    assert cut_along("states", inside, (B, S), None, None) is inside
    assert cut_along("states", [drawn((2, 3)), "x"], (B, S), None, Layout(INDEX, None, S))[1] == "x"
