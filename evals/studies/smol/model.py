"""The model in training: vision, decoder and the heads of `see`, with what is saved of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from prunekit_evals.smol import base
from prunekit_evals.studies.smol.decoder import SCALE, WHOLE, Cut, Decoder, Groups, Merged
from prunekit_evals.studies.smol.see import SeeLoss
from prunekit_evals.studies.smol.tower import Vision
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn


@dataclass(frozen=True)
class Asked:
    """Rows on the device: ids, labels int64 `[B, S]`; groups as in `decoder`."""

    ids: Tensor
    labels: Tensor
    groups: Groups

    @property
    def answers(self) -> Tensor:
        """Where an answer's token is predicted, bool `[B, S]`."""
        return self.labels >= 0


class Smol(nn.Module):
    """Everything that is trained, in float32; arithmetic in bfloat16 on a GPU and in float32 elsewhere."""

    def __init__(self, weights: dict[str, np.ndarray], tokenizer: Tokenizer, lead: list[int], seed: int, device: str):
        super().__init__()
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.decoder = Decoder(weights, self.dtype, seed)
        embed = torch.from_numpy(weights["embed_tokens.weight"])
        self.see = SeeLoss(embed, tokenizer)
        self.vision = Vision(seed, self.see.target.middle)
        self.to(self.device)
        self.lead = torch.tensor(lead, device=self.device)

    def mixed(self) -> AbstractContextManager[None]:
        """Where the tower computes: autocast on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype != torch.float32)

    def answers(self, merged: Merged, visual: Tensor | None, asked: Asked, cut: Cut = WHOLE) -> Tensor:
        """Float logits `[N, 49152]` where answers are predicted, in the order of `asked.labels[asked.answers]`."""
        states, _ = self.decoder(merged, self.lead, visual, asked.ids, asked.groups, cut)
        return self.decoder.logits(states[asked.answers])

    def ship(self, path: Path, adapters: bool = True) -> None:
        """What training changed, in float16: tower, projector, and `W + b a` for each adapter of every layer."""
        tensors = dict(self.vision.named_parameters())
        for kind, a in self.decoder.a.items() if adapters else ():
            tensors[f"adapters.{kind}.a"], tensors[f"adapters.{kind}.b"] = a, SCALE * self.decoder.b[kind]
        save_file({k: v.detach().to("cpu", torch.float16).contiguous() for k, v in tensors.items()}, path)


def load_base(gguf: Path | None) -> tuple[dict[str, np.ndarray], Tokenizer]:
    """Base weights and tokenizer of a file, or of the installed package; raises where it is not the known one."""
    file = gguf or base.locate()
    base.check(file)
    return base.read(file)
