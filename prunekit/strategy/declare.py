"""`@strategy(...)`: a class becomes a strategy, declared once; what is not known is an error at import.

    @strategy(sites=Sites(default=Site(2), encoder=False, lowest=1), inputs={"attention": Rows(queries="last")})
    class FastV:
        @hookimpl
        def score_tokens(self, attention):
            return attention

The class becomes a frozen dataclass. Its annotated names are the options of a pipeline file, its public methods are
hooks, and nothing else is public; helpers and their data begin with an underscore, constants are in capitals.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, dataclass_transform

from prunekit.errors import PluginError, PrunekitError, did_you_mean
from prunekit.strategy import inputs as table
from prunekit.strategy.keywords import Policy, Routes, Schedule, problem, schedule_problem
from prunekit.strategy.options import STAGE_KEYS
from prunekit.strategy.sites import PIXELS, Keep, Site, Sites

TOKEN_STARTS = ("score_tokens", "select_tokens")
STARTS = (*TOKEN_STARTS, table.IMAGE_HOOK, "plan_layers", "route")
# What a strategy may say beside deciding; the hook specifications describe each.
STATEMENTS: Mapping[str, tuple[str, ...]] = {
    "files": (),
    "check": ("shape",),
    "protected_layers": ("shape",),
    "flops": ("shape", "text", "visual"),
    "learner": ("shape", "layers", "theta"),
    "calibrate": ("prompts", "shape"),
    "predict_harm": ("scores", "keep", "layer_scores", "keep_layers", "state"),
}
HOOKS: Mapping[str, tuple[str, ...]] = {
    **{
        hook: tuple(one.name for one in table.inputs_of(hook))
        for hook in (*table.TOKEN_HOOKS, table.IMAGE_HOOK, "route")
    },
    "plan_layers": ("shape",),
    **STATEMENTS,
}
# What the decorator says that means something only for one kind of strategy; the rest is for both kinds.
OF_TOKENS = ("schedule", "spread", "drops_all", "extras", "crops")
OF_ROUTERS = ("keep_layers", "routes")
# What it says for readers alone, for strategies of every kind; and how that is written.
OF_ALL = ("paper", "code", "group", "fixed_count")
SCORES_TOKENS = "a router scores tokens, and `keep` in the file says how many stay"
NOT_ROUTED = "; what decides by itself how many stay is a token strategy with select_tokens and keep='optional'"
AT_PIXELS = Sites(default=PIXELS, encoder=False, decoder=False, pixels=True)
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Declaration:
    """What `@strategy(...)` was given: all that a strategy says about itself beside its options and hooks.

    sites: where it may act and its default; or a function of the instance, so that an option can choose.
    inputs: requests by the name of the input; or a function of the instance.
    keep: whether the pipeline file has to say how many tokens to leave (`keep`, `keep_tokens`), may, or must not.
        A strategy that refuses decides by itself. keep_layers: the same for how many layers a router lets run.
    schedule: default sites with the fraction that each keeps of the original tokens, `{Site(8): 0.5, Site(16): 0.25}`,
        or None where the strategy decides by itself; or a function of the instance and the number of decoder layers,
        which raises ValueError where options do not allow one; for sites in the vision tower, one that names a third
        argument, `blocks`: how many blocks lead to the features that the projector gets, 1 where the tower cannot be
        cut. The file may then leave out `at` and `keep`.
    spread: one budget for several sites is what the last one leaves, and each takes an equal part of what has to go;
        else every site leaves as much. With `keep_of: current` it means nothing.
    per_sample: its token and router hooks are called once for each sample: tensors without padding and without the B
        axis, `count` and `seed` an int, `question` a str. They answer alike, such as float (V,) for scores.
    drops_all: it leaves no visual token. crops: its selections may `crop`, so that tokens also leave the KV of earlier
    layers. trainable: its hooks run with gradients, on states that are not detached.
    extras: what of the tower it takes beside the visual tokens, such as ("cls",). routes: what a router decides about.

    For readers, of every kind of strategy: paper, its arXiv id or address. code: what was studied, `owner/name@commit`.
    group: the heading under which it is listed; empty: by where it acts. fixed_count: how many tokens it leaves does
    not depend on what they show; None: it follows from `keep` and `schedule`. What else lists and cards say follows
    from hooks and requests, see `prunekit.strategy.about`.
    """

    sites: Sites | Callable[[Any], Sites] = field(default_factory=Sites)
    inputs: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)
    keep: Policy = "required"
    keep_layers: Policy = "required"
    schedule: Schedule | Callable[..., Schedule] | None = None
    spread: bool = False
    per_sample: bool = False
    drops_all: bool = False
    crops: bool = False
    trainable: bool = False
    extras: tuple[str, ...] = ()
    routes: tuple[Routes, ...] = ("tokens", "layers")
    paper: str = ""
    code: str = ""
    group: str = ""
    fixed_count: bool | None = None

    def sites_of(self, instance: Any) -> Sites:
        """The sites of an instance. Raises PluginError when the strategy's function gives something else."""
        if isinstance(self.sites, Sites):
            return self.sites
        sites = self.sites(instance)
        if not isinstance(sites, Sites):
            raise PluginError(f"`sites` of {type(instance).__name__} gave {sites!r}; it gives Sites(...)")
        return sites

    def inputs_of(self, instance: Any) -> Mapping[str, Any]:
        """The requests of an instance. Raises PluginError when the strategy's function gives something else."""
        if not callable(self.inputs):
            return self.inputs
        requests = self.inputs(instance)
        if (wrong := table.problem(requests)) is not None:
            raise PluginError(f"{type(instance).__name__}: {wrong}")
        return requests

    def schedule_of(self, instance: Any, layers: int, blocks: int) -> tuple[tuple[Site, Keep | None], ...] | None:
        """Default sites with their budgets in a decoder of `layers` layers, in the order of the data; None without one.

        A budget is None where the strategy decides by itself. blocks: of the vision tower, those that lead to the image
        features. Raises ValueError as the strategy's function does, and PluginError when it gives something else or
        fails otherwise.
        """
        schedule = self.schedule
        if schedule is None:
            return None
        if callable(schedule):
            tower = {"blocks": max(blocks, 1)} if "blocks" in inspect.signature(schedule).parameters else {}
            try:
                schedule = schedule(instance, layers, **tower)
            except (PrunekitError, ValueError):
                raise
            except Exception as error:
                who = type(instance).__name__
                raise PluginError(f"`schedule` of {who} failed with {type(error).__name__}: {error}") from error
        if (wrong := schedule_problem(schedule) or _undecided(type(instance), schedule, self.keep)) is not None:
            raise PluginError(f"`schedule` of {type(instance).__name__}: {wrong}")
        keeps = {site: None if keep is None else Keep(float(keep)) for site, keep in schedule.items()}
        return tuple((site, keeps[site]) for site in sorted(keeps))


@dataclass_transform(frozen_default=True)
def strategy(*bare: Any, **declared: Any) -> Callable[[C], C]:
    """Declare a strategy; the keywords are the fields of `Declaration`. A subclass inherits what it does not say anew.

    Raises PluginError, naming the class and the nearest right word, for keywords, methods, arguments and names that
    are not known, and for declarations that contradict each other.
    """

    if bare:
        name = getattr(bare[0], "__name__", repr(bare[0]))
        raise PluginError(f"strategy {name}: @strategy takes keywords alone; with nothing to say write @strategy()")

    def declare(cls: C) -> C:
        who = f"strategy {cls.__name__} ({cls.__module__})"
        _check_keywords(declared, who)
        inherited = next((one for base in cls.__mro__ if (one := declaration_of(base)) is not None), Declaration())
        declaration = dataclasses.replace(inherited, **declared)
        if is_image(cls):  # follows from its hook
            declaration = dataclasses.replace(declaration, sites=AT_PIXELS, keep="refused")
        _check_body(cls, who)
        made: Any = dataclass(frozen=True)(cls)
        made.__prunekit__ = declaration
        _check_fields(made, who)
        _check_hooks(made, declaration, who)
        _check_declared(made, declared, who)
        _check_routes(made, declaration, declared, who)
        return cast("C", made)

    return declare


def declaration_of(cls: type[Any]) -> Declaration | None:
    """What the class was declared with; None for one that is no strategy."""
    declaration: Declaration | None = cls.__dict__.get("__prunekit__")
    return declaration


def implements(cls: type[Any], hook: str) -> bool:
    """The class has a marked implementation of `hook`."""
    return getattr(getattr(cls, hook, None), "prunekit_impl", None) is not None


def is_token(cls: type[Any]) -> bool:
    """Its instances decide about visual tokens at a site."""
    return any(implements(cls, hook) for hook in TOKEN_STARTS)


def is_image(cls: type[Any]) -> bool:
    """Its instances decide how small images are shown to the vision tower."""
    return implements(cls, table.IMAGE_HOOK)


def is_router(cls: type[Any]) -> bool:
    """Its instances decide once for each sample, at the decoder input or before a layer that the file names."""
    return implements(cls, "route")


def routes_tokens(cls: type[Any]) -> bool:
    """It is a router that scores tokens."""
    return is_router(cls) and "tokens" in cls.__prunekit__.routes


def routes_layers(cls: type[Any]) -> bool:
    """It is a router that scores or plans layers."""
    return is_router(cls) and "layers" in cls.__prunekit__.routes


def plans_layers_itself(cls: type[Any]) -> bool:
    """It is a router that plans layers without a budget."""
    return routes_layers(cls) and cls.__prunekit__.keep_layers == "refused"


def takes_keep(cls: type[Any]) -> bool:
    """A pipeline file may say how many tokens its stages leave."""
    policy: Policy = cls.__prunekit__.keep
    return policy != "refused"


def stage_keys(cls: type[Any]) -> tuple[str, ...]:
    """The reserved keys that its stages take, for suggestions."""
    if is_router(cls):
        tokens = STAGE_KEYS[1:5] if routes_tokens(cls) and takes_keep(cls) else ()
        layers = ("keep_layers",) if routes_layers(cls) and not plans_layers_itself(cls) else ()
        return ("use", *tokens, *layers, "route_at")
    if is_token(cls) or is_image(cls):
        return STAGE_KEYS[:5] if takes_keep(cls) else STAGE_KEYS[:2]
    return STAGE_KEYS[:1]


def _check_keywords(declared: Mapping[str, Any], who: str) -> None:
    kinds = {one.name: one for one in dataclasses.fields(Declaration)}
    for name in declared:
        if name not in kinds:
            raise PluginError(f"{who}: strategy(...) takes no '{name}' ({did_you_mean(name, kinds)}{_takes(kinds)})")
    for name, value in declared.items():
        if wrong := problem(name, value):
            itself = f"`{name}`: " if callable(value) else f"`{name}` is {value!r}; " if name != "inputs" else ""
            raise PluginError(f"{who}: {itself}{wrong}")


def _undecided(cls: type[Any], schedule: Schedule, policy: Policy) -> str | None:
    """What does not fit between the budgets of a schedule and who says how many tokens stay."""
    for site, keep in schedule.items():
        if keep is None and (policy == "required" or not implements(cls, "select_tokens")):
            return f"None at '{site}' is for strategies that may decide by themselves (keep='optional', select_tokens)"
        if keep is not None and policy == "refused":
            return f"{keep} at '{site}' is a default budget, which keep='refused' takes none of"
    return None


def _takes(names: Iterable[str]) -> str:
    return f"it takes {', '.join(names)}"


def _public(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """Public names of the class and its bases that are no constants and no options; a ClassVar is no option."""
    annotated = {name: kind for base in cls.__mro__[:-1] for name, kind in inspect.get_annotations(base).items()}
    options = {name for name, kind in annotated.items() if "ClassVar" not in str(kind)}
    for base in cls.__mro__[:-1]:
        for name, value in base.__dict__.items():
            if not (name.startswith("_") or name.isupper() or name in options):
                yield name, value


def _check_body(cls: type[Any], who: str) -> None:
    """Every public name is an option or a hook; what is neither names the nearest right word."""
    if "__dataclass_params__" in cls.__dict__:
        raise PluginError(f"{who}: @strategy makes it a frozen dataclass; leave out @dataclass")
    keywords = [one.name for one in dataclasses.fields(Declaration)]
    for name, value in _public(cls):
        if name in keywords:
            raise PluginError(f"{who}: `{name}` is an argument of the decorator: @strategy({name}=...)")
        if name in HOOKS:
            if not implements(cls, name):
                raise PluginError(f"{who}: {name} is not marked; put @hookimpl above it")
            continue
        near = did_you_mean(name, HOOKS if callable(value) else (*keywords, *HOOKS))
        if callable(value):
            rest = f"hooks are {', '.join(HOOKS)}; a helper is named _{name}"
            raise PluginError(f"{who}: '{name}' is no hook ({near}{rest})")
        rest = f"an option has an annotation, as in `{name}: float = 0.5`; a constant is in capitals"
        raise PluginError(f"{who}: '{name}' is neither an option nor a keyword of @strategy ({near}{rest})")


def _check_fields(cls: type[Any], who: str) -> None:
    names = {one.name for one in dataclasses.fields(cls)}
    keywords = {one.name for one in dataclasses.fields(Declaration)}
    for name in sorted(names & keywords):
        raise PluginError(f"{who}: '{name}' cannot be an option; it is an argument of @strategy")
    for name in (*STAGE_KEYS, *HOOKS):
        if name in names:
            raise PluginError(f"{who}: '{name}' cannot be an option (rename it)")


def _check_hooks(cls: type[Any], declaration: Declaration, who: str) -> None:
    """Its hooks can be called, and the declaration fits them."""
    hooks = [hook for hook in HOOKS if implements(cls, hook)]
    if not any(hook in STARTS for hook in hooks):
        raise PluginError(f"{who} implements none of {', '.join(STARTS)}, so it would do nothing")
    others = [hook for hook in hooks if hook in (*table.TOKEN_HOOKS, "plan_layers")]
    if is_router(cls) and others:
        raise PluginError(f"{who} implements route and {others[0]}; a router is a strategy of its own: make it two")
    if is_image(cls) and (also := [hook for hook in hooks if hook in (*others, "route")]):
        raise PluginError(f"{who} implements {table.IMAGE_HOOK} and {also[0]}; make it two strategies")
    asked: set[str] = set()
    for hook in hooks:
        asked.update(_asked(cls, hook, who))
    if asked & {"extras", "extras_valid"} and not declaration.extras:
        raise PluginError(f"{who} asks for `extras` but declares none: @strategy(extras=('cls',))")
    if "forward" in asked and declaration.per_sample:
        raise PluginError(f"{who}: `forward` runs the whole batch; leave out per_sample")
    _check_budgets(cls, declaration, who)


def _asked(cls: type[Any], hook: str, who: str) -> tuple[str, ...]:
    """The arguments that a hook of the class asks for. pluggy hands over none that has a default."""
    parameters = list(inspect.signature(getattr(cls, hook)).parameters.values())[1:]
    for one in parameters:
        if one.name not in HOOKS[hook] and one.default is one.empty:
            near = did_you_mean(one.name, HOOKS[hook])
            raise PluginError(f"{who}: {hook} has no argument '{one.name}' ({near}{_takes(HOOKS[hook])})")
        if one.name in HOOKS[hook] and one.default is not one.empty:
            raise PluginError(f"{who}: {hook} would never get '{one.name}', which has a default; write it without")
    return tuple(one.name for one in parameters if one.default is one.empty)


def _check_declared(cls: type[Any], declared: Mapping[str, Any], who: str) -> None:
    """What the decorator says means something for a strategy with these hooks."""
    for name in (one for one in declared if one not in OF_ALL):
        tokens, routers = is_token(cls) and name not in OF_ROUTERS, is_router(cls) and name not in OF_TOKENS
        if not tokens and not routers:
            kinds = "routers" if name in OF_ROUTERS else "strategies with token hooks"
            both = "" if name in (*OF_ROUTERS, *OF_TOKENS) else " and routers"
            raise PluginError(f"{who}: `{name}` is for {kinds}{both} (leave it out)")


def _check_budgets(cls: type[Any], declaration: Declaration, who: str) -> None:
    decides = is_image(cls) or (is_token(cls) and declaration.keep != "required" and not declaration.drops_all)
    if declaration.fixed_count is not None and not decides:
        why = "is for strategies that decide by themselves how many tokens stay (leave it out)"
        raise PluginError(f"{who}: `fixed_count` {why}")
    scores_only = implements(cls, "score_tokens") and not implements(cls, "select_tokens")
    if scores_only and declaration.keep != "required" and declaration.schedule is None:
        raise PluginError(
            f"{who} only scores, so how many tokens stay comes from `keep`: leave out keep={declaration.keep!r}, or "
            "implement select_tokens"
        )
    if declaration.keep != "refused" and not declaration.drops_all and implements(cls, "select_tokens"):
        selects: Any = cls
        if "count" not in inspect.signature(selects.select_tokens).parameters:
            what = "select_tokens does not name `count`, so what the file says in `keep` would do nothing"
            raise PluginError(f"{who}: {what}: name it, or write keep='refused'")
    schedule = declaration.schedule
    if not isinstance(schedule, Mapping):
        return
    wrong = _undecided(cls, schedule, declaration.keep)
    if wrong is None and isinstance(declaration.sites, Sites):
        reasons = ((site, declaration.sites.reason_against(site)) for site in schedule)
        wrong = next((f"`sites` does not allow '{site}': it {reason}" for site, reason in reasons if reason), None)
    if wrong is not None:
        raise PluginError(f"{who}: `schedule`: {wrong}")


def _check_routes(cls: type[Any], declaration: Declaration, declared: Mapping[str, Any], who: str) -> None:
    """Of a router: what it decides about takes a budget, as only scores and the file together say what leaves."""
    if not is_router(cls):
        return
    tokens, layers = ("tokens" in declaration.routes, "layers" in declaration.routes)
    alone = len(declaration.routes) == 1
    for policy, here, others in (("keep", tokens, "layers"), ("keep_layers", layers, "tokens")):
        if not here and declared.get(policy, "refused") != "refused":
            raise PluginError(f"{who}: `{policy}` says nothing of a router of {others} (leave it out)")
    if tokens and declaration.keep == "refused":
        rest = "leave out keep='refused'" if alone else "leave it out, or write routes=('layers',)"
        raise PluginError(f"{who}: {SCORES_TOKENS}, so with keep='refused' none would leave: {rest}{NOT_ROUTED}")
    if tokens and alone and declaration.keep == "optional":
        raise PluginError(
            f"{who}: {SCORES_TOKENS}, so without it this router would do nothing: leave out keep='optional'{NOT_ROUTED}"
        )
    if layers and declaration.keep_layers == "optional" and (alone or declaration.keep == "optional"):
        raise PluginError(
            f"{who}: a router without any budget would do nothing: leave out keep_layers='optional', or write "
            "keep_layers='refused' and return `plans`"
        )
