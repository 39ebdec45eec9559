import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from prunekit_evals.micro import attention, drop
from prunekit_evals.micro.compose import TOKENS
from prunekit_evals.micro.lexicon import COLOR_NAMES, HEIGHTS, NOUNS, SIDES
from prunekit_evals.micro.packing import IGNORE, Packer, pixels
from prunekit_evals.micro.question import Question
from prunekit_evals.micro.scenes import ask, patch_owner, scene
from prunekit_evals.studies.micro import depth, export, naming
from prunekit_evals.studies.micro import train as training
from prunekit_evals.studies.micro.glance import Contents, Glance, begins
from prunekit_evals.studies.micro.model import NAMES, SEEING, word_vectors
from prunekit_evals.studies.micro.optim import Masters, schedule
from prunekit_evals.studies.micro.pointing import Pointing, Words, scaffold
from prunekit_evals.studies.micro.read import FOREIGN_EVERY, Cut, Read, answer_states, everything, new_model
from prunekit_evals.studies.micro.see import SeeLoss, shown
from prunekit_evals.studies.micro.stages import See
from prunekit_evals.studies.micro.tokenizer import train


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
    packed = packer.pack(scenes, np.random.default_rng(0), 3, 2, 2)
    logits = model.lm_head(answer_states(model, features, everything(2), packer, packed))
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
    packed = packer.pack(scenes, np.random.default_rng(0), 2, 0, 0)
    features = torch.randn(1, TOKENS, 160, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[5, 60, 143]])
    states = answer_states(model, features, Cut(0, keep), packer, packed)
    lead, ids = len(packer.prefix), packed.ids[:, : packed.groups[0][1]]
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(torch.tensor(packer.prefix))[None], features[:, keep[0]], embed(ids)], 1)
    positions = torch.cat([torch.arange(lead), keep[0] + lead, torch.arange(ids.shape[1]) + lead + TOKENS])[None]
    model.set_attn_implementation("eager")
    alone = model.model.language_model(inputs_embeds=inputs, position_ids=positions).last_hidden_state
    model.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(states[:, : ids.shape[1]], alone[:, lead + 3 :], atol=1e-4, rtol=1e-4)


def test_labels_are_the_answers(packer):
    packed = packer.pack([scene(4)], np.random.default_rng(0), 4, 1, 2)
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
    scenes = [scene(i) for i in range(4)]
    about, keep = shown(scenes), everything(4).keep
    losses = []
    for _ in range(5):
        seen = model.model.vision_tower(pixels(scenes, torch.bfloat16), output_hidden_states=True)
        emitted = model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:])
        loss = head.early(emitted, about)[0] + head.late(emitted, about, keep, 0.1)[0]
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


def test_names_are_learned_inside_the_decoder_only(model):
    """The tower's own features carry colors and places; names are asked of the states before layer SEEING."""
    assert 0 < SEEING < len(model.model.language_model.layers) / 2
    assert model.config.vision_config.num_hidden_layers + model.config.vision_feature_layer + 1 == 2


def test_schedule_rises_stays_and_falls():
    rates = [schedule(p, 1.0) for p in (0.0, 0.1, 0.6, 0.9, 1.0)]
    assert rates[0] < 0.1
    assert rates[1] == rates[2] == 1.0
    assert 0.02 <= rates[4] < rates[3] < 1.0


@torch.no_grad()
def test_a_cut_before_a_layer_hides_tokens_from_there_on(model, packer):
    packed = packer.pack([scene(3), scene(5)], np.random.default_rng(0), 2, 1, 1)
    features = torch.randn(2, TOKENS, 160, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[5, 60, 143], [0, 1, 2]])
    at_input = answer_states(model, features, Cut(0, keep), packer, packed)
    inside = answer_states(model, features, Cut(2, keep), packer, packed)
    whole = answer_states(model, features, everything(2), packer, packed)
    assert not torch.allclose(inside, at_input, atol=1e-3)
    assert not torch.allclose(inside, whole, atol=1e-3)
    hidden = Cut(1, keep).hidden(len(packer.prefix))
    first = answer_states(model, features, everything(2), packer, packed, cut=(0, hidden))
    torch.testing.assert_close(first, at_input, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_layers_left_out_come_back(model, packer):
    packed = packer.pack([scene(3)], np.random.default_rng(0), 2, 0, 0)
    features = torch.randn(1, TOKENS, 160, generator=torch.Generator().manual_seed(0))
    whole = answer_states(model, features, everything(1), packer, packed)
    with depth.without(model, 3):
        assert not torch.allclose(answer_states(model, features, everything(1), packer, packed), whole, atol=1e-3)
    torch.testing.assert_close(answer_states(model, features, everything(1), packer, packed), whole)
    drawn = [depth.drawn(np.random.default_rng(i), 0.9, 8) for i in range(200)]
    assert {d for d in drawn if d is not None} == set(range(8))
    assert depth.drawn(np.random.default_rng(0), 0.1, 8) is None


def test_pointing_pays_for_looking_at_what_a_word_names(packer):
    scenes = [scene(6)]
    owner = patch_owner(scenes[0])
    packed = packer.pack(scenes, np.random.default_rng(0), 6, 2, 2)
    lead, keep = len(packer.prefix), torch.arange(TOKENS)[None]
    words = Words(packer.tokenizer)
    aimed, astray = (Pointing(words, scenes, keep, packed, lead) for _ in range(2))
    target = torch.from_numpy(owner >= 0).float()
    for pointing, patches in ((aimed, target), (astray, 1 - target)):
        for group, (count, length) in enumerate(packed.groups):
            seen = torch.cat([torch.zeros(lead), patches / patches.sum()]).expand(1, 5, count * length, -1)
            pointing(3, group, seen)
    assert aimed.loss() < astray.loss() - 3


def test_absent_names_look_before_the_picture_and_hops_at_things_of_one_color(packer):
    shown = next(s for s in map(scene, range(100)) if ask(s, np.random.default_rng(0), "same_color"))
    question = ask(shown, np.random.default_rng(0), "same_color")
    missing = next(n for n in NOUNS if n not in {t.noun for t in shown.objects})
    absent = Question("existence", "", f"Is there a {missing} in the image?", "No")
    packed = packer.group([[question, absent]], np.random.default_rng(0))
    lead, words = len(packer.prefix), Words(packer.tokenizer)
    pointing = Pointing(words, [shown], torch.arange(TOKENS)[None], packed, lead)
    length = packed.groups[0][1]
    a, b = (next(t for t in shown.objects if t.noun == n) for n in (question.text[:-1].split()[-1], question.answer))
    hops = pointing.aims["hops"]
    assert (hops.at[:, 1] < length).all()
    owner = torch.from_numpy(patch_owner(shown))
    kin = [i for i, t in enumerate(shown.things) if t.color == a.color and t is not a]
    assert shown.things.index(b) in kin
    row = hops.at[:, 1].tolist().index(packed.ids[0].tolist().index(words.names[NAMES.index(a.noun)]))
    assert torch.equal(hops.columns[row, lead:], torch.isin(owner, torch.tensor(kin)))
    aim = pointing.aims["absent"]
    assert (aim.at[:, 1] >= length).any()
    assert aim.columns[:, :lead].all()
    assert not aim.columns[:, lead:].any()


def test_words_of_a_place_count_only_together(packer):
    shown = scene(6)
    thing = shown.objects[0]
    text = f" {thing.height} {thing.side} {thing.side} {thing.noun} {thing.color}"
    ids = np.array(packer.tokenizer(text, add_special_tokens=False)["input_ids"])
    words = Words(packer.tokenizer)
    assert words.about(ids, shown)[:, 0].tolist() == [False, True, False, True, True]
    assert words.about(ids, shown, names=False)[:, 0].tolist() == [False, True, False, False, True]


def test_spelling_wants_what_a_name_has_found_out(packer):
    shown = next(s for s in map(scene, range(100)) if ask(s, np.random.default_rng(0), "same_color"))
    question = ask(shown, np.random.default_rng(0), "same_color")
    packed = packer.group([[question]], np.random.default_rng(0))
    words = Words(packer.tokenizer)
    wanted = naming.targets(words, [shown], packed)
    named = next(t for t in shown.objects if t.noun == question.text[:-1].split()[-1])
    at = packed.ids[0].tolist().index(words.names[NAMES.index(named.noun)])
    assert wanted["color"][0, at] == COLOR_NAMES.index(named.color)
    assert wanted["other"][0, at] == NAMES.index(question.answer)
    states = torch.zeros(1, packed.ids.shape[1], 160)
    wrong = naming.naming_loss({7: states + 1}, word_vectors(), wanted)
    states[0, at] = word_vectors()[NAMES.index(question.answer)]
    told = packed.ids[0].tolist().index(words.names[NAMES.index(question.answer)])
    states[0, told] = word_vectors()[NAMES.index(named.noun)]
    assert naming.naming_loss({7: states}, word_vectors(), wanted) < 0.1 < wrong


def test_spelling_wants_the_place_of_the_other_thing_only_where_it_is_asked_for(packer):
    shown = next(s for s in map(scene, range(100)) if ask(s, np.random.default_rng(0), "where_same"))
    asked = [ask(shown, np.random.default_rng(0), family) for family in ("where_same", "same_color")]
    packed = packer.group([asked], np.random.default_rng(0))
    wanted = naming.targets(Words(packer.tokenizer), [shown], packed)
    length = packed.groups[0][1]
    level, side = asked[0].answer.split()
    for kind, told in (("there", SIDES.index(side)), ("level", HEIGHTS.index(level))):
        found = wanted[kind][0]
        assert told in found[:length].tolist()
        assert (found[length:] == naming.NOTHING).all()
    assert (wanted["other"][0, length:] != naming.NOTHING).any()


def test_scaffolds_fade_to_nothing_before_the_end():
    assert scaffold(0.0) == scaffold(0.5) > scaffold(0.65) > scaffold(0.8) == scaffold(1.0) == 0


def test_layers_that_do_not_see_start_small_against_the_words(model):
    later, first = (model.model.language_model.layers[i].mlp.down_proj.weight.std() for i in (SEEING, 0))
    assert later < 0.25 * first


def test_later_visual_states_are_held_to_their_words():
    head, about, keep = SeeLoss(), shown([scene(1)]), everything(1).keep
    far, near = (head.held([torch.full((1, TOKENS, 160), x)], about, keep).item() for x in (20.0, 0.0))
    assert far > 200 > 3 > near


def test_an_answer_begins_where_its_prompt_ends(packer):
    packed = packer.pack([scene(4), scene(5)], np.random.default_rng(0), 3, 1, 2)
    found = begins(packed.labels)
    for b, start, length in _rows(packed):
        at = found[b, start : start + length].nonzero().flatten().tolist()
        assert len(at) == 1
        assert packer.tokenizer.decode(packed.ids[b, start : start + at[0] + 1]).endswith("ASSISTANT:")


def test_a_glance_wants_everything_shown_and_nothing_else():
    scenes = [scene(7), scene(8)]
    vectors, here = word_vectors(), torch.ones(2, 1, dtype=torch.bool)
    all_of, one_of = torch.zeros(2, 1, 160), torch.zeros(2, 1, 160)
    for row, shown_here in enumerate(scenes):
        for thing in shown_here.things:
            all_of[row] += vectors[NAMES.index(thing.noun)]
        for color in {t.color for t in shown_here.things}:
            all_of[row] += vectors[len(NAMES) + COLOR_NAMES.index(color)]
        one_of[row] = vectors[NAMES.index(shown_here.things[0].noun)]
    contents = Contents.of(scenes)
    entropies = [-(s * s.log().nan_to_num(0, 0, 0)).sum(-1).mean() for s in (contents.names, contents.colors)]
    least = sum(entropies, torch.zeros(()))
    good, poor, other = (contents.loss(x, here, vectors) for x in (all_of, one_of, all_of.flip(0)))
    assert least <= good < least + 0.2
    assert poor > good + 1
    assert other > good + 1


STEPS = [base for base in range(1 << 50, (1 << 50) + 96, 8) if base // 8 % FOREIGN_EVERY]  # its pictures are an extra


def _steps(stage, progress):
    return [stage.loss(range(base, base + stage.scenes), progress)[1] for base in STEPS]


@pytest.mark.slow  # minutes of training steps
def test_each_stage_has_its_own_scaffold_and_none_at_the_end(monkeypatch):
    read, glance = Read(0, {}), Glance(0, {})
    assert all({"pointing", "naming"} <= set(m) and "glance" not in m for m in _steps(read, 0.3))
    late = _steps(glance, 0.3)
    assert not any("pointing" in m for m in late)
    scaffolded = [base for base, m in zip(STEPS, late, strict=True) if "glance" in m]
    assert 0 < len(scaffolded) < len(STEPS)
    assert all(m["glance"] > 3 for m in late if "glance" in m)
    seeds = range(scaffolded[0], scaffolded[0] + glance.scenes)
    early, late = (glance.loss(seeds, at)[0].item() for at in (0.3, 0.85))
    monkeypatch.setattr(Glance, "auxiliary", lambda *args: {})
    assert glance.loss(seeds, 0.85)[0].item() == late < early - 0.5


@pytest.mark.slow
def test_an_evaluation_leaves_no_states_to_the_next_step():
    stage = Glance(0, {})
    stage.evaluate(stage.scenes)
    assert stage.recorder.states == {}


def test_a_stage_that_is_finished_is_not_run_or_logged_again(tmp_path):
    run = training.Run("see", tmp_path, 3, 1e-3, 0.0, 0, True, 1)
    (tmp_path / "see.json").write_text('{"step": 3}')
    optimizer = Masters(dict(See(0).trained()), 0.0, (0.9, 0.97))
    optimizer.save(tmp_path / "see.safetensors")
    training.worker(0, run)
    assert not (tmp_path / "curve.jsonl").exists()


def test_runs_that_cannot_be_made_are_told_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "see.safetensors").touch()
    for run, argv, told in (
        (training.main, ["train", "--stage", "glance", "--out", str(tmp_path)], "goes on from read.safetensors in"),
        (
            training.main,
            ["train", "--stage", "read", "--out", str(tmp_path / "new")],
            "goes on from see.safetensors in",
        ),
        (
            training.main,
            ["train", "--processes", "0", "--out", str(tmp_path / "new")],
            "--processes must be at least 1",
        ),
        (training.main, ["train", "--seed", "-1", "--out", str(tmp_path / "new")], "--seed must be from 0 to 4095"),
        (export.main, ["export", "--run", str(tmp_path)], "lacks read.safetensors, glance.safetensors; train it"),
    ):
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit):
            run()
        assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
