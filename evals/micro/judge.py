"""A checkpoint in float32 and what it answers, with tokens removed or layers skipped anywhere, without the engine.

Greedy decoding gives an answer if and only if every token of it, and the end token after it, is the most likely
one after the tokens before; one forward over prompt and answer tells. Kept apart from prunekit's own forwards on
purpose: the card vouches for the model, whatever happens to a strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from prunekit_evals.micro import attention, prompts
from prunekit_evals.micro.benchmark import Item
from prunekit_evals.micro.compose import TOKENS
from prunekit_evals.micro.packing import IGNORE, Packer, pixels
from prunekit_evals.micro.questions import Question
from prunekit_evals.micro.selections import View
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration


@dataclass(frozen=True)
class Trace:
    """A dense forward of one question an image.

    states: before each layer and after the last, float `[B, lead + 144 + L, H]`. positions: int64, the same without
    H. labels: int64 `[B, L]`. last, text: for each layer, what the last prompt token and the mean of the
    question's tokens attend to among the visual tokens, mean over heads, float `[B, 144]`.
    """

    states: list[Tensor]
    positions: Tensor
    labels: Tensor
    last: list[Tensor]
    text: list[Tensor]


class Judge:
    """Loads a folder; raises what `from_pretrained` raises where it is no checkpoint."""

    def __init__(self, folder: Path) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model.config.text_config._attn_implementation = attention.NAME
        self.model = model.eval()
        self.packer = Packer(AutoTokenizer.from_pretrained(folder))
        self.lead = len(self.packer.prefix)
        self.layers = len(model.model.language_model.layers)

    @torch.no_grad()
    def view(self, items: Sequence[Item]) -> View:
        core = self.model.model
        images = pixels([shown for shown, _ in items], torch.float32)
        seen = core.vision_tower(images, output_hidden_states=True, output_attentions=True)
        layer = self.model.config.vision_feature_layer
        features = core.multi_modal_projector(seen.hidden_states[layer][:, 1:])
        return View(features, seen.attentions[layer][:, :, 0, 1:].mean(1), [shown for shown, _ in items])

    def _rows(self, asked: Sequence[Question], task: str) -> tuple[Tensor, Tensor]:
        rows = [self.packer.row(q, prompts.BY_TASK[task](q)) for q in asked]
        length = max(len(ids) for ids, _ in rows)
        ids = [i + [self.packer.pad] * (length - len(i)) for i, _ in rows]
        return torch.tensor(ids), torch.tensor([t + [IGNORE] * (length - len(t)) for _, t in rows])

    @torch.no_grad()
    def trace(self, view: View, asked: Sequence[Question], task: str) -> Trace:
        """The dense forward."""
        ids, labels = self._rows(asked, task)
        B, L = ids.shape
        embed = self.model.get_input_embeddings()
        states = [torch.cat([embed(torch.tensor(self.packer.prefix)).expand(B, -1, -1), view.features, embed(ids)], 1)]
        positions = torch.arange(states[0].shape[1]).expand(B, -1)
        layout = attention.Layout(self.lead + TOKENS, ((1, L),))
        ends = (labels != IGNORE).int().argmax(-1)
        asking = (torch.arange(L) <= ends[:, None]).float() / (ends[:, None] + 1)
        last, text = [], []

        def observe(layer: int, group: int, seen: Tensor) -> None:
            rows = seen[..., self.lead :].mean(1)
            last.append(rows[torch.arange(B), ends])
            text.append((rows * asking[..., None]).sum(1))

        for layer in range(self.layers):
            states.append(self._run(states[-1], positions, layout, [layer], observe))
        return Trace(states, positions, labels, last, text)

    def _run(self, states: Tensor, positions: Tensor, layout: attention.Layout, layers: Sequence[int],
             observe: attention.AttentionObserver | None = None) -> Tensor:  # fmt: skip
        decoder = self.model.model.language_model
        places = decoder.rotary_emb(states, positions)
        for layer in layers:
            out = decoder.layers[layer](
                states, attention_mask=None, position_ids=positions, position_embeddings=places, layout=layout,
                observe=observe,
            )  # fmt: skip
            states = out if isinstance(out, Tensor) else out[0]
        return states

    @torch.no_grad()
    def right(self, trace: Trace, layer: int = 0, keep: Tensor | None = None, skip: Sequence[int] = ()) -> list[bool]:
        """Whether each question is answered exactly right.

        From `layer` on only the visual tokens `keep` (sorted int64 `[B, K]`; None: all) are there, at their
        original positions, and the layers `skip` are left out.
        """
        first = min([layer, *skip]) if keep is None else layer
        states, positions = trace.states[first], trace.positions
        prefix = self.lead + TOKENS
        if keep is not None:
            first = layer
            places = torch.arange(states.shape[1]).expand(len(states), -1)
            index = torch.cat([places[:, : self.lead], keep + self.lead, places[:, prefix:]], 1)
            states = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
            positions, prefix = positions.gather(1, index), self.lead + keep.shape[1]
        layout = attention.Layout(prefix, ((1, trace.labels.shape[1]),))
        layers = [i for i in range(first, self.layers) if i not in skip]
        out = self.model.model.language_model.norm(self._run(states, positions, layout, layers)[:, prefix:])
        at = trace.labels != IGNORE
        wrong = torch.zeros_like(at)
        wrong[at] = self.model.lm_head(out[at]).argmax(-1) != trace.labels[at]
        return (~wrong.any(-1)).tolist()
