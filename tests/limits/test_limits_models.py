"""Which models are refused, each by its own words; what no installed model has is simulated."""

# ruff: noqa: SIM117
from __future__ import annotations

import functools
import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from refusing import FASTV, model_of
from torch import nn

import prunekit
from prunekit import probes, upstream
from prunekit.families import find, generic, grids, patch_groups
from prunekit.families.decoders import NotPlain, decoder, plain, token_params
from prunekit.families.grids import square_grid
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify import proof, twin
from prunekit.verify.observed import observe


def said(phrase):
    return pytest.raises(prunekit.Unsupported, match=re.escape(phrase))


class Wrapper(nn.Module):
    """What PEFT, DataParallel and the like do."""

    def __init__(self, model):
        super().__init__()
        self.module, self.config = model, model.config

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, lambda model: torch.compile(model, backend="eager"), str])
def test_what_is_no_model_of_transformers(wrap):
    with said("; of a wrapper (torch.compile, DataParallel, PEFT) give the model inside"):
        with prunekit.apply(wrap(model_of()), FASTV):
            pass


def test_a_model_without_its_head():
    with said("LlavaModel cannot generate; give the complete model with its head"):
        with prunekit.apply(model_of().model, FASTV):
            pass


def test_a_model_without_a_vision_tower():
    """As Gemma 4's own config has none unless it is given one."""
    model = tiny_model("gemma4")
    model.config.vision_config = None
    with said("this gemma4 was made without a vision tower: it takes no images to prune"):
        with prunekit.apply(model, FASTV):
            pass


def test_a_tower_that_is_not_known():
    own = model_of()
    own.config.vision_config.model_type = "dinov2"
    with said("' tower is not supported by this version; its tower must be one of: "), prunekit.apply(own, FASTV):
        pass


def test_a_model_of_no_known_family():
    from transformers import LlamaConfig, LlamaForCausalLM

    numbers = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = LlamaForCausalLM(LlamaConfig(**numbers, num_attention_heads=2, num_key_value_heads=2))
    with said("is no LVLM that can be pruned without one: it takes no images"):
        with prunekit.apply(text, FASTV):
            pass


def _reads_through_the_cache(text):
    text.layers[2].self_attn.is_kv_shared_layer = True
    text.layers[1].self_attn.store_full_length_kv = True


def _no_layers(text):
    text.layers = nn.ModuleList()


def _other_attention(text):
    text.layers[2].attention = text.layers[2].self_attn
    del text.layers[2].self_attn


def _other_mlp(text):
    text.layers[1].experts = text.layers[1].mlp
    del text.layers[1].mlp


def _other_norms(text):
    del text.layers[0].input_layernorm


def _further_parts(text):
    text.layers[1].cross_attention = nn.Identity()


def _loops(text):
    text.config.n_recurrent_loops = 2


def _indexer(text):
    text.layers[3].self_attn.indexer = nn.Identity()


def _indexed(text):
    text.config.layer_types = ["indexed_attention", "full_attention"] * 3


def _two_at_once(text):
    text.layers[2].conv = nn.Identity()


def _nothing_attends(text):
    for layer in text.layers:
        layer.conv = layer.self_attn
        del layer.self_attn


def _shared(text):
    text.config.num_kv_shared_layers = 2
    text.config.layer_types = ["full_attention"] * 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_no_layers, "it has no list `layers` of decoder layers"),
        (
            _other_attention,
            ", under which attention has to be, but mlp",
        ),
        (_other_mlp, "layer 1 has no MLP under a known name, but self_attn"),
        (_other_norms, "layer 0 has an unknown order of norms: post_attention_layernorm"),
        (_further_parts, "layer 1 has further parts: cross_attention"),
        (_loops, "it runs its layers several times (`n_recurrent_loops`)"),
        (_indexer, "layer 3 chooses keys by where they stand (`self_attn.indexer`)"),
        (_indexed, "its layers hold indexed_attention, whose cache cannot be cut"),
        (_two_at_once, "layer 2 has self_attn and conv at once, and so two kinds of cache"),
        (_nothing_attends, "none of its layers attends"),
        (_shared, "its layers share their keys and values, but do not say which"),
        (_reads_through_the_cache, "layer 2 reads keys and values of another one in an unknown way"),
    ],
)
def test_decoders_that_are_not_plain(change, reason):
    own = model_of()
    change(own.model.language_model)
    with pytest.raises(prunekit.Unsupported, match=f"the decoder LlamaModel is not supported: .*{re.escape(reason)}"):
        plain(own.model.language_model)
    assert reason in decoder(own.model.language_model)["opaque"]
    with pytest.raises(prunekit.PrunekitError, match=re.escape(reason)), prunekit.apply(own, FASTV):
        pass


def _encoder_decoder(text):
    text.config.is_encoder_decoder = True


def _encoder(text):
    for layer in text.layers:
        layer.self_attn.is_causal = False


def _takes(*names):
    """Let a decoder's forward take these arguments alone."""

    def change(text):
        forward = type(text).forward
        left = [one for one in inspect.signature(forward).parameters.values() if one.name in ("self", *names)]
        other = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))
        other.__signature__ = inspect.Signature(left)
        text.__class__ = type("Other", (type(text),), {"forward": other})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_encoder_decoder, "LlamaModel is an encoder-decoder: its text attends to what an encoder made"),
        (_encoder, "LlamaModel is an encoder: its tokens see those behind them"),
        (_takes("input_ids"), "takes no inputs_embeds, among which features of images could stand"),
        (_takes("inputs_embeds"), "takes no cache of transformers to decode from"),
        (_takes("inputs_embeds", upstream.CACHE), "takes no position_ids, so that it cannot be told where"),
    ],
)
def test_decoders_that_cannot_be_cut_at_all(change, reason):
    """Where they are not plain; a plain one has its layers looked into."""
    own = model_of()
    text = own.model.language_model
    _further_parts(text)
    change(text)
    with said(reason):
        decoder(text)
    with said(reason), prunekit.apply(own, FASTV):
        pass


def test_experts_without_a_number():
    module = nn.Module()
    module.experts = nn.Parameter(torch.zeros(4, 2, 2))
    with said("has experts but does not say to how many of them a token is sent"):
        token_params(module, object())


def test_a_version_of_transformers_that_lacks_something(monkeypatch):
    monkeypatch.setattr(probes, "_problems", lambda: ("masking_utils: gone",))
    with said("Install a tested version, or a newer prunekit."), prunekit.apply(model_of(), FASTV):
        pass


def _not_plain(text):
    raise NotPlain(text, "it is closed")


class TestTheProof:
    """Of a model without a family file: on a tiny twin, before anything is pruned."""

    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch):
        monkeypatch.setattr(prunekit.families, "families", lambda: ())
        proof._PROOFS.clear()
        yield
        proof._PROOFS.clear()

    def test_no_twin(self, monkeypatch):
        def fails(config, side):
            raise RuntimeError("7 is not 8")

        monkeypatch.setattr(twin, "shrunken", fails)
        with said(
            "no tiny twin of LlavaForConditionalGeneration can be made, so that nothing can be proved about it: "
        ):
            proof.proved_parts(model_of())

    def test_a_twin_that_does_not_run(self, monkeypatch):
        def fails(*_):
            raise RuntimeError("7 is not 8")

        monkeypatch.setattr(proof, "observe", fails)
        with said("the tiny twin of LlavaForConditionalGeneration does not run: RuntimeError: 7 is not 8"):
            proof.proved_parts(model_of())

    def test_no_inputs(self):
        own = model_of()
        parts = find(own)
        own.forward = lambda **_: 1 / 0
        with said("runs on none of the inputs that prunekit can make for it"):
            twin.fed(own, parts)
        with said("nor on words alone, so that nothing"):
            twin.fed(own, parts)
        plain = own.__class__.forward
        own.forward = lambda **given: 1 / 0 if "pixel_values" in given else plain(own, **given)
        with said("that it knows among them, so that nothing"):
            twin.fed(own, parts)

    def test_a_model_that_was_changed(self):
        own = tiny_model("llava", dtype=torch.float32)
        text = own.model.language_model
        text.layers[1].mlp = type("Another", (type(text.layers[1].mlp),), {})(text.config)
        with said("mlp of layer 1 is a Another, which a model made from the config"):
            proof.proved_parts(own)

    def test_a_decoder_that_was_changed(self):
        own = tiny_model("llava", dtype=torch.float32)
        own.model.language_model.layers[1].gate = nn.Identity()
        with said("made from the config alone is another one"):
            proof.proved_parts(own)

    def test_a_twin_that_is_not_exact(self, monkeypatch):
        monkeypatch.setattr(proof, "_run", lambda name, *_: proof.Case(name, None, "off by 3"))
        with said(" was recognised, but its tiny twin is not pruned exactly: nothing pruned: off by 3"):
            proof.proved_parts(model_of())

    def test_a_decoder_that_is_not_known_inside(self, monkeypatch):
        own = model_of()
        monkeypatch.setattr(prunekit.families.decoders, "plain", _not_plain)
        monkeypatch.setattr(proof, "_run", lambda name, *_: proof.Case(name, None, "off by 3"))
        with said("since it is closed, and its tiny twin shows that even this would not be exact"):
            proof.proved_parts(own)
        proof._PROOFS.clear()
        monkeypatch.setattr(twin, "guesses", lambda model, parts: iter(()))
        with said("since it is closed, and on a tiny twin no prompt runs, so that even this cannot be proved"):
            proof.proved_parts(own)

    def test_loops_that_are_no_plain_ones(self):
        def watched(change):
            own = model_of()
            change(own.model.language_model)
            return observe(own, find(own), tiny_batch(own))

        def tuples(text):
            text.layers[-1].register_forward_hook(lambda _, given, result: (result, None))
            text.norm.register_forward_pre_hook(lambda _, given: given[0][:1])

        def fewer(text):
            text.config.num_hidden_layers -= 1

        def growing(text):
            for layer in text.layers:
                layer.register_forward_pre_hook(lambda _, given: (given[0] * 1.01, *given[1:]))

        for change, phrase in (
            (tuples, "its decoder layers return more than the hidden states"),
            (fewer, "its decoder called 5 layers of 6 in one forward"),
            (growing, "its decoder changes hidden states between all layers"),
        ):
            assert watched(change).opaque.startswith(phrase)


class TestCoords:
    """Where visual tokens are in their images; asked for by strategies that read `coords` or `frames`."""

    def test_of_a_model_without_a_family_file(self):
        with said("where visual tokens are in their images is not known of this model"):
            generic.no_coords({}, [16])

    def test_of_frames_without_a_grid(self):
        with said("where visual tokens are in the frames of a video is not known of a model without a family file"):
            grids.by_arguments("video", tiny_model("llava", dtype=torch.float32).config)({}, [16])

    def test_of_a_picture_that_is_no_square(self):
        with said("17 visual tokens do not fill a square grid, so a strategy that asks for `coords`"):
            square_grid(17)

    def test_of_other_counts(self):
        with said("coords of the visual tokens cannot be told: [4] tokens an image or video expected"):
            grids.checked([torch.zeros(4, 5)], [5])

    def test_without_the_sizes(self):
        own = tiny_model("qwen2_vl", dtype=torch.float32)
        coords = find(own).modalities[0].coords
        with said("coords of the visual tokens cannot be told, as 'image_grid_thw' did not come with the pixels"):
            coords({}, [4])


class TestPatches:
    """Which patches make a visual token; asked for by stages that cut or read the tower."""

    def test_a_picture_that_does_not_divide(self):
        with said("visual tokens are not made of whole patches: 25 patches, 2 x 2 a token"):
            patch_groups.square(25, 2)

    def test_a_picture_of_its_own_size_that_does_not_divide(self):
        with said("visual tokens of an image of 3 x 4 patches are not made of whole ones"):
            patch_groups.by_size(14, 2)("image", {"image_sizes": [[42, 56]]}, 1, 12)

    def test_a_picture_that_is_shrunken(self):
        config = SimpleNamespace(vision_aspect_ratio="anyres_max_1")
        with said("patches is shrunken by interpolation, so that its visual tokens are not made of whole patches"):
            patch_groups._check_limit(torch.zeros(8, 8), 4, {}, config)
