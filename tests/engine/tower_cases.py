"""Strategies of about ten lines that cut and read the vision tower, and a naive LLaVA to compare with."""

from __future__ import annotations

import sys
from typing import ClassVar

import torch
from torch import nn

from prunekit import Selection, Sites, hookimpl, strategy
from prunekit.ops import top_k_mask
from prunekit.pipeline import build
from prunekit.registry import Registry
from prunekit.strategy.tower_requests import EncoderKeys, EncoderRows, EncoderValues, Features
from prunekit.testing.tiny import IMAGE

ANYWHERE = Sites(tower=True, end=True)


@strategy(sites=ANYWHERE)
class ClsTopK:
    """FasterVLM's rule: keep what the CLS token attends to."""

    @hookimpl
    def score_tokens(self, encoder_attention):
        return encoder_attention


@strategy(sites=ANYWHERE)
class Norms:
    """Keep the longest states; `hidden` is the tower's own at a tower site."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.norm(dim=-1)


@strategy(sites=ANYWHERE, keep="refused", per_sample=True, inputs={"encoder_keys": EncoderKeys()})
class Merging:
    """ToMe's rule: alternate tokens pair up by their keys, the `r` most similar pairs merge by their sizes."""

    r: int = 3

    @hookimpl
    def select_tokens(self, encoder_keys, sizes, valid):
        return tome(encoder_keys, sizes, self.r)


def tome(keys, sizes, r):
    """ToMe's matching on keys (V, D) with sizes (V,): what to keep, how to merge, and the new sizes."""
    unit = nn.functional.normalize(keys, dim=-1)
    best, partner = (unit[::2] @ unit[1::2].T).max(1)
    merged = best.argsort(descending=True, stable=True)[: min(r, len(best))]
    weights = torch.diag(sizes.to(keys.dtype))
    weights[1 + 2 * partner[merged], 2 * merged] = sizes[2 * merged].to(keys.dtype)
    keep = torch.ones(len(keys), dtype=torch.bool).index_fill(0, 2 * merged, False)
    return Selection(keep, weights / weights.sum(1, keepdim=True), weights.sum(1))


@strategy(sites=ANYWHERE, keep="refused")
class Skewed:
    """Merges that are neither averages nor symmetric, and keeps a number that depends on the picture."""

    @staticmethod
    def _mix(hidden):
        size = hidden.shape[-2]
        places = torch.arange(size, dtype=hidden.dtype)
        return ((places[:, None] * 3 + places * 7) % 5 / size).expand(*hidden.shape[:-2], size, size)

    @staticmethod
    def _choose(hidden):
        return (torch.arange(hidden.shape[-2]) % 3 == 1) & (hidden[..., 0] > 0)

    @hookimpl
    def select_tokens(self, hidden, valid):
        return Selection(self._choose(hidden) & valid, self._mix(hidden))


@strategy(sites=Sites(decoder=False), extras=("cls",), per_sample=True)
class AppendCls:
    """VisionZip's shape: the CLS token itself goes in, in the first slot that would be dropped."""

    @hookimpl
    def select_tokens(self, encoder_attention, extras, count):
        order = encoder_attention.argsort(descending=True, stable=True)
        keep = torch.zeros_like(encoder_attention, dtype=torch.bool).index_fill(0, order[:count], True)
        weights = torch.eye(len(keep), len(keep) + len(extras), dtype=extras.dtype)
        weights[order[count - 1]] = 0
        weights[order[count - 1], len(keep)] = 1
        return Selection(keep, weights)


@strategy(sites=ANYWHERE, inputs={"encoder_attention": EncoderRows(), "encoder_values": EncoderValues(heads="none")})
class Steps:
    """FlowCut's shape: one stage with several cuts in the tower that remembers a running score in `state`."""

    @hookimpl
    def select_tokens(self, encoder_attention, encoder_values, count, valid, cut, state):
        score = encoder_attention * encoder_values.mean(-2).norm(p=1, dim=-1)
        if cut:
            score = (score + state["score"][state["keep"]].view_as(score)) / 2
        state["score"], state["keep"] = score, top_k_mask(score, count, valid)
        return state["keep"]


EVERYTHING = {
    "encoder_attention": (
        EncoderRows(), EncoderRows(0, heads="sum"), EncoderRows(1, "mean", "none"),
        EncoderRows(-1, heads="joined"), EncoderRows(1, heads="none", domain="logits"),
    ),
    "encoder_keys": EncoderKeys(0, heads="none"),
    "encoder_values": (EncoderValues(), EncoderValues(of="cls")),
    "features": (Features(), Features(0), Features(projected=True), Features(of="cls")),
}  # fmt: skip


@strategy(sites=ANYWHERE, keep="refused", inputs=EVERYTHING)
class Everything:
    """Takes down what it is given, and keeps the first half."""

    SEEN: ClassVar[list] = []

    @hookimpl
    def select_tokens(self, encoder_attention, encoder_keys, encoder_values, encoder_queries, features, valid):
        names = "encoder_attention", "encoder_keys", "encoder_values", "encoder_queries", "features"
        given = encoder_attention, encoder_keys, encoder_values, encoder_queries, features
        self.SEEN.append(dict(zip(names, given, strict=True)))
        return valid & (valid.cumsum(-1) * 2 <= valid.sum(-1, keepdim=True) + 1)


def piped(*stages, **options):
    """A pipeline of (strategy class of this or another test module, keys of its stage)."""
    registry, listed = Registry(), []
    for number, (cls, keys) in enumerate(stages):
        module = sys.modules[cls.__module__]
        assert getattr(module, cls.__name__) is cls
        registry.strategy(f"s{number}", f"{cls.__module__}:{cls.__name__}")
        listed.append({"use": f"s{number}", **keys})
    return build.build({"name": "tower", "stages": listed, **options}, registry=registry)


def tower_of(model):
    """The tower, whose blocks are `encoder.layers`, and how many tokens stand before the patches."""
    inside = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    return inside, 1 if hasattr(inside, "pre_layrnorm") else 0


def naive_states(model, pixels, cuts=()):
    """Hidden states of every block for each picture in full length, with dropped patches masked as keys from then on.

    cuts: (block, point, rule); the rule gets patches (pictures, n, width), the block's keys (pictures, A, n, D), what
    is left (pictures, n) and sizes (pictures, n), and returns what to keep (pictures, n), weights (pictures, n, n) or
    None, and sizes or None. Returns the states (blocks + 1 of (pictures, tokens, width)), queries, keys and values by
    block (pictures, A, tokens, D), the chances by block (pictures, A, tokens, tokens), and what is left in the end.
    """
    inside, leading = tower_of(model)
    hidden = inside.embeddings(pixels)
    hidden = inside.pre_layrnorm(hidden) if leading else hidden
    seen = torch.ones(hidden.shape[:2], dtype=torch.bool)
    sizes = torch.ones(hidden.shape[:2], dtype=hidden.dtype)
    states, attended, maps = [hidden], [], []

    def apply(point, number, hidden, keys):
        for rule in [rule for block, where, rule in cuts if (block, where) == (number, point)]:
            patches = hidden[:, leading:]
            keep, weights, given = rule(patches, keys[:, :, leading:], seen[:, leading:].clone(), sizes[:, leading:])
            if weights is not None:
                patches = torch.where(keep[..., None], weights.to(hidden.dtype) @ patches, patches)
                hidden = torch.cat([hidden[:, :leading], patches], 1)
            seen[:, leading:] &= keep
            if given is not None:
                sizes[:, leading:] = given.to(sizes)
        return hidden

    for number, block in enumerate(inside.encoder.layers):
        normed, attention = block.layer_norm1(hidden), block.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = [p(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections]
        logits = q @ k.transpose(-1, -2) * attention.head_dim**-0.5 + sizes.log()[:, None, None]
        chances = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        hidden = hidden + attention.out_proj((chances @ v).transpose(1, 2).flatten(2))
        hidden = apply("mid", number, hidden, k)
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
        hidden = apply("after", number, hidden, k)
        states.append(hidden)
        attended.append((q, k, v))
        maps.append(chances)
    return states, attended, maps, seen[:, leading:]


def naive_logits(model, inputs, features, left, steps=0):
    """Logits of each row by itself from image features (pictures, patches, H); visual tokens not in `left` are gone.

    left: bool (pictures, patches). With steps, also the greedy continuation, a list of rows.
    """
    decoder, base, first, rows, texts = model.model.language_model, model.model, 0, [], []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        count = int((ids == IMAGE).sum()) // features.shape[1]
        embeds = base.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = features[first : first + count].flatten(0, 1).to(embeds)
        stay = torch.ones_like(ids, dtype=torch.bool)
        stay[ids == IMAGE] = left[first : first + count].flatten()
        first += count
        positions = torch.arange(len(ids))[stay]
        embeds, text = embeds[stay], []
        for _ in range(steps + 1):
            mask = torch.ones(1, len(embeds), dtype=torch.int64)  # without one, gaps in positions mean packed prompts
            hidden = decoder(
                inputs_embeds=embeds[None], position_ids=positions[None], attention_mask=mask, use_cache=False
            )
            logits = model.lm_head(hidden.last_hidden_state)[0, -1]
            if not text:
                rows.append(logits)
            text.append(int(logits.argmax()))
            embeds = torch.cat([embeds, base.get_input_embeddings()(torch.tensor(text[-1:]))])
            positions = torch.cat([positions, positions[-1:] + 1])
        texts.append(text[:steps])
    return torch.stack(rows), texts
