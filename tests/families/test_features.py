"""What encoders of older transformers return and take, as today's do; `tests/versions.py` runs them themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.families.features import by_prompt, each, ending_with, split_by
from prunekit.families.grids import places, positioned
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.upstream import Encoder, feature_layers, newline_later


def same(found: Any, expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_frames_and_rows_become_tokens_in_their_order() -> None:
    plain = [torch.rand(5, 4), torch.rand(3, 4)]
    assert same(each({}, plain), plain) and same(each({}, torch.stack(plain[:1] * 2)), plain[:1] * 2)
    frames = torch.rand(2, 3, 6, 4)
    assert same(each({}, tuple(frames)), [torch.cat(list(one)) for one in frames])
    assert same(each({}, torch.rand(1, 5, 0, 4)), [torch.empty(0, 4)])


def test_tiles_of_a_prompt_are_one_entry_and_empty_ones_are_none() -> None:
    pixels = torch.rand(3, 2, 3, 4, 4)
    pixels[0, 1] = pixels[2] = 0
    tiles = torch.rand(3, 9, 8)  # of the first prompt one, of the second two, of the third none
    expected = [tiles[0], torch.cat([tiles[1], tiles[2]]), torch.empty(0, 8)]
    assert same(by_prompt({"pixel_values": pixels}, tiles), expected)
    assert same(by_prompt({"pixel_values": pixels}, expected), expected)  # as today
    assert same(by_prompt({}, tiles), list(tiles))  # features from elsewhere


def test_a_newline_stands_behind_each_video() -> None:
    newline, videos = torch.rand(4), torch.rand(2, 3, 4, dtype=torch.float64)
    expected = [torch.cat([one, newline.double()[None]]) for one in videos]
    assert same(ending_with(newline)({}, videos), expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_videos_in_places_are_told_apart_frame_by_frame_and_stacked(stacked: bool) -> None:
    """Two videos of two frames of 2 x 4 and 4 x 2 patches, four of which are one token."""
    shapes = [[(2, 4)] * 2, [(4, 2)] * 2]
    table = torch.full((4, 10, 2), -1)
    for frame, (rows, columns) in zip(table, [one for video in shapes for one in video], strict=True):
        frame[: rows * columns] = torch.cartesian_prod(torch.arange(columns), torch.arange(rows))
    given = {"where": table.view(2, 2, 10, 2)} if stacked else {"where": table, "many": torch.tensor([2, 2])}
    tables = places("where", 2, "many")(given)
    assert [one[:, 0].tolist() for one in tables] == [[0, 0, 1, 1]] * 2
    assert [one[:2, 1:].tolist() for one in tables] == [
        [[0, 0, 1, 2], [0, 1, 1, 2]], [[0, 0, 2, 1], [1, 0, 2, 1]],
    ]  # fmt: skip
    assert same(positioned("where", 2, "many")(given, [4, 4]), tables)
    features = torch.rand(8, 3)
    assert same(split_by(places("where", 2, "many"))(given, features), [features[:4], features[4:]])
    assert same(split_by(places("where", 2, "many"))(given, list(features.split(4))), list(features.split(4)))
    assert same(split_by(places("where", 2, "many"))({}, features), [features])


def of_today(pixel_values_videos: int, size: int = 0, **kwargs: int) -> dict[str, int]:
    return {"pixels": pixel_values_videos, "size": size} | kwargs


def of_old(pixel_values: int, size: int = 0, **kwargs: int) -> dict[str, int]:
    return {"pixels": pixel_values, "size": size} | kwargs


@pytest.mark.parametrize("method", [of_today, of_old])
def test_a_method_is_called_by_the_names_of_the_models_call(method: Any) -> None:
    encoder = Encoder(method, "pixel_values_videos")
    given = encoder.arguments((3,), {"size": 2, "more": 1})
    assert given == {"pixel_values_videos": 3, "size": 2, "more": 1}
    assert encoder(given | {"pixel_values_videos": 5}) == {"pixels": 5, "size": 2, "more": 1}
    assert encoder.takes("pixel_values_videos") and encoder.takes("size") and not encoder.takes("other")


def test_which_states_of_the_tower_are_used_is_read_under_both_names() -> None:
    class Old:
        vision_feature_layers = (-2, 1)

    class New:
        vision_feature_layer = -2

    assert feature_layers(Old()) == (-2, 1) and feature_layers(New()) == -2 and feature_layers(object()) == -1
    assert tuple(feature_layers(CONFIGS["vipllava"](6))) == (-2, -3, 1)


def test_who_puts_the_newline_is_read_off_the_method() -> None:
    class Old:
        get_video_features = of_old

    class New:
        get_video_features = of_today

    assert newline_later(Old()) and not newline_later(New())
