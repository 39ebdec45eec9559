"""One stage of a pipeline: a strategy instance in a plugin manager of its own, where and how much it prunes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pluggy

from prunekit import options, plugins
from prunekit.decisions import Rows
from prunekit.errors import Fault, PluginError, UnknownName, Where
from prunekit.hookspecs import LayerHooks, TokenHooks
from prunekit.registry import Entry, Registry
from prunekit.sites import Keep, Site, Sites
from prunekit.spec import STAGE_KEYS, StageSpec

TOKEN_STARTS = ("score_tokens", "select_tokens")
HOOKS = (*TOKEN_STARTS, "merge_tokens", "plan_layers")
# What a strategy class says about itself beside its options; as dataclass fields they would become options.
TRAITS = ("sites", "takes_keep", "drops_all", "per_sample", "inputs")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A strategy instance, addressed through `hook`; whoever holds the stage may register wrappers in `manager`.

    site: None until the pipeline is bound, when the file names none. keep: None for a strategy that takes none.
    where: of the stage in its file; keys: of its values, by key path below the stage; names: of its keys. Places are
    None for a dict.
    origin: the distribution and version that registered the strategy.
    """

    index: int
    use: str
    strategy: Any
    site: Site | None
    keep: Keep | None
    where: Where | None
    manager: pluggy.PluginManager
    keys: Mapping[str, Where | None] = dataclasses.field(default_factory=dict)
    names: Mapping[str, Where | None] = dataclasses.field(default_factory=dict)
    origin: str = ""

    @property
    def hook(self) -> Any:
        """Call a hook of this stage: `stage.hook.score_tokens(...)`."""
        return self.manager.hook

    @property
    def is_token(self) -> bool:
        """It decides about visual tokens."""
        return any(implements(type(self.strategy), hook) for hook in TOKEN_STARTS)

    @property
    def is_layer(self) -> bool:
        """It decides about decoder layers."""
        return implements(type(self.strategy), "plan_layers")

    @property
    def sites(self) -> Sites:
        """The sites that its strategy allows."""
        return getattr(self.strategy, "sites", None) or Sites()

    @property
    def known_site(self) -> Site | None:
        """Where it acts; None while that is a default that scales with the depth of a model."""
        site = self.site if self.site is not None else self.sites.default
        return site if isinstance(site, Site) else None

    @property
    def drops_all(self) -> bool:
        """It leaves no visual token."""
        return bool(getattr(self.strategy, "drops_all", False))

    @property
    def label(self) -> str:
        """As messages name it: `stages[0] fastv`."""
        return f"stages[{self.index}] {self.use}"

    def requests(self, hook: str) -> frozenset[str]:
        """The arguments that any implementation of `hook` on this stage asks for."""
        return frozenset(name for impl in getattr(self.hook, hook).get_hookimpls() for name in impl.argnames)

    def asks_for(self, argument: str) -> bool:
        """Any of its token hooks names `argument`, such as `attention`."""
        return any(argument in self.requests(hook) for hook in (*TOKEN_STARTS, "merge_tokens"))

    def fault(self, key: str, message: str, hint: str = "", on_name: bool = False) -> Fault:
        """A fault at a value of this stage, or with `on_name` at its key; an empty key means the stage itself."""
        path = f"stages[{self.index}]" + (f".{key}" if key else "")
        return Fault((self.names if on_name else self.keys).get(key, self.where), path, message, hint)


def make(index: int, spec: StageSpec, registry: Registry, faults: list[Fault]) -> Stage | None:
    """The stage that `spec` describes, or None after adding to `faults` what is wrong with it.

    Raises PluginError when the strategy itself is broken.
    """
    draft = Stage(index, spec.use, None, spec.at, spec.keep, spec.where, _manager(), spec.keys, spec.names)
    try:
        entry = registry.strategy_entry(spec.use)
    except UnknownName as error:
        faults.append(draft.fault("use", error.message, error.hint))
        return None
    cls = registry.get_strategy(spec.use)
    _check_class(cls, entry)
    found = _placement_faults(cls, draft)
    problems: list[options.Problem] = []
    token = any(implements(cls, hook) for hook in TOKEN_STARTS)
    values = options.check(cls, spec.options, STAGE_KEYS if token else STAGE_KEYS[:1], problems)
    strategy = None if problems else _create(cls, values, entry, problems)
    found += [draft.fault(one.key, one.message, one.hint, one.unknown) for one in problems]
    faults += found
    if found:
        return None
    _register(draft.manager, strategy, entry)
    return dataclasses.replace(draft, strategy=strategy, origin=entry.origin)


def implements(cls: type[Any], hook: str) -> bool:
    """The class has a marked implementation of `hook`."""
    return getattr(getattr(cls, hook, None), "prunekit_impl", None) is not None


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("prunekit")
    manager.add_hookspecs(TokenHooks)
    manager.add_hookspecs(LayerHooks)
    plugins.trace(manager)
    return manager


def _check_class(cls: type[Any], entry: Entry) -> None:
    """Raise PluginError, naming the origin, for a class that cannot be a strategy."""
    who = f"strategy '{entry.name}' ({entry.target}) from {entry.origin}"
    if not dataclasses.is_dataclass(cls):
        raise PluginError(f"{who} is no dataclass; its options are dataclass fields: add @dataclass(frozen=True)")
    unmarked = [hook for hook in HOOKS if hasattr(cls, hook) and not implements(cls, hook)]
    if unmarked:
        raise PluginError(f"{who}: {unmarked[0]} is not marked; put @hookimpl above it")
    starts = (*TOKEN_STARTS, "plan_layers")
    if not any(implements(cls, hook) for hook in starts):
        raise PluginError(f"{who} implements none of {', '.join(starts)}, so it would do nothing")
    inputs = getattr(cls, "inputs", {})
    if not isinstance(inputs, Mapping) or any(
        item[0] != "attention" or not isinstance(item[1], Rows) for item in inputs.items()
    ):
        raise PluginError(f"{who}: `inputs` is {inputs!r}; this version takes {{'attention': Rows(...)}} there")
    names = {field.name for field in dataclasses.fields(cls)}
    for name in (*STAGE_KEYS, *TRAITS):
        if name in names:
            hint = "it is a class attribute: leave out the annotation" if name in TRAITS else "rename it"
            raise PluginError(f"{who}: '{name}' cannot be a field ({hint})")


def _placement_faults(cls: type[Any], draft: Stage) -> list[Fault]:
    """What is wrong with `at` and `keep` for this kind of strategy."""
    kinds = [hook for hook in TOKEN_STARTS if implements(cls, hook)]
    budget = next((key for key in ("keep", "keep_tokens", "keep_of") if key in draft.names), "keep")
    given = budget in draft.names
    found = []
    if not kinds:
        why = f"'{draft.use}' decides about layers, so it takes no"
        if "at" in draft.names:
            found.append(draft.fault("at", f"{why} `at`", "remove it", on_name=True))
        if given:
            found.append(draft.fault(budget, f"{why} `{budget}`", "remove it", on_name=True))
        return found
    sites: Sites = getattr(cls, "sites", None) or Sites()
    if draft.site is not None and (reason := sites.reason_against(draft.site)):
        found.append(draft.fault("at", f"'{draft.use}' cannot act at '{draft.site}': it {reason}"))
    if not getattr(cls, "takes_keep", True):
        if given:
            message = f"'{draft.use}' decides by itself and takes no `{budget}`"
            found.append(draft.fault(budget, message, "remove it", on_name=True))
    elif not given:
        hint = "the fraction of the visual tokens to keep, such as 0.25; or keep_tokens: 144"
        found.append(draft.fault("keep", f"is missing; '{draft.use}' needs `keep` or `keep_tokens`", hint))
    return found


def _create(cls: type[Any], values: dict[str, Any], entry: Entry, problems: list[options.Problem]) -> Any:
    """The instance, or None when its own `__post_init__` refuses the values with a ValueError."""
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(named_problem(cls, str(error)))
        return None
    except Exception as error:
        raise PluginError(
            f"strategy '{entry.name}' from {entry.origin} failed on its options: {type(error).__name__}: {error}"
        ) from error


def named_problem(cls: type[Any], text: str) -> options.Problem:
    """A strategy's ValueError; `field: message` puts it at that field."""
    key, separator, message = text.partition(": ")
    if separator and key in {field.name for field in dataclasses.fields(cls)}:
        return options.Problem(key, message)
    return options.Problem("", text or "refuses these options")


def _register(manager: pluggy.PluginManager, strategy: Any, entry: Entry) -> None:
    cls = type(strategy)
    if implements(cls, "score_tokens") and not implements(cls, "select_tokens"):
        from prunekit.engine.defaults import DefaultSelection  # needs torch, as the strategy does

        manager.register(DefaultSelection(), name="default")
    try:
        manager.register(strategy, name="strategy")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"strategy '{entry.name}' ({entry.target}) from {entry.origin}: {reason}") from error
