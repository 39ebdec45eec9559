"""Stage 2, read: the decoder learns to answer from the picture, also when most of its tokens are gone."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from . import attention, drop
from .compose import CHECK_SEEDS, GRID, scene
from .model import WORDS, config, fresh, word_vectors
from .optim import load_masters
from .packing import IGNORE, Packed, Packer
from .pointing import Pointing, Words, pointing_weight
from .see import pixels
from .tokenizer import IMAGE, single_tokens
from .tokenizer import train as train_tokenizer

TOKENS = GRID * GRID
DTYPE = torch.bfloat16


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int, implementation: str) -> LlavaForConditionalGeneration:
    """A fresh model for a tokenizer, with the aligned words' embedding rows in place.

    Queries and keys start equal, so that attention starts as "look where it says the same": a random
    projection keeps similarities. Without it the first few hundred steps learn nothing else.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    cfg = config(len(tokenizer), image, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = fresh(cfg, seed, implementation)
    with torch.no_grad():
        model.get_input_embeddings().weight[single_tokens(tokenizer, WORDS)] = word_vectors()
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


@torch.no_grad()
def keep_only_words(model: LlavaForConditionalGeneration) -> None:
    """Cut from the projector's output all that is not a word vector.

    Stage 1 asks nothing of the other 102 directions, so they hold noise four times as strong as the words.
    """
    words = word_vectors()
    last = model.model.multi_modal_projector.linear_2
    last.weight.copy_(words.T @ (words @ last.weight))
    last.bias.copy_(words.T @ (words @ last.bias))


def answer_states(model: LlavaForConditionalGeneration, features: Tensor, keep: Tensor, packer: Packer,
                  packed: Packed, **kwargs: object) -> Tensor:  # fmt: skip
    """Last hidden states of all question rows, ``[B, sum(count * length), H]``.

    ``features`` are the projected patches ``[B, 144, H]`` and ``keep`` the indices of those that reach the
    decoder, int64 ``[B, K]``; they keep their original positions. ``kwargs`` go to the attention.
    """
    B, lead = len(features), len(packer.prefix)
    embed = model.get_input_embeddings()
    shown = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))
    before = embed(torch.tensor(packer.prefix)).expand(B, -1, -1)
    inputs = torch.cat([before, shown, embed(packed.ids)], 1)
    layout = attention.Layout(lead + keep.shape[1], packed.groups)
    prefix_positions = torch.cat([torch.arange(lead).expand(B, -1), keep + lead], 1)
    states = model.model.language_model(
        inputs_embeds=inputs, position_ids=layout.positions(prefix_positions, lead + TOKENS),
        use_cache=False, layout=layout, **kwargs,
    ).last_hidden_state  # fmt: skip
    return states[:, layout.prefix :]


class Read:
    """The decoder and the projector learn; the tower stays as stage 1 left it."""

    scenes = 8

    def __init__(self, seed: int, seen: dict[str, Tensor]) -> None:
        self.tokenizer = train_tokenizer()
        self.packer = Packer(self.tokenizer)
        self.words = Words(self.tokenizer)
        self.model = new_model(self.tokenizer, seed, attention.NAME)
        load_masters(self.model, seen)
        keep_only_words(self.model)
        self.model.to(DTYPE)
        self.model.model.vision_tower.requires_grad_(False)

    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def features(self, images: Tensor) -> Tensor:
        core = self.model.model
        with torch.no_grad():
            seen = core.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        return core.multi_modal_projector(seen)

    def _mix(self, progress: float) -> tuple[int, int, bool]:
        """Open and multiple-choice questions a scene, and whether the choices are the late, harder mixture.

        Choices wait until single facts can be read.
        """
        for end, mix in ((0.12, (18, 0, False)), (0.35, (14, 6, False)), (0.45, (10, 8, False))):
            if progress < end:
                return mix
        return 6, 12, True

    def _keep(self, rng: np.random.Generator, progress: float) -> Tensor:
        """Half of the steps after the first quarter keep only 8 to 100 % of the tokens, chosen blindly.

        A few of them keep none, so that the blind row of the card is a guess and not an accident.
        """
        count = TOKENS
        if progress > 0.25 and rng.random() < 0.5:
            count = 0 if rng.random() < 0.06 else round(TOKENS * 0.08 ** rng.random())
        pattern = drop.PATTERNS[rng.integers(len(drop.PATTERNS))]
        return torch.from_numpy(drop.kept(rng, self.scenes, count, pattern))

    def loss(self, seeds: Sequence[int], progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seeds[0], 2])
        scenes = [scene(s) for s in seeds]
        packed = self.packer.pack(scenes, rng, *self._mix(progress))
        keep = self._keep(rng, progress)
        weight = pointing_weight(progress)
        pointing = Pointing(self.words, scenes, keep, packed, len(self.packer.prefix)) if weight else None
        logits, targets, _ = self._answers(self.features(pixels(scenes, DTYPE)), keep, packed, pointing)
        loss = F.cross_entropy(logits.float(), targets)
        right = (logits.argmax(-1) == targets)[targets != self.tokenizer.eos_token_id]
        metrics = {"answer_loss": loss.item(), "right": right.float().mean().item(), "kept": keep.shape[1] / TOKENS}
        if pointing is not None:
            metrics["pointing"] = pointing.loss().item()
            loss = loss + weight * pointing.loss()
        return loss, metrics

    def _answers(
        self, features: Tensor, keep: Tensor, packed: Packed, watch: attention.Watcher | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[A, vocabulary]`` and targets ``[A]`` of all answer tokens, and where they stand."""
        states = answer_states(self.model, features, keep, self.packer, packed, watch=watch)
        at = packed.labels != IGNORE
        return self.model.lm_head(states[at]), packed.labels[at], at

    @torch.no_grad()
    def evaluate(self, scenes: int = 64) -> dict[str, float]:
        """Share of wholly right answers by family with all tokens, and over all with 11 % and none."""
        table: dict[str, list[bool]] = {}
        for begin in range(0, scenes, self.scenes):
            rng = np.random.default_rng([begin, 3])
            shown = [scene(CHECK_SEEDS + begin + i) for i in range(self.scenes)]
            packed = self.packer.pack(shown, rng, 18, 10)
            features = self.features(pixels(shown, DTYPE))
            for name, count in (("", TOKENS), ("keep11", round(0.11 * TOKENS)), ("blind", 0)):
                keep = torch.from_numpy(drop.kept(rng, self.scenes, count, "random"))
                judged = self._judge(features, keep, packed)
                for family, right in zip(itertools.chain(*packed.families), judged, strict=True):
                    table.setdefault(name or family, []).append(right)
        return {k: float(np.mean(v)) for k, v in sorted(table.items())}

    def _judge(self, features: Tensor, keep: Tensor, packed: Packed) -> list[bool]:
        logits, targets, at = self._answers(features, keep, packed)
        wrong = torch.zeros_like(packed.ids, dtype=torch.bool)
        wrong[at] = logits.argmax(-1) != targets
        sizes = [count * length for count, length in packed.groups]
        parts = wrong.split(sizes, 1)
        groups = zip(parts, packed.groups, strict=True)
        rows = torch.cat([p.view(len(p), count, length).any(-1) for p, (count, length) in groups], 1)
        return (~rows).flatten().tolist()
