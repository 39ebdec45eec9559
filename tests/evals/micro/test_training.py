import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from prunekit_evals.micro import attention, drop
from prunekit_evals.micro.optim import Masters, schedule
from prunekit_evals.micro.packing import IGNORE, Packer
from prunekit_evals.micro.pointing import LAYERS, Pointing, Words
from prunekit_evals.micro.read import TOKENS, answer_states, keep_only_words, new_model
from prunekit_evals.micro.scenes import patch_owner, scene
from prunekit_evals.micro.see import SeeLoss, pixels, see_batch
from prunekit_evals.micro.tokenizer import train


@pytest.fixture(scope="module")
def packer():
    return Packer(train())


@pytest.fixture(scope="module")
def model(packer):
    return new_model(packer.tokenizer, 0, attention.NAME).eval()


@torch.no_grad()
def test_shared_prefix_equals_the_plain_forward(model, packer):
    """Each packed question gets the logits that the ordinary model gives it alone after the image."""
    plain = new_model(packer.tokenizer, 0, "eager").eval()
    scenes = [scene(1), scene(2)]
    images = pixels(scenes, torch.float32)
    features = model.model.multi_modal_projector(
        model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    )
    packed = packer.pack(scenes, np.random.default_rng(0), 3, 2)
    everything = torch.arange(TOKENS).expand(2, -1)
    logits = model.lm_head(answer_states(model, features, everything, packer, packed))
    for b, start, length in _rows(packed):
        ids = packed.ids[b, start : start + length]
        ids = ids[: (ids != packer.pad).sum()]
        image = torch.full((TOKENS,), model.config.image_token_id)
        prompt = torch.cat([torch.tensor(packer.prefix), image, ids])[None]
        out = plain(input_ids=prompt, pixel_values=images[b : b + 1]).logits[0, -len(ids) :]
        torch.testing.assert_close(logits[b, start : start + len(ids)], out, atol=1e-4, rtol=1e-4)


def _rows(packed):
    start = 0
    for count, length in packed.groups:
        for i in range(count):
            for b in range(len(packed.ids)):
                yield b, start + i * length, length
        start += count * length


@torch.no_grad()
def test_dropped_tokens_leave_the_others_at_their_positions(model, packer):
    scenes = [scene(3)]
    packed = packer.pack(scenes, np.random.default_rng(0), 2, 0)
    features = torch.randn(1, TOKENS, 160, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[5, 60, 143]])
    states = answer_states(model, features, keep, packer, packed)
    lead, ids = len(packer.prefix), packed.ids[:, : packed.groups[0][1]]
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(torch.tensor(packer.prefix))[None], features[:, keep[0]], embed(ids)], 1)
    positions = torch.cat([torch.arange(lead), keep[0] + lead, torch.arange(ids.shape[1]) + lead + TOKENS])[None]
    model.set_attn_implementation("eager")
    alone = model.model.language_model(inputs_embeds=inputs, position_ids=positions).last_hidden_state
    model.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(states[:, : ids.shape[1]], alone[:, lead + 3 :], atol=1e-4, rtol=1e-4)


def test_labels_are_the_answers(packer):
    packed = packer.pack([scene(4)], np.random.default_rng(0), 4, 2)
    for b, start, length in _rows(packed):
        at = packed.labels[b, start : start + length] != IGNORE
        told = packer.tokenizer.decode(packed.labels[b, start : start + length][at])
        whole = packer.tokenizer.decode(packed.ids[b, start : start + length], skip_special_tokens=True)
        assert told.endswith("</s>")
        assert whole.endswith(f"ASSISTANT: {told.removesuffix('</s>')}")


@pytest.mark.parametrize("pattern", drop.PATTERNS)
@pytest.mark.parametrize("count", [0, 1, 16, 100, 144])
def test_drop_patterns_keep_as_many_as_asked(pattern, count):
    kept = drop.kept(np.random.default_rng(0), 5, count, pattern)
    assert kept.shape == (5, count)
    assert all(len(set(row)) == count and (np.diff(row) > 0).all() for row in kept.tolist())
    assert count == 0 or 0 <= kept.min() <= kept.max() < TOKENS


def test_see_learns_and_masters_resume(model, tmp_path):
    head = SeeLoss()
    model = model.to(torch.bfloat16)
    named = {f"p.{n}": p for n, p in model.model.multi_modal_projector.named_parameters()}
    optimizer = Masters(named, 0.0, (0.9, 0.97))
    batch = see_batch([scene(i) for i in range(4)], torch.bfloat16)
    losses = []
    for _ in range(5):
        loss, _accuracy = head(model, batch, 0.0)
        loss.backward()
        optimizer.step(3e-3)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    optimizer.save(tmp_path / "s.safetensors")
    other = Masters(named, 0.0, (0.9, 0.97))
    other.load(tmp_path / "s.safetensors")
    for name, master in optimizer.weights().items():
        assert torch.equal(master, other.weights()[name])
    assert set(other.adam.state) == set(other.masters)
    model.to(torch.float32)


def test_keep_only_words_removes_the_rest(model):
    from prunekit_evals.micro.model import word_vectors

    keep_only_words(model)
    out = model.model.multi_modal_projector(torch.randn(3, 128))
    inside = out @ word_vectors().T @ word_vectors()
    torch.testing.assert_close(out, inside, atol=1e-4, rtol=1e-4)


def test_schedule_rises_stays_and_falls():
    rates = [schedule(p, 1.0) for p in (0.0, 0.1, 0.6, 0.9, 1.0)]
    assert rates[0] < 0.1
    assert rates[1] == rates[2] == 1.0
    assert 0.02 <= rates[4] < rates[3] < 1.0


@torch.no_grad()
def test_a_cut_at_the_first_layer_equals_tokens_that_never_entered(model, packer):
    packed = packer.pack([scene(3), scene(5)], np.random.default_rng(0), 2, 1)
    features = torch.randn(2, TOKENS, 160, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[5, 60, 143], [0, 1, 2]])
    hidden = torch.ones(2, len(packer.prefix) + TOKENS, dtype=torch.bool)
    hidden[:, : len(packer.prefix)] = False
    hidden.scatter_(1, keep + len(packer.prefix), False)
    everything = torch.arange(TOKENS).expand(2, -1)
    cut = answer_states(model, features, everything, packer, packed, cut=(0, hidden))
    torch.testing.assert_close(cut, answer_states(model, features, keep, packer, packed), atol=1e-4, rtol=1e-4)


def test_pointing_pays_for_looking_at_what_a_word_names(packer):
    scenes = [scene(6)]
    owner = patch_owner(scenes[0])
    packed = packer.pack(scenes, np.random.default_rng(0), 6, 2)
    lead, keep = len(packer.prefix), torch.arange(TOKENS)[None]
    words = Words(packer.tokenizer)
    aimed, astray = (Pointing(words, scenes, keep, packed, lead) for _ in range(2))
    target = torch.from_numpy(owner >= 0).float()
    for pointing, shown in ((aimed, target), (astray, 1 - target)):
        for group, (count, length) in enumerate(packed.groups):
            seen = torch.cat([torch.zeros(lead), shown / shown.sum()]).expand(1, 5, count * length, -1)
            pointing(LAYERS[0], group, seen)
    assert aimed.loss() < astray.loss() - 3


def test_words_of_a_place_count_only_together(packer):
    shown = scene(6)
    thing = shown.objects[0]
    text = f" {thing.height} {thing.side} {thing.side} {thing.noun} {thing.color}"
    ids = np.array(packer.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert Words(packer.tokenizer).about(ids, shown)[:, 0].tolist() == [False, True, False, True, True]
