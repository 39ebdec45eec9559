"""Registers the built-in strategies and pipelines, through the same entry-point group as anyone's."""

from __future__ import annotations

from pathlib import Path

from prunekit import hookimpl
from prunekit.registry import Registry

STRATEGIES = {
    "dense": ("dense:Dense", "the model as it is"),
    "blind": ("blind:Blind", "no visual tokens"),
    "random": ("random:Random", "a random subset, seeded per sample"),
    "stride": ("stride:Stride", "a uniform sub-grid"),
    "pool": ("pool:Pool", "average-pool of the grid"),
    "fastv": ("fastv:FastV", "most attended by the last prompt token (FastV, ECCV 2024)"),
    "feather": ("feather:Feather", "attended without rotation, and a uniform grid (FEATHER, ICCV 2025)"),
    "pyramiddrop": ("pyramiddrop:PyramidDrop", "half leave at each quarter, by a look ahead (PyramidDrop, CVPR 2025)"),
    "sparsevlm": (
        "sparsevlm:SparseVLM",
        "rated by words about the image, others clustered (SparseVLM v1.5, ICML 2025)",
    ),
    "sparsevlm_plus": (
        "sparsevlm:SparseVLMPlus",
        "rated by words about the image in the best heads, near or far (SparseVLM +, 2025)",
    ),
    "dart": ("dart:DART", "what resembles pivots with large keys least (DART, EMNLP 2025)"),
    "v2drop": ("v2drop:V2Drop", "what a layer changes most (V2Drop, CVPR 2026)"),
    "tokencarve": ("tokencarve:TokenCarve", "attended and informative, similar ones merged (TokenCarve, 2025)"),
    "fitprune": ("fitprune:FitPrune", "inside each layer, by a calibrated table (FitPrune, AAAI 2025)"),
    "divprune": ("divprune:DivPrune", "the most diverse subset (DivPrune, CVPR 2025)"),
    "vtw": ("vtw:VTW", "all visual tokens leave before a layer (VTW, AAAI 2025)"),
    "par": ("par.strategy:Par", "a trained router ranks tokens and layers for each sample (PAR, ICCV 2025)"),
    "skip_layers": ("skip_layers:SkipLayers", "a static list of layers, of their attention or of their MLP"),
    "shortgpt": ("shortgpt:ShortGPT", "the layers that change states least, by a calibration (ShortGPT)"),
    "freeze_layers": ("freeze_layers:FreezeLayers", "visual tokens pass listed layers unchanged (ShortV, ICCV 2025)"),
}


@hookimpl
def prunekit_register(registry: Registry) -> None:
    """Names and lazy targets; nothing is imported until a pipeline uses it."""
    for name, (target, summary) in STRATEGIES.items():
        registry.strategy(name, f"prunekit_strategies.{target}", summary=summary)


@hookimpl
def prunekit_pipelines() -> dict[str, Path]:
    """The files of `pipelines/`, each under its name without the ending."""
    folder = Path(__file__).resolve().parent / "pipelines"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
