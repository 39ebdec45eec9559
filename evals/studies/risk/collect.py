"""Every prompt on every rung, once: what splits are then drawn from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from prunekit_evals.micro import foreign, prompts

from prunekit import load, loading
from prunekit.spec.risk_keys import RiskBudget
from prunekit.training.data import Sample, Source, encode, order, source
from prunekit.training.risk import climb
from prunekit.verify.proof import proved_parts

FOREIGN = "easy-vqa"
BATCH, TOKENS, SEED = 16, 8, 0


class Foreign:
    """Questions of easy-vqa's test split, in the words of the benchmark: images that are no scenes."""

    digest = "easy-vqa-1.0-test"

    def __init__(self) -> None:
        self._asked = [(number, one) for number, asked in sorted(foreign.questions("test").items()) for one in asked]

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, index: int) -> Sample:
        number, question = self._asked[index]
        shown = Image.fromarray(np.asarray(foreign.image("test", number).image))
        return Sample((shown,), prompts.BY_TASK["easy_vqa"](question))


def source_of(name: str) -> Source:
    """A registered source, a JSONL file, or the foreign set."""
    return Foreign() if name == FOREIGN else source(name)


def collect(pipeline: str, model: str, names: list[str], many: int) -> Iterator[dict[str, Any]]:
    """One row for each of `many` prompts of each named source, drawn without repetition."""
    made = load(pipeline)
    loaded, processor = loading.load(model)
    parts = proved_parts(loaded)
    for name in names:
        data = source_of(name)
        drawn = order(len(data), SEED, min(many, len(data)))
        groups = (drawn[start : start + BATCH] for start in range(0, len(drawn), BATCH))
        batches = (encode(processor, [data[index] for index in group]) for group in groups)
        for one in climb(made, loaded, processor, parts, batches, TOKENS):
            yield {"set": name, "harms": one.harms, "differs": one.differs, "flops": one.flops}


def write(path: Path, pipeline: str, model: str, names: list[str], many: int) -> None:
    """The rows as a file, with what they are of. Numbers are rounded to seven digits."""
    made, rows = load(pipeline), []
    assert isinstance(made.budget, RiskBudget), "the study is of a budget of risk"
    for row in collect(pipeline, model, names, many):
        rows.append({name: _rounded(value) for name, value in row.items()})
        print(f"\r{len(rows)} prompts", end="", flush=True)
    print()
    head = {"pipeline": made.name, "use": made.stages[0].use, "model": model, **made.budget.ladder_data()}
    identity = {"base": made.base, "weights": loading.model_identity(loading.resolve(model)), "max_new_tokens": TOKENS}
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps({**head, **identity})[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [int(one) if isinstance(one, bool) else round(one, 7) for one in value]
    return value
