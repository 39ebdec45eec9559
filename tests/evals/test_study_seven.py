"""The study's prefill at a large shape whose layers share weights: many layers, one's memory, the same computation."""

import pytest
import torch

pytest.importorskip("lmms_eval")
from prunekit_evals.studies.par import findings, seven, tables

TINY = seven.workload.TINY


def test_layers_share_weights_and_keep_their_numbers():
    layers = seven.model_of(TINY).model.language_model.layers
    assert len(layers) == TINY.layers
    assert len({layer.mlp.up_proj.weight.data_ptr() for layer in layers}) == 1
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(TINY.layers))


@torch.no_grad()
def test_it_computes_what_as_many_layers_with_equal_weights_do():
    shared = seven.model_of(TINY).float()
    plain = seven.workload.model_of(TINY)
    state = {name: value.clone() for name, value in shared.state_dict().items()}
    plain.load_state_dict(state)
    inputs = seven.workload.inputs_of(TINY)
    torch.testing.assert_close(shared(**inputs).logits, plain(**inputs).logits)


def test_figures_and_their_sentence():
    found = seven.seven(TINY, 1)
    assert len(found["rows"]) == 2
    assert tables.prefills(found).count("\n") == 3
    row = {"flops": 0.25, "prefill": [0.24, 0.25, 0.26]}
    text = findings.seven({"rounds": 3, "dense_s": 60.0, "rows": {"T=1, L=2": row}})
    assert "4.00 times as fast as dense, 1.00 of what its FLOPs promise and past the 2.3" in text
    slow = findings.seven({"rounds": 3, "dense_s": 60.0, "rows": {"T=1, L=2": row | {"prefill": [0.5, 0.5, 0.5]}}})
    assert "short of the 2.3" in slow
