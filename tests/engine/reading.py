"""A strategy that takes down what its hooks are given, and the naive computation of the same from the stock model."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
from torch import Tensor

from prunekit import hookimpl, strategy
from prunekit.pipeline import build
from prunekit.registry import Registry
from prunekit.strategy.sites import Sites

EVERYWHERE = Sites(end=True)


def reader(names, seen, keep=None, **traits):
    """A strategy class whose `score_tokens` or `select_tokens` asks for `names` and appends them to `seen`.

    keep: from what was seen to the bool mask of kept tokens; None keeps all but the last token of each sample.
    """

    def take(**given):
        seen.append(given)
        return keep(given) if keep else given["valid"] & (given["valid"].cumsum(-1) < given["valid"].sum(-1, True))

    space: dict = {"take": take}
    arguments = sorted({*names, "valid"})
    text = (
        f"def select_tokens(self, {', '.join(arguments)}):\n    return take({', '.join(f'{a}={a}' for a in arguments)})"
    )
    exec(text, space)
    declared = {"keep": "refused", "sites": EVERYWHERE, **traits}
    return strategy(**declared)(type("Reader", (), {"select_tokens": hookimpl(space["select_tokens"])}))


def piped(*stages, **options):
    """A pipeline of (strategy class or registered name, keys of the stage) pairs."""
    registry, listed = _registry(), []
    for number, (use, keys) in enumerate(stages):
        if not isinstance(use, str):
            setattr(sys.modules[__name__], f"Reader{number}", use)
            registry.strategy(f"reader{number}", f"{__name__}:Reader{number}")
            use = f"reader{number}"
        listed.append({"use": use, **keys})
    return build.build({"name": "reads", "stages": listed, **options}, registry=registry)


def _registry():
    from prunekit_strategies import plugin

    registry = Registry()
    plugin.prunekit_register(registry)
    return registry


@contextmanager
def watched(model):
    """The states that enter every decoder layer and the arguments of the call, while the stock model runs."""
    found: list[tuple[Tensor, dict]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given, named: found.append((given[0], named)), with_kwargs=True)
        for layer in model.get_decoder().layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def rotated(x, cos, sin):
    """By hand: halves, the second turned in front of the first with its sign changed."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def projected(layer, states, cos_sin):
    """Queries (B, A, S, D), keys and values (B, A_kv, S, D) of a llama layer by hand; cos_sin None: not rotated."""
    attention, states = layer.self_attn, layer.input_layernorm(states)
    shape = (*states.shape[:-1], -1, attention.head_dim)
    q, k, v = (p(states).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    return (q, k, v) if cos_sin is None else (rotated(q, *cos_sin), rotated(k, *cos_sin), v)


def logits_of(layer, states, cos_sin):
    """Scaled products of all queries with all keys, (B, A, S, S), head by head."""
    q, k, _ = projected(layer, states, cos_sin)
    group = q.shape[1] // k.shape[1]
    heads = [q[:, a] @ k[:, a // group].transpose(1, 2) / q.shape[-1] ** 0.5 for a in range(q.shape[1])]
    return torch.stack(heads, dim=1)
