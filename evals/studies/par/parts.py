"""The parts of the study that ask questions; each gives plain data. What they mean stands in docs/par.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunekit_evals.studies.par import cosines, equal, static
from prunekit_evals.studies.par.asked import DRAWN
from prunekit_evals.studies.par.cells import Bench, pipeline, say
from prunekit_evals.studies.par.equal import Equal, Stage
from prunekit_evals.studies.par.settings import VARIANTS, Setting

from prunekit.errors import SpecError
from prunekit.pipeline.build import Pipeline

SHARES = (0.1, 0.2, 0.3)
DRAWS = 8
UNSEEN = 200  # number of the first question of each task that nobody looked at while choosing places and router
FASTV_SITE = 2  # the paper's; boxes and cosines are about attention before this layer
# Boxes are many and take one question in four, pairs of layers and ablations one in two.
BOX_SHARE, LESS_SHARE = 4, 2
DENSE: Stage = {"use": "dense"}
BLIND: Stage = {"use": "blind"}


@dataclass(frozen=True)
class Routers:
    """The router under study and those of the ablations.

    stage: `use: par` with the options that name the shipped router, and `at` if the file says it. folder: where the
    ablations' routers are.
    """

    stage: Mapping[str, Any]
    folder: Path

    @property
    def sites(self) -> list[int]:
        """The layers before which its tokens leave."""
        sites = self.stage.get("at", FASTV_SITE)
        return [sites] if isinstance(sites, int) else list(sites)

    def at(self, bench: Bench, setting: Setting, stage: Stage | None = None) -> Pipeline:
        """PAR at a setting, never above its FLOPs. stage: another router than the one under study."""
        chosen = {**(stage or self.stage), "keep_layers": setting.layers}
        return Equal(bench, setting.flops).below(chosen)

    def named(self, name: str) -> dict[str, Any] | None:
        """The stage with the router of an ablation; None while there is none."""
        folder = self.folder / name
        if not (folder / "config.json").is_file():
            return None
        kept = {key: self.stage[key] for key in ("use", "at", "eligible", "protect") if key in self.stage}
        return {**kept, "weights": str(folder)}


def _rows(bench: Bench, wanted: Mapping[str, Pipeline], count: int | None = None) -> dict[str, Any]:
    rows = bench.ask(wanted.values(), count)
    return {label: rows[one.sha].as_data() for label, one in wanted.items()}


def _fewer(bench: Bench, share: int) -> int:
    """One question in `share`, in pairs."""
    return max(bench.questions // share // 2 * 2, 2)


def layers(bench: Bench) -> dict[str, Any]:
    """Adjacent pairs of layers left out, one pair at a time, and what they do to the states."""
    pairs = [(first, first + 1) for first in range(bench.shape.layers - 1)]
    wanted = {f"{a}-{b}": pipeline([{"use": "skip_layers", "layers": [a, b]}]) for a, b in pairs}
    wanted = {"dense": pipeline([DENSE]), **wanted}
    rows = _rows(bench, wanted, _fewer(bench, LESS_SHARE))
    return {"rows": rows, "cosines": [round(one, 4) for one in cosines.of_pairs(bench)]}


def boxes(bench: Bench) -> dict[str, Any]:
    """Accuracy of repeated selections of tokens: random, by attention, by attention with noise."""
    wanted: dict[str, Pipeline] = {"dense": pipeline([DENSE])}
    for share in SHARES:
        kept = {"at": FASTV_SITE, "keep": share}
        wanted[f"{share} attention"] = pipeline([{"use": "fastv", **kept}])
        for draw in range(DRAWS):
            wanted[f"{share} random {draw}"] = pipeline([{"use": "random", "seed": draw, **kept}])
            wanted[f"{share} noise {draw}"] = pipeline([{"use": "noisy_attention", "seed": draw, **kept}])
    return {"rows": _rows(bench, wanted, _fewer(bench, BOX_SHARE))}


def correlation(bench: Bench) -> dict[str, Any]:
    """Cosines of each layer with all tokens, and with half of them by attention, with and without noise."""
    half = {"at": FASTV_SITE, "keep": 0.5}
    wanted = {"all": pipeline([DENSE]), "attention": pipeline([{"use": "fastv", **half}])}
    for draw in range(DRAWS // 2):
        wanted[f"noise {draw}"] = pipeline([{"use": "noisy_attention", "seed": draw, **half}])
    cosine = cosines.of_layers(bench, list(wanted.values()))
    short = ([[round(one, 4) for one in row] for row in rows] for rows in cosine)
    return {"from": FASTV_SITE, "cosines": dict(zip(wanted, short, strict=True))}


def table(bench: Bench, routers: Routers, settings: Sequence[Setting]) -> dict[str, Any]:
    """PAR at its settings against everything else at the same FLOPs."""
    pars = {setting: routers.at(bench, setting) for setting in settings}
    asked = bench.ask(pars.values())
    # What it really took: where the router chooses layers, that is less than the most that it may.
    costs = {setting: asked[one.sha].flops for setting, one in pars.items()}
    lowest = min(costs.values())
    orders = {
        use: static.greedy(bench, use, lambda one: _cost(bench, one) < lowest)
        for use in ("skip_layers", "freeze_layers")
    }
    base = {"dense": pipeline([DENSE]), "blind": pipeline([BLIND])}
    wanted = {
        str(setting): {"PAR": pars[setting], **_rivals(Equal(bench, costs[setting]), routers, setting, orders)}
        for setting in settings
    }
    outcomes = bench.ask([*base.values(), *(one for rows in wanted.values() for one in rows.values())])
    return {
        "orders": orders, "text_tokens": bench.usual_text, "sites": routers.sites, "costs": {
            str(setting): round(value, 5) for setting, value in costs.items()
        },
        "base": {label: outcomes[one.sha].as_data() for label, one in base.items()},
        "settings": {
            setting: {label: outcomes[one.sha].as_data() for label, one in rows.items()}
            for setting, rows in wanted.items()
        },
    }  # fmt: skip


def unseen(bench: Bench, routers: Routers, setting: Setting) -> dict[str, Any]:
    """The setting of the target on the questions behind those of everything else, against those whom it names.

    Twice as many, if there are: what is left to tell apart is small.
    """
    first = max(UNSEEN, bench.questions)
    others = replace(bench, first=first, questions=min(2 * bench.questions, DRAWN - first))
    mine = routers.at(bench, setting)
    same = Equal(bench, _cost(bench, mine))
    named = ("fastv", "random", "divprune")
    every = equal.token_strategies(routers.sites)
    rivals = {label: same.tokens(stage) for label, stage in every if stage["use"] in named}
    wanted = {"dense": pipeline([DENSE]), "PAR": mine, **rivals}
    return {"setting": str(setting), "first": others.first, "rows": _rows(others, wanted)}


def _cost(bench: Bench, one: Pipeline) -> float:
    return equal.cost(one.bind(bench.shape), bench.text_tokens)


def _rivals(
    same: Equal, routers: Routers, setting: Setting, orders: Mapping[str, Sequence[int]]
) -> dict[str, Pipeline]:
    """Every rival by its label; those that cannot be brought to these FLOPs are left out and told."""
    total = same.bench.shape.layers
    inner = [layer for layer in orders["skip_layers"] if layer >= FASTV_SITE][: max(total - setting.layers, 1)]
    rivals: dict[str, Pipeline | None] = {
        label: _tried(label, same, stage) for label, stage in equal.token_strategies(routers.sites)
    }
    rivals["static layers"] = same.layers("skip_layers", orders["skip_layers"])
    rivals["frozen layers"] = same.layers("freeze_layers", orders["freeze_layers"])
    rivals["vtw"] = same.leaving("vtw")
    skipped = {"use": "skip_layers", "layers": sorted(inner)}
    words = f"+ {len(inner)} static layer{'s' * (len(inner) > 1)} left out"
    for label, stage in equal.token_strategies(routers.sites):
        if stage["use"] == "fastv":
            rivals[f"{label} {words}"] = _tried(label, same, stage, skipped)
    chance = {"use": "chance", "at": equal.at(routers.sites), "keep_layers": setting.layers}
    rivals["random tokens and layers"] = _tried("random tokens and layers", same, chance)
    return {label: one for label, one in rivals.items() if one is not None}


def _tried(label: str, same: Equal, *stages: Stage) -> Pipeline | None:
    try:
        return same.tokens(*stages)
    except SpecError as error:
        say(f"{label} is left out at {same.flops:.3f} of dense FLOPs: {str(error).splitlines()[0]}")
        return None


def ablations(bench: Bench, routers: Routers, settings: Sequence[Setting]) -> dict[str, Any]:
    """Routers that were trained otherwise, and uses of one router, all within the FLOPs of one setting."""
    wanted: dict[str, dict[str, Pipeline]] = {str(setting): {} for setting in settings}
    stages = {"shipped": dict(routers.stage), "untrained": _untrained(bench, routers)}
    stages |= {one.folder: stage for one in VARIANTS if (stage := routers.named(one.folder)) is not None}
    for setting in settings:
        rows, same = wanted[str(setting)], Equal(bench, setting.flops)
        for label, stage in stages.items():
            if label == "layers-only":
                rows[label] = same.router_layers(_without_site(stage))
            else:
                rows[label] = routers.at(bench, setting, stage)
        rows["shipped: its layers, all tokens"] = same.router_layers(_without_site(routers.stage))
        chance = {"use": "chance", "at": equal.at(routers.sites)}
        rows["random tokens and layers"] = routers.at(bench, setting, chance)
    count = _fewer(bench, LESS_SHARE)
    trained = [one.folder for one in VARIANTS if one.folder in stages]
    return {
        "settings": {setting: _rows(bench, rows, count) for setting, rows in wanted.items()},
        "training": {name: _training(routers.folder / name) for name in trained},
    }


def _without_site(stage: Stage) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key != "at"}


def _untrained(bench: Bench, routers: Routers) -> dict[str, Any]:
    """A new router of the shipped one's architecture."""
    from prunekit_strategies.par import files

    if routers.stage.get("weights") is None:
        return dict(routers.stage)
    made = files.read(files.find(str(routers.stage["weights"]))).architecture
    kept = {key: routers.stage[key] for key in ("use", "at", "eligible", "protect") if key in routers.stage}
    width = "model" if made.width == bench.shape.hidden else made.width
    size = {"width": width, "depth": made.depth, "heads": made.heads, "attention": made.attention}
    return {**kept, "weights": None, "seed": 0, **size}


def _training(folder: Path) -> dict[str, Any]:
    """What a router's folder says of its training: steps, and held-out KL at the start, by chance, at the end."""
    from prunekit_strategies.par import files

    told = files.read(folder).training
    start, end = told["curve"][0], told["curve"][-1]
    return {
        "steps": told["steps"], "start": round(start["held_out"], 4), "random": round(start["random"], 4),
        "end": round(end["held_out"], 4), "difference": round(end.get("difference", 0.0), 1),
    }  # fmt: skip
