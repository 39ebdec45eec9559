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
    "downsample": ("downsample:Downsample", "smaller images"),
    "pixelprune": ("pixelprune:PixelPrune", "patches unlike those beside them, before the tower (PixelPrune, 2026)"),
    "evs": ("evs:Evs", "patches of a video that changed since the frame before (EVS, 2025)"),
    "fastv": ("fastv:FastV", "most attended by the last prompt token (FastV, ECCV 2024)"),
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
