"""What calls of a model, `generate` and KV caches are refused, by its own words and before a decoder layer has run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from refusing import FASTV, FLASH, flash_kernel, inputs_of, model_of, refused
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import GenerationConfig

import prunekit
from prunekit.engine.cache import static
from prunekit.testing.tiny import IMAGE
from prunekit.testing.tiny_configs import CONFIGS, text
from prunekit.testing.tiny_families import tiny_from_config
from prunekit.upstream import CACHE


@pytest.fixture(scope="module")
def model():
    return model_of()


def longer(inputs, count=1):
    mask = inputs["attention_mask"]
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)


OUTPUTS = "=True is not available under a pruning pipeline: layers hold different tokens"


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("where", ["call", "generate", "config"])
def test_outputs_of_every_layer(name, where):
    own = model_of("eager")
    if where == "config":
        setattr(own.config.text_config, name, True)
    options = {name: True} if where == "call" else {}
    with prunekit.apply(own, FASTV), refused(name + OUTPUTS, own):
        if where == "generate":
            own.generate(**inputs_of(), max_new_tokens=2, return_dict_in_generate=True, **{name: True})
        else:
            own(**inputs_of(), **options)


def test_masks_that_are_not_flat(model):
    inputs = inputs_of()
    size = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, size, size, dtype=torch.bool)
    with prunekit.apply(model, FASTV), refused("give a 2-D attention_mask (batch, tokens)", model):
        model(**inputs)


@pytest.mark.parametrize("columns", [-2, 5])
def test_masks_of_another_length(model, columns):
    inputs = inputs_of()
    inputs["attention_mask"] = torch.ones(1, inputs["input_ids"].shape[1] + columns, dtype=torch.int64)
    with prunekit.apply(model, FASTV), refused("; give one entry for each token of the prompt", model):
        model(**inputs)


@pytest.mark.parametrize("way", ["call", "generate"])
def test_embeddings_in_place_of_ids(model, way):
    inputs = inputs_of()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with prunekit.apply(model, FASTV), refused("pass input_ids: prunekit finds the visual tokens by their ids", model):
        model(**given) if way == "call" else model.generate(**given, max_new_tokens=2)


def test_visual_tokens_without_pictures(model):
    inputs = inputs_of()
    del inputs["pixel_values"]
    with prunekit.apply(model, FASTV), refused("but no images or videos came with it; give their pixels", model):
        model.generate(**inputs, max_new_tokens=2)
    inputs["attention_mask"][inputs["input_ids"] == IMAGE] = 0
    with pytest.warns(prunekit.PrunekitWarning, match="no visual tokens"), prunekit.apply(model, FASTV):
        model(**inputs)  # padding may have any id


def test_pictures_that_the_prompt_shows_in_part(model):
    inputs = inputs_of()
    inputs["attention_mask"][0, (inputs["input_ids"][0] == IMAGE).nonzero()[:4, 0]] = 0
    pool = {"stages": [{"use": "pool", "keep": 0.25}]}
    with prunekit.apply(model, pool), refused(" image tokens, the encoder made 16", model):
        model(**inputs)


def switch(model, which):
    """Its name has changed; older versions know the second one only."""
    (getattr(model, f"activation_checkpointing_{which}", None) or getattr(model, f"gradient_checkpointing_{which}"))()


def test_gradient_checkpointing():
    own = model_of()
    own.requires_grad_(True).train()
    switch(own, "enable")
    with prunekit.apply(own, FASTV):
        with refused("gradient checkpointing would run the decoder layers again", own):
            own(**inputs_of(), use_cache=False)
        with torch.no_grad():
            kept = own(**inputs_of(), use_cache=False).logits
        switch(own, "disable")
        assert torch.equal(own(**inputs_of(), use_cache=False).logits, kept)


def test_the_decoder_by_itself(model):
    embeds = model.get_input_embeddings()(inputs_of()["input_ids"])
    with prunekit.apply(model, FASTV), refused("the decoder was called by itself; call the LVLM", model):
        model.get_decoder()(inputs_embeds=embeds)


def test_layers_called_with_positional_arguments():
    """Simulated: a version of transformers whose decoder hands its mask on without a name, which a layer may have."""
    own, inputs = model_of(), inputs_of()
    first = own.get_decoder().layers[0]
    with prunekit.apply(own, FASTV):
        named = own(**inputs).logits

    def positional(_, given, named):
        return (*given, named.pop("attention_mask")), named

    first.register_forward_pre_hook(positional, with_kwargs=True)
    with prunekit.apply(own, FASTV):
        assert torch.equal(own(**inputs).logits, named)
    plain = first.forward
    first.forward = lambda hidden, *rest, **more: plain(hidden, attention_mask=rest[0], **more)
    with prunekit.apply(own, FASTV), refused("decoder layers are called with positional arguments", own):
        own(**inputs)


GENERATE = "=...) is not supported under a pruning pipeline: "


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"assistant_model": "itself"}, "the assistant's own cache and tokens"),
        ({"assistant_early_exit": 2}, "the first layers alone would draft"),
        ({"prefill_chunk_size": 8}, "stages must see the whole prompt at once"),
        ({"custom_generate": lambda *_, **__: None}, "what it does with caches and masks is not known"),
        ({"use_mtp": True}, "the prediction layers have a KV cache of their own"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ways_of_generating(model, options, reason):
    options = {name: model if value == "itself" else value for name, value in options.items()}
    with prunekit.apply(model, FASTV), refused(next(iter(options)) + GENERATE + reason, model):
        model.generate(**inputs_of(), max_new_tokens=2, **options)


def test_prefilling_at_every_step(model):
    phrase = "generate(use_cache=False) would prune anew at every step; leave use_cache at its default"
    with prunekit.apply(model, FASTV):
        with refused(phrase, model):
            model.generate(**inputs_of(), max_new_tokens=2, use_cache=False)
        with refused(phrase, model):
            model.generate(**inputs_of(), generation_config=GenerationConfig(max_new_tokens=2, use_cache=False))


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "hybrid"])
def test_kinds_of_cache_by_name(model, kind):
    phrase = ") is not supported under a pruning pipeline; leave it out, or use one of dynamic, static"
    with prunekit.apply(model, FASTV), refused(phrase, model):
        model.generate(**inputs_of(), max_new_tokens=2, cache_implementation=kind)


def test_paged_batches(model):
    with prunekit.apply(model, FASTV), refused("generate_batch keeps its KV in pages", model):
        model.generate_batch([[1, 5, 6]])


def test_kinds_of_cache_by_object(model):
    class Other(DynamicCache):
        """A cache that somebody else wrote."""

    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    old = tuple((torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8)) for _ in range(6))
    with prunekit.apply(model, FASTV):
        for cache in (Other(), both, old):
            with refused("pruning needs transformers' DynamicCache with layers of attention", model):
                model(**inputs_of(), **{CACHE: cache})


def test_a_cache_that_was_filled_outside(model):
    inputs = inputs_of()
    cache = model(input_ids=inputs["input_ids"][:, :1])[CACHE]
    with prunekit.apply(model, FASTV), refused("this KV cache was filled outside of prunekit.apply", model):
        model(**inputs, **{CACHE: cache})


def test_a_pruned_cache_outside_and_elsewhere():
    """The stock model computes the keys of its first layer before it hands them to the cache, which refuses them."""
    model, other, inputs = model_of(), model_of(seed=1), inputs_of()
    more = {"input_ids": torch.tensor([[5]]), "attention_mask": longer(inputs)}
    with prunekit.apply(model, FASTV):
        cache = model(**inputs)[CACHE]
    with refused("this KV cache was pruned under prunekit.apply and is used outside of it", model):
        model(**more, **{CACHE: cache})
    phrase = "); continue under the same pipeline and model, or start with a new cache"
    with prunekit.apply(model, {"stages": [{"use": "pool", "keep": 0.5}]}), refused(phrase, model):
        model(**more, **{CACHE: cache})
    with prunekit.apply(other, FASTV), refused(phrase, other):
        other(**more, **{CACHE: cache})


def test_a_pruned_cache_is_copied_but_not_pickled(model):
    inputs = inputs_of()
    with prunekit.apply(model, FASTV):
        cache = model(**inputs)[CACHE]
        copy.deepcopy(cache)
        with refused("a pruned KV cache belongs to its model and its `with` block, so it cannot be pickled", model):
            pickle.dumps(cache)


def test_a_model_inside_the_block_is_not_copied():
    """A copy would hold the overrides, which run the modules of the original."""
    own = model_of()
    with prunekit.apply(own, FASTV), refused("a model inside a prunekit.apply block cannot be copied", own):
        copy.deepcopy(own)
    assert torch.equal(copy.deepcopy(own)(**inputs_of()).logits, own(**inputs_of()).logits)


def test_new_images_on_a_pruned_cache(model):
    """The pictures are encoded before the decoder is called, which refuses them."""
    inputs = inputs_of()
    more = {"input_ids": inputs["input_ids"][:, 5:], "pixel_values": inputs["pixel_values"]}
    with prunekit.apply(model, FASTV):
        cache = model(**inputs)[CACHE]
        with refused("new images on a KV cache that already holds a prompt are not supported", model):
            model(**more, attention_mask=longer(inputs, more["input_ids"].shape[1]), **{CACHE: cache})


def test_images_after_a_prompt_without_any(model):
    """Nothing was pruned there; the reason is another."""
    inputs = inputs_of()
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    more = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
    with pytest.warns(prunekit.PrunekitWarning, match="no visual tokens"), prunekit.apply(model, FASTV):
        cache = model(**text)[CACHE]
        with refused("stages decide once, when a prompt begins; start a new prompt with all that was said", model):
            model(**more, attention_mask=longer(text, more["input_ids"].shape[1]), **{CACHE: cache})


def test_cropping_into_the_prompt(model):
    with prunekit.apply(model, FASTV):
        cache = model(**inputs_of())[CACHE]
        with refused("cannot crop a KV cache into its pruned prompt; crop at most the generated tokens", model):
            cache.crop(-3)


def static_cache(model, length=80):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=length)


def test_static_caches(model):
    """Length is only known to be too small when the prompt has passed the first layer."""
    with prunekit.apply(model, FASTV):
        with refused("tokens does not fit into a static cache of", model, after=6):
            model(**inputs_of(), **{CACHE: static_cache(model, 10)})
        cache = static_cache(model)
        model(**inputs_of(), **{CACHE: cache})
        with refused("a static KV cache cannot be cropped; use the default cache", model):
            cache.crop(-1)


RENUMBERED = {"positions": "renumber", **FASTV}
HALF = {"stages": [{"use": "skip_layers", "layers": [0], "what": "attention"}]}
COMPILED = {
    "a prefill": (FASTV, False, "only decoding steps on a StaticCache that was filled under it are one graph"),
    "renumbered": (RENUMBERED, True, "renumbered positions cannot be compiled; decode uncompiled"),
    "half a layer": (HALF, True, "layers that '.+' in decoding cannot be compiled; decode uncompiled"),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_calls(model, case):
    """Only the decoding steps of `generate` on a static cache are compiled; dynamo tells our reason with its own."""
    pipeline, filled, phrase = COMPILED[case]
    torch._dynamo.reset()
    inputs = inputs_of()
    with torch.no_grad(), prunekit.apply(model, pipeline):
        cache, given = static_cache(model), inputs
        if filled:
            model(**inputs, **{CACHE: cache})
            seen = torch.arange(80) <= inputs["input_ids"].shape[1]
            given = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[26]])}
            given["attention_mask"] = seen[None, None, None]
        step = torch.compile(model.forward, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=phrase):
            step(**given, **{CACHE: cache})


def test_a_compiled_step_without_a_mask(model):
    """Simulated: transformers makes one for every static cache."""
    with torch.no_grad(), prunekit.apply(model, FASTV):
        cache = static_cache(model)
        model(**inputs_of(), **{CACHE: cache})
        with refused("compiled decoding on a pruned cache needs the attention mask that `generate` makes", model):
            static.decode(3, None, torch.zeros(1, 1, 32), {CACHE: cache}, "bool")


def test_a_kind_of_attention_that_is_not_known(model):
    own = model_of()
    own.config.text_config._attn_implementation = "flex_attention"
    with refused("is not supported by this version; load the model with", own), prunekit.apply(own, FASTV):
        pass


def with_decoder(kind, **numbers):
    """A LLaVA with another decoder; it is not proved here."""
    config = CONFIGS["llava"](4)
    decoder = text(4, **numbers)
    config.text_config = AutoConfig.for_model(kind, **decoder)
    return tiny_from_config(config, "eager", torch.float32)


def test_positions_under_flash_attention():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}
    own = with_decoder("ministral3", rope_parameters=rope | {"original_max_position_embeddings": 8})
    with flash_kernel():
        own.config.text_config._attn_implementation = FLASH
        phrase = ", whose gaps flash attention would take for the borders of packed sequences"
        with refused(phrase, own), prunekit.apply(own, FASTV):
            pass
        with prunekit.apply(own, {"stages": [{"use": "skip_layers", "layers": [1]}]}):
            own.generate(**inputs_of(), max_new_tokens=2)


def test_positions_that_layers_count_by_themselves():
    numbers = {"num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 8, "floor_scale": 60}
    own = with_decoder("llama4_text", no_rope_layers=[1, 1, 1, 0], **numbers)
    inputs = inputs_of((1,), 9)
    with prunekit.apply(own, FASTV):
        with refused(" count positions by themselves, which is exact for prompts of less than 30 tokens", own):
            own(**inputs_of((2,), 9))
        own.generate(**inputs, max_new_tokens=3)
        with refused("and of less than 60 with the answer", own, after=1000):
            own.generate(**inputs, max_new_tokens=50, min_new_tokens=50)


def test_a_window_under_flash_attention():
    from prunekit.testing.tiny_families import tiny_batch, tiny_model

    own = tiny_model("gemma3", dtype=torch.float32)
    with flash_kernel():
        own.config.text_config._attn_implementation = "flash_of_the_tests"
        with prunekit.apply(own, FASTV), refused(", which flash attention would count in kept tokens", own):
            own(**tiny_batch(own))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_blocks_may_be_left_in_any_order(order):
    """As several exit stacks may do: what is still open acts, and in the end the model is as it was."""
    own, inputs = model_of(), inputs_of()
    dense = own(**inputs).logits
    blocks = [prunekit.apply(own, {"stages": [{"use": "random", "at": at, "keep": 0.5}]}) for at in (1, 2, 3)]
    for block in blocks:
        block.__enter__()
    for number in order:
        assert not torch.equal(own(**inputs).logits, dense)
        blocks[number].__exit__(None, None, None)
    assert torch.equal(own(**inputs).logits, dense)
    assert not any("forward" in vars(module) for module in own.modules())
    assert not any("__prunekit_attached__" in vars(module) for module in own.modules())
