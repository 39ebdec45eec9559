"""Tries every image-text-to-text type of the installed transformers, and puts what it saw into docs/families.md.

    python tests/families_table.py                  # all types; `make families` does this
    python tests/families_table.py ovis2 molmo2     # only these; the others stay as they were in the file
    python tests/families_table.py --resume         # those that were not tried yet with these versions and this code

Each type is tried in a process of its own, with a time limit: its default config makes a model on the meta device,
which is recognised, and proved on its tiny twin. Exit code 1 if one crashed, ran out of time, was not exact, or raised
what is no refusal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "families_table.json", HERE.parent / "docs" / "families.md"
BLOCK = re.compile(r"(<!-- types: begin -->\n).*?(<!-- types: end -->)", re.S)
LIMIT = 900


def _lettered(number: int) -> str:
    """A number as Chameleon spells the words of its codebook."""
    return "".join("ABCDEFGHIJ"[int(digit)] for digit in str(number))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GLM = {"rope_parameters": ROPE | {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}}
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 364, "patch_size": 14,
}  # fmt: skip
# A tower of timm, which these tests do without, is replaced by one of transformers.
RESNET = {"model_type": "resnet", "hidden_sizes": [16, 32, 64, 64], "hidden_size": 64}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
    "image_size": 448, "patch_size": 14, "model_args": {"embed_dim": 64},
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 512,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# Numbers that default configs leave out, or contradict themselves in, as published checkpoints have them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": SIGLIP},
    "blip-2": {"image_token_index": 50265},
    "chameleon": {"vocabulary_map": {"<image>": 8711} | {f"IMGIMG{_lettered(n)}Z": 4 + n for n in range(8192)}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}},
    "deepseek_ocr2": {
        "text_config": {
            "num_hidden_layers": 12, "mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_experts_per_tok": 6,
            "n_routed_experts": 64, "n_group": 1, "topk_group": 1,
        }
    },
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "emu3": {
        "vocabulary_map": {"<image>": 151851, "<|extra_200|>": 151846}
        | {f"<|visual token {n:06d}|>": 151854 + n for n in range(32768)}
    },
    "fast_vlm": {"vision_config": RESNET},
    "gemma3n": {"vision_config": RESNET | {"hidden_size": 2048, "vocab_size": 128, "vocab_offset": 262144}},
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "glm46v": {"text_config": GLM},
    "glm4v": {"text_config": GLM},
    "glm4v_moe": {"text_config": GLM | {"head_dim": 128}},
    "glmga": {"text_config": GLM},
    "granite4_vision": {
        "vision_config": SIGLIP | {"image_size": 384, "patch_size": 16}, "downsample_rate": "4/8",
        "vision_feature_select_strategy": "full", "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768]],
        "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]],
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 128, "num_key_value_heads": 8, "rope_parameters": ROPE | {"mrope_section": [16, 16, 16, 16]},
        }
    },
    "instructblip": {"image_token_index": 50265},
    "nemotron_h_omni": {"image_token_id": 18},
    "perception_lm": {"vision_config": CLIP, "projector_pooling_ratio": 2},
    "llama4": {"vision_config": {"hidden_size": 1408, "vision_output_dim": 4096}},
    "minicpmv4_6": {"image_token_id": 248056, "video_token_id": 248057},
    "minicpmv4_7": {"image_token_id": 248056, "video_token_id": 248057},
    "minicpm_ocr": {"image_token_id": 248056, "video_token_id": 248057},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652, "audio_start_token_id": 151647},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 151652, "audio_start_token_id": 151669, "text_config": {"head_dim": 128},
    },
    "qwen4_exp": {"text_config": INDEXER},
    "step3p7": {"text_config": {"sliding_window": 512}},
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of one type. how: `file NAME`, `generic`, `refused`, `no model` or `failed`. error: the largest of
    the proof, None without one. sites, reason: in words. seconds: that it took.
    """

    type: str
    how: str
    sites: str = ""
    error: float | None = None
    reason: str = ""
    seconds: float = 0.0


def types() -> list[str]:
    """Every type that the installed transformers calls image-text-to-text."""
    return sorted(_classes())


def _classes() -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    return dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def skeleton(kind: str) -> Any:
    """A model of this type on the meta device, from its default config."""
    import torch
    import transformers

    config = transformers.CONFIG_MAPPING[kind](**PUBLISHED.get(kind, {}))
    with torch.device("meta"):
        return getattr(transformers, _classes()[kind])._from_config(config)


def tried(kind: str) -> Result:
    """Recognise and prove one type."""
    from prunekit.errors import Unsupported
    from prunekit.families import family_of
    from prunekit.verify.proof import prove, proved_parts

    try:
        model = skeleton(kind)
    except Exception as error:
        return Result(kind, "no model", reason=f"its default config makes no model: {_brief(error)}")
    try:
        family = family_of(model)
        parts = proved_parts(model)
        proof = prove(model)
    except Unsupported as refusal:
        return Result(kind, "refused", reason=_reason(str(refusal)))
    how = f"file `{family.name}`" if family else "generic"
    faults = [f"{case.name}: {case.fault}" for case in proof.cases if case.fault]
    if faults:
        return Result(kind, "failed", reason=f"{how}: {faults[0]}")
    return Result(
        kind,
        how,
        sites=_sites(parts, family is not None or proof.observed.coords),
        error=max(case.error or 0.0 for case in proof.cases),
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _reason(refusal: str) -> str:
    """The sentence of a refusal that says what is lacking."""
    inside = re.search(r"can be pruned without one: (.*)\. What has a file", refusal, re.S)
    return (inside[1] if inside else refusal).replace("\n", " ")[:400]


def _sites(parts: Any, coords: bool) -> str:
    decoder = ["all of the decoder", *(["no `N.mid`"] if parts.mlp_norm is None else [])]
    if parts.opaque is not None:
        decoder = [f"encoder only ({parts.opaque.replace('|', '/')})"]
    tower = ["`vision.N`"] if parts.tower is not None else []
    return ", ".join([*decoder, *tower, "coords" if coords else "no coords"])


def _child(kind: str, pipe: Any) -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    begin = time.monotonic()
    try:
        result = tried(kind)
    except BaseException as error:
        traceback.print_exc()
        result = Result(kind, "failed", reason=f"raised {_brief(error)}")  # type: ignore[arg-type]
    pipe.send(asdict(result) | {"seconds": round(time.monotonic() - begin, 1)})


def apart(kind: str) -> Result:
    """As `tried`, in a process of its own that may crash, and may take so long."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_child, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(LIMIT) else None
    except EOFError:
        answer = {"type": kind, "how": "failed", "reason": "the process that tried it died"}
    if answer is None:
        process.kill()
        answer = {"type": kind, "how": "failed", "reason": f"took more than {LIMIT} seconds"}
    process.join()
    return Result(**answer)


def stored() -> dict[str, Any]:
    """What is in the file: versions, and results by type."""
    data: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return data or {"transformers": "", "torch": "", "types": {}}


def keep(results: dict[str, Result]) -> None:
    """Write the file and the page."""
    data = {**versions(), "types": {kind: asdict(results[kind]) for kind in sorted(results)}}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    written = "\n".join(table(results, data["transformers"]))
    PAGE.write_text(BLOCK.sub(lambda match: f"{match[1]}{written}\n{match[2]}", page), encoding="utf-8")


def versions() -> dict[str, str]:
    """Of what the types are tried with."""
    import torch
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}


def table(results: dict[str, Result], version: str) -> Iterator[str]:
    """Markdown: those that are pruned, then those that are not, with the reason."""
    exact = [one for one in results.values() if one.error is not None]
    rest = [one for one in results.values() if one.error is None]
    unmade = sum(one.how == "no model" for one in rest)
    worst = max((one.error or 0.0 for one in exact), default=0.0)
    files = sum(one.how.startswith("file") for one in exact)
    yield (
        f"transformers {version}: {len(results)} types, of which {len(exact)} are pruned exactly, {files} with a file "
        f"and {len(exact) - files} by proof; largest error in float64 {worst:.0e}. {len(rest) - unmade} are refused"
        + (f"; of {unmade} no model can be made here." if unmade else ".")
    )
    yield from ("", "| type | how | sites | largest error |", "| --- | --- | --- | ---: |")
    yield from (f"| `{one.type}` | {one.how} | {one.sites} | {one.error:.0e} |" for one in exact)
    yield from ("", "| type | not pruned, because |", "| --- | --- |")
    yield from (f"| `{one.type}` | {one.reason.replace('|', '/')} |" for one in rest)


def main() -> int:
    """Try, write after each type, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="which; all if none is named")
    parser.add_argument("--resume", action="store_true", help="only those that are not in the file with these versions")
    parser.add_argument("--processes", type=int, default=1, help="how many at once")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    before = stored()
    same = all(before[name] == value for name, value in versions().items())
    every = types()
    results = {kind: Result(**one) for kind, one in before["types"].items() if kind in every and same}
    wanted = options.types or [kind for kind in every if not (options.resume and kind in results)]
    failed = False
    with ThreadPoolExecutor(options.processes) as pool:
        for one in pool.map(apart, wanted):
            said = f"exact to {one.error:.0e}" if one.error is not None else one.reason
            print(f"{one.type}: {one.how}: {said} ({one.seconds:.0f} s)", flush=True)
            results[one.type] = one
            failed |= one.how == "failed"
            keep(results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
