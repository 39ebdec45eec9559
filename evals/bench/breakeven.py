"""The break-even map: for which batches, images and answers a pipeline pays on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit_evals.bench.measure import Point, Spread, Times, speedup, verdict

MARKS = {"pays": "+", "even": "=", "costs": "-"}


@dataclass(frozen=True)
class Row:
    """One pipeline at one point; times in seconds, as medians with quartiles.

    visual: tokens of each row of the batch. first: to the first token, tower and prefill together. whole: by the number
    of new tokens, to the last of them. faster: of each of these over dense, in the same rounds; "first" of the first
    token. overhead: seconds of the first token beyond a pipeline that leaves as many tokens without thinking; None
    where there is none such.
    """

    pipeline: str
    batch: int
    visual: int
    text: int
    tower: Spread
    prefill: Spread
    first: Spread
    step: Spread
    whole: Mapping[int, Spread]
    faster: Mapping[str, Spread]
    memory: int
    flops: float | None
    overhead: Spread | None
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        spreads = {name: vars(getattr(self, name)) for name in ("tower", "prefill", "first", "step")}
        return {
            "pipeline": self.pipeline, "batch": self.batch, "visual_tokens": self.visual, "text_tokens": self.text,
            "rounds": self.rounds, "seconds": spreads,
            "end_to_end_seconds": {str(count): vars(one) for count, one in self.whole.items()},
            "speedup": {name: {**vars(one), "verdict": verdict(one)} for name, one in self.faster.items()},
            "peak_memory_bytes": self.memory, "first_token_flops_fraction": self.flops,
            "selector_overhead_seconds": None if self.overhead is None else vars(self.overhead),
        }  # fmt: skip


def rows_of(
    point: Point, visual: int, times: Mapping[str, Times], twins: Mapping[str, Times], lengths: Sequence[int]
) -> list[Row]:
    """The rows of one point, dense first. times: with those of the dense model under "dense"."""
    dense, rows = times["dense"], []
    for name, one in times.items():
        whole = {count: Spread.of(one.whole(count)) for count in lengths}
        faster = {str(count): speedup(one.whole(count), dense.whole(count)) for count in lengths}
        faster["first"] = speedup(one.first(), dense.first())
        twin = twins.get(name)
        overhead = None
        if twin is not None:
            overhead = Spread.of([own - other for own, other in zip(one.first(), twin.first(), strict=True)])
        parts = (Spread.of(seconds) for seconds in (one.tower, one.prefill, one.first(), one.step))
        sizes = (point.batch, visual, point.text)
        rows.append(Row(name, *sizes, *parts, whole, faster, one.memory, one.flops, overhead, len(one.step)))
    return rows


def table(rows: Sequence[Row], lengths: Sequence[int]) -> str:
    """Markdown: what was measured at each point."""
    heads = ["pipeline", "batch", "visual", "tower ms", "prefill ms", "first ms", "of dense", "FLOPs of dense"]
    heads += ["ms a token", "of dense", "selector ms", *(f"{count} tokens ms" for count in lengths), "peak GB"]
    lines = [heads]
    base = {(row.batch, row.visual): row for row in rows if row.pipeline == "dense"}
    for row in rows:
        dense = base[row.batch, row.visual]
        flops = "not known" if row.flops is None else f"{row.flops:.2f}"
        lines.append([
            row.pipeline, str(row.batch), str(row.visual), _ms(row.tower), _ms(row.prefill), _ms(row.first),
            f"{1 / row.faster['first'].median:.2f}", flops, _ms(row.step), f"{row.step.median / dense.step.median:.2f}",
            "" if row.overhead is None else _ms(row.overhead), *(_ms(row.whole[count]) for count in lengths),
            f"{row.memory / 1e9:.2f}",
        ])  # fmt: skip
    return _markdown(lines)


def break_even(rows: Sequence[Row]) -> str:
    """Markdown: how many times faster than dense, with a mark: `+` pays, `=` even within the spread, `-` costs."""
    columns = ["first", *(name for name in rows[0].faster if name != "first")]
    heads = [("first token" if name == "first" else f"{name} new tokens") for name in columns]
    lines = [["pipeline", "batch", "visual", *heads]]
    for row in rows:
        if row.pipeline != "dense":
            cells = [f"{row.faster[name].median:.2f} {MARKS[verdict(row.faster[name])]}" for name in columns]
            lines.append([row.pipeline, str(row.batch), str(row.visual), *cells])
    return _markdown(lines)


def chart(rows: Sequence[Row]) -> Any:
    """The map as an Altair chart: batch by visual tokens, a panel for each pipeline and length of the answer.

    Raises ImportError where Altair is not installed.
    """
    import altair

    data = [
        {
            "pipeline": row.pipeline, "batch": row.batch, "visual tokens": row.visual,
            "answer": "first token" if name == "first" else f"{name} tokens",
            "speed-up": round(one.median, 3), "spread": f"{one.low:.2f} to {one.high:.2f}", "pruning": verdict(one),
        }
        for row in rows if row.pipeline != "dense" for name, one in row.faster.items()
    ]  # fmt: skip
    base = altair.Chart(altair.Data(values=data)).encode(x="batch:O", y=altair.Y("visual tokens:O", sort="descending"))
    scale = altair.Scale(domainMid=1, scheme="redblue")
    squares = base.mark_rect().encode(
        color=altair.Color("speed-up:Q", scale=scale),
        tooltip=["pipeline:N", "batch:O", "visual tokens:O", "answer:N", "speed-up:Q", "spread:N", "pruning:N"],
    )
    panels = (squares + base.mark_text().encode(text=altair.Text("speed-up:Q", format=".2f"))).properties(width=160)
    return panels.facet(column="answer:N", row="pipeline:N").properties(title="times faster than dense")


def _ms(spread: Spread) -> str:
    return f"{1e3 * spread.median:.1f} ({1e3 * spread.low:.1f}-{1e3 * spread.high:.1f})"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    shown = []
    for cells in (lines[0], rule, *lines[1:]):
        right = (cell.rjust(width) for cell, width in zip(cells[1:], others, strict=True))
        shown.append(f"| {' | '.join([cells[0].ljust(first), *right])} |")
    return "\n".join(shown)
