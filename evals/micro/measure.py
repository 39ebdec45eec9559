"""Measure a checkpoint on the held-out benchmark: dense, blind, and with few tokens at the decoder's door."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from . import attention, prompts
from .benchmark import ITEMS, TASKS, Item
from .packing import IGNORE, Packed, Packer
from .questions import Question
from .read import TOKENS, answer_states
from .see import pixels
from .selections import SELECTIONS, View

PROMPTS = {
    "pope": prompts.word, "mme": prompts.word, "gqa": prompts.word,
    "mmbench_en_dev_static": prompts.mmbench, "scienceqa_img": prompts.scienceqa,
}  # fmt: skip
BATCH = 50


class Judge:
    """A checkpoint in float32 and what it answers; greedy decoding is judged exactly, without generating.

    Greedy decoding gives an answer if and only if every token of it, and the end token after it, is the
    most likely one after the tokens before; one forward over prompt and answer tells.
    """

    def __init__(self, folder: Path) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model.config.text_config._attn_implementation = attention.NAME
        self.model = model.eval()
        self.packer = Packer(AutoTokenizer.from_pretrained(folder))

    @torch.no_grad()
    def view(self, items: list[Item]) -> View:
        core = self.model.model
        images = pixels([shown for shown, _ in items], torch.float32)
        seen = core.vision_tower(images, output_hidden_states=True, output_attentions=True)
        layer = self.model.config.vision_feature_layer
        features = core.multi_modal_projector(seen.hidden_states[layer][:, 1:])
        return View(features, seen.attentions[layer][:, :, 0, 1:].mean(1), [shown for shown, _ in items])

    @torch.no_grad()
    def right(self, view: View, keep: Tensor, asked: list[Question], task: str, layer: int = 0) -> list[bool]:
        """Whether each question (one a picture) is answered exactly right with the tokens ``keep``.

        Before ``layer`` the decoder sees all tokens; at layer 0 the others never enter it.
        """
        rows = [self.packer.row(q, PROMPTS[task](q)) for q in asked]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([i + [self.packer.pad] * (length - len(i)) for i, _ in rows])
        labels = torch.tensor([t + [IGNORE] * (length - len(t)) for _, t in rows])
        packed, cut = Packed(ids, labels, ((1, length),), []), None
        if layer:
            cut, keep = (layer, self._hidden(keep)), torch.arange(TOKENS).expand(len(keep), -1)
        states = answer_states(self.model, view.features, keep, self.packer, packed, cut=cut)
        at = labels != IGNORE
        wrong = torch.zeros_like(at)
        wrong[at] = self.model.lm_head(states[at]).argmax(-1) != labels[at]
        return (~wrong.any(-1)).tolist()

    def _hidden(self, keep: Tensor) -> Tensor:
        """Bool ``[B, prefix]``: the visual tokens that are not in ``keep``."""
        lead = len(self.packer.prefix)
        hidden = torch.ones(len(keep), lead + TOKENS, dtype=torch.bool)
        hidden[:, :lead] = False
        return hidden.scatter(1, keep + lead, False)


def measure(folder: Path, count: int = 600, keeps: Iterable[float] = (0.25, 0.11), tasks: Iterable[str] = TASKS,
            removals: Iterable[int] = range(1, 10)) -> dict[str, dict[str, dict[str, list[bool]]]]:  # fmt: skip
    """``{row: {task: {family: [right, ...]}}}``: dense, blind, every selection at every keep, every removal."""
    judge = Judge(folder)
    table: dict[str, dict[str, dict[str, list[bool]]]] = {}
    for task in tasks:
        items = ITEMS[task](count)
        for begin in range(0, len(items), BATCH):
            part = items[begin : begin + BATCH]
            view, asked = judge.view(part), [q for _, q in part]
            rows = {"dense": torch.arange(TOKENS).expand(len(part), -1)}
            rows["blind"] = rows["dense"][:, :0]
            for keep in keeps:
                number = round(keep * TOKENS)
                rows |= {f"{name} {keep:.0%}": choose(view, number) for name, choose in SELECTIONS.items()}
            cuts = dict.fromkeys(rows, 0) | {f"removed before layer {k}": k for k in removals}
            for name, layer in cuts.items():
                kept = rows.get(name, rows["blind"])
                for q, ok in zip(asked, judge.right(view, kept, asked, task, layer), strict=True):
                    family = f"{q.family}/{q.category}" if task == "pope" else q.family
                    table.setdefault(name, {}).setdefault(task, {}).setdefault(family, []).append(ok)
    return table


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share."""
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * np.sqrt(share * (1 - share) / total + weight / (4 * total))
    return float(middle - half), float(middle + half)
