"""What a strategy class says about itself: its hooks and traits, and whether it can be a strategy at all."""

from __future__ import annotations

import dataclasses
from typing import Any

from prunekit.errors import PluginError
from prunekit.registry import Entry
from prunekit.strategy import decoder_requests
from prunekit.strategy.options import STAGE_KEYS
from prunekit.strategy.sites import Sites
from prunekit.strategy.tower_requests import ENCODER_KINDS

TOKEN_STARTS = ("score_tokens", "select_tokens")
TOKEN_HOOKS = (*TOKEN_STARTS, "merge_tokens")
STARTS = (*TOKEN_STARTS, "plan_layers", "route")
HOOKS = (*TOKEN_HOOKS, "plan_layers", "route")
FLAGS = ("takes_keep", "takes_keep_layers", "drops_all", "per_sample", "trainable", "routes_tokens", "routes_layers")
# What a strategy class says about itself beside its options; as dataclass fields they would become options.
TRAITS = ("sites", "inputs", "extras", *FLAGS)
EXTRAS = ("cls",)  # what a tower gives beside the visual tokens


def implements(cls: type[Any], hook: str) -> bool:
    """The class has a marked implementation of `hook`."""
    return getattr(getattr(cls, hook, None), "prunekit_impl", None) is not None


def is_token(cls: type[Any]) -> bool:
    """Its instances decide about visual tokens at a site."""
    return any(implements(cls, hook) for hook in TOKEN_STARTS)


def is_router(cls: type[Any]) -> bool:
    """Its instances decide once for each sample, before the decoder."""
    return implements(cls, "route")


def routes_tokens(cls: type[Any]) -> bool:
    """It is a router that scores tokens."""
    return is_router(cls) and bool(getattr(cls, "routes_tokens", True))


def routes_layers(cls: type[Any]) -> bool:
    """It is a router that scores or plans layers."""
    return is_router(cls) and bool(getattr(cls, "routes_layers", True))


def plans_layers_itself(cls: type[Any]) -> bool:
    """It is a router that plans layers without a budget."""
    own = not (getattr(cls, "takes_keep_layers", True) and takes_keep(cls))
    return routes_layers(cls) and own


def takes_keep(cls: type[Any]) -> bool:
    """Its budgets come from the pipeline file."""
    return bool(getattr(cls, "takes_keep", True))


def sites_of(cls: type[Any]) -> Sites:
    """The sites that it allows."""
    return getattr(cls, "sites", None) or Sites()


def stage_keys(cls: type[Any]) -> tuple[str, ...]:
    """The reserved keys that its stages take, for suggestions."""
    if is_router(cls):
        tokens = STAGE_KEYS[1:5] if routes_tokens(cls) and takes_keep(cls) else ()
        layers = STAGE_KEYS[5:] if routes_layers(cls) and not plans_layers_itself(cls) else ()
        return ("use", *tokens, *layers)
    if is_token(cls):
        return STAGE_KEYS[:5] if takes_keep(cls) else STAGE_KEYS[:2]
    return STAGE_KEYS[:1]


def check_class(cls: type[Any], entry: Entry) -> None:
    """Raise PluginError, naming the origin, for a class that cannot be a strategy."""
    who = f"strategy '{entry.name}' ({entry.target}) from {entry.origin}"
    if not dataclasses.is_dataclass(cls):
        raise PluginError(f"{who} is no dataclass; its options are dataclass fields: add @dataclass(frozen=True)")
    unmarked = [hook for hook in HOOKS if hasattr(cls, hook) and not implements(cls, hook)]
    if unmarked:
        raise PluginError(f"{who}: {unmarked[0]} is not marked; put @hookimpl above it")
    if not any(implements(cls, hook) for hook in STARTS):
        raise PluginError(f"{who} implements none of {', '.join(STARTS)}, so it would do nothing")
    others = [hook for hook in HOOKS[:-1] if implements(cls, hook)]
    if is_router(cls) and others:
        raise PluginError(f"{who} implements route and {others[0]}; a router is a strategy of its own: make it two")
    names = {field.name for field in dataclasses.fields(cls)}
    for name in (*STAGE_KEYS, *TRAITS):
        if name in names:
            hint = "it is a class attribute: leave out the annotation" if name in TRAITS else "rename it"
            raise PluginError(f"{who}: '{name}' cannot be a field ({hint})")
    _check_traits(cls, who)


def _check_traits(cls: type[Any], who: str) -> None:
    kinds = {**decoder_requests.KINDS, **ENCODER_KINDS}
    if (wrong := decoder_requests.problem(getattr(cls, "inputs", {}), kinds)) is not None:
        raise PluginError(f"{who}: {wrong}")
    sites = getattr(cls, "sites", None)
    if sites is not None and not isinstance(sites, Sites):
        raise PluginError(f"{who}: `sites` is {sites!r}; write Sites(...) there")
    for flag in FLAGS:
        if not isinstance(getattr(cls, flag, False), bool):
            raise PluginError(f"{who}: `{flag}` is {getattr(cls, flag)!r}; it is True or False")
    extras = getattr(cls, "extras", ())
    if not isinstance(extras, tuple) or any(one not in EXTRAS for one in extras):
        known = ", ".join(map(repr, EXTRAS))
        raise PluginError(f"{who}: `extras` is {extras!r}; it is a tuple of {known}, such as ({known},)")
    if not (getattr(cls, "routes_tokens", True) or getattr(cls, "routes_layers", True)):
        raise PluginError(f"{who}: a router that routes neither tokens nor layers would do nothing")
