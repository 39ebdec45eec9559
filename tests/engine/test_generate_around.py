"""What people do around `generate` and `forward`: threads, gradients, weights elsewhere, flash kernels; refusals."""

from __future__ import annotations

import threading
from functools import cache

import pytest
import torch
from cases import pipeline
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from twins import pool_merges

import prunekit
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import generate
from prunekit.verify.oracle import MaskedReference
from prunekit.verify.precision import Float64Throughout

EXACT, LENGTH = 1e-9, 5
FLASH = "simulated_flash_attention"
NAMES = ["fastv", "divprune-fastv-skip", "random-pool-divprune", "skip-attention", "skip-mlp"]
model_of = cache(tiny_llava)


def batch(seed=0):
    return tiny_inputs((1, 2, 1), (14, 6, 9), seed=seed)


def reference_of(model, name, inputs, report):
    return MaskedReference(model, inputs, report, pool_merges(pipeline(name)["stages"])(report))


def test_two_threads_share_one_attached_model():
    model, found = model_of(), {}
    prompts = {seed: batch(seed) for seed in range(4)}

    def work(*seeds):
        for seed in seeds:
            found[seed] = torch.stack(generate(model, prompts[seed], max_new_tokens=LENGTH).logits)

    with prunekit.apply(model, pipeline("divprune-fastv-skip")):
        threads = [threading.Thread(target=work, args=seeds) for seeds in ((0, 1, 2), (3, 2, 1, 0))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, prompt in prompts.items():
            assert torch.equal(found[seed], torch.stack(generate(model, prompt, max_new_tokens=LENGTH).logits))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_all_parameters_are_those_of_the_reference(name, attention):
    model, inputs = tiny_llava(attention).requires_grad_(True), batch()

    def gradients():
        model.zero_grad()
        # Each row's last token: holes in the logits of the others have no counterpart.
        model(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    with Float64Throughout():
        with prunekit.apply(model, pipeline(name)) as run:
            ours = gradients()
        with reference_of(model, name, inputs, run.report).installed():
            theirs = gradients()
    zero = torch.zeros(())
    assert sum(g is not None and bool(g.any()) for g in ours.values()) > 30
    for parameter in ours:
        mine, other = (zero if g is None else g for g in (ours[parameter], theirs[parameter]))
        assert (mine - other).abs().max() < EXACT * max(1, float(other.abs().max())), parameter


def test_gradient_checkpointing_is_refused():
    model = tiny_llava().requires_grad_(True).train()
    for layer in model.model.language_model.layers:
        layer.gradient_checkpointing = True  # as `gradient_checkpointing_enable` says it
    with prunekit.apply(model, pipeline("fastv")):
        with pytest.raises(prunekit.Unsupported, match="gradient checkpointing"):
            model(**tiny_inputs(), use_cache=False)
        for layer in model.model.language_model.layers:
            layer.gradient_checkpointing = False
        model(**tiny_inputs(), use_cache=False).logits.sum().backward()


def test_weights_that_are_fetched_when_a_layer_runs():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny_llava(), batch()
    with prunekit.apply(model, pipeline("divprune-fastv-skip")):
        expected = torch.stack(generate(model, inputs, max_new_tokens=LENGTH).logits)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    fetched = set()
    for number, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(lambda *_, number=number: fetched.add(number))
    with prunekit.apply(model, pipeline("divprune-fastv-skip")):
        found = torch.stack(generate(model, inputs, max_new_tokens=LENGTH).logits)
    assert torch.equal(found, expected)
    assert fetched == {0, 1, 2, 4, 5}, "a skipped layer is not even fetched"
    assert all(p.device.type == "meta" for p in model.model.language_model.layers.parameters())


def test_layers_on_several_devices():
    """`device_map` moves what enters each layer; on one machine without GPUs, the map itself is what can be tried."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny_llava(), batch()
    with prunekit.apply(model, pipeline("fastv")):
        expected = torch.stack(generate(model, inputs, max_new_tokens=LENGTH).logits)
    places = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "language_model"}
    decoder = model.model.language_model
    places |= {f"model.language_model.{name}": "cpu" for name, _ in decoder.named_children() if name != "layers"}
    places |= {f"model.language_model.layers.{number}": "cpu" for number in range(len(decoder.layers))}
    dispatched = accelerate.dispatch_model(model, device_map=places, main_device="cpu", force_hooks=True)
    with prunekit.apply(dispatched, pipeline("fastv")):
        found = torch.stack(generate(dispatched, inputs, max_new_tokens=LENGTH).logits)
    assert torch.equal(found, expected)


def simulated_flash(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """What a flash kernel computes, from what it gets: padding as (B, K), causality by itself, from the end."""
    queries, keys = query.shape[2], key.shape[2]
    assert attention_mask is None or attention_mask.ndim == 2
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    seen = torch.ones(queries, keys, dtype=torch.bool)
    causal = module.is_causal if is_causal is None else is_causal
    seen = (seen.tril(keys - queries) if causal else seen)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, :]
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return output.nan_to_num(0.0).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash():
    AttentionInterface.register(FLASH, simulated_flash)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    model = tiny_llava()
    model.model.language_model.config._attn_implementation = FLASH  # loading by name would want the real kernel
    yield model
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop(FLASH)


@pytest.mark.parametrize("images", [(1,), (1, 2, 1), (1, 0, 2)], ids=["one", "ragged", "text-row"])
@pytest.mark.parametrize("name", NAMES[:3])
def test_flash_kernels_get_their_kind_of_mask(flash, name, images):
    inputs = tiny_inputs(images, (14, 6, 9)[: len(images)])
    with Float64Throughout():
        with prunekit.apply(flash, pipeline(name)) as run:
            output = generate(flash, inputs, max_new_tokens=LENGTH)
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        reference = reference_of(model_of("sdpa"), name, inputs, run.report).logits(tokens)
    assert (torch.stack(output.logits, 1) - reference).abs().max() < EXACT


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"assistant_model": "the model itself"}, "assistant_model.*prompt_lookup"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
        ({"custom_generate": lambda model, **kwargs: None}, "custom_generate"),
        ({"cache_implementation": "quantized"}, "quantized"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_calls_of_generate_that_are_refused(options, reason):
    model = model_of()
    if "assistant_model" in options:
        options = {"assistant_model": tiny_llava()}
    ran = []
    handle = model.model.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
    with prunekit.apply(model, pipeline("fastv")), pytest.raises(prunekit.Unsupported, match=reason):
        generate(model, tiny_inputs(), max_new_tokens=3, **options)
    handle.remove()
    assert not ran, "refused before anything is computed"


def test_generate_batch_is_refused():
    model = model_of()
    with prunekit.apply(model, pipeline("fastv")), pytest.raises(prunekit.Unsupported, match="pages"):
        model.generate_batch([[1, 2, 3]])


def test_generate_is_itself_again_afterwards():
    model = model_of()
    with prunekit.apply(model, pipeline("fastv")):
        assert "generate" in model.__dict__
    assert not {"generate", "generate_batch", "prepare_inputs_for_generation"} & set(model.__dict__)
