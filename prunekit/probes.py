"""What prunekit uses of transformers beyond its documented surface: every name, where it is used, and a probe of it.

The probes run once in a process, when the first pipeline is applied, and take some milliseconds. One that fails says
what changed upstream, instead of leaving it to a wrong number. Whatever else is imported from a submodule of
transformers is caught by the tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import cache_utils, modeling_utils
from transformers.models.llava import modeling_llava
from transformers.models.llava_next import modeling_llava_next

from prunekit.errors import Unsupported
from prunekit.upstream import CACHE, EMPTY_LAYERS, TESTED


@dataclass(frozen=True)
class Probe:
    """A name of transformers that is no documented API.

    files: those of prunekit that rely on it, each with what it is called there. purpose: what for. check: raises
    whatever it likes if it is not as it was.
    """

    name: str
    files: Mapping[str, str]
    purpose: str
    check: Callable[[], None]


def verify() -> None:
    """Raise Unsupported if this transformers version lacks something, with all that it lacks. Checked once."""
    if problems := _problems():
        raise Unsupported(
            f"transformers {transformers.__version__} is not as prunekit needs it (tested: {TESTED}):\n  "
            + "\n  ".join(problems)
            + "\nInstall a tested version, or a newer prunekit."
            + f" (pip install 'transformers{TESTED}')"
        )


@cache
def _problems() -> tuple[str, ...]:
    return tuple(text for probe in PROBES if (text := problem(probe)))


def problem(probe: Probe) -> str:
    """What is wrong with what `probe` looks at, in one line; empty: nothing."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            probe.check()
    except Exception as error:
        return f"{probe.name} ({', '.join(probe.files)}: {probe.purpose}): {type(error).__name__}: {error}"
    return ""


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def _cache_layers() -> None:
    kv: Any = cache_utils.DynamicCache()
    states = torch.zeros(1, 1, 3, 2)
    kv.update(states, states, 0)
    layer = kv.layers[0]
    _expect(type(layer) is cache_utils.DynamicLayer, f"a DynamicCache holds {type(layer).__name__}, not DynamicLayer")
    _expect(
        layer.keys.shape == states.shape == layer.values.shape, "a layer's keys and values are not what it was given"
    )
    _expect(layer.is_initialized and kv.get_seq_length() == 3, "a filled layer does not say so")
    _expect(tuple(layer.get_mask_sizes(2)) == (5, 0), "get_mask_sizes(2) of a layer of 3 tokens is not (5, 0)")


# What `RaggedLayer` overrides, and what it must therefore override.
OVERRIDDEN = (
    "update", "get_seq_length", "get_mask_sizes", "crop", "reset", "reorder_cache", "batch_select_indices",
    "batch_repeat_interleave",
)  # fmt: skip
INHERITED = {"lazy_initialization", "get_max_cache_shape", "get_max_length", "offload", "prefetch"}


def _layer_methods() -> None:
    base = cache_utils.DynamicLayer
    gone = [name for name in OVERRIDDEN if not callable(getattr(base, name, None))]
    _expect(not gone, f"DynamicLayer has no {', '.join(gone)}")
    public = {name for name, value in inspect.getmembers(base, callable) if not name.startswith("_")}
    new = public - set(OVERRIDDEN) - INHERITED
    _expect(not new, f"DynamicLayer has new methods, which may count in physical tokens: {', '.join(sorted(new))}")


def _sliding_layer() -> None:
    sliding = cache_utils.DynamicSlidingWindowLayer
    _expect(issubclass(sliding, cache_utils.DynamicLayer), "DynamicSlidingWindowLayer is no DynamicLayer")


def _static_layer() -> None:
    layer: Any = cache_utils.StaticLayer(max_cache_len=5)
    states = torch.ones(1, 1, 2, 2)
    layer.update(states, states)
    _expect(layer.max_cache_len == 5 and layer.keys.shape[2] == 5, "a StaticLayer is not as long as asked")
    _expect(isinstance(layer.cumulative_length, Tensor), "StaticLayer.cumulative_length is no tensor")
    _expect(int(layer.get_seq_length()) == 2, "a StaticLayer of two tokens does not say so")
    config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
    whole: Any = cache_utils.StaticCache(config=config, max_cache_len=5)
    _expect({type(one) for one in whole.layers} == {cache_utils.StaticLayer}, "a StaticCache holds other layers")
    _expect(tuple(layer.get_mask_sizes(1)) == (5, 0), "get_mask_sizes(1) of a StaticLayer of 5 slots is not (5, 0)")


def _empty_layers() -> None:
    for kind in EMPTY_LAYERS:
        layer = kind()
        _expect(layer.keys is None and layer.values is None, f"a {kind.__name__} holds keys and values")


class _Longer(cache_utils.DynamicLayer):  # type: ignore[no-untyped-call]
    """Says that four more tokens have passed than it holds."""

    def get_seq_length(self) -> int:
        return super().get_seq_length() + 4

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def _decoder() -> tuple[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """A decoder of one layer, and what that layer was called with: `forward` of the instance is overridden."""
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config._attn_implementation = "sdpa"
    decoder: Any = transformers.LlamaModel(config)
    decoder.eval()
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    original = decoder.layers[0].forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    decoder.layers[0].forward = forward
    return decoder, seen


def _layer_call() -> None:
    decoder, seen = _decoder()
    output = decoder(inputs_embeds=torch.zeros(1, 3, 8), use_cache=True)
    _expect(len(seen) == 1, "an override of a layer's forward on the instance is not called")
    args, kwargs = seen[0]
    _expect(len(args) == 1 and args[0].shape == (1, 3, 8), "a layer is not called with hidden states alone, then names")
    wanted = {"attention_mask", "position_embeddings", "position_ids", CACHE}
    _expect(wanted <= set(kwargs), f"a layer is called without {', '.join(sorted(wanted - set(kwargs)))}")
    _expect(len(kwargs["position_embeddings"]) == 2, "position_embeddings are not (cos, sin)")
    _expect(output["last_hidden_state"].shape == (1, 3, 8), "a decoder's output has no last_hidden_state")


def _mask_sizes() -> None:
    decoder, seen = _decoder()
    kv: Any = cache_utils.DynamicCache()
    decoder(inputs_embeds=torch.zeros(2, 3, 8), **{CACHE: kv})
    kv.layers[0].__class__ = _Longer
    padded = torch.tensor([[0] + 7 * [1], 8 * [1]])

    def run(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return args[0]

    decoder.layers[0].forward = run
    decoder(inputs_embeds=torch.zeros(2, 1, 8), attention_mask=padded, **{CACHE: kv})
    mask = seen[-1][1]["attention_mask"]
    _expect(isinstance(mask, Tensor) and mask.shape[-1] == 8, "masks are not sized by the cache's get_mask_sizes")


def _attention_interface() -> None:
    original = modeling_utils.AttentionInterface.get_interface
    parameters = list(inspect.signature(original).parameters)
    _expect(parameters == ["self", "attn_implementation", "default"], f"get_interface takes {parameters}")
    asked: list[str] = []

    class Spy(modeling_utils.AttentionInterface):
        def get_interface(self, attn_implementation: str, default: Any) -> Any:
            asked.append(attn_implementation)
            return original(self, attn_implementation, default)

    decoder, _ = _decoder()
    module = inspect.getmodule(type(decoder))
    before = module.ALL_ATTENTION_FUNCTIONS  # type: ignore[union-attr]
    module.ALL_ATTENTION_FUNCTIONS = Spy()  # type: ignore[union-attr, no-untyped-call]
    try:
        decoder(inputs_embeds=torch.zeros(1, 2, 8))
    finally:
        module.ALL_ATTENTION_FUNCTIONS = before  # type: ignore[union-attr]
    _expect(asked == ["sdpa"], "attention modules do not ask AttentionInterface.get_interface for their kernel")


def _registered_kernels() -> None:
    interface: Any = modeling_utils.AttentionInterface
    interface.register("prunekit-probe", lambda: None)
    _expect("prunekit-probe" in interface._global_mapping, "a registered kernel is not in _global_mapping")
    del interface._global_mapping["prunekit-probe"]
    _expect("prunekit-probe" not in interface().valid_keys(), "a kernel that was taken out of it is still valid")


def _attention_name() -> None:
    decoder, _ = _decoder()
    _expect(decoder.config._attn_implementation == "sdpa", "config._attn_implementation does not name the attention")


def _image_features() -> None:
    base: Any = modeling_llava.LlavaModel
    named = str(inspect.signature(base.get_image_features).return_annotation)
    _expect("BaseModelOutputWithPooling" in named, f"get_image_features returns {named}, without pooler_output")


def _own_class() -> None:
    make: Any = transformers.LlamaForCausalLM._from_config
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    made = make(config, attn_implementation="eager")
    _expect(type(made) is transformers.LlamaForCausalLM, f"_from_config makes a {type(made).__name__}")
    _expect(made.config._attn_implementation == "eager", "_from_config does not take attn_implementation")


def _encoded_first() -> None:
    """`generate` may encode images before it calls the model; it then hands them over in this argument."""
    base: Any = modeling_llava.LlavaModel
    encodes = hasattr(transformers.GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
    takes = "mm_encoder_outputs" in inspect.signature(base.forward).parameters
    _expect(takes or not encodes, "images are encoded by generate, but not handed over in mm_encoder_outputs")


def _anyres() -> None:
    packing: Any = modeling_llava_next
    grid = packing.get_anyres_image_grid_shape((4, 8), [[4, 8], [8, 4]], 4)
    _expect(tuple(grid) == (1, 2), f"get_anyres_image_grid_shape gives {grid}, not (1, 2)")
    cut = packing.unpad_image(torch.zeros(1, 4, 4), (2, 4))
    _expect(tuple(cut.shape) == (1, 2, 4), f"unpad_image leaves {tuple(cut.shape)}, not (1, 2, 4)")


def _module_forward() -> None:
    """An override in an instance's `__dict__` wins over the class, also through `__call__`."""
    module = nn.Identity()
    module.__dict__["forward"] = lambda x: x + 1
    _expect(int(module(torch.zeros(()))) == 1, "nn.Module.__call__ does not call the instance's forward")


def _replicas() -> None:
    _expect(callable(nn.Identity()._replicate_for_data_parallel), "DataParallel copies modules in another way")


RAGGED, STATIC, TAP = "engine/cache/ragged.py", "engine/cache/static.py", "engine/attention/tap.py"
PROBES = (
    Probe(
        "cache_utils.DynamicCache.layers", {RAGGED: "DynamicCache"}, "ragged layers stand in for its own",
        _cache_layers,
    ),
    Probe("cache_utils.DynamicLayer", {RAGGED: "DynamicLayer"}, "what ragged layers override", _layer_methods),
    Probe(
        "cache_utils.DynamicSlidingWindowLayer",
        {RAGGED: "DynamicSlidingWindowLayer", "verify/comparison.py": "DynamicSlidingWindowLayer"}, "is replaced, too",
        _sliding_layer,
    ),
    Probe(
        "cache_utils.DummyLayer", {RAGGED: "EMPTY_LAYERS", STATIC: "EMPTY_LAYERS"},
        "of layers that read others' keys and values", _empty_layers,
    ),
    Probe("cache_utils.StaticLayer", {STATIC: "StaticLayer"}, "what static ragged layers override", _static_layer),
    Probe(
        "masking_utils", {RAGGED: "get_mask_sizes", STATIC: "get_mask_sizes"}, "masks are as long as the cache says",
        _mask_sizes,
    ),
    Probe(
        "decoder layers",
        {"engine/decoder/layer_call.py": "position_embeddings", "verify/stock.py": "position_embeddings"},
        "how a layer is called, what it returns", _layer_call,
    ),
    Probe(
        "modeling_utils.AttentionInterface", {TAP: "get_interface"}, "what kernels are called with",
        _attention_interface,
    ),
    Probe(
        "AttentionInterface._global_mapping", {"verify/tower.py": "_global_mapping"},
        "a kernel is registered for a while", _registered_kernels,
    ),
    Probe(
        "config._attn_implementation",
        {"families/base.py": "_attn_implementation", "verify/stock.py": "_attn_implementation"},
        "which attention is used", _attention_name,
    ),
    Probe(
        "get_image_features().pooler_output",
        {"engine/attach.py": "pooler_output", "engine/prompt/visual_inputs.py": "pooler_output",
         "verify/tiny_prompts.py": "pooler_output"},
        "visual tokens of each image", _image_features,
    ),
    Probe(
        "PreTrainedModel._from_config", {"verify/tiny_models.py": "_from_config"}, "twins of a model's own class",
        _own_class,
    ),
    Probe(
        "mm_encoder_outputs", {"engine/prompt/call.py": "mm_encoder_outputs"}, "images that generate has encoded",
        _encoded_first,
    ),
    Probe(
        "models.llava_next.modeling_llava_next",
        {"families/grids.py": "modeling_llava_next", "families/patch_groups.py": "PACKING"},
        "coords and patches of any-resolution images", _anyres,
    ),
    Probe(
        "torch.nn.Module._replicate_for_data_parallel", {"engine/attach.py": "_replicate_for_data_parallel"},
        "copies of a model inside a block are refused", _replicas,
    ),
    Probe("torch.nn.Module.__call__", {"engine/overrides.py": "__dict__"}, "overrides of instances", _module_forward),
)  # fmt: skip
