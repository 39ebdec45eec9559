"""What each keyword of `@strategy(...)` may be, by itself: its types, and why a value is none of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

from prunekit.errors import did_you_mean
from prunekit.strategy import inputs as table
from prunekit.strategy.functions import unfit
from prunekit.strategy.sites import Site, Sites

Policy = Literal["required", "optional", "refused"]
Routes = Literal["tokens", "layers"]
Schedule = Mapping[Site, float | None]
WRITTEN: Mapping[str, tuple[re.Pattern[str], str]] = {
    "paper": (re.compile(r"\d{4}\.\d{4,5}(v\d+)?|https://\S+"), "an arXiv id such as '2403.06764', or an address"),
    "code": (
        re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{7,40}(:\S+)?"),
        "a repository at a commit, 'owner/name@1a2b3c4', and if wanted ':path' in it",
    ),
    "group": (re.compile(r"[a-z][a-z0-9 -]*"), "a heading in lower case, such as 'baselines'"),
}
EXTRAS = ("cls",)  # what a vision tower gives beside the visual tokens


def problem(name: str, value: Any) -> str | None:
    """Why `value` cannot be that of the keyword `name`, for people; None or empty: it can."""
    return _CHECKS[name](value)


def _sites_problem(sites: object) -> str | None:
    if callable(sites):
        return unfit(sites, ("the strategy",))
    if isinstance(sites, Site):
        return "it is the sites that the strategy allows: write Sites(default=...) with it"
    return None if isinstance(sites, Sites) else "write Sites(...) there"


def _flag_problem(value: object) -> str | None:
    return None if isinstance(value, bool) else "it is True or False"


def _text_problem(name: str, value: object) -> str | None:
    pattern, wanted = WRITTEN[name]
    return None if isinstance(value, str) and pattern.fullmatch(value) else f"it is {wanted}"


def _policy_problem(value: object) -> str | None:
    policies = get_args(Policy)
    near = did_you_mean(value, policies) if isinstance(value, str) else ""
    return None if value in policies else f"{near}it is {', '.join(map(repr, policies[:-1]))} or {policies[-1]!r}"


def _tuple_problem(value: object, entries: tuple[str, ...]) -> str | None:
    if isinstance(value, tuple) and all(one in entries for one in value):
        return None
    return f"it is a tuple of {', '.join(map(repr, entries))}, such as ({entries[0]!r},)"


def _schedule_keyword_problem(schedule: object) -> str | None:
    if callable(schedule):
        return unfit(schedule, ("the strategy", "the number of decoder layers"), ("blocks",))
    return None if schedule is None else schedule_problem(schedule)


def schedule_problem(schedule: object) -> str | None:
    """Why this is no dict of sites and fractions; None: it is one."""
    if not isinstance(schedule, Mapping) or not schedule:
        return f"{schedule!r} is no dict of sites and fractions, such as {{Site(8): 0.5}}"
    for site, keep in schedule.items():
        if not isinstance(site, Site):
            return f"{site!r} is no Site"
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1):
            return f"{keep!r} at '{site}' is no fraction in (0, 1]"
    fractions = [schedule[site] for site in sorted(schedule) if schedule[site] is not None]
    return "fractions must not rise" if fractions != sorted(fractions, reverse=True) else None


_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "sites": _sites_problem,
    "inputs": lambda value: unfit(value, ("the strategy",)) if callable(value) else table.problem(value),
    "schedule": _schedule_keyword_problem,
    "extras": lambda value: _tuple_problem(value, EXTRAS),
    "routes": lambda value: _tuple_problem(value, get_args(Routes)) or ("name at least one" if not value else None),
    **dict.fromkeys(("keep", "keep_layers"), _policy_problem),
    **dict.fromkeys(("per_sample", "spread", "drops_all", "crops", "trainable", "fixed_count"), _flag_problem),
    **{name: partial(_text_problem, name) for name in WRITTEN},
}
