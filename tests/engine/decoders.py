"""A LLaVA around the decoder of every causal language model of transformers: pruned exactly, or refused with a reason.

PRUNEKIT_DECODERS=decoders.jsonl python -m pytest -m slow tests/engine/test_decoders.py
python tests/engine/decoders.py decoders.jsonl       # puts them into docs/families.md
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- decoders: begin -->", "<!-- decoders: end -->"
# What LVLMs of transformers have as a decoder, without a causal language model of its own.
MORE = ("mistral4",)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
}  # fmt: skip
# Numbers without which a config of transformers' defaults makes no model, or none in which its specials show.
NUMBERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, **LATENT},
    "hunyuan_v1_dense": {"head_dim": 64, "rope_parameters": ROPE},
    "hunyuan_v1_moe": {"head_dim": 64, "rope_parameters": ROPE, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 64, "rope_parameters": ROPE},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "ministral3": {"rope_parameters": YARN},
    "mistral4": {"rope_parameters": YARN},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Of one type of decoder. status: `exact`, `refused`, or `none`: transformers makes no LLaVA of it.

    reason: why it is refused. error: the largest of a logit. inside: tokens can leave between attention and MLP.
    """

    kind: str
    status: str
    reason: str = ""
    error: float = 0.0
    inside: bool = True


def kinds() -> list[str]:
    """All types; LVLMs and the like, whose decoder is a type of its own, left out."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    composite = {"text_config", "decoder", "decoder_config", "audio_config", "patcher_config", "language_config"}
    every = [*names, *(one for one in MORE if one in CONFIG_MAPPING)]
    return [name for name in every if not composite & set(CONFIG_MAPPING[name].sub_configs)]


def llava(kind: str) -> Any:
    """The config of a LLaVA with a small tower and this decoder, as large as its config's defaults are."""
    from transformers import CONFIG_MAPPING, LlavaConfig

    from prunekit.testing.tiny_configs import vision
    from prunekit.verify.tiny_models import IMAGE

    make: Any = LlavaConfig
    text = CONFIG_MAPPING[kind](**NUMBERS.get(kind, {}))
    text.tie_word_embeddings = False
    return make(
        text_config=text, vision_config=vision("clip_vision_model", projection_dim=24), image_token_id=IMAGE,
        image_seq_length=16, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip


def on_meta(config: Any) -> Any:
    """The model of a config without weights; None where transformers itself makes none."""
    import torch
    from transformers import AutoModelForImageTextToText

    make: Any = AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            return make.from_config(config, attn_implementation="eager")
    except Exception:
        return None


def verdict(kind: str) -> Verdict:
    """What is recognised, and what the proof says of it."""
    from prunekit.errors import Unsupported
    from prunekit.verify.proof import prove, proved_parts

    try:
        model = on_meta(llava(kind))
    except Exception:  # numbers that only a real config has
        model = None
    if model is None:
        return Verdict(kind, "none")
    try:
        proved_parts(model)
        proof = prove(model)
    except Unsupported as refusal:
        return Verdict(kind, "refused", str(refusal))
    faults = [f"{case.name}: {case.fault}" for case in proof.cases if case.fault is not None]
    if faults:
        return Verdict(kind, "refused", "; ".join(faults))
    inside = any("between" in case.name for case in proof.cases)
    return Verdict(kind, "exact", "", max(case.error or 0.0 for case in proof.cases), inside)


def table(verdicts: list[Verdict], version: str) -> str:
    """Markdown: what happens, and to which types."""
    exact = [one for one in verdicts if one.status == "exact"]
    refused = defaultdict(list)
    for one in verdicts:
        if one.status == "refused":
            refused[short(one.reason)].append(one.kind)
    worst = max(one.error for one in exact)
    rows = [("pruned exactly", [one.kind for one in exact if one.inside])]
    rows.append(("the same, but not between attention and MLP", [one.kind for one in exact if not one.inside]))
    rows += [(f"refused: {reason}", names) for reason, names in sorted(refused.items(), key=lambda row: -len(row[1]))]
    left = len(verdicts) - len(exact) - sum(map(len, refused.values()))
    return "\n".join([
        f"Of {len(verdicts)} causal language models of transformers {version}, {len(exact)} are pruned exactly "
        f"(largest error of a logit {worst:.0e}) and {sum(map(len, refused.values()))} refused; of {left} there is no "
        "LLaVA.",
        "",
        "| decoder | types |",
        "| --- | --- |",
        *(f"| {what} | {', '.join(f'`{name}`' for name in names)} |" for what, names in rows),
    ])  # fmt: skip


def short(reason: str) -> str:
    """A refusal without what it says of this model alone."""
    reason = re.sub(r"^the decoder \w+ (is not supported: )?", lambda found: "" if found[1] else "it ", reason)
    reason = re.sub(r"^(the tiny twin of )?LlavaForConditionalGeneration (?=runs|does)", "it ", reason)
    return re.sub(r"^\w+Config has experts", "it has experts", reason).replace("|", "/")


def main(path: str) -> None:
    """Write the table into the page."""
    import transformers

    verdicts = [Verdict(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if missing := set(kinds()) ^ {one.kind for one in verdicts}:
        raise SystemExit(f"{len(missing)} types are missing or unknown: {', '.join(sorted(missing))}")
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    made = table(sorted(verdicts, key=lambda one: one.kind), transformers.__version__)
    DOCS.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"{len(verdicts)} types into {DOCS.name}")


def line(one: Verdict) -> str:
    """One line of the file that `main` reads."""
    return json.dumps(asdict(one)) + "\n"


if __name__ == "__main__":
    main(sys.argv[1])
