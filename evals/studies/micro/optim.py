"""AdamW over float32 masters while the model computes in bfloat16, averaged over processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration


class Masters:
    """Holds float32 copies of the trained parameters and steps them; the model keeps bfloat16 working copies.

    bfloat16 matrix products are 4 to 6 times as fast as float32 ones on the CPUs this is trained on, and
    the masters keep small updates from being rounded away.
    """

    def __init__(
        self, named: dict[str, nn.Parameter], weight_decay: float, betas: tuple[float, float],
        slow: Callable[[str], bool] = lambda name: False,
    ) -> None:  # fmt: skip
        self.names = list(named)
        self.working = list(named.values())
        self.masters = [p.detach().float().clone() for p in self.working]
        groups = []
        for decayed, gentle in itertools.product((True, False), (True, False)):
            chosen = [m for n, m in self.weights().items() if (m.ndim >= 2) == decayed and slow(n) == gentle]
            if chosen:
                groups.append({"params": chosen, "weight_decay": weight_decay * decayed, "slow": gentle})
        self.adam = torch.optim.AdamW(groups, betas=betas, fused=True)
        self.flat = torch.zeros(sum(m.numel() for m in self.masters))

    def step(self, lr: float, pace: float = 1.0, clip: float = 1.0) -> float:
        """Average the gradients over processes, clip, step, refresh the working copies; returns the norm.

        The `slow` parameters take `pace` times the rate.
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.working]
        torch.cat([g.float().reshape(-1) for g in grads], out=self.flat)
        if dist.is_initialized():
            dist.all_reduce(self.flat)
            self.flat /= dist.get_world_size()
        norm = self.flat.norm().item()
        self.flat *= min(1.0, clip / (norm + 1e-6))
        for master, grad in zip(self.masters, self.flat.split([m.numel() for m in self.masters]), strict=True):
            master.grad = grad.view_as(master)
        for group in self.adam.param_groups:
            group["lr"] = lr * (pace if group["slow"] else 1.0)
        self.adam.step()
        self.refresh()
        for p in self.working:
            p.grad = None
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        for p, master in zip(self.working, self.masters, strict=True):
            p.copy_(master)

    def weights(self) -> dict[str, Tensor]:
        """The float32 masters by parameter name."""
        return dict(zip(self.names, self.masters, strict=True))

    def save(self, path: Path) -> None:
        tensors = {f"master.{n}": m for n, m in self.weights().items()}
        for name, master in self.weights().items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)

    def load(self, path: Path) -> None:
        """Resume: masters and optimizer state. Parameters the file lacks keep their initial values."""
        tensors = load_file(path)
        for name, master in self.weights().items():
            if f"master.{name}" not in tensors:
                continue
            master.copy_(tensors[f"master.{name}"])
            keys = ("exp_avg", "exp_avg_sq", "step")
            if f"exp_avg.{name}" in tensors:
                self.adam.state[master] = {key: tensors[f"{key}.{name}"] for key in keys}
        self.refresh()


def schedule(progress: float, peak: float, warmup: float = 0.025, decay: float = 0.2) -> float:
    """Trapezoid learning rate for a progress in 0..1: short warm-up, plateau, linear decay to 2 %."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    if progress < 1 - decay:
        return peak
    return peak * max(0.02, (1 - progress) / decay)


def load_masters(model: LlavaForConditionalGeneration, tensors: dict[str, Tensor]) -> None:
    """Put the saved float32 masters of a stage into a model; other entries of the file are ignored."""
    masters = {k.removeprefix("master."): v for k, v in tensors.items() if k.startswith("master.")}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in masters.items():
            if name in parameters:
                parameters[name].copy_(value)
