"""How a router is trained: every choice is a field, with its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from prunekit.errors import InputError
from prunekit.strategy import options

MOST = 2**31  # seeds of samples and candidates are multiples of it


@dataclass(frozen=True)
class Recipe:
    """The options of a training. The defaults of samples, batch, rounds and lr are those that did best on the bundled
    model (docs/decisions/par-recipe.md); the authors' values are not published.

    seed: of the order of the data and of all noise. samples: how many prompts are seen; steps: of the optimizer, None
        for samples / batch. batch: prompts of one step. held_out: prompts that are only measured on.
    candidates: decisions tried for each prompt, the first without noise. noise: its deviation. noise_on: the router's
        `attention` logits, or its `scores`, there in units of their own deviation over the tokens and over the layers.
    vary: what noise changes of a candidate, tokens and layers `together`, or `apart`: layers alone in the first, third,
        and so on, tokens alone in the others, so that a pair says which of them made the difference.
    answer_tokens: the most of the dense model's greedy answer that is compared. kl: `forward`, from the dense model's
        distribution, or `reverse`. temperature: of both distributions.
    pairing: the best candidate is preferred to the worst, `best_worst`, or to the one without noise, `best_plain`; or
        each to every worse one, weighted by how much worse it is, `all`.
    least_gap: pairs whose KL differs by less are left out.
    likelihood: of a decision, each group (tokens, layers) divided by its size, `normalised`, or `summed`.
    loss: `cpl`, -log sigmoid(alpha * (log p(best) - bias * log p(worst))), or `dpo`, the same with the starting router
        as reference, beta in place of alpha and no bias. alpha, bias: None takes 5 and 1 with `normalised`, 0.1 and 0.5
        with `summed`. sparsity: weight of keeping mean probabilities at the budget.
    rounds: how often candidates come from a fresh copy of the router; 1: always from the one at the start.
    replay: batches from which a step learns once more beside its own, drawn from the last `remember` ones.
    lr, copied_lr: of new parameters, and of those copied from the LVLM. warmup: share of the steps. clip: of gradients.
    router_dtype: in which the router computes; its parameters and the loss are float32.
    measure_every, save_every: steps between held-out measurements and between checkpoints.
    """

    seed: int = 0
    samples: int = 5000
    steps: int | None = None
    batch: int = 16
    held_out: int = 64
    candidates: int = 8
    noise: float = 1.0
    noise_on: Literal["attention", "scores"] = "attention"
    vary: Literal["together", "apart"] = "together"
    answer_tokens: int = 64
    kl: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    pairing: Literal["best_worst", "best_plain", "all"] = "best_worst"
    least_gap: float = 1e-3
    likelihood: Literal["normalised", "summed"] = "normalised"
    loss: Literal["cpl", "dpo"] = "cpl"
    alpha: float | None = None
    bias: float | None = None
    beta: float = 0.1
    sparsity: float = 1.0
    rounds: int = 30
    replay: int = 0
    remember: int = 256
    lr: float = 1e-3
    copied_lr: float = 1e-5
    warmup: float = 0.03
    clip: float = 1.0
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    measure_every: int = 50
    save_every: int = 10

    def __post_init__(self) -> None:
        least = {
            "samples": 1, "batch": 1, "candidates": 2, "answer_tokens": 1, "rounds": 1, "remember": 1,
            "measure_every": 1, "save_every": 1, "held_out": 1, "steps": 0, "seed": 0, "replay": 0, "bias": 0,
            "sparsity": 0, "least_gap": 0,
        }  # fmt: skip
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name}: must be at least {lowest}, not {value}")
        for name in ("noise", "temperature", "lr", "copied_lr", "clip", "beta", "alpha"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be above 0, not {value}")
        if self.seed >= MOST:
            raise ValueError(f"seed: must be below {MOST}, not {self.seed}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: is a share of the steps, in [0, 1), not {self.warmup}")

    @property
    def total(self) -> int:
        """Steps of the optimizer."""
        return -(-self.samples // self.batch) if self.steps is None else self.steps

    @property
    def scale(self) -> tuple[float, float]:
        """Alpha and bias."""
        usual = (5.0, 1.0) if self.likelihood == "normalised" else (0.1, 0.5)
        return usual[0] if self.alpha is None else self.alpha, usual[1] if self.bias is None else self.bias

    def round_of(self, step: int) -> int:
        """The round, from 0, in which a step lies."""
        return min(step * self.rounds // max(self.total, 1), self.rounds - 1)


def read_recipe(path: Path | None, changes: Sequence[str]) -> Recipe:
    """A recipe from a YAML file (None: the defaults) and `key=value` texts. Raises InputError."""
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"'{path}' is no recipe: {str(error).partition(chr(10))[0]}") from error
        if not isinstance(data, Mapping):
            raise InputError(f"'{path}' is no recipe: it must be a mapping such as `lr: 0.001`")
    values = dict(data)
    for text in changes:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"'{text}' is not key=value (write it as lr=0.001)")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"'{text}': its value is no YAML") from error
    problems: list[options.Problem] = []
    fitted = options.check(Recipe, {key: _number(value) for key, value in values.items()}, (), problems)
    if problems:
        lines = (f"{one.key}: {one.message}" + (f" ({one.hint})" if one.hint else "") for one in problems)
        raise InputError("the recipe cannot be used: " + "; ".join(lines))
    try:
        return Recipe(**fitted)
    except ValueError as error:
        raise InputError(f"the recipe cannot be used: {error}") from error


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) and "e" in value.casefold() else value
    except ValueError:
        return value


def as_data(recipe: Recipe) -> dict[str, Any]:
    """Plain data, for files."""
    return dataclasses.asdict(recipe)
