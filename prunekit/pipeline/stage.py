"""One stage of a pipeline: a strategy instance in a plugin manager of its own, where and how much it prunes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pluggy

from prunekit import plugins
from prunekit.errors import Fault, PluginError, SpecError, UnknownName, Where
from prunekit.hookspecs import ImageHooks, LayerHooks, RouterHooks, StatementHooks, TokenHooks
from prunekit.registry import Entry, Registry
from prunekit.spec.budget_keys import OPEN
from prunekit.spec.schema import StageSpec
from prunekit.strategy import declare, options
from prunekit.strategy import inputs as table
from prunekit.strategy.declare import Declaration, implements
from prunekit.strategy.options import BUDGETS, STAGE_KEYS
from prunekit.strategy.sites import ENCODER, Keep, Site, Sites

# Libraries whose methods people look for here, and why they are no stages.
ELSEWHERE = {
    "kvpress": "kvpress 0.5 needs transformers below 5.3, and its presses prune the KV cache of language models: run "
    "it by itself, or write what you want of it as a strategy at `prefill_end`",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A strategy instance, addressed through `hook`; whoever holds the stage may register wrappers in `manager`.

    sites_given: as the file names them, None when it does not. keeps: one budget for all sites or one for each; empty
    for a strategy that takes none. keep_layers: of a router, how many decoder layers run; route_at: where it is asked.
    where: of the stage in its file; keys: of its values, by key path below the stage; names: of its keys. Places are
    None for a dict.
    origin: the distribution and version that registered the strategy.
    open: how much it keeps is left to the budget of the pipeline.
    sites: those that its strategy allows, with these options. inputs: what it requests, by the name of the input.
    """

    index: int
    use: str
    strategy: Any
    sites_given: tuple[Site, ...] | None
    keeps: tuple[Keep, ...]
    keep_layers: Keep | None
    where: Where | None
    manager: pluggy.PluginManager
    keys: Mapping[str, Where | None] = dataclasses.field(default_factory=dict)
    names: Mapping[str, Where | None] = dataclasses.field(default_factory=dict)
    origin: str = ""
    open: bool = False
    sites: Sites = dataclasses.field(default_factory=Sites)
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    route_at: Site = ENCODER

    @property
    def hook(self) -> Any:
        """Call a hook of this stage: `stage.hook.score_tokens(...)`."""
        return self.manager.hook

    @property
    def declaration(self) -> Declaration:
        """What its strategy was declared with."""
        declaration: Declaration = type(self.strategy).__prunekit__
        return declaration

    @property
    def is_token(self) -> bool:
        """It decides about visual tokens at its sites."""
        return declare.is_token(type(self.strategy))

    @property
    def is_image(self) -> bool:
        """It decides how small images are shown to the vision tower."""
        return declare.is_image(type(self.strategy))

    @property
    def is_layer(self) -> bool:
        """It decides about decoder layers, for every sample alike."""
        return implements(type(self.strategy), "plan_layers")

    @property
    def is_router(self) -> bool:
        """It decides for each sample, at `route_at`."""
        return declare.is_router(type(self.strategy))

    @property
    def decides_layers(self) -> bool:
        """It is a router that decides which decoder layers run: by a budget of them, or by itself."""
        return self.keep_layers is not None or declare.plans_layers_itself(type(self.strategy))

    @property
    def cuts_tokens(self) -> bool:
        """Visual tokens leave at its sites."""
        return self.is_token or self.is_image or (self.is_router and bool(self.keeps))

    @property
    def known_sites(self) -> tuple[Site, ...] | None:
        """Where it acts; None while that is a default that scales with the depth of a model."""
        placements = self.placements(None, 0)
        return None if placements is None else tuple(site for site, _ in placements)

    def placements(self, layers: int | None, blocks: int) -> tuple[tuple[Site, Keep | None], ...] | None:
        """Its sites in a decoder of `layers` layers, each with its budget, in the order of the data.

        A budget is None where the strategy decides by itself. layers: None is a model that is not known yet; the result
        is then None where a default scales with the depth. blocks: of the vision tower, those that lead to the image
        features. What the file leaves out comes from the strategy's schedule, else from its default site.
        """
        schedule = None
        if self.declaration.schedule is not None and not (self.sites_given and self.keeps):
            if layers is None and callable(self.declaration.schedule):
                return None if not self.sites_given else tuple((site, None) for site in self.sites_given)
            schedule = self._schedule(layers or 0, blocks)
        sites = self.sites_given
        if sites is None and schedule is not None:
            sites = tuple(site for site, _ in schedule)
        if sites is None:
            if layers is None and not isinstance(self.sites.default, Site):
                return None
            sites = (self.sites.resolve(layers or 0),)
        keeps: tuple[Keep | None, ...] = self.keeps or self._scheduled(schedule or (), sites) or (None,)
        if len(keeps) == 1:
            keeps *= len(sites)
            only = keeps[0]
            if self.declaration.spread and only is not None and only.of == "original":
                keeps = tuple(dataclasses.replace(only, cuts=cuts) for cuts in range(len(sites), 0, -1))
        return tuple(zip(sites, keeps, strict=True))

    def _scheduled(
        self, schedule: tuple[tuple[Site, Keep | None], ...], sites: tuple[Site, ...]
    ) -> tuple[Keep | None, ...]:
        """The budgets of a schedule, which are for as many sites as it names itself; empty where it has none.

        Raises SpecError for other sites that the file names without budgets.
        """
        keeps = tuple(keep for _, keep in schedule)
        if not any(keeps) or len(keeps) == len(sites):
            return keeps if any(keeps) else ()
        message = f"names {len(sites)} site{'s' * (len(sites) != 1)}, but '{self.use}' has budgets for {len(keeps)}"
        raise SpecError([self.fault("at", message, "say how much to keep")])

    def _schedule(self, layers: int, blocks: int) -> tuple[tuple[Site, Keep | None], ...] | None:
        """Its strategy's schedule. Raises SpecError where the options do not allow one."""
        try:
            return self.declaration.schedule_of(self.strategy, layers, blocks)
        except ValueError as error:
            problem = named_problem(type(self.strategy), str(error))
            raise SpecError([self.fault(problem.key, problem.message, problem.hint)]) from error

    @property
    def drops_all(self) -> bool:
        """It leaves no visual token."""
        return self.declaration.drops_all

    @property
    def per_sample(self) -> bool:
        """Its hooks are called once for each sample, without padding."""
        return self.declaration.per_sample

    @property
    def trainable(self) -> bool:
        """Its hooks run with gradients, on states that are not detached."""
        return self.declaration.trainable

    @property
    def extras(self) -> tuple[str, ...]:
        """What of the tower it takes beside the visual tokens, such as `cls`."""
        return self.declaration.extras

    @property
    def label(self) -> str:
        """As messages name it: `stages[0] fastv`."""
        return f"stages[{self.index}] {self.use}"

    def requests(self, hook: str) -> frozenset[str]:
        """The arguments that any implementation of `hook` on this stage asks for."""
        return frozenset(name for impl in getattr(self.hook, hook).get_hookimpls() for name in impl.argnames)

    def asks_for(self, argument: str) -> bool:
        """Any of its token or router hooks names `argument`, such as `attention`."""
        return any(argument in self.requests(hook) for hook in (*table.TOKEN_HOOKS, "route"))

    @property
    def counts(self) -> bool:
        """Its decision follows the budget of its cuts: whoever selects tokens asks for `count`."""
        return not self.is_token or "count" in self.requests("select_tokens")

    def states(self, statement: str) -> bool:
        """It implements this hook among those of `StatementHooks`."""
        return bool(getattr(self.hook, statement).get_hookimpls())

    def owns(self, fault: Fault) -> bool:
        """The fault is this stage's, or that of a value in it."""
        return re.match(rf"stages\[{self.index}\](\.|$)", fault.key) is not None

    def fault(self, key: str, message: str, hint: str = "", on_name: bool = False) -> Fault:
        """A fault at a value of this stage, or with `on_name` at its key; an empty key means the stage itself."""
        path = f"stages[{self.index}]" + (f".{key}" if key else "")
        return Fault((self.names if on_name else self.keys).get(key, self.where), path, message, hint)


def make(index: int, spec: StageSpec, registry: Registry, faults: list[Fault], budgeted: bool = False) -> Stage | None:
    """The stage that `spec` describes, or None after adding to `faults` what is wrong with it.

    budgeted: the pipeline has a budget, to which a stage may leave how much it keeps.
    Raises PluginError when the strategy itself is broken.
    """
    draft = Stage(
        index, spec.use, None, spec.sites, spec.keeps or (), spec.keep_layers, spec.where, _manager(), spec.keys,
        spec.names, route_at=spec.route_at or ENCODER,
    )  # fmt: skip
    try:
        entry = registry.strategy_entry(spec.use)
    except UnknownName as error:
        faults.append(draft.fault("use", error.message, ELSEWHERE.get(spec.use, error.hint)))
        return None
    cls = registry.get_strategy(spec.use)
    if declare.declaration_of(cls) is None:
        raise PluginError(f"{_who(entry)} is not declared: put @strategy(...) above the class")
    if budgeted and "keep" in declare.stage_keys(cls) and not {*BUDGETS} & draft.names.keys():
        draft = dataclasses.replace(draft, keeps=(OPEN,), names={**draft.names, "keep": spec.where}, open=True)
    before = len(faults)
    faults += _key_faults(cls, draft)
    problems: list[options.Problem] = []
    values = options.check(cls, spec.options, declare.stage_keys(cls), problems, spec.folders)
    made = None if problems else _created(cls, draft, values, entry, problems)
    faults += [draft.fault(one.key, one.message, one.hint, one.unknown) for one in problems]
    faults += _site_faults(cls, made, draft)
    if made is None or len(faults) > before:
        return None
    _register(made.manager, made.strategy, entry)
    return made


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("prunekit")
    for hooks in (TokenHooks, ImageHooks, LayerHooks, RouterHooks, StatementHooks):
        manager.add_hookspecs(hooks)
    plugins.trace(manager)
    return manager


def _key_faults(cls: type[Any], draft: Stage) -> list[Fault]:
    """Reserved keys that this kind of strategy does not take, and budgets that it needs."""
    allowed = declare.stage_keys(cls)
    given = [key for key in STAGE_KEYS[1:] if key in draft.names]
    wrong = [key for key in given if key not in allowed]
    # `keep_of` beside `keep` is the same mistake.
    told = [key for key in wrong if key not in BUDGETS or key == next(one for one in wrong if one in BUDGETS)]
    found = [draft.fault(key, _refusal(cls, draft.use, key), "remove it", on_name=True) for key in told]
    if missing := _missing_budget(cls, draft, given):
        hint = "the fraction of the visual tokens to keep, such as 0.25; or keep_tokens: 144"
        if missing == ("keep_layers",):
            hint = "how many decoder layers run, such as 24, or the fraction of them, such as 0.75"
        needs = " or ".join(f"`{key}`" for key in missing)
        found.append(draft.fault(missing[0], f"is missing; '{draft.use}' needs {needs}", hint))
    elif declare.is_router(cls) and {"at"} & {*given} & {*allowed} and not {*BUDGETS} & {*given}:
        message = "says where tokens leave, but there is no `keep`"
        found.append(draft.fault("at", message, "add `keep` or `keep_tokens`, or remove it", on_name=True))
    return found


def _missing_budget(cls: type[Any], draft: Stage, given: Sequence[str]) -> tuple[str, ...]:
    """The keys of which the file has to name one, and names none. One is enough for a router that requires two."""
    declaration: Declaration = cls.__prunekit__
    allowed, tokens, layers = declare.stage_keys(cls), ("keep", "keep_tokens"), ("keep_layers",)
    told_tokens, told_layers = {*tokens, "keep_of"} & {*given}, {*layers} & {*given}
    scheduled = declaration.schedule is not None and draft.sites_given is None
    needs_tokens = "keep" in allowed and declaration.keep == "required" and not scheduled
    needs_layers = "keep_layers" in allowed and declaration.keep_layers == "required"
    if needs_tokens and needs_layers:
        return () if told_tokens or told_layers else (*tokens, *layers)
    return tokens if needs_tokens and not told_tokens else layers if needs_layers and not told_layers else ()


def _refusal(cls: type[Any], use: str, key: str) -> str:
    """Why strategies of this class do not take a reserved key."""
    about_layers = key == "keep_layers"
    if key == "route_at":
        return f"'{use}' is no router, so it takes no `route_at`"
    if declare.is_image(cls):
        return f"'{use}' decides about whole images, so it takes no `{key}`"
    if not about_layers and not (declare.is_token(cls) or declare.routes_tokens(cls)):
        return f"'{use}' decides about layers, so it takes no `{key}`"
    if about_layers and not (declare.routes_layers(cls) or implements(cls, "plan_layers")):
        return f"'{use}' decides about tokens, so it takes no `{key}`"
    about = "about layers " if about_layers and declare.is_router(cls) and "keep" in declare.stage_keys(cls) else ""
    return f"'{use}' decides {about}by itself and takes no `{key}`"


def _site_faults(cls: type[Any], made: Stage | None, draft: Stage) -> list[Fault]:
    """Sites in the file that the strategy does not allow; where its options decide, only once these are right."""
    declared = cls.__prunekit__.sites
    sites = made.sites if made is not None else declared if isinstance(declared, Sites) else None
    places = declare.is_token(cls) or declare.is_image(cls) or declare.routes_tokens(cls)
    if sites is None or draft.sites_given is None or not places:
        return []
    listed = len(draft.sites_given) > 1
    return [
        draft.fault(f"at[{number}]" if listed else "at", f"'{draft.use}' cannot act at '{site}': it {reason}")
        for number, site in enumerate(draft.sites_given)
        if (reason := sites.reason_against(site))
    ]


def _created(
    cls: type[Any], draft: Stage, values: dict[str, Any], entry: Entry, problems: list[options.Problem]
) -> Stage | None:
    """The draft with its strategy; None where that refuses the values, or what follows from them, with a ValueError."""
    declaration: Declaration = cls.__prunekit__
    try:
        strategy = cls(**values)
        sites, inputs = declaration.sites_of(strategy), declaration.inputs_of(strategy)
        return dataclasses.replace(draft, strategy=strategy, sites=sites, inputs=inputs, origin=entry.origin)
    except PluginError:
        raise
    except ValueError as error:
        problems.append(named_problem(cls, str(error)))
        return None
    except Exception as error:
        raise PluginError(f"{_who(entry)} failed on its options: {type(error).__name__}: {error}") from error


def named_problem(cls: type[Any], text: str) -> options.Problem:
    """A strategy's ValueError; `field: message` puts it at that field."""
    key, separator, message = text.partition(": ")
    if separator and key in {field.name for field in dataclasses.fields(cls)}:
        return options.Problem(key, message)
    return options.Problem("", text or "refuses these options")


def _register(manager: pluggy.PluginManager, strategy: Any, entry: Entry) -> None:
    cls = type(strategy)
    if implements(cls, "score_tokens") and not implements(cls, "select_tokens"):
        from prunekit.pipeline.default_selection import DefaultSelection  # needs torch, as the strategy does

        manager.register(DefaultSelection(), name="default")
    try:
        manager.register(strategy, name="strategy")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"{_who(entry)}: {reason}") from error


def _who(entry: Entry) -> str:
    return f"strategy '{entry.name}' ({entry.target}) from {entry.origin}"
