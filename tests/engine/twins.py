"""Naive twins of the strategies' rules: loops over what a masked, unpruned model shows; no code under test."""

from __future__ import annotations

import math
from dataclasses import replace

from prunekit.testing.tiny import IMAGE_SIZE, PATCH, PER_IMAGE
from prunekit.verify.oracle import MaskedReference

SIDE = IMAGE_SIZE // PATCH


def wanted(stage, original, current):
    """How many tokens a stage asks for, from its keys."""
    if "keep_tokens" in stage:
        return min(stage["keep_tokens"], current)
    base = current if stage.get("keep_of") == "current" else original
    return min(max(math.floor(base * stage["keep"] + 0.5), 1), current) if current else 0


def upto(report, number):
    """The report as it was before event `number`."""
    events = report.events[:number]
    kept = tuple(len(row) for row in events[-1].kept) if events else report.visual_tokens
    return replace(report, events=events, kept_tokens=kept)


def entered(report, number):
    """Per row, the original indices of the visual tokens that reached event `number`."""
    if number == 0:
        return tuple(tuple(range(count)) for count in report.visual_tokens)
    return report.events[number - 1].kept


def fastv(reference: MaskedReference, number, site, counts):
    """The full eager attention map of the layer before: mean of heads, last prompt row, visual columns, top of them."""
    rows = reference.attention(int(site) - 1).mean(1)[:, -1]
    picked = []
    for row, slots, tokens, count in zip(
        rows, reference.visual, entered(reference.report, number), counts, strict=True
    ):
        score = {token: row[slots[token]].item() for token in tokens}
        picked.append(tuple(sorted(sorted(tokens, key=lambda token: (-score[token], token))[:count])))
    return tuple(picked)


def divprune(reference: MaskedReference, number, site, counts):
    """Greedy max-min on the cosine distance of the states that reach the site."""
    states = reference.states(0 if site == "encoder" else int(site))
    picked = []
    for row, (tokens, count) in enumerate(zip(entered(reference.report, number), counts, strict=True)):
        vectors = {token: states[row, reference.visual[row][token]].tolist() for token in tokens}
        picked.append(tuple(sorted(_max_min(vectors, count))))
    return tuple(picked)


def _max_min(vectors, count):
    def distance(a, b):
        dot = math.fsum(x * y for x, y in zip(vectors[a], vectors[b], strict=True))
        return 1 - dot / math.hypot(*vectors[a]) / math.hypot(*vectors[b])

    chosen = []
    while len(chosen) < count:
        rest = [token for token in vectors if token not in chosen]
        gaps = {t: min((distance(t, o) for o in (chosen or vectors) if o != t), default=0) for t in rest}
        chosen.append(max(rest, key=lambda token: (gaps[token], -token)))
    return chosen


def pool_cells(tokens, count):
    """The cells of an even grid over each image that still has tokens: lists of tokens in raster order."""
    images = sorted({token // PER_IMAGE for token in tokens})
    cells = {}
    for place, image in enumerate(images):
        share = max(count * (place + 1) // len(images) - count * place // len(images), 1)
        grids = [(r, c) for r in range(1, SIDE + 1) for c in range(1, SIDE + 1) if r * c <= share]
        r, c = max(grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] / grid[1] - 1), -grid[0]))
        for token in tokens:
            if token // PER_IMAGE == image:
                y, x = divmod(token % PER_IMAGE, SIDE)
                cells.setdefault((image, y * r // SIDE, x * c // SIDE), []).append(token)
    return list(cells.values())


def middle(cell):
    """The token that stands for a cell."""
    return cell[len(cell) // 2]


def pool(reference: MaskedReference, number, site, counts):
    """The middle token of each cell."""
    rows = zip(entered(reference.report, number), counts, strict=True)
    return tuple(tuple(sorted(middle(cell) for cell in pool_cells(tokens, count))) for tokens, count in rows)


def stride(reference: MaskedReference, number, site, counts):
    """The middle token of each cell, and the missing ones spread evenly over the rest."""
    picked = []
    for tokens, count in zip(entered(reference.report, number), counts, strict=True):
        chosen = [middle(cell) for cell in pool_cells(tokens, count)] if count else []
        rest = [token for token in tokens if token not in chosen]
        missing = count - len(chosen)
        chosen += [rest[(2 * i + 1) * len(rest) // (2 * missing)] for i in range(missing)]
        picked.append(tuple(sorted(chosen)))
    return tuple(picked)


def pool_merges(stages):
    """For `assert_equivalent(merges=...)`: averages of the cells, from the definition and the kept indices alone."""
    import torch

    token_stages = [stage for stage in stages if stage["use"] not in ("dense", "skip_layers")]

    def merges(report):
        found = {}
        for number, (stage, event) in enumerate(zip(token_stages, report.events, strict=True)):
            if stage["use"] != "pool":
                continue
            weights = []
            for row, tokens in enumerate(entered(report, number)):
                matrix = torch.zeros(len(event.kept[row]), len(tokens), dtype=torch.float64)
                count = wanted(stage, report.visual_tokens[row], len(tokens))
                for cell in pool_cells(tokens, count) if tokens else []:
                    for token in cell:
                        matrix[event.kept[row].index(middle(cell)), tokens.index(token)] = 1 / len(cell)
                weights.append(matrix)
            found[number] = weights
        return found

    return merges
