"""The exactness matrix: which pipelines meet which families, prompt batches, kernels, caches and precisions.

A cell is one run of a pipeline on a model. Every cell either equals the masked reference, or is refused by name:
nothing is left out silently. `CELLS` is the list; test_matrix.py runs it, exactness_table.py counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.testing.tiny_families import takes_video, tiny_names

FAMILIES = tiny_names()
IMAGE, TWO, VIDEO, WORDS = ("image",), ("image", "image"), ("video",), ()
BATCHES = {
    "one": (IMAGE,), "pair": (IMAGE, IMAGE), "ragged": (IMAGE, TWO), "words": (WORDS, IMAGE), "video": (VIDEO, IMAGE),
    "videos": (VIDEO, VIDEO),
}  # fmt: skip


def stages(*one, **pipeline):
    """A pipeline of these stages."""
    return {"stages": [dict(stage) for stage in one], **pipeline}


def use(name, **keys):
    return {"use": name, **keys}


# By group, then by name. A row of the table in the docs is a family, a column a group.
GROUPS = {
    "strategies": {
        "dense": stages(use("dense")),
        "random": stages(use("random", keep=0.5)),
        "stride": stages(use("stride", at=1, keep=0.4)),
        "pool": stages(use("pool", keep=0.4)),
        "fastv": stages(use("fastv", keep=0.5)),
        "divprune": stages(use("divprune", keep=0.3)),
        "vtw": stages(use("vtw", at=4)),
        "blind": stages(use("blind")),
    },
    "sites": {
        "encoder": stages(use("ex_loud", at="encoder", keep=0.5)),
        "before": stages(use("ex_loud", at=3, keep=0.4)),
        "mid": stages(use("ex_loud", at="2.mid", keep=0.4)),
        "after": stages(use("ex_loud", at="2.after", keep=0.4)),
        "prefill-end": stages(use("ex_loud", at="prefill_end", keep=0.4)),
        "list-with-state": stages(use("ex_pyramid", at=["encoder", 2, "3.after"], keep=[0.8, 0.5, 0.25])),
        "crop": stages(use("ex_cropped", at=3, keep=0.4)),
        "crop-mid": stages(use("ex_cropped", at="3.mid", keep=0.4)),
    },
    "merges": {
        "sizes": stages(use("ex_gather", at="encoder", keep=0.5)),
        "sizes-twice": stages(use("ex_gather", at=1, keep=0.6), use("ex_gather", at=3, keep=0.3)),
        "sizes-mid": stages(use("ex_gather", at="2.mid", keep=0.5)),
        "recycle": stages(use("ex_recycle", at=2, keep=0.4)),
        "append-cls": stages(use("ex_with_cls", at="encoder", keep=0.4)),
        "each-crop": stages(use("ex_each_crop", at="encoder", keep=0.5)),
    },
    "positions": {
        "renumber-encoder": stages(use("ex_loud", at="encoder", keep=0.5), positions="renumber"),
        "renumber-twice": stages(use("ex_loud", at=1, keep=0.6), use("fastv", at=3, keep=0.3), positions="renumber"),
        "renumber-mid": stages(use("ex_gather", at="2.mid", keep=0.4), positions="renumber"),
        "renumber-crop": stages(use("ex_cropped", at=3, keep=0.4), use("ex_acts", layers=[4], action="skip"),
                                positions="renumber"),
    },
    "layers": {
        "skip": stages(use("ex_acts", layers=[0, 3], action="skip")),
        "skip-in-prefill": stages(use("ex_acts", layers=[2, 4], action="skip", decode="run")),
        "skip-in-decoding": stages(use("ex_acts", layers=[1, 5], decode="skip")),
        "attention-only": stages(use("ex_acts", layers=[1, 4], action="skip_mlp")),
        "mlp-only": stages(use("ex_acts", layers=[2, 5], action="skip_attention")),
        "fill-kv": stages(use("ex_acts", layers=[1, 3], action="fill_kv")),
        "freeze": stages(use("ex_acts", layers=[2, 3], action="freeze")),
    },
    "per sample": {
        "plans": stages(use("ex_lots")),
        "plans-and-cuts": stages(use("ex_loud", at="encoder", keep=0.7), use("ex_lots"),
                                 use("ex_loud", at=3, keep=0.4)),
        "budgets": stages(use("ex_par", at=1, keep=0.5, keep_layers=4)),
        "budgets-renumbered": stages(use("ex_par", at=2, keep_tokens=3, keep_layers=0.5), positions="renumber"),
    },
    "compositions": {
        "three-stages": stages(use("divprune", keep=0.75), use("fastv", at=2, keep=0.4),
                               use("skip_layers", layers=[3])),
        "four-sites": stages(use("ex_gather", at="encoder", keep=0.8), use("ex_loud", at="1.mid", keep=0.6),
                             use("ex_cropped", at="3.after", keep=0.4), use("ex_loud", at="prefill_end", keep=0.2)),
        "freeze-and-cut": stages(use("ex_loud", at=1, keep=0.6), use("ex_acts", layers=[3, 4], action="freeze"),
                                 use("fastv", at=3, keep=0.3)),
        "fill-and-crop": stages(use("ex_acts", layers=[1], action="fill_kv"), use("ex_cropped", at=3, keep=0.5)),
    },
}  # fmt: skip
GROUPS["tower"] = {
    "vision": stages(use("ex_loud", at="vision.0", keep=0.8)),
    "vision-mid": stages(use("ex_loud", at="vision.1.mid", keep=0.5), use("fastv", at=3, keep=0.2)),
}
GROUPS["pixels"] = {
    "pixels": stages(use("ex_bright", at="pixels", keep=0.5)),
    "pixels-and-blocks": stages(use("ex_bright", at="pixels", keep=0.8), use("ex_loud", at="vision.0.mid", keep=0.5),
                                use("fastv", at=3, keep=0.2)),
    "smaller": stages(use("downsample", scale=0.6)),
    "smaller-and-pixels": stages(use("downsample", scale=0.7), use("ex_bright", at="pixels", keep=0.6),
                                 use("ex_loud", at=2, keep=0.3)),
}  # fmt: skip
PIPELINES = {name: pipeline for group in GROUPS.values() for name, pipeline in group.items()}
GROUP_OF = {name: group for group, found in GROUPS.items() for name in found}

# Every pipeline meets these; further ways to run meet a few pipelines each.
SHAPES = (("ragged", "sdpa"), ("ragged", "eager"), ("words", "sdpa"), ("one", "eager"))
SHORT = ("fastv", "four-sites", "plans-and-cuts", "renumber-twice", "sizes-twice", "budgets")
FLASH = ("fastv", "budgets", "renumber-twice", "prefill-end", "crop-mid", "three-stages", "sizes-twice", "freeze")
TOWER_TOO = ("pixels", "smaller")  # of one kind of visual input, which is all that the reference follows in a tower
VIDEO_TOO = (*SHORT, "each-crop", "list-with-state", "skip-in-prefill", "freeze")
WAYS = {
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "float32": {},
    "flash": {},  # a kernel by hand that takes 2-D masks
}
ALLOWED = {"float32": 1e-3}

# What is refused, and the message that is due.
NO_TOWER = ("fast_vlm", "perception_lm")
SIDE_BY_SIDE = ("aya_vision", "cohere2_vision")
# The last layers read keys and values of layers 1 and 2, and layers do more behind their MLP than add it.
SHARED_KV = ("gemma3n", "gemma4", "gemma4_unified")
# How images reach their towers is not known.
SIZES_UNKNOWN = (*SHARED_KV, *NO_TOWER, "molmo2", "ovis2", "paddleocr_vl")
SLIDING = ("gemma3", "aya_vision", "cohere2_vision", *SHARED_KV)
RECURRENT = ("qwen3_5", "qwen3_5_moe")
# What some plan of these tells a layer to do needs keys and values of tokens.
NEEDS_KV = ("fill-kv", "freeze", "freeze-and-cut", "plans", "plans-and-cuts")
ANY_SIZE = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "mistral3", "glm4v", "glm46v",
    "glm4v_moe",
)  # fmt: skip
HAS_CLS = ("llava", "llava_next", "llava_next_video")


@dataclass(frozen=True)
class Cell:
    """One run. batch: a name of `BATCHES`. way: what else is special. refused: the message that is due instead."""

    family: str
    pipeline: str
    batch: str
    attention: str = "sdpa"
    way: str = ""

    @property
    def group(self) -> str:
        return self.way or ("video" if "video" in self.batch else GROUP_OF[self.pipeline])

    @property
    def refused(self) -> str:
        """A part of the message of the refusal, or nothing."""
        text = str(PIPELINES[self.pipeline])
        alone = self.batch == "one" and "plans" in self.pipeline  # the first plan skips layers only
        if self.way == "static cache" and self.family in RECURRENT:
            return "LinearAttentionLayer"
        if self.family in RECURRENT and self.pipeline in NEEDS_KV and not alone:
            return "of which layers|hold a recurrent state and have none"
        if self.way == "flash" and self.pipeline == "freeze":  # seen before anything runs
            return "flash kernels do not take"
        if self.way == "flash" and self.family in SLIDING:
            return "more than the sliding window|side by side"
        if self.way == "flash" and self.pipeline == "sizes-twice":
            return "flash kernels do not take"
        if self.way == "static cache" and self.family in SLIDING:
            return "StaticSlidingWindowLayer|side by side"
        if self.way == "static cache" and GROUP_OF[self.pipeline] == "per sample":
            return "must run the same layers|side by side"
        if GROUP_OF[self.pipeline] == "pixels" and self.family in SIZES_UNKNOWN:
            return "how images reach this model's vision tower is not known"
        if "'at': 'pixels'" in text and self.family not in ANY_SIZE:
            return "takes whole images"
        if self.family in SIDE_BY_SIDE and ".mid" in text.replace("vision.1.mid", "").replace("vision.0.mid", ""):
            return "side by side"
        if self.family in NO_TOWER and ("vision" in text or self.pipeline == "append-cls"):
            return "tower"
        if self.pipeline == "append-cls" and self.family not in HAS_CLS:
            return "no CLS token|does not map single tokens|cannot be read"
        return self._refused_of_shared_kv if self.family in SHARED_KV else ""

    @property
    def _refused_of_shared_kv(self) -> str:
        if self.pipeline in ("skip-in-decoding", "mlp-only"):
            return "attends to its keys and values"
        if self.pipeline in ("sizes-mid", "renumber-mid"):
            return "changes further behind the MLP"
        return "vision tower cannot be cut" if GROUP_OF[self.pipeline] == "tower" else ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.family, self.pipeline, self.batch, self.attention, self.way) if part)


def cells():
    """All cells, in an order in which one in `EVERY` has something of everything."""
    found = [
        Cell(family, name, batch, attention) for name in PIPELINES for batch, attention in SHAPES for family in FAMILIES
    ]
    found += [Cell(family, name, _videos(family)) for name in VIDEO_TOO for family in FAMILIES if takes_video(family)]
    found += [Cell(family, name, "videos") for name in TOWER_TOO for family in FAMILIES if takes_video(family)]
    found += [
        Cell(family, name, _pictures(family, way), way=way)
        for way in ("beams", "static cache", "float32")
        for name in TOWER_TOO
        for family in ANY_SIZE
    ]
    for way in WAYS:
        for name in FLASH if way == "flash" else SHORT:
            found += [Cell(family, name, _pictures(family, way), way=way) for family in FAMILIES if _runs(family, way)]
    return found


def _runs(family, way):
    """On flash kernels the prefix of PaliGemma and the images of Molmo 2 are causal: other models, also unpruned."""
    return not (way == "flash" and family in ("paligemma", "molmo2"))


def _videos(family):
    """GLM-4V shows videos by the ids of images, and cannot take both in one batch."""
    return "videos" if family.startswith("glm") else "video"


def _pictures(family, way):
    """Beams of GLM-4V get each other's pictures when a row has two: the stock model, without any pruning."""
    return "pair" if family.startswith("glm") and way == "beams" else "ragged"


CELLS = cells()
# `make test` runs one cell in so many: a number with which all families, pipelines, batches and ways are met.
EVERY = 23
SOME = CELLS[::EVERY]
# Cells whose rows are also run alone, which no kernel, cache or precision changes.
SEVERAL_ROWS = [one for one in CELLS if len(BATCHES[one.batch]) > 1 and one.attention == "sdpa" and not one.way]
