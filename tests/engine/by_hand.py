"""One unpadded prompt through a tiny LLaVA, by hand: lists really become shorter, and each layer keeps its own KV.

It knows nothing of masks, engine or reference: a third way of saying what pruning means.
"""

from __future__ import annotations

import math

import torch

from prunekit.strategy.decisions import LayerAction, LayerPlan
from prunekit.strategy.sites import Site
from prunekit.testing.tiny import IMAGE

IDENTITY = (LayerAction.SKIP, LayerAction.FILL_KV)


class ByHand:
    """events: (site, kept indices, options) options being crop, sizes, weights (kept, entered + E), extras (E, H)."""

    def __init__(self, model, batch, events=(), plan=None, positions="keep"):
        self.decoder, self.head = model.get_decoder(), model.lm_head
        self.plan, self.renumber = plan or LayerPlan(), positions == "renumber"
        self.state = self.decoder.embed_tokens(batch["input_ids"])[0]
        self.slots = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
        self.state[self.slots] = torch.cat(list(model.get_image_features(batch["pixel_values"]).pooler_output))
        self.alive = list(range(len(self.state)))
        self.size = dict.fromkeys(self.alive, 1.0)
        self.kv, self.shift = [], []
        self.events = [(Site.parse(site), kept, options) for site, kept, options in events]

    def logits(self, tokens):
        """(T, vocabulary) for int64 (T,)."""
        found = [self.prefill()]
        for number, token in enumerate(tokens[:-1].tolist()):
            found.append(self.decode(token, number))
        return torch.stack(found)

    def prefill(self):
        prompt = len(self.alive)
        for number, layer in enumerate(self.decoder.layers):
            for site, kept, options in self.events:
                if site.place != "prefill_end" and site.point != "mid" and max(site.depth, 0) == number:
                    self.cut(kept, options)
            places = list(range(len(self.alive))) if self.renumber else self.alive
            self.shift.append(prompt - len(self.alive) if self.renumber else 0)
            action, inputs = self.plan[number], self.state
            keys, values = self.keys(layer, inputs, places)
            self.kv.append([])
            if action.writes_kv:
                sizes = [self.size[slot] for slot in self.alive]
                self.kv[-1] = list(zip(self.alive, keys, values, sizes, strict=True))
            if action in IDENTITY:
                continue
            if action is not LayerAction.SKIP_ATTENTION:
                rows = [self.attend(layer, inputs[i], places[i], self.kv[-1][: i + 1]) for i in range(len(inputs))]
                self.state = inputs + torch.stack(rows)
            for site, kept, options in self.events:
                if site.point == "mid" and site.layer == number:
                    self.cut(kept, options)
            if action is not LayerAction.SKIP_MLP:
                self.state = self.state + layer.mlp(layer.post_attention_layernorm(self.state))
            if action is LayerAction.FREEZE:
                for place, slot in enumerate(self.alive):
                    if slot in self.slots:
                        self.state[place] = inputs[place]
        before = range(len(self.slots))
        for site, kept, options in self.events:
            gone, before = {self.slots[place] for place in before if place not in kept}, kept
            if options.get("crop") or site.place == "prefill_end":
                self.kv = [[one for one in layer if one[0] not in gone] for layer in self.kv]
        # What no decoding step will ask for is not kept.
        asked = [self.plan.decoding(number).attends for number in range(len(self.kv))]
        self.kv = [layer if needed else [] for layer, needed in zip(self.kv, asked, strict=True)]
        return self.head(self.decoder.norm(self.state[-1]))

    def decode(self, token, number):
        state = self.decoder.embed_tokens(torch.tensor(token))
        for index, layer in enumerate(self.decoder.layers):
            action = self.plan.decoding(index)
            if action in IDENTITY:
                continue
            place = len(self.size) + number - self.shift[index]
            if action is not LayerAction.SKIP_ATTENTION:
                key, value = self.keys(layer, state[None], [place])
                self.kv[index].append((None, key[0], value[0], 1.0))
                state = state + self.attend(layer, state, place, self.kv[index])
            if action is not LayerAction.SKIP_MLP:
                state = state + layer.mlp(layer.post_attention_layernorm(state))
        return self.head(self.decoder.norm(state))

    def cut(self, kept, options):
        """Merge and drop, in the list of states."""
        entered = [place for place, slot in enumerate(self.alive) if slot in self.slots]
        stay = [self.alive.index(self.slots[one]) for one in kept]
        if "weights" in options:
            parts = torch.cat([self.state[entered], options.get("extras", self.state[:0])])
            self.state = self.state.clone()
            self.state[stay] = options["weights"] @ parts
        for place, size in zip(stay, options.get("sizes", ()), strict=False):
            self.size[self.alive[place]] = size
        left = [place for place in range(len(self.alive)) if place not in entered or place in stay]
        self.state, self.alive = self.state[left], [self.alive[place] for place in left]

    def keys(self, layer, states, places):
        """Rotated keys and values, each (tokens, KV heads, head width)."""
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        split = (len(states), -1, attention.head_dim)
        keys = self.rotated(attention.k_proj(normed).view(split), places)
        return keys, attention.v_proj(normed).view(split)

    def attend(self, layer, state, place, entries):
        """What attention adds to one state, from a list of KV entries."""
        attention = layer.self_attn
        query = attention.q_proj(layer.input_layernorm(state)).view(1, -1, attention.head_dim)
        query, found = self.rotated(query, [place])[0], []
        for head, vector in enumerate(query):
            shared = head // attention.num_key_value_groups
            scores = [
                vector @ key[shared] / math.sqrt(attention.head_dim) + math.log(size) for _, key, _, size in entries
            ]
            chances = torch.stack(scores).softmax(0)
            found.append(sum(chance * value[shared] for chance, (_, _, value, _) in zip(chances, entries, strict=True)))
        return attention.o_proj(torch.cat(found))

    def rotated(self, vectors, places):
        half = vectors.shape[-1] // 2
        speeds = self.decoder.rotary_emb.inv_freq  # float32 once, so not quite 10000 ** (-i / half)
        angles = torch.tensor(places, dtype=torch.float64)[:, None, None] * speeds
        first, second = vectors[..., :half], vectors[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
