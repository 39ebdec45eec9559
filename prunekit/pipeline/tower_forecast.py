"""What the vision tower and its projector will cost under the cuts of a pipeline.

Exact where a prompt leaves no choice. Bounds where the cost depends on which tokens stay: of several crops, frames or
windows that each attend to themselves, an even spread of what stays is cheapest. Few full ones are dearest; and rows of
a batch are filled up to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.cost import Area, TowerInput, TowerWork
from prunekit.pipeline.cut import Cut
from prunekit.strategy.decisions import TowerParams, TowerShape
from prunekit.strategy.sites import PIXELS, Site


def one_size(tower: TowerShape, params: TowerParams, visual: int) -> TowerInput | None:
    """What a tower that takes one size gets of one image of `visual` tokens; None where images have any size."""
    if params.tokens is None:
        return None
    patches = params.tokens - tower.leading
    group = max(round(patches / visual), 1)
    blank = max(visual * group - patches, 0)
    made = visual - blank
    area = Area(made, params.tokens - made * group)
    return TowerInput(((visual, blank),), group, ((area,),) * tower.blocks, 1, params.tokens, params.mapped)


def tower_work(
    given: TowerInput, params: TowerParams, tower: TowerShape, cuts: Sequence[Cut], counts: Sequence[int], most: bool
) -> TowerWork:
    """The least work that the tower can have, or the `most`.

    cuts: those in front of the tower and in it. counts: visual tokens that enter each of them, and leave the last one.
    """
    made = given.visual - given.blank

    def remaining(site: Site) -> int:
        """Visual tokens made of patches when the cuts before and at `site` have been made."""
        return counts[sum(cut.site <= site for cut in cuts)] - given.blank

    def padded(areas: Sequence[Area], left: int) -> int:
        """Tokens of all rows, or of the sequence, when so many of the visual ones are left."""
        tokens = given.tokens - (made - left) * given.group
        if not most or given.rows < 2 or left == made:
            return tokens
        longest = max(area.fixed + min(area.visual, left) * given.group for area in areas)
        return min(longest * given.rows, given.tokens)

    blocks = []
    for number, areas in enumerate(given.blocks):
        entering = remaining(Site(number - 1, "vision", "after") if number else PIXELS)
        tokens, fed = (padded(areas, count) for count in (entering, remaining(Site(number, "vision", "mid"))))
        filled = most and given.rows > 1 and entering < made
        pairs = tokens**2 // given.rows if filled else _pairs(areas, given.group, entering, most)
        blocks.append((tokens, pairs, fed))
    pools = given.rows if tower.pool else 0
    last = remaining(Site(len(given.blocks), "vision", "after"))
    behind = params.behind or (len(given.blocks),) * len(params.mergers)
    # Rows of one size hand all their tokens on, as far as they are mapped together.
    merged = (made,) * len(behind) if given.rows else (remaining(Site(at, "vision", "after")) for at in behind)
    patches = remaining(PIXELS) * given.group if given.apart else given.tokens - given.rows * tower.leading
    return TowerWork(
        patches,
        tuple(blocks),
        _projected(given, tower, last) if params.projector else 0,
        tuple(merged),
        pools,
        pools and given.tokens,
    )


def _projected(given: TowerInput, tower: TowerShape, last: int) -> int:
    """Tokens that the projector maps: behind a cut those that visual tokens still need, and leading ones."""
    tokens = given.tokens // max(given.rows, 1)
    if last == given.visual - given.blank or given.mapped < tokens - 1:  # of pooled rows it maps all
        return given.rows * given.mapped
    leading = max(tower.leading - (tokens - given.mapped), 0)
    return last * given.group + given.rows * leading


def _pairs(areas: Sequence[Area], group: int, count: int, most: bool) -> int:
    """Squares of the tokens of each area, summed, when `count` of all visual tokens are left."""
    every = [(area.fixed, area.visual * group, area.times) for area in areas]
    whole = sum((fixed + own) ** 2 * times for fixed, own, times in every)
    if count == sum(area.visual * area.times for area in areas):
        return whole
    left, number = count * group, sum(times for _, _, times in every)
    tokens = left + sum(fixed * times for fixed, _, times in every)
    if not most or number == 1:
        return -(-(tokens**2) // number)
    total = sum(fixed**2 * times for fixed, _, times in every)
    # Each area gains by 2 fixed + own a token when it is filled up: the dearest are filled first.
    for fixed, own, times in sorted(every, key=lambda one: -(2 * one[0] + one[1])):
        filled = min(left, own * times)
        total += filled * (2 * fixed + own)
        left -= filled
    return total
