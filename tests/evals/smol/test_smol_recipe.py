"""prunekit-smol's recipe computes what transformers computes, and asks what the benchmark asks."""

import re

import numpy as np
import pytest
import torch
from prunekit_evals.micro.compose import scene
from prunekit_evals.smol import base
from prunekit_evals.smol.adapters import KINDS
from prunekit_evals.studies.smol import rows, see
from prunekit_evals.studies.smol.decoder import Cut, Decoder, _Thin
from prunekit_evals.studies.smol.tower import VISION_LAYERS, VISION_WIDTH, Vision
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

LAYERS, VOCABULARY, LEAD = 3, 50, [7, 8]
GROUPS = ((2, 4), (1, 6))
SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}


def weights():
    rng = np.random.default_rng(0)
    shapes = {f"self_attn.{name}_proj": shape for name, shape in SHAPES.items()}
    shapes |= {"mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536)}
    made = {"norm.weight": rng.uniform(0.5, 1.5, 576)}
    for i in range(LAYERS):
        made |= {f"layers.{i}.{name}.weight": rng.normal(0, 0.03, shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"layers.{i}.{name}.weight"] = rng.uniform(0.5, 1.5, 576)
    made["embed_tokens.weight"] = rng.normal(0, 0.3, (VOCABULARY, 576))
    return {name: value.astype(np.float32) for name, value in made.items()}


@pytest.fixture(scope="module")
def decoder():
    made = Decoder(weights(), torch.float32)
    with torch.no_grad():
        for b in made.b.values():
            b.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    return made


@pytest.fixture(scope="module")
def llama(decoder):
    """transformers' own model with the merged weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
        tie_word_embeddings=True,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    state = {f"model.{name}": torch.from_numpy(value) for name, value in weights().items()}
    for number, layer in enumerate(decoder.merged().layers):
        for kind, (parts, _, _) in KINDS.items():
            sizes = [len(state[f"model.layers.0.{part}.weight"]) for part in parts]
            for part, value in zip(parts, layer[kind][0].split(sizes), strict=True):
                state[f"model.layers.{number}.{part}.weight"] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    made.load_state_dict(state)
    return made


def drawn(seed=2):
    noise = torch.Generator().manual_seed(seed)
    length = sum(count * n for count, n in GROUPS)
    return torch.randn(2, 144, 576, generator=noise), torch.randint(0, VOCABULARY, (2, length), generator=noise)


def one_by_one(llama, visual, ids, at=None, layers=range(LAYERS)):
    """Logits of every row asked alone; `at`: the positions of the visual tokens given."""
    whole, found, begin = llama.model.layers, [], 0
    llama.model.layers = torch.nn.ModuleList(whole[i] for i in layers)
    for count, length in GROUPS:
        for _ in range(count):
            row = ids[:, begin : begin + length]
            begin += length
            lead = torch.tensor([LEAD]).expand(len(ids), -1)
            embed = llama.model.embed_tokens
            states = torch.cat([embed(lead), visual, embed(row)], 1)
            middle = torch.arange(144).expand(len(ids), -1) if at is None else at
            text = torch.arange(length).expand(len(ids), -1)
            positions = torch.cat([torch.arange(2).expand(len(ids), -1), 2 + middle, 146 + text], 1)
            with torch.no_grad():
                # Without a mask transformers takes a jump of positions for the start of another prompt.
                everything = torch.ones(states.shape[:2], dtype=torch.int64)
                out = llama(inputs_embeds=states, position_ids=positions, attention_mask=everything, use_cache=False)
            found.append(out.logits[:, -length:])
    llama.model.layers = whole
    return torch.cat(found, 1)


def ours(decoder, visual, ids, cut):
    with torch.no_grad():
        states, _ = decoder(decoder.merged(), torch.tensor(LEAD), visual, ids, GROUPS, cut)
        return decoder.logits(states)


def test_questions_after_a_shared_image_answer_as_if_asked_alone(decoder, llama):
    visual, ids = drawn()
    torch.testing.assert_close(ours(decoder, visual, ids, Cut()), one_by_one(llama, visual, ids), atol=2e-3, rtol=1e-3)


def test_left_out_layers_are_left_out(decoder, llama):
    visual, ids = drawn()
    found = ours(decoder, visual, ids, Cut(frozenset({1})))
    torch.testing.assert_close(found, one_by_one(llama, visual, ids, layers=(0, 2)), atol=2e-3, rtol=1e-3)


def test_dropped_tokens_are_gone_and_positions_stay(decoder, llama):
    visual, ids = drawn()
    keep = torch.tensor([[3, 50, 90], [0, 1, 143]])
    kept = visual.gather(1, keep[..., None].expand(-1, -1, 576))
    found = ours(decoder, visual, ids, Cut(layer=0, keep=keep))
    torch.testing.assert_close(found, one_by_one(llama, kept, ids, keep), atol=2e-3, rtol=1e-3)


def test_gradients_of_the_adapters_are_those_of_the_sum():
    torch.manual_seed(3)
    shapes = ((5, 4), (6, 4), (2, 4), (6, 2))
    x, fixed, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    thin = torch.autograd.grad(_Thin.apply(x, (fixed + b @ a).detach(), a, b).square().sum(), (x, a, b))
    plain = torch.autograd.grad((x @ (fixed + b @ a).T).square().sum(), (x, a, b))
    torch.testing.assert_close(thin, plain)


def test_the_tower_is_clips():
    vision = Vision(0, torch.zeros(576))
    config = CLIPVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=4 * VISION_WIDTH, num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4, image_size=168, patch_size=14,
    )  # fmt: skip
    clip = CLIPVisionModel(config).eval()
    names = list(clip.state_dict())
    before = "vision_model." if names[0].startswith("vision_model.") else ""
    own = {before + name: value for name, value in vision.vision_tower.state_dict().items()}
    lacking = clip.load_state_dict(own, strict=False)
    assert not lacking.unexpected_keys and all(name.endswith("position_ids") for name in lacking.missing_keys)
    images = torch.from_numpy(np.stack([scene(5).image, scene(6).image]))
    with torch.no_grad():
        _, features, pooled = vision(images)
        seen = clip(images.permute(0, 3, 1, 2).float() / 127.5 - 1, output_hidden_states=True)
    torch.testing.assert_close(features, seen.hidden_states[-2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled, seen.pooler_output, atol=1e-4, rtol=1e-4)


def words():
    """A tokenizer of single bytes: rows need no vocabulary of any kind."""
    letters = {chr(i): i for i in range(3, 128)} | {"Ġ": 128, "Ċ": 129}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def test_a_row_predicts_its_answer_and_the_end():
    encoder = rows.Encoder(words())
    ids, labels = encoder.row(rows.Row("Is it?", "no", "existence"))
    predicted = [label for label in labels if label != rows.IGNORE]
    assert predicted == [*encoder.row(rows.Row("Is it?", "no", "existence"))[0][-4:-1], base.END_ID]
    begins = labels.index(predicted[0])
    assert ids[begins + 1 : begins + 1 + len(predicted)] == predicted


def test_held_out_questions_hold_every_family_once():
    asked = [row.kind for group in rows.checks(scene(1 << 30)) for row in group]
    named = [kind for kind in asked if kind != "caption"]
    assert len(asked) == 24 and len(named) == len(set(named)) and len(named) > 12


@pytest.mark.parametrize("level", range(rows.LEVELS))
def test_texts_alone_name_their_answer(level):
    rng = np.random.default_rng(level)
    for seed in range(20):
        row = rows.bound(scene(seed), rng, level)
        if row.kind == "bind":
            word = re.search(r"The letter of (.+) is$|Which option is (.+)\?", row.prompt)
            assert word is not None
            assert f"{row.answer}. {word[1] or word[2]}" in row.prompt.splitlines()


def test_patch_labels_are_those_of_the_things():
    shown = scene(11)
    name, color, side, height = see.labels([shown])[0]
    for thing in shown.things:
        left, top, width, tall = thing.box
        middle = (top + tall // 2) // 14 * 12 + (left + width // 2) // 14
        if name[middle] != see.NOTHING:
            assert see.NAMES[name[middle]] == thing.noun and see.COLOR_NAMES[color[middle]] == thing.color
            assert (see.SIDES[side[middle]], see.HEIGHTS[height[middle]]) == (thing.side, thing.height)
    assert (name == see.NOTHING).sum() > 60
