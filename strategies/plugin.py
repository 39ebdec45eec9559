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
    "first": ("first:First", "the first tokens in raster order"),
    "last": ("last:Last", "the last tokens in raster order"),
    "downsample": ("downsample:Downsample", "smaller images"),
    "pixelprune": ("pixelprune:PixelPrune", "patches unlike those beside them, before the tower (PixelPrune, 2026)"),
    "evs": ("evs:Evs", "patches of a video that changed since the frame before (EVS, 2025)"),
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
    "pact": ("pact:PACT", "centres of important tokens, near ones merged, by keys (PACT, CVPR 2025)"),
    "aim": ("aim:AIM", "similar tokens merge, half of them in each round (AIM, ICCV 2025)"),
    "aim_decoder": ("aim:AIMDecoder", "where passed-on attention ends, fewer after each layer (AIM, ICCV 2025)"),
    "illava": ("illava:ILLaVA", "the least attended become one, block by block in the tower (iLLaVA, 2024)"),
    "illava_decoder": ("illava:ILLaVADecoder", "the least attended become one, before a layer (iLLaVA, 2024)"),
    "mustdrop": ("mustdrop:MustDrop", "read by the question or in a key set of CLS, by thresholds (MustDrop, 2024)"),
    "mustdrop_tower": ("mustdrop:MustDropTower", "alike windows merge in the tower (MustDrop, 2024, first stage)"),
    "autoprune": ("autoprune:AutoPrune", "fewer after each layer, on the question's curve (AutoPrune, NeurIPS 2025)"),
    "ivc_prune": ("ivc_prune:IVCPrune", "implicit coordinates and the foreground, by values (IVC-Prune, ICLR 2026)"),
    "divprune": ("divprune:DivPrune", "the most diverse subset (DivPrune, CVPR 2025)"),
    "scope": ("scope:Scope", "coverage of the image, salient tokens first (SCOPE, NeurIPS 2025)"),
    "mmtok": ("mmtok:MMTok", "coverage of the question's words and the image (MMTok, ICLR 2026)"),
    "vscan": ("vscan:VScan", "local and global attention in the tower, the rest merged (VScan, TMLR 2026)"),
    "vscan_decoder": ("vscan:VScanDecoder", "most attended in the middle layer ahead (VScan, TMLR 2026, second stage)"),
    "hiprune": ("hiprune:HiPrune", "anchors, their neighbours and what the tower's end sees (HiPrune, AAAI 2026)"),
    "flowcut": ("flowcut:FlowCut", "what flows to CLS, block by block in the tower (FlowCut, NeurIPS 2025)"),
    "gprune": ("gprune:GPrune", "important on a graph of similar tokens (G-Prune, AAAI 2025)"),
    "idpruner": ("idpruner:IDPruner", "importance against likeness, by MMR (IDPruner, without its trained scorer)"),
    "tome": ("tome:ToMe", "similar tokens merge in every block of the tower (ToMe, ICLR 2023)"),
    "lrcp": ("lrcp:LRCP", "what a low-rank picture explains worst, the rest merged (LRCP, 2026)"),
    "todre": ("todre:ToDRE", "least like all kept ones, from a pivot on (ToDRE, 2025, first stage)"),
    "fastervlm": ("fastervlm:FasterVLM", "most attended by the tower's CLS token (FasterVLM, 2024)"),
    "vispruner": ("vispruner:VisPruner", "attended by CLS, and without repetitions (VisPruner, ICCV 2025)"),
    "visionzip": ("visionzip:VisionZip", "attended by CLS, CLS itself, and merged ones (VisionZip, CVPR 2025)"),
    "prumerge": ("prumerge:PruMerge", "outliers of CLS attention, with merges (PruMerge, ICCV 2025)"),
    "prumerge_plus": ("prumerge:PruMergePlus", "the same and an even grid (PruMerge+, ICCV 2025)"),
    "hired": ("hired:HiRED", "a budget for each tile from early CLS attention (HiRED, AAAI 2025)"),
    "globalcom2": ("globalcom2:GlobalCom2", "the whole image steers what stays of its tiles (GlobalCom2, AAAI 2026)"),
    "holov": ("holov:HoloV", "CLS attention within parts of the image, by variety (HoloV, NeurIPS 2025)"),
    "trim": ("clip_text.trim:TRIM", "what CLIP's text tower finds of the question, and a mean (TRIM, COLING 2025)"),
    "cdpruner": (
        "clip_text.cdpruner:CDPruner",
        "a diverse subset weighed by CLIP's text tower (CDPruner, NeurIPS 2025)",
    ),
    "cdpruner_embeds": (
        "clip_text.cdpruner:CDPrunerEmbeds",
        "the same, weighed by the decoder's own embeddings of the question",
    ),
    "vidcom2": ("vidcom2:VidCom2", "what is rare in a video and in its frame (VidCom2, EMNLP 2025)"),
    "dycoke": ("dycoke:DyCoke", "one frame of four, and what is new in the others (DyCoke, CVPR 2025, prefill part)"),
    "flashvid": (
        "flashvid:FlashVID",
        "attended and diverse in each frame, the rest merged (FlashVID, ICLR 2026)",
    ),
    "holitom": (
        "holitom:HoliTom",
        "what stands still merges, of the rest what is attended (HoliTom, NeurIPS 2025)",
    ),
    "holitom_decoder": (
        "holitom:HoliTomDecoder",
        "attended by the last token, others join by halves (HoliTom, second step)",
    ),
    "fastvid": ("fastvid:FastVID", "salient in each frame, and dense ones that sum up (FastVID, NeurIPS 2025)"),
    "framefusion": (
        "framefusion:FrameFusion",
        "what a video repeats merges, then the rest is pruned (FrameFusion, ICCV 2025)",
    ),
    "vtw": ("vtw:VTW", "all visual tokens leave before a layer (VTW, AAAI 2025)"),
    "par": ("par.strategy:Par", "a trained router ranks tokens and layers for each sample (PAR, ICCV 2025)"),
    "skip_layers": ("skip_layers:SkipLayers", "a static list of layers, of their attention or of their MLP"),
    "shortgpt": ("shortgpt:ShortGPT", "the layers that change states least, by a calibration (ShortGPT)"),
    "shortv": ("shortv:ShortV", "visual tokens pass unchanged in calibrated layers (ShortV, ICCV 2025)"),
    "freeze_layers": ("freeze_layers:FreezeLayers", "visual tokens pass listed layers unchanged"),
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
