"""Every name of transformers that is no documented API has a probe, which passes here and fails when it changes."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import cache_utils, modeling_utils
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava
from transformers.models.llava_next import modeling_llava_next

import prunekit
from prunekit import probes, upstream

ROOT = Path(__file__).parent.parent
PROBES = {probe.name: probe for probe in probes.PROBES}


def _add_method(patch: Any) -> None:
    patch.setattr(cache_utils.DynamicLayer, "shuffle", lambda self: None, raising=False)


def _physical_sizes(patch: Any) -> None:
    patch.setattr(cache_utils.DynamicLayer, "get_mask_sizes", lambda self, queries: (queries, 3))


def _positional(patch: Any) -> None:
    plain = modeling_llama.LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[0].forward
        self.layers[0].forward = lambda hidden, **named: layer(hidden, named.pop("attention_mask"), **named)
        return plain(self, *args, **kwargs)

    patch.setattr(modeling_llama.LlamaModel, "forward", forward)


def _physical_masks(patch: Any) -> None:
    patch.setattr(probes._Longer, "get_mask_sizes", cache_utils.DynamicLayer.get_mask_sizes)
    patch.setattr(probes._Longer, "get_seq_length", lambda self: self.keys.shape[-2])


class _Holding:
    keys = values = torch.zeros(1)


def _own_kernel(patch: Any) -> None:
    class Table(dict):  # type: ignore[type-arg]
        def get_interface(self, name: str, default: Any) -> Any:
            return default

    patch.setattr(modeling_utils.AttentionInterface, "get_interface", lambda self, name: None)


def _one_more(patch: Any) -> None:
    patch.setattr(torch.nn.Module, "__call__", lambda self, x: type(self).forward(self, x))


# How upstream might change each of them.
CHANGES: dict[str, Any] = {
    "cache_utils.DynamicCache.layers": _physical_sizes,
    "cache_utils.DynamicLayer": _add_method,
    "cache_utils.DynamicSlidingWindowLayer": lambda patch: patch.setattr(
        cache_utils, "DynamicSlidingWindowLayer", cache_utils.StaticLayer
    ),
    "cache_utils.DummyLayer": lambda patch: patch.setattr(probes, "EMPTY_LAYERS", (_Holding,)),
    "cache_utils.StaticLayer": lambda patch: patch.setattr(
        cache_utils.StaticLayer, "get_mask_sizes", lambda self, queries: (queries, 0)
    ),
    "masking_utils": _physical_masks,
    "decoder layers": _positional,
    "modeling_utils.AttentionInterface": _own_kernel,
    "AttentionInterface._global_mapping": lambda patch: patch.setattr(
        modeling_utils.AttentionInterface, "register", classmethod(lambda cls, key, value: None)
    ),
    "config._attn_implementation": lambda patch: patch.setattr(
        transformers.LlamaConfig, "_attn_implementation", property(lambda self: "eager", lambda self, value: None)
    ),
    "get_image_features().pooler_output": lambda patch: patch.setattr(
        modeling_llava.LlavaModel, "get_image_features", lambda self, pixel_values: None
    ),
    "PreTrainedModel._from_config": lambda patch: patch.setattr(
        transformers.PreTrainedModel, "_from_config", classmethod(lambda cls, config, **_: cls(config))
    ),
    "mm_encoder_outputs": lambda patch: (
        patch.setattr(modeling_llava.LlavaModel, "forward", lambda self, input_ids: None),
        patch.setattr(
            transformers.GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation", None, raising=False
        ),
    ),
    "models.llava_next.modeling_llava_next": lambda patch: patch.setattr(
        modeling_llava_next, "unpad_image", lambda image, size: image
    ),
    "torch.nn.Module._replicate_for_data_parallel": lambda patch: patch.delattr(
        torch.nn.Module, "_replicate_for_data_parallel"
    ),
    "torch.nn.Module.__call__": _one_more,
}


def test_every_probe_has_its_change() -> None:
    assert list(CHANGES) == list(PROBES)


@pytest.mark.parametrize("name", PROBES)
def test_the_probe_passes_here(name: str) -> None:
    assert probes.problem(PROBES[name]) == ""


@pytest.mark.parametrize("name", PROBES)
def test_the_probe_names_the_files_that_use_it(name: str) -> None:
    assert PROBES[name].files
    for path, mention in PROBES[name].files.items():
        assert mention in (ROOT / "prunekit" / path).read_text(encoding="utf-8"), f"{path} does not use {mention}"


@pytest.mark.parametrize("name", CHANGES)
def test_the_probe_notices_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CHANGES[name](monkeypatch)
    text = probes.problem(PROBES[name])
    assert text.startswith(f"{name} (")
    assert len(text) > len(name) + 10


def test_a_change_is_refused_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.testing.tiny import tiny_llava

    broken = probes.Probe(
        "AttentionInterface.frobnicate", {"tap.py": "x"}, "nothing", lambda: probes._expect(False, "gone")
    )
    monkeypatch.setattr(probes, "_problems", lambda: (probes.problem(broken),))
    with (
        pytest.raises(prunekit.Unsupported, match=r"(?s)transformers 5.*Interface.frobnicate.*gone.*Install"),
        prunekit.apply(tiny_llava(), {"stages": [{"use": "fastv", "keep": 0.5}]}),
    ):
        pass


def test_probes_leave_no_trace() -> None:
    state, interface = torch.get_rng_state(), modeling_utils.AttentionInterface.get_interface
    functions = modeling_llama.ALL_ATTENTION_FUNCTIONS
    for probe in probes.PROBES:
        assert probes.problem(probe) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert modeling_utils.AttentionInterface.get_interface is interface
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS is functions


def test_the_tested_range_is_the_declared_one() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r'"transformers(>=[^"]+)"', text)
    assert declared is not None and declared[1] == upstream.TESTED


def test_nothing_else_is_taken_from_inside_transformers() -> None:
    """A name from a submodule of transformers is one of those that a probe looks at, or of those here."""
    harmless = {"transformers.utils.logging"}
    probed = inspect.getsource(probes)
    found = set()
    for path in sorted((ROOT / "prunekit").rglob("*.py")):
        if "testing" in path.parts or path.name in ("upstream.py", "probes.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.startswith("transformers.")}
    for name in sorted(found - harmless):
        module, _, attribute = name.rpartition(".")
        assert module.rpartition(".")[2] in probed and attribute in probed, f"{name} has no probe in {probes.__name__}"


def test_private_names_are_those_of_the_probes() -> None:
    """The private attributes of configs and of `AttentionInterface` that prunekit reads."""
    read: set[str] = set()
    for path in sorted((ROOT / "prunekit").rglob("*.py")):
        read |= set(re.findall(r"(?:config|AttentionInterface|interface)\.(_\w+)", path.read_text(encoding="utf-8")))
    assert read - {"__dict__"} == {"_attn_implementation", "_global_mapping"}
