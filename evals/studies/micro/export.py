"""Write a trained run as an ordinary checkpoint: `python -m prunekit_evals.studies.micro.export --run runs/micro`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from prunekit_evals.micro import model_path
from prunekit_evals.micro.compose import IMAGE_SIZE, PATCH_SIZE
from prunekit_evals.studies.micro.optim import load_masters
from prunekit_evals.studies.micro.read import new_model
from prunekit_evals.studies.micro.tokenizer import IMAGE
from prunekit_evals.studies.micro.tokenizer import train as train_tokenizer
from prunekit_evals.studies.micro.train import STAGES, missing
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else ' ' if message['role'] == 'system' else ' ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def processor() -> LlavaProcessor:
    """Tokenizer and image processor; images of any size are scaled and cropped to 168 x 168."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=train_tokenizer(), patch_size=PATCH_SIZE, chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default", image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


def trained_model(run: Path) -> LlavaForConditionalGeneration:
    """The model of a run in float32: each stage goes over what the ones before it have left."""
    model = new_model(train_tokenizer(), 0, "sdpa")
    for stage in STAGES:
        load_masters(model, load_file(run / f"{stage}.safetensors"))
    return model.eval()


def export(run: Path, out: Path) -> None:
    """Save model (float16), tokenizer, processor and generation settings into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model, parts = trained_model(run).to(torch.float16), processor()
    ids = parts.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id, do_sample=False
    )
    model.save_pretrained(out)
    parts.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors files start private; the folder is shipped as package data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/micro"))
    parser.add_argument("--out", type=Path, default=model_path())
    args = parser.parse_args()
    if lacking := missing(args.run):
        parser.error(
            f"'{args.run}' is no finished run, it lacks {', '.join(lacking)}; train it, or name another by --run"
        )
    export(args.run, args.out)
    total = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
