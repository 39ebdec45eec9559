"""The crossing that exactness is shown on: pipelines and prompt batches."""

from __future__ import annotations

from itertools import product

BATCHES = {
    "one": ((1,), (9,)),
    "two-images": ((2,), (8,)),
    "ragged": ((1, 2, 1), (14, 6, 9)),  # left padding of different widths, one row with two images
    "text-row": ((1, 0, 2), (7, 31, 5)),  # a row without an image among others
}

SINGLE = {
    "dense": [{"use": "dense"}],
    "blind": [{"use": "blind"}],
    "blind-3": [{"use": "blind", "at": 3}],
    "random": [{"use": "random", "keep": 0.5}],
    "random-0": [{"use": "random", "at": 0, "keep_tokens": 3}],
    "random-4": [{"use": "random", "at": 4, "keep": 0.3, "seed": 5}],
    "stride": [{"use": "stride", "keep": 0.4}],
    "stride-2": [{"use": "stride", "at": 2, "keep_tokens": 5}],
    "pool": [{"use": "pool", "keep": 0.25}],
    "pool-3": [{"use": "pool", "at": 3, "keep": 0.4}],
    "fastv": [{"use": "fastv", "keep": 0.5}],
    "fastv-1": [{"use": "fastv", "at": 1, "keep_tokens": 1}],
    "fastv-5": [{"use": "fastv", "at": 5, "keep": 0.25}],
    "divprune": [{"use": "divprune", "keep": 0.3}],
    "divprune-3": [{"use": "divprune", "at": 3, "keep": 0.5}],
    "vtw": [{"use": "vtw"}],
    "vtw-5": [{"use": "vtw", "at": 5}],
    "skip-first": [{"use": "skip_layers", "layers": [0]}],
    "skip-some": [{"use": "skip_layers", "layers": [2, 3, 5]}],
    "skip-attention": [{"use": "skip_layers", "layers": [0, 3], "what": "attention"}],
    "skip-mlp": [{"use": "skip_layers", "layers": [1, 5], "what": "mlp"}],
}

COMPOSED = {
    "divprune-fastv-skip": [
        {"use": "divprune", "keep": 0.75},
        {"use": "fastv", "at": 2, "keep": 0.4},
        {"use": "skip_layers", "layers": [3]},
    ],
    "pool-fastv-vtw": [{"use": "pool", "keep": 0.6}, {"use": "fastv", "at": 3, "keep": 0.25}, {"use": "vtw", "at": 5}],
    "stride-random-fastv": [
        {"use": "stride", "at": 0, "keep": 0.8},
        {"use": "random", "at": 1, "keep": 0.5},
        {"use": "fastv", "at": 4, "keep_tokens": 2},
    ],
    "random-pool-divprune": [
        {"use": "random", "keep": 0.9},
        {"use": "pool", "at": 2, "keep": 0.5},
        {"use": "divprune", "at": 4, "keep": 0.5, "keep_of": "current"},
    ],
    "fastv-fastv-attention": [
        {"use": "fastv", "at": 1, "keep": 0.7},
        {"use": "fastv", "at": 3, "keep": 0.4, "keep_of": "current"},
        {"use": "skip_layers", "layers": [1, 4], "what": "attention"},
    ],
    "pool-pool-mlp": [
        {"use": "pool", "keep": 0.6},
        {"use": "pool", "at": 3, "keep": 0.25},
        {"use": "skip_layers", "layers": [2, 3], "what": "mlp"},
    ],
    "three-kinds-of-skip": [
        {"use": "skip_layers", "layers": [0]},
        {"use": "skip_layers", "layers": [2], "what": "attention"},
        {"use": "skip_layers", "layers": [4], "what": "mlp"},
    ],
    "three-at-the-decoder-input": [
        {"use": "random", "keep": 0.9},
        {"use": "divprune", "keep": 0.6},
        {"use": "pool", "at": 0, "keep": 0.25},
    ],
    "skip-around-a-cut": [
        {"use": "skip_layers", "layers": [2]},
        {"use": "stride", "at": 2, "keep": 0.5},
        {"use": "blind", "at": 3},
    ],
}

PIPELINES = SINGLE | COMPOSED

_TOKEN = ("random", "stride", "pool", "fastv", "divprune")
_LAST = (
    {"use": "vtw", "at": 5},
    *({"use": "skip_layers", "layers": [2, 5], "what": what} for what in ("layer", "attention", "mlp")),
)


def full_crossing() -> dict[str, list[dict[str, object]]]:
    """Every ordered pair of token strategies at an early and a later site, followed by a third stage."""
    found = {}
    for (a, b), last, (early, late) in product(product(_TOKEN, repeat=2), _LAST, (("encoder", 2), (1, 1), (2, 4))):
        if a == "fastv" and early == "encoder":
            continue
        what = last.get("what", "vtw")
        name = f"{a}-{early}-{b}-{late}-{what}"
        found[name] = [{"use": a, "at": early, "keep": 0.7}, {"use": b, "at": late, "keep": 0.3}, last]
    return found


def pipeline(name: str) -> dict[str, object]:
    """The pipeline of that name, as `prunekit.load` takes it."""
    stages = PIPELINES.get(name) or full_crossing()[name]
    return {"name": name, "stages": stages}
