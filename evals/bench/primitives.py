"""What the primitives of `prunekit.ops` cost: CPU time on one thread, float32, one sample.

python -m prunekit_evals.bench.primitives          # print the table
python -m prunekit_evals.bench.primitives --docs   # and put it into docs/reference/ops.md
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from prunekit_evals.bench.timing import Case, interleaved, median

from prunekit import ops

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "ops.md"  # of a checkout
# Visual tokens and how many are kept: LLaVA-1.5, LLaVA-NeXT.
SIZES = ((576, 128), (2880, 640))
WIDTH, GROUPS = 1024, 16


def calls(tokens: int, kept: int) -> dict[str, Callable[[], Any]]:
    """One call of each primitive that works on scores, features or matrices."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(tokens, WIDTH, generator=generator)
    scores, weights = torch.rand(tokens, generator=generator), torch.rand(GROUPS, generator=generator)
    similarity = ops.cosine(features)
    keep = ops.top_k_mask(scores, kept)
    groups = torch.arange(tokens) * GROUPS // tokens
    sizes = ops.group_sizes(groups, GROUPS)
    quota = ops.quotas(weights, kept, sizes)
    return {
        "top_k_mask": lambda: ops.top_k_mask(scores, kept),
        "borda": lambda: ops.borda([scores, -scores]),
        "outliers": lambda: ops.outliers(scores),
        "cosine": lambda: ops.cosine(features),
        "max_min": lambda: ops.max_min(1 - similarity, kept),
        "dpp": lambda: ops.dpp(similarity, kept, scores),
        "coverage": lambda: ops.coverage(similarity, kept),
        "mmr": lambda: ops.mmr(scores, similarity, kept),
        "nearest_kept": lambda: ops.nearest_kept(similarity, keep),
        "bipartite_matching": lambda: ops.bipartite_matching(similarity, kept),
        "density_peaks": lambda: ops.density_peaks(1 - similarity, kept, neighbours=5),
        "quotas": lambda: ops.quotas(weights, kept, sizes),
        "group_top_k": lambda: ops.group_top_k(scores, groups, quota),
    }


def milliseconds(tokens: int, kept: int, rounds: int) -> dict[str, float]:
    """The median CPU time of each primitive."""

    def case(call: Callable[[], Any]) -> Case:
        @contextlib.contextmanager
        def enter() -> Iterator[Callable[[], Any]]:
            yield call

        return enter

    cases = {name: case(call) for name, call in calls(tokens, kept).items()}
    times = interleaved(cases, rounds, f"{kept} of {tokens} tokens")
    return {name: 1000 * median(times[name]).cpu for name in cases}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Primitives in rows, sizes in columns."""
    names = next(iter(columns.values()))
    lines = ["| primitive | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name in names:
        lines.append(f"| `{name}` | " + " | ".join(f"{times[name]:,.1f}" for times in columns.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and put the table where the page has its marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/reference/ops.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = table(
        {f"{kept} of {tokens:,} tokens": milliseconds(tokens, kept, arguments.rounds) for tokens, kept in SIZES}
    )
    print(text)
    if arguments.docs:
        page = PAGE.read_text(encoding="utf-8")
        marked = re.compile(r"(?<=<!-- cost -->\n).*?(?=\n<!-- /cost -->)", flags=re.S)
        PAGE.write_text(marked.sub(lambda _: text, page), encoding="utf-8")


if __name__ == "__main__":
    main()
