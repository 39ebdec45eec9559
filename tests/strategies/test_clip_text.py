"""TRIM and CDPruner, which read the question: authors' choices, loops over lists, the CLIP model, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import naive
import pytest
import tiny_clip
import torch
from asking import ask, cases, stage_of
from golden_files import drawn
from layouts import Layout, drawn_features, drawn_layout, grid, layout
from prunekit_strategies.clip_text import pair as clip_pair
from selection_cost import share_of_prefill
from transformers import LlamaConfig

import prunekit
from prunekit import Selection, SpecError, Unsupported
from prunekit.testing.contract import contract
from prunekit.testing.subject import BATCHES
from prunekit.testing.tiny import TinyWords, tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_model
from prunekit.verify.equivalence import assert_equivalent

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
seeds = pytest.mark.parametrize("seed", range(60))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


class Pair:
    """In place of a CLIP model: patches and texts that are in the common space already."""

    def __init__(self, texts):
        self.texts = texts

    def patches(self, features):
        return features

    def segments(self, text):
        return self.texts


def select(use, where: Layout, count, options=None, **given) -> Selection:
    stage = stage_of(use, **(options or {}))
    answer = ask(stage, "select_tokens", **where.places_as_named, **given, project=lambda states: states, count=count)
    return answer if isinstance(answer, Selection) else Selection(answer)


def kept(selection: Selection) -> list[int]:
    return selection.keep.nonzero()[:, 0].tolist()


def square(tokens: int, images: int = 1) -> Layout:
    side = math.isqrt(tokens)
    return layout([one for image in range(images) for one in grid(side, side, image)])


# TRIM


@both_precisions
@pytest.mark.parametrize("case", cases("trim", 4))
def test_trim_as_its_authors(case, dtype, clip, monkeypatch):
    """Through norm and projection; the mean of the dropped stands where the last of them stood."""
    tensors, params, expected = drawn(case, dtype), case["params"], case["expected"]
    norm = torch.nn.LayerNorm(params["dim"], eps=1e-5, dtype=dtype)
    visual = torch.nn.Linear(params["dim"], params["clip_dim"], bias=False, dtype=dtype)
    norm.weight.data, norm.bias.data = tensors["layernorm_weight"], tensors["layernorm_bias"]
    visual.weight.data = tensors["visual_projection"]
    pair = clip_pair.ClipPair(norm, visual, norm, norm, list, 0, 1, 77)
    monkeypatch.setattr(clip_pair.ClipPair, "segments", lambda self, text: tensors["text"][None])
    monkeypatch.setattr(clip_pair, "load", lambda clip, of, device: pair)
    count = None if params["k"] == -1 else int(params["patches"] * params["k"]) + 1
    where, features = square(params["patches"]), tensors["features"]
    chosen = select("trim", where, count, {"clip": str(clip)}, features=features, question="")
    slots = kept(chosen)
    assert len(slots) == expected["count_out"]
    (rest,) = set(slots) - set(expected["kept_sorted"])
    assert set(expected["kept_sorted"]) < set(slots)
    assert rest == max(set(range(params["patches"])) - set(expected["kept_sorted"]))
    (mean,), authors = chosen.extras, torch.tensor(expected["mean_of_dropped"], dtype=dtype)
    assert ((mean - authors).abs() <= 2e-5 * (1 + authors.abs())).all()
    assert chosen.weights[rest].tolist() == [0.0] * params["patches"] + [1.0]


@seeds
@pytest.mark.parametrize("budget", [True, False])
def test_trim_as_loops(seed, budget, clip, monkeypatch):
    rng = Random(seed)
    where = drawn_layout(rng)
    features = drawn_features(rng, len(where))
    words = torch.tensor([rng.choice([-1.0, 0.5, 2.0]) for _ in range(4)], dtype=torch.float64)
    monkeypatch.setattr(clip_pair, "load", lambda *_: Pair(torch.stack([words, -words])))  # the first segment counts
    count = rng.randint(1, len(where)) if budget else None
    coords = where.coords.tolist()
    images = [[i for i, one in enumerate(coords) if one[0] == image and one[1] >= 0] for image in range(3)]
    images = [tokens for tokens in images if tokens]
    quota = naive.crop_quotas(coords, [0] * len(coords), len(coords) if count is None else count)[1]
    owner = [-1] * len(where)
    for i in where.newlines()[: quota[len(images)]] if budget and len(quota) > len(images) else []:
        owner[i] = i
    for tokens, share in zip(images, quota, strict=False):
        products = {i: float(sum(a * b for a, b in zip(features[i], words, strict=True))) for i in tokens}
        least = min(products.values())
        raised = {i: math.exp(least - product) for i, product in products.items()}
        scores = {i: one / sum(raised.values()) for i, one in raised.items()}
        number = sum(naive.outliers(list(scores.values()))) if count is None else share - 1
        stay = (
            tokens
            if budget and share == len(tokens)
            else naive.best_first(tokens, scores.__getitem__)[: max(number, 0)]
        )
        for i in tokens if count is None or share else []:
            owner[i] = i if i in stay else [j for j in tokens if j not in stay][-1]
    found = select("trim", where, count, {"clip": str(clip)}, features=features, question="")
    slots = [i for i, one in enumerate(owner) if i == one]
    states = torch.cat([features, found.extras])
    assert kept(found) == slots
    means = torch.stack([features[[j for j, one in enumerate(owner) if one == i]].mean(0) for i in slots])
    assert torch.allclose((found.weights.double() @ states)[found.keep], means, atol=1e-12)
    assert count is None or len(kept(found)) == count


# CDPruner


@both_precisions
@pytest.mark.parametrize("case", cases("cdpruner", 4))
def test_cdpruner_as_its_authors(case, dtype, clip, monkeypatch):
    """Several images on one scale, as theirs are in a batch."""
    tensors, params = drawn(case, dtype), case["params"]
    monkeypatch.setattr(clip_pair, "load", lambda *_: Pair(tensors["text_embeds"]))
    where, count = square(params["patches"], params["images"]), params["keep"] * params["images"]
    given = {"features": tensors["image_embeds"].flatten(0, 1), "hidden": tensors["tokens"].flatten(0, 1)}
    chosen = kept(select("cdpruner", where, count, {"clip": str(clip), "scale": "sample"}, question="", **given))
    for image, expected in case["expected"]["kept_sorted"].items():
        first = int(image) * params["patches"]
        assert [i - first for i in chosen if first <= i < first + params["patches"]] == expected
    if params["images"] == 1:
        alone = select("cdpruner", where, count, {"clip": str(clip)}, question="", **given)
        assert kept(alone) == chosen


def cdpruner(where: Layout, count: int, hidden, relevance: list[float], scale: str) -> list[int]:
    coords = where.coords.tolist()
    _, quota = naive.crop_quotas(coords, where.frames.tolist(), count)
    chosen = []
    for tokens, share in zip(where.crops(), quota, strict=False):
        alike = [
            i for i, one in enumerate(coords) if one[1] >= 0 and (scale == "sample" or one[0] == coords[tokens[0]][0])
        ]
        low, high = min(relevance[i] for i in alike), max(relevance[i] for i in alike)
        weigh = [(relevance[i] - low + 1e-6) / (high - low) if high > low else 1.0 for i in tokens]
        rows = [hidden[i].tolist() for i in tokens]
        cosines = [
            [1.0 if i == j else one for j, one in enumerate(row)] for i, row in enumerate(naive.cosine(rows, rows))
        ]
        chosen += [tokens[i] for i in naive.dpp(cosines, share, weigh)]
    return sorted([*chosen, *where.newlines()[: count - len(chosen)]])


def drawn_states(rng: Random, tokens: int) -> torch.Tensor:
    """float64 (tokens, 4), without the ties that rounding decides in a determinant."""
    return torch.tensor([[rng.gauss(0, 1) for _ in range(4)] for _ in range(tokens)], dtype=torch.float64)


def small_layout(rng: Random) -> Layout:
    """At most sixteen tokens: the loops compute exact determinants."""
    while len(where := drawn_layout(rng)) > 16:
        pass
    return where


@seeds
def test_cdpruner_as_loops(seed, clip, monkeypatch):
    rng = Random(seed)
    where, scale = small_layout(rng), rng.choice(["image", "sample"])
    hidden, features = drawn_states(rng, len(where)), drawn_features(rng, len(where))
    words = drawn_features(rng, rng.choice([1, 2, 4]))
    monkeypatch.setattr(clip_pair, "load", lambda *_: Pair(words))
    count = min(rng.randint(1, 4), len(where))  # four numbers span no more
    relevance = [-sum(row) / len(row) for row in naive.cosine(features.tolist(), words.tolist())]
    options = {"clip": str(clip), "scale": scale}
    found = kept(select("cdpruner", where, count, options, features=features, hidden=hidden, question=""))
    assert found == cdpruner(where, count, hidden, relevance, scale) and len(found) == count


@seeds
def test_cdpruner_embeds_as_loops(seed):
    """Words behind the image where there are any, else all."""
    rng = Random(seed)
    where, scale, negative = small_layout(rng), rng.choice(["image", "sample"]), rng.random() < 0.5
    hidden, text = drawn_states(rng, len(where)), drawn_states(rng, rng.choice([1, 2, 4]))
    after = torch.tensor([number < len(text) // 2 for number in range(len(text))])
    count = min(rng.randint(1, 4), len(where))  # four numbers span no more
    words = [row.tolist() for row, behind in zip(text, after, strict=True) if behind or not after.any()]
    relevance = [(-1 if negative else 1) * sum(row) / len(row) for row in naive.cosine(hidden.tolist(), words)]
    given = {"hidden": hidden, "text": text, "text_after": after}
    found = kept(select("cdpruner_embeds", where, count, {"negative": negative, "scale": scale}, **given))
    assert found == cdpruner(where, count, hidden, relevance, scale) and len(found) == count


def test_of_equal_tokens_the_lower_index_stays():
    """Orthogonal tokens that are equally relevant, each twice: the first ones, and none twice."""
    hidden = torch.eye(8, dtype=torch.float64).repeat(2, 1)
    given = {"hidden": hidden, "text": torch.ones(1, 8, dtype=torch.float64), "text_after": torch.tensor([True])}
    assert kept(select("cdpruner_embeds", square(16), 5, **given)) == [0, 1, 2, 3, 4]
    assert kept(select("cdpruner_embeds", square(16), 10, **given)) == [*range(10)]


# The CLIP model


def test_the_pair_computes_what_clip_does(clip):
    """Patches and texts in the common space, against the complete model's own."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    pair = clip_pair.load(clip, torch.float32, torch.device("cpu"))
    states = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model.post_layernorm(states))
        assert torch.equal(pair.patches(states), expected)
        ids = [pair.start, *pair.tokenize("a dog"), pair.end]
        words = model.text_model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).pooler_output
        assert torch.allclose(pair.segments("a dog"), model.text_projection(words), atol=1e-6)
    with pytest.raises(Unsupported, match="its vision tower is 24 wide, this model's 32"):
        pair.patches(torch.zeros(1, 32))


def test_long_questions_are_cut_into_segments(clip):
    pair, room = clip_pair.load(clip, torch.float64, torch.device("cpu")), tiny_clip.SEGMENT - 2
    for letters in (0, 1, room, room + 1, 3 * room):
        assert len(pair.segments("x" * letters)) == max(math.ceil(letters / room), 1)
    whole = pair.segments("y " * room + "x")
    parts = torch.cat([pair.segments("y " * room), pair.segments("x")])
    assert torch.allclose(whole, parts) and whole.dtype == torch.float64


@pytest.mark.parametrize("use", ["trim", "cdpruner"])
def test_what_is_refused_before_compute(use, clip, tmp_path):
    def refuses(match, model=None, **options):
        with (
            pytest.raises((SpecError, Unsupported), match=match),
            prunekit.apply(
                model or tiny_llava(), {"stages": [{"use": use, "keep": 0.5, **options}]}, processor=TinyWords()
            ),
        ):
            pytest.fail("entered")

    refuses("clip: is missing")
    refuses("is neither a folder nor a model in this machine's Hub cache", clip="openai/no-such-clip")
    refuses("no folder of a CLIP model: there is no config.json", clip=str(tmp_path))
    LlamaConfig().save_pretrained(tmp_path)
    refuses("there are no weights", clip=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes())
    refuses("is a llama, not a complete CLIP model", clip=str(tmp_path))
    other = tiny_clip.write(tmp_path / "other", width=16)
    refuses(
        "its vision tower has 3 blocks of width 16 and a CLS token, this model 3 blocks of width 24", clip=str(other)
    )
    refuses(
        "this model 3 blocks of width 24 without one; name the CLIP model that", tiny_model("paligemma"), clip=str(clip)
    )
    with (
        pytest.raises(Unsupported, match="asks for `question`"),
        prunekit.apply(tiny_llava(), {"stages": [{"use": use, "keep": 0.5, "clip": str(clip)}]}),
    ):
        pytest.fail("entered")


def test_other_weights_are_another_pipeline(clip, tmp_path):
    def hash_of(folder):
        return prunekit.load({"stages": [{"use": "trim", "clip": str(folder)}]}).sha

    before = hash_of(clip)
    copy = tiny_clip.write(tmp_path / "clip")
    assert hash_of(copy) == hash_of(copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    first = hash_of(copy)
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert hash_of(copy) != first and hash_of(clip) == before


class TestTRIMByOutliers(contract("trim", keep={})):
    """Without a budget it decides by itself."""

    @pytest.fixture(autouse=True)
    def _with_clip(self, clip):
        type(self).options = {"clip": str(clip)}


@pytest.mark.parametrize("use", ["trim", "cdpruner", "cdpruner_embeds"])
def test_it_runs_behind_another_stage_and_says_what_it_costs(use, clip):
    options = {} if use == "cdpruner_embeds" else {"clip": str(clip)}
    stages = [{"use": "random", "keep": 0.7}, {"use": use, "keep": 0.3, **options}]
    inputs = tiny_inputs(**BATCHES["ragged"])
    assert_equivalent(tiny_llava(), {"stages": stages}, inputs, steps=2, processor=TinyWords())
    assert 0 < share_of_prefill(use, **options) < 0.02


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", ["trim", "cdpruner", "cdpruner_embeds"])
def test_half_precision_is_ranked_as_the_same_numbers_in_float32(use, half, clip):
    rng = torch.Generator().manual_seed(2)
    where, options = square(144), {} if use == "cdpruner_embeds" else {"clip": str(clip)}
    hidden, features, text = (60 * torch.randn(n, 24, generator=rng).to(half) for n in (144, 144, 5))
    answers = []
    for cast in (lambda x: x, torch.Tensor.float):
        given = {"hidden": cast(hidden), "features": cast(features), "text": cast(text)}
        given |= {"text_after": torch.ones(5, dtype=torch.bool), "question": "what is it"}
        answers.append(kept(select(use, where, 40, options, **given)))
    assert answers[0] == answers[1]
