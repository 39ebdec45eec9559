"""The primitives of `prunekit.ops` once more, under the same names: loops over lists, written for reading.

A twin gets one sample and only its valid tokens, so there is neither a batch axis nor padding here. Numbers may be int,
float or Fraction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Row = Sequence[float]
Matrix = Sequence[Row]


def best_first(items: Sequence[int], value) -> list[int]:
    """The largest value first, on ties the lower item."""
    return sorted(items, key=lambda i: (-value(i), i))


def ranks(scores: Row) -> list[int]:
    order = best_first(range(len(scores)), scores.__getitem__)
    return [order.index(i) for i in range(len(scores))]


def top_k_mask(scores: Row, count: int) -> list[bool]:
    chosen = set(best_first(range(len(scores)), scores.__getitem__)[:count])
    return [i in chosen for i in range(len(scores))]


def borda(scores: Sequence[Row], weights: Row) -> list[float]:
    points = [0.0] * len(scores[0])
    for one, weight in zip(scores, weights, strict=True):
        for place, token in enumerate(best_first(range(len(one)), one.__getitem__)):
            points[token] += weight * (len(one) - place)
    return points


def cosine(features: Matrix, others: Matrix) -> list[list[float]]:
    def one(x: Row, y: Row) -> float:
        length = math.hypot(*x) * math.hypot(*y)
        return sum(a * b for a, b in zip(x, y, strict=True)) / length if length else 0.0

    return [[one(x, y) for y in others] for x in features]


def min_max(scores: Row) -> list[float]:
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) if high > low else 0.0 for score in scores]


def index_mask(indices: Sequence[int], size: int) -> list[bool]:
    return [i in indices for i in range(size)]


def greedily(tokens: int, count: int, gain) -> list[int]:
    """`count` times the token with the largest `gain(token, chosen so far)`, the lower index on ties."""
    chosen: list[int] = []
    while len(chosen) < min(count, tokens):
        others = [i for i in range(tokens) if i not in chosen]
        chosen.append(best_first(others, lambda i: gain(i, chosen))[0])
    return chosen


def max_min(distance: Matrix, count: int, weights: Row | None = None) -> list[int]:
    def gain(token: int, chosen: list[int]) -> float:
        weight = 1 if weights is None else weights[token]
        compared = [weight * distance[j][token] for j in chosen or range(len(distance))]
        return min(compared) if chosen else sorted(compared)[min(1, len(compared) - 1)]

    return greedily(len(distance), count, gain)


def mmr(scores: Row, similarity: Matrix, count: int, balance: float = 0.5, at_once: int = 1) -> list[int]:
    def gain(token: int, chosen: list[int]) -> float:
        if not chosen:
            return scores[token]
        return balance * scores[token] - (1 - balance) * max(similarity[token][j] for j in chosen)

    chosen: list[int] = []
    while len(chosen) < min(count, len(scores)):
        before = list(chosen)
        others = [i for i in range(len(scores)) if i not in chosen]
        chosen += best_first(others, lambda i, before=before: gain(i, before))[: min(at_once, count - len(chosen))]
    return chosen


def max_sum(similarity: Matrix, scores: Row, count: int) -> list[int]:
    def gain(token: int, chosen: list[int]) -> float:
        return -sum(similarity[token][j] for j in chosen) if chosen else scores[token]

    return greedily(len(scores), count, gain)


def precise(values: Sequence[float]) -> list[float]:
    return list(values)


def coverage(similarity: Matrix, count: int, weights: Row, saliency: Row) -> list[int]:
    def covered(target: int, chosen: list[int]) -> float:
        return max([0, *(similarity[target][j] for j in chosen)])

    def gain(token: int, chosen: list[int]) -> float:
        added = (covered(i, [*chosen, token]) - covered(i, chosen) for i in range(len(similarity)))
        return saliency[token] * sum(weight * one for weight, one in zip(weights, added, strict=True))

    return greedily(len(saliency), count, gain)


def determinant(matrix: Matrix) -> Fraction:
    """Exact, by elimination."""
    rows = [[Fraction(x) for x in row] for row in matrix]
    result = Fraction(1)
    for i in range(len(rows)):
        pivot = next((j for j in range(i, len(rows)) if rows[j][i] != 0), None)
        if pivot is None:
            return Fraction(0)
        if pivot != i:
            rows[i], rows[pivot] = rows[pivot], rows[i]
            result = -result
        result *= rows[i][i]
        for j in range(i + 1, len(rows)):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return result


def dpp(kernel: Matrix, count: int, relevance: Row) -> list[int]:
    scaled = [[Fraction(relevance[i]) * Fraction(x) * Fraction(relevance[j]) for j, x in enumerate(row)]
              for i, row in enumerate(kernel)]  # fmt: skip

    def gain(token: int, chosen: list[int]) -> Fraction:
        # Divided by the determinant so far this is the factor; that changes no order. Once no token adds volume,
        # all are 0 and the lower index comes first.
        indices = [*chosen, token]
        return determinant([[scaled[i][j] for j in indices] for i in indices])

    return greedily(len(kernel), count, gain)


def nearest_kept(similarity: Matrix, keep: Sequence[bool]) -> list[int]:
    kept = [j for j, stays in enumerate(keep) if stays]
    if not kept:
        return [-1] * len(keep)
    return [i if keep[i] else best_first(kept, similarity[i].__getitem__)[0] for i in range(len(keep))]


def bipartite_matching(
    similarity: Matrix, merges: int, protected: Sequence[bool], sources: Sequence[bool] | None = None
) -> list[int]:
    tokens = len(similarity)
    free = [i for i in range(tokens) if not protected[i]]
    if sources is None:
        merges = min(merges, len(free) // 2)
        sources = [i % 2 == 0 for i in range(tokens)]
    targets = [j for j in free if not sources[j]]
    owner = list(range(tokens))
    if targets:
        proposal = {i: best_first(targets, similarity[i].__getitem__)[0] for i in free if sources[i]}
        for i in best_first(list(proposal), lambda i: similarity[i][proposal[i]])[:merges]:
            owner[i] = proposal[i]
    return owner


def density_peaks(distance: Matrix, count: int, neighbours: int) -> list[int]:
    tokens = range(len(distance))

    def log_density(i: int) -> float:
        near = sorted(distance[i])[:neighbours]
        return -sum(d * d for d in near) / len(near)

    densest_first = best_first(tokens, log_density)

    def separation(i: int) -> float:
        denser = densest_first[: densest_first.index(i)]
        return min((distance[i][j] for j in denser), default=max(max(row) for row in distance))

    def peak(i: int) -> float:
        return log_density(i) + math.log(separation(i)) if separation(i) else -math.inf

    centres = best_first(tokens, peak)[:count]
    return nearest_kept([[-d for d in row] for row in distance], [i in centres for i in tokens])


def density_cutoff(distance: Matrix, cutoff: float, reach: float, core: Sequence[int]) -> list[int]:
    tokens = range(len(distance))
    apart = [[0.0 if i == j else max(distance[i][j], 0.0) for j in tokens] for i in tokens]
    members = [i for i in tokens if core[i]]

    def density(i: int) -> float:
        return sum(math.exp(-((d / 2) ** 2)) for d in sorted(apart[i][j] for j in members))

    centres: list[int] = []
    for i in best_first(members, density):
        if all(apart[i][j] > cutoff for j in centres):
            centres.append(i)
    owner = nearest_kept([[-d for d in row] for row in apart], [i in centres for i in tokens])
    return [j if j in (i, -1) or apart[i][j] <= reach * cutoff else -1 for i, j in enumerate(owner)]


def recycle(scores: Row, states: Matrix, kept: int, recycled: int, clusters: int) -> list[int]:
    order = best_first(range(len(scores)), scores.__getitem__)
    owner = [i if i in order[:kept] else -1 for i in range(len(scores))]
    others = order[kept : kept + recycled] if clusters else []
    distance = [[math.dist(states[i], states[j]) / math.sqrt(len(states[i])) for j in others] for i in others]
    for i, centre in zip(others, density_peaks(distance, clusters, clusters), strict=True):
        owner[i] = others[centre]
    return owner


def outliers(scores: Row, factor: float = 1.5) -> list[bool]:
    def quantile(share: Fraction) -> Fraction:
        ascending = sorted(map(Fraction, scores))
        position = share * (len(ascending) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ascending) - 1)
        return ascending[below] + (position - below) * (ascending[above] - ascending[below])

    low, high = quantile(Fraction(1, 4)), quantile(Fraction(3, 4))
    return [score > high + Fraction(factor) * (high - low) for score in map(Fraction, scores)]


def group_sizes(groups: Sequence[int], count: int) -> list[int]:
    return [list(groups).count(group) for group in range(count)]


def group_means(values: Matrix, groups: Sequence[int], count: int) -> list[list[float]]:
    members = [[row for row, own in zip(values, groups, strict=True) if own == group] for group in range(count)]
    zeros = [0.0] * len(values[0])
    return [[sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else zeros for rows in members]


def group_members(groups: Sequence[int], count: int) -> list[list[int]]:
    return [[i for i, group in enumerate(groups) if group == number] for number in range(count)]


def group_top_k(scores: Row, groups: Sequence[int], quota: Sequence[int]) -> list[bool]:
    mask = [False] * len(scores)
    for group, count in enumerate(quota):
        members = [i for i, other in enumerate(groups) if other == group]
        for i in best_first(members, scores.__getitem__)[:count]:
            mask[i] = True
    return mask


def quotas(
    weights: Row, total: int, capacity: Sequence[int], minimum: int = 0, remainder: str = "fraction"
) -> list[int]:
    quota = [0] * len(weights)
    for limit in ([min(size, minimum) for size in capacity], list(capacity)):
        for weight in (weights, [1] * len(weights)):
            room = [most - has for most, has in zip(limit, quota, strict=True)]
            more = shares([Fraction(w) for w in weight], total - sum(quota), room, remainder)
            quota = [has + one for has, one in zip(quota, more, strict=True)]
    return quota


def shares(weights: list[Fraction], rest: int, room: list[int], remainder: str) -> list[int]:
    """Groups whose share exceeds their room are filled and leave; when no more do, the others get what is left."""
    groups = [g for g in range(len(weights)) if weights[g] > 0 and room[g] > 0]
    ideal = [Fraction(0)] * len(weights)
    while groups:
        total = sum(weights[g] for g in groups)
        full = [g for g in groups if weights[g] * rest / total >= room[g]]
        for g in full or groups:
            ideal[g] = Fraction(room[g]) if full else weights[g] * rest / total
        rest -= sum(room[g] for g in full)
        groups = [g for g in groups if g not in full] if full else []
    quota = [math.floor(one) for one in ideal]
    left_over = int(sum(ideal)) - sum(quota)
    fraction = [one - has for one, has in zip(ideal, quota, strict=True)]
    candidates = [g for g in range(len(weights)) if weights[g] > 0 and quota[g] < room[g]]
    for g in best_first(candidates, (fraction if remainder == "fraction" else weights).__getitem__)[:left_over]:
        quota[g] += 1
    return quota


def crop_quotas(
    coords: Sequence[Sequence[int]], frames: Sequence[int], count: int, videos: Sequence[bool] | None = None
) -> tuple[list[int], list[int]]:
    frames = [0 if videos and videos[i] else frame for i, frame in enumerate(frames)]
    crops = sorted({(place[0], frame) for place, frame in zip(coords, frames, strict=True) if place[1] >= 0})
    places = zip(coords, frames, strict=True)
    groups = [crops.index((place[0], frame)) if place[1] >= 0 else len(crops) for place, frame in places]
    sizes = [groups.count(group) for group in range(max(groups) + 1)]
    return groups, quotas([*sizes[: len(crops)], *[0] * (len(sizes) - len(crops))], count, sizes)


def clip_shares(
    coords: Sequence[Sequence[int]], frames: Sequence[int], videos: Sequence[bool], count: int | None
) -> tuple[list[bool], list[tuple[list[int], int | None]]]:
    groups, quota = crop_quotas(coords, frames, len(frames) if count is None else count, videos)
    stays, asked = [False] * len(frames), []
    for group, share in enumerate(quota):
        tokens = [i for i, own in enumerate(groups) if own == group]
        clip = coords[tokens[0]][1] >= 0
        if clip and count is None and videos[tokens[0]]:
            asked.append((tokens, None))
        elif clip and share not in (0, len(tokens)):
            asked.append((tokens, share))
        else:
            for i in tokens[:share]:
                stays[i] = True
    return stays, asked


def slot_weights(slots: Sequence[int], size: int) -> list[list[float]]:
    rows = [[float(i == j) for j in range(size + len(slots))] for i in range(size)]
    for number, slot in enumerate(slots):
        rows[slot] = [float(j == size + number) for j in range(size + len(slots))]
    return rows


def same_place(coords: Sequence[Sequence[int]], frames: Sequence[int], steps: int | None = None) -> list[int]:
    found = []
    for (image, row, column, *_), frame in zip(coords, frames, strict=True):
        earlier = {
            frames[j]: j
            for j, at in enumerate(coords)
            if row >= 0 and (at[0], at[1], at[2]) == (image, row, column) and frames[j] < frame
        }
        back = max(earlier, default=-1) if steps is None else frame - steps
        found.append(earlier.get(back, -1))
    return found


def segments(similarity: Row, threshold: float, least: int) -> list[int]:
    cuts = {i for i, value in enumerate(similarity) if value < threshold}
    for i in best_first(range(len(similarity)), lambda i: -similarity[i]):
        if len(cuts) < least - 1:
            cuts.add(i)
    return [sum(i < frame for i in cuts) for frame in range(len(similarity) + 1)]


def even_grid(rows: int, columns: int, count: int) -> tuple[int, int]:
    fitting = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1) if r * c <= count]
    return max(fitting, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] / grid[1] - rows / columns), -grid[0]))


def grid_cells(coords: Sequence[Sequence[int]], count: int) -> list[int]:
    sizes = {image: (rows, columns) for image, _, _, rows, columns in coords}
    total = sum(rows * columns for rows, columns in sizes.values())
    grids, first, before, start = {}, {}, 0, 0
    for image, (rows, columns) in sorted(sizes.items()):
        share = (before + rows * columns) * count // total - before * count // total
        before += rows * columns
        if share:
            grids[image], first[image] = even_grid(rows, columns, share), start
            start += math.prod(grids[image])
    cells = []
    for image, row, column, rows, columns in coords:
        r, c = grids.get(image, (0, 0))
        cells.append(first[image] + (row * r // rows) * c + column * c // columns if r else -1)
    return cells


def middles(cells: Sequence[int]) -> list[bool]:
    mask = [False] * len(cells)
    for cell in set(cells) - {-1}:
        members = [i for i, other in enumerate(cells) if other == cell]
        mask[members[len(members) // 2]] = True
    return mask


def tile_of(coords: Sequence[Sequence[int]], places: Sequence[Sequence[int]], groups: Sequence[int]) -> list[int]:
    def is_tile(i: int) -> bool:
        return coords[i][1] >= 0 and coords[i][3:] != places[i][2:]

    def under(i: int) -> int:
        image, row, column, rows, columns = coords[i]
        if row < 0 or is_tile(i):
            return -1
        for j, (other, (y, x, height, width)) in enumerate(zip(coords, places, strict=True)):
            if other[0] == image and is_tile(j):
                down = Fraction(2 * row + 1, 2 * rows) * height - (y - other[1])
                across = Fraction(2 * column + 1, 2 * columns) * width - (x - other[2])
                if 0 <= down < other[3] and 0 <= across < other[4]:
                    return groups[j]
        return -1

    return [under(i) for i in range(len(coords))]
