"""Stage 2, read: the decoder learns to answer from the image, also when tokens or a layer are gone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from prunekit_evals.micro import attention, drop, foreign
from prunekit_evals.micro.compose import CHECK_SEEDS, TOKENS, Scene, scene
from prunekit_evals.micro.packing import IGNORE, Packed, Packer, pixels
from prunekit_evals.studies.micro import depth, naming
from prunekit_evals.studies.micro.model import LAYERS, SEEING, WORDS, config, fresh, word_vectors
from prunekit_evals.studies.micro.optim import load_masters
from prunekit_evals.studies.micro.pointing import Pointing, Words, scaffold
from prunekit_evals.studies.micro.see import Recorder, SeeLoss, shown
from prunekit_evals.studies.micro.tokenizer import IMAGE, single_tokens
from prunekit_evals.studies.micro.tokenizer import train as train_tokenizer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

DTYPE = torch.bfloat16
HELD = 0.05  # weight of the later visual states' distance to their words, and of the text states' length
LENGTH = 4.0  # length of a text state beyond which it adds to the loss
QUIET = 0.2  # initial scale of what the layers after SEEING add to a state whose words have length 1
LATE = 0.4  # progress from which the questions of one fact are the harder ones
# Questions of one fact, of several hops, with choices for a scene, up to that progress: facts come first.
MIX = ((0.08, (16, 0, 0)), (0.2, (11, 3, 3)), (1.1, (8, 5, 5)))
FOREIGN_EVERY = 14  # steps, after the first twelfth
DROP = ((0.2, 0.25), (0.6, 0.4))  # share of the steps that drop tokens, from that progress on
SLOW = 0.3  # what sees learns at that share of the rate


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
        for number, layer in enumerate(model.model.language_model.layers):
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
            if number >= SEEING:
                layer.self_attn.o_proj.weight.mul_(QUIET)
                layer.mlp.down_proj.weight.mul_(QUIET)
    return model


@dataclass(frozen=True)
class Cut:
    """Which visual tokens are kept, sorted int64 `[B, K]`, from decoder layer `layer` on (0: the decoder input)."""

    layer: int
    keep: Tensor

    def hidden(self, lead: int) -> Tensor:
        """Bool `[B, lead + 144]`: the visual tokens of a whole prefix that are not kept."""
        hidden = torch.ones(len(self.keep), lead + TOKENS, dtype=torch.bool)
        hidden[:, :lead] = False
        return hidden.scatter(1, self.keep + lead, False)


def everything(batch: int) -> Cut:
    return Cut(0, torch.arange(TOKENS).expand(batch, -1))


def answer_states(model: LlavaForConditionalGeneration, features: Tensor, visible: Cut, packer: Packer,
                  packed: Packed, **kwargs: object) -> Tensor:  # fmt: skip
    """Last hidden states of all question rows, `[B, sum(count * length), H]`.

    `features` are the projected patches `[B, 144, H]`; kept ones stay at their original positions.
    `kwargs` go to the attention.
    """
    B, lead = len(features), len(packer.prefix)
    keep = visible.keep
    if visible.layer:
        kwargs, keep = kwargs | {"cut": (visible.layer, visible.hidden(lead))}, everything(B).keep
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
    """Everything learns; the losses of stage 1 fade out. `recorded`: the first layer whose input is kept."""

    scenes, recorded = 8, SEEING

    def __init__(self, seed: int, seen: dict[str, Tensor]) -> None:
        self.tokenizer = train_tokenizer()
        self.packer = Packer(self.tokenizer)
        self.words = Words(self.tokenizer)
        self.model = new_model(self.tokenizer, seed, attention.NAME)
        load_masters(self.model, seen)
        self.model.to(DTYPE)
        self.recorder, self.see = Recorder(self.model, self.recorded), SeeLoss()

    def trained(self) -> dict[str, nn.Parameter]:
        """All but the tower's last layer, which nothing in the answer depends on."""
        last = f"vision_tower.encoder.layers.{self.model.config.vision_config.num_hidden_layers - 1}."
        return {n: p for n, p in self.model.named_parameters() if last not in n and "post_layernorm" not in n}

    def slow(self, name: str) -> bool:
        """What stage 1 has taught to see: at the full rate it blurs."""
        seeing = [f"language_model.layers.{i}." for i in range(SEEING)]
        return any(part in name for part in ("vision_tower", "multi_modal_projector", *seeing))

    def pace(self, progress: float) -> float:
        return SLOW

    def age(self, progress: float) -> float:
        """How far it is, 0 to 1, with what it asks, drops and leaves out; the rate follows `progress` itself."""
        return progress

    def features(self, images: Tensor) -> Tensor:
        core = self.model.model
        return core.multi_modal_projector(core.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:])

    def _cut(self, rng: np.random.Generator, progress: float) -> Cut:
        """A share of the steps after the first fifth keep only 8 to 100 % of the tokens, chosen blindly.

        From which layer on is drawn as well, at the decoder input or inside. A few of them keep none, so that the blind
        row of the card is a guess and not an accident.
        """
        share = max((start, share) for start, share in ((0.0, 0.0), *DROP) if progress >= start)[1]
        if rng.random() >= share:
            return everything(self.scenes)
        layer = int(rng.integers(LAYERS - 1))
        count = round(TOKENS * 0.08 ** rng.random())
        if rng.random() < 0.06:
            layer, count = 0, 0
        pattern = drop.PATTERNS[rng.integers(len(drop.PATTERNS))]
        return Cut(layer, torch.from_numpy(drop.kept(rng, self.scenes, count, pattern)))

    def loss(self, seeds: Sequence[int], progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seeds[0], 2])
        weight, progress = scaffold(progress), self.age(progress)
        if progress > 1 / 12 and seeds[0] // self.scenes % FOREIGN_EVERY == 0:
            return self._foreign(rng)
        scenes = [scene(s) for s in seeds]
        packed = self.packer.pack(scenes, rng, *next(mix for end, mix in MIX if progress < end), late=progress >= LATE)
        cut = self._cut(rng, progress)
        pointing = (
            Pointing(self.words, scenes, cut.keep, packed, len(self.packer.prefix)) if scaffold(progress) else None
        )
        if pointing is not None and cut.layer:
            cut = Cut(0, cut.keep)  # the scaffold needs tokens that are present from layer 0 on
        features = self.features(pixels(scenes, DTYPE))
        skipped = depth.drawn(rng, progress, LAYERS)
        with depth.without(self.model, skipped):
            logits, targets, _ = self._answers(features, cut, packed, pointing)
        loss = F.cross_entropy(logits.float(), targets)
        metrics = {"answer_loss": loss.item()} | self._right(logits, targets)
        auxiliary = self.auxiliary(scenes, packed, cut, pointing)
        metrics |= {name: value.item() for name, value in auxiliary.items()}
        loss = loss + weight * sum(auxiliary.values(), torch.zeros(()))
        return self._with_seeing(loss, metrics, scenes, features, cut, skipped, packed, progress)

    def auxiliary(self, scenes: list[Scene], packed: Packed, cut: Cut, pointing: Pointing | None) -> dict[str, Tensor]:
        """Auxiliary losses by name, as long as there is a scaffold; `pointing` has seen this forward's attention."""
        if pointing is None:
            return {}
        wanted = naming.targets(self.words, scenes, packed)
        named = naming.naming_loss(self.asked(packed), self.see.words, wanted)
        return {"pointing": pointing.loss(), "naming": named}

    def asked(self, packed: Packed) -> dict[int, Tensor]:
        """The states of the questions, `[B, S, H]`, before each recorded layer."""
        return {n: s[:, -packed.ids.shape[1] :] for n, s in self.recorder.states.items()}

    def _with_seeing(
        self, loss: Tensor, metrics: dict[str, float], scenes: list[Scene], features: Tensor, cut: Cut,
        skipped: int | None, packed: Packed, progress: float,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """Adds stage 1's losses at a fading weight, holds later visual states to their words, and text states short."""
        keep = everything(len(scenes)).keep if cut.layer else cut.keep
        lengths = torch.stack([s.float().norm(dim=-1) for s in self.asked(packed).values()])
        length = F.relu(lengths - LENGTH).mean()
        loss, metrics = loss + HELD * length, metrics | {"length": length.item()}
        states = self.recorder.visual(len(self.packer.prefix), keep.shape[1])
        if skipped is not None or not keep.shape[1]:
            return loss, metrics
        about = shown(scenes)
        early, _ = self.see.early(features, about)
        late, seen = self.see.late(states[0], about, keep, 0.15)
        held = self.see.held(states[1:-1], about, keep)
        weight = max(0.3 * (1 - progress * 12 / 7), 0.08)
        return loss + weight * (early + late) + HELD * held, metrics | seen | {"held": held.item()}

    def _foreign(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        images = foreign.draw(rng, self.scenes)
        packed = self.packer.group([foreign.asked(rng, p, 16) for p in images], rng)
        features = self.features(pixels(images, DTYPE))
        logits, targets, _ = self._answers(features, everything(len(images)), packed)
        self.recorder.states = {}
        loss = F.cross_entropy(logits.float(), targets)
        return loss, {"foreign_loss": loss.item()}

    def _right(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        right = (logits.argmax(-1) == targets)[targets != self.tokenizer.eos_token_id]
        return {"right": right.float().mean().item()}

    def _answers(
        self, features: Tensor, cut: Cut, packed: Packed, observe: attention.AttentionObserver | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[A, vocabulary]` and targets `[A]` of all answer tokens, and where they stand."""
        states = answer_states(self.model, features, cut, self.packer, packed, observe=observe)
        at = packed.labels != IGNORE
        return self.model.lm_head(states[at]), packed.labels[at], at

    @torch.no_grad()
    def evaluate(self, scenes: int = 48) -> dict[str, float]:
        """Share of wholly right answers by family with all tokens; over all with 11 %, none, or none from a layer."""
        table: dict[str, list[bool]] = {}
        for begin in range(0, scenes, self.scenes):
            rng = np.random.default_rng([begin, 3])
            seen = [scene(CHECK_SEEDS + begin + i) for i in range(self.scenes)]
            packed = self.packer.pack(seen, rng, 14, 6, 6)
            features = self.features(pixels(seen, DTYPE))
            few = torch.from_numpy(drop.kept(rng, self.scenes, round(0.11 * TOKENS), "random"))
            none = few[:, :0]
            cuts = {"": everything(self.scenes), "keep11": Cut(2, few), "blind": Cut(0, none)}
            cuts |= {f"before{layer}": Cut(layer, none) for layer in range(2, LAYERS - 1)}
            for name, cut in cuts.items():
                judged = self._judge(features, cut, packed)
                for family, right in zip(itertools.chain(*packed.families), judged, strict=True):
                    table.setdefault(name or family, []).append(right)
                    table.setdefault(name or "all", []).append(right)
        self.recorder.states = {}
        return {k: float(np.mean(v)) for k, v in sorted(table.items())}

    def _judge(self, features: Tensor, cut: Cut, packed: Packed) -> list[bool]:
        logits, targets, at = self._answers(features, cut, packed)
        wrong = torch.zeros_like(packed.ids, dtype=torch.bool)
        wrong[at] = logits.argmax(-1) != targets
        sizes = [count * length for count, length in packed.groups]
        parts = wrong.split(sizes, 1)
        groups = zip(parts, packed.groups, strict=True)
        rows = torch.cat([p.view(len(p), count, length).any(-1) for p, (count, length) in groups], 1)
        return (~rows).flatten().tolist()
