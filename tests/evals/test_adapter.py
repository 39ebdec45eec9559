"""The adapter against hand-made requests: layouts, batches, padding, journal, likelihoods, identity."""

import json
import os
import subprocess
import sys

import pytest
import torch
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from PIL import Image
from PIL.ExifTags import Base
from prunekit_evals.lmms import tasks
from prunekit_evals.lmms.adapter import PruneKit, PruneKitChat, PruneKitSimple
from prunekit_evals.lmms.requests import Settings
from prunekit_evals.run import answering
from prunekit_evals.run.generation import decoding
from prunekit_evals.run.placeholders import as_text, placeholders
from prunekit_evals.run.prompts import Prompt, from_messages, from_visuals

import prunekit
from prunekit.errors import InputError, PrunekitWarning, SpecError, Unsupported

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}
FASTV = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.25}]}
RANDOM = {"name": "random", "stages": [{"use": "random", "keep": 0.25}]}
GREEDY = {"until": ["\n\n"], "max_new_tokens": 4, "temperature": 0, "do_sample": False}


def picture(number):
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (60 + number, 70, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def docs(count=13, pictures=(1,)):
    """Questions of different lengths; question n shows `pictures[n % len(pictures)]` pictures."""
    shown = [[picture(10 * n + i) for i in range(pictures[n % len(pictures)])] for n in range(count)]
    return [{"q": f"Is there a cat{' or a dog' * (n % 4)} in {n}?", "images": shown[n]} for n in range(count)]


def requests(rows, chat, arguments=GREEDY):
    def messages(doc):
        shown = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": doc["q"]}]}]

    def visuals(doc):
        return doc["images"]

    made = []
    for number, doc in enumerate(rows):
        args = (doc["q"], messages, arguments) if chat else (doc["q"], arguments, visuals)
        about = {"task": "toy", "doc_id": number, "repeats": 1}
        made.append(Instance("generate_until", (*args, number, "toy", "test"), 0, about))
    return made


def adapter(loaded, pipeline=FASTV, rows=(), kind=PruneKitChat, journal="", **settings):
    made = kind.over(loaded, prunekit.load(pipeline), Settings(**settings), str(journal))
    made.task_dict = {"toy": {"test": rows}}
    return made


def texts(results):
    assert all(isinstance(result, GenerationResult) for result in results)
    return [result.text for result in results]


@pytest.fixture
def wordy(loaded):
    """The tiny model with a head that says anything, so that answers differ in every token."""
    head = loaded.model.get_output_embeddings().weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(4)))
    yield loaded
    with torch.no_grad():
        head.copy_(kept)


@pytest.mark.parametrize("pipeline", [DENSE, FASTV, RANDOM], ids=lambda one: one["name"])
def test_batch_1_equals_batch_8(wordy, pipeline):
    rows = docs(13, (1, 2))
    asked = requests(rows, chat=True, arguments={**GREEDY, "max_new_tokens": 12})
    one = texts(adapter(wordy, pipeline, rows, batch_size=1).generate_until(asked))
    eight = texts(adapter(wordy, pipeline, rows, batch_size=8).generate_until(asked))
    assert one == eight
    assert len(set(one)) > 6


def test_batches_are_padded_on_the_left(wordy):
    prompts = [from_visuals(doc["images"], doc["q"], wordy.processor, "") for doc in docs(4)]
    inputs = answering.encode(wordy, prompts)
    mask = inputs["attention_mask"]
    assert (mask == 0).any()
    assert mask[:, -1].all()
    assert (mask.diff(dim=1) >= 0).all()


def test_chat_and_simple_requests_ask_the_same(wordy):
    rows = docs(5)
    chat = adapter(wordy, rows=rows, batch_size=2).generate_until(requests(rows, chat=True))
    simple = adapter(wordy, rows=rows, batch_size=2, kind=PruneKitSimple).generate_until(requests(rows, chat=False))
    swapped = adapter(wordy, rows=rows, batch_size=2).generate_until(requests(rows, chat=False))
    assert texts(chat) == texts(simple) == texts(swapped)


def test_docs_with_and_without_pictures(wordy):
    rows = docs(9, (1, 0, 2))
    asked = requests(rows, chat=True)
    with pytest.warns(PrunekitWarning, match="no visual tokens"):
        mixed = adapter(wordy, rows=rows, batch_size=4)
        together = texts(mixed.generate_until(asked))
    with pytest.warns(PrunekitWarning):
        alone = texts(adapter(wordy, rows=rows, batch_size=1).generate_until(asked))
    assert together == alone
    assert any("no visual tokens" in note for note in mixed.tally.notes)
    assert sorted(one.visual_tokens for one in mixed.tally.facts) == [0] * 3 + [16] * 3 + [32] * 3
    assert {(one.visual_tokens, one.kept_tokens) for one in mixed.tally.facts} == {(0, 0), (16, 4), (32, 8)}


def test_the_head_ends_answers_and_tokens_are_counted(loaded):
    rows = docs(6)
    results = adapter(loaded, rows=rows, batch_size=4).generate_until(requests(rows, chat=True))
    assert set(texts(results)) <= {"yes", "no"}
    assert {result.token_counts.output_tokens for result in results} == {2}
    assert len({result.token_counts.input_tokens for result in results}) > 1


def test_arguments_of_a_task_are_not_changed(loaded):
    rows = docs(3)
    arguments = {**GREEDY, "image_aspect_ratio": "original"}
    before = dict(arguments)
    adapter(loaded, rows=rows).generate_until(requests(rows, chat=True, arguments=arguments))
    assert arguments == before


def test_until_cuts(wordy):
    rows = docs(1)
    made = adapter(wordy, rows=rows)
    whole = texts(made.generate_until(requests(rows, True, {**GREEDY, "max_new_tokens": 8})))[0]
    stop = whole[2]
    cut = texts(made.generate_until(requests(rows, True, {**GREEDY, "max_new_tokens": 8, "until": [stop]})))
    assert cut == [whole[: whole.index(stop)]]


def test_an_error_is_an_error(loaded, monkeypatch):
    rows = docs(2)

    def fail(**inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapter(loaded, rows=rows).generate_until(requests(rows, chat=True))


def test_beams_and_sampling(wordy):
    rows = docs(3)
    beams = adapter(wordy, rows=rows, batch_size=3)
    assert len(texts(beams.generate_until(requests(rows, True, {**GREEDY, "num_beams": 3})))) == 3
    assert [(one.visual_tokens, one.kept_tokens) for one in beams.tally.facts] == [(16, 4)] * 3
    torch.manual_seed(0)
    sampled = adapter(wordy, rows=rows, batch_size=3)
    assert len(texts(sampled.generate_until(requests(rows, True, {"temperature": 1.0, "max_new_tokens": 6})))) == 3


def test_a_journal_answers_and_takes_no_time(wordy, tmp_path, monkeypatch):
    rows = docs(7)
    asked = requests(rows, chat=True)
    first = adapter(wordy, rows=rows, journal=tmp_path / "j.jsonl", batch_size=3)
    answers = texts(first.generate_until(asked[:5]))
    first.clean()
    again = adapter(wordy, rows=rows, journal=tmp_path / "j.jsonl", batch_size=3)
    assert texts(again.generate_until(asked))[:5] == answers
    assert (again.tally.journaled, again.tally.computed) == (5, 2)
    assert len(again.tally.facts) == 7
    again.clean()
    monkeypatch.setattr(wordy.model, "generate", lambda **inputs: pytest.fail("answered twice"))
    last = adapter(wordy, rows=rows, journal=tmp_path / "j.jsonl", batch_size=2)
    assert texts(last.generate_until(asked))[:5] == answers
    assert (last.tally.seconds, last.tally.computed) == (0.0, 0)


@pytest.mark.parametrize("change", ["pipeline", "picture", "text", "arguments", "settings"])
def test_a_journal_answers_only_the_same_question(wordy, tmp_path, change):
    rows = docs(1)
    first = adapter(wordy, rows=rows, journal=tmp_path / "j.jsonl")
    first.generate_until(requests(rows, chat=True))
    first.clean()
    arguments, pipeline, settings = GREEDY, FASTV, {}
    if change == "pipeline":
        pipeline = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.5}]}
    elif change == "picture":
        rows = [{**rows[0], "images": [picture(99)]}]
    elif change == "text":
        rows = [{**rows[0], "q": "What?"}]
    elif change == "arguments":
        arguments = {**GREEDY, "max_new_tokens": 3}
    else:
        settings = {"system_prompt": "Be brief."}
    again = adapter(wordy, pipeline, rows, journal=tmp_path / "j.jsonl", **settings)
    again.generate_until(requests(rows, chat=True, arguments=arguments))
    again.clean()
    assert (again.tally.journaled, again.tally.computed) == (0, 1)


def test_repeats_are_draws_of_their_own(wordy, tmp_path):
    rows = docs(1)
    asked = requests(rows, True, {"temperature": 1.0, "max_new_tokens": 6}) * 3
    torch.manual_seed(0)
    first = adapter(wordy, rows=rows, journal=tmp_path / "j.jsonl")
    answers = texts(first.generate_until(asked))
    first.clean()
    assert len(set(answers)) > 1
    assert texts(adapter(wordy, rows=rows, journal=tmp_path / "j.jsonl").generate_until(asked)) == answers


def likelihood(doc, choice, number=0):
    args = (doc["q"], choice, lambda doc: doc["images"], number, "toy", "test")
    return Instance("loglikelihood", args, 0, {"task": "toy", "doc_id": number, "repeats": 1})


@pytest.mark.parametrize("choice", [" yes", " a longer answer", "B"])
def test_loglikelihood_is_the_mean_loss(wordy, choice):
    rows = docs(1)
    made = adapter(wordy, DENSE, rows, PruneKitSimple)
    (loss, greedy), count = unwrap_generation_output(made.loglikelihood([likelihood(rows[0], choice)])[0])
    assert count is None
    prompt = from_visuals(rows[0]["images"], rows[0]["q"], wordy.processor, "")
    inputs = answering.encode(wordy, [prompt])
    ids = wordy.processor.tokenizer(choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.inference_mode():
        logits = wordy.model(**whole).logits[:, -ids.shape[1] - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0])
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert greedy is bool((logits.argmax(-1) == ids).all())


def test_the_likeliest_continuation_has_the_smallest_loss(wordy):
    rows = docs(1)
    said = texts(adapter(wordy, rows=rows).generate_until(requests(rows, True, {**GREEDY, "max_new_tokens": 1})))[0]
    made = adapter(wordy, rows=rows, kind=PruneKitSimple)
    results = made.loglikelihood([likelihood(rows[0], choice) for choice in (said, "Zq", "%")])
    pairs = [result.text for result in results]
    assert pairs[0][1] is True
    assert min(pairs)[0] == pairs[0][0]


def test_clean_keeps_the_model(loaded):
    rows = docs(2)
    made = adapter(loaded, rows=rows)
    first = texts(made.generate_until(requests(rows, chat=True)))
    made.clean()
    assert texts(made.generate_until(requests(rows, chat=True))) == first


def test_the_repr_is_an_identity(loaded):
    assert repr(adapter(loaded)) == repr(adapter(loaded))
    assert " at 0x" not in repr(adapter(loaded))
    different = {
        repr(adapter(loaded)),
        repr(adapter(loaded, DENSE)),
        repr(adapter(loaded, max_new_tokens=5)),
        repr(adapter(loaded, system_prompt="x")),
        repr(adapter(loaded, honor_until="all")),
    }
    assert len(different) == 5
    assert prunekit.load(FASTV).sha in repr(adapter(loaded))


def test_the_batch_size_is_on_record(loaded):
    made = adapter(loaded, batch_size=8)
    assert (made.batch_size, made.batch_sizes) == (8, {"generate_until": 8})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained="),
        ({"pretrained": "x", "pipelin": "y"}, "did you mean 'pipeline'"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size"),
        ({"pretrained": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"pretrained": "x", "honor_until": "maybe"}, "honor_until"),
        ({"pretrained": "x", "download": "maybe"}, "download must be true or false, not 'maybe'"),
        ({"pretrained": "x", "download": 2}, "download must be true or false"),
        ({"pretrained": "x", "journal": True}, "journal must be text, not 'True'"),
        ({"pretrained": True}, "pretrained must be text"),
        ({"pretrained": "x", "max_new_tokens": 1.5}, "max_new_tokens"),
        ({"pretrained": "./nowhere/at/all"}, "no such model folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(InputError, match=message):
        PruneKitChat(**arguments)


@pytest.mark.parametrize(("said", "meant"), [("no", False), (False, False), (0, False), ("yes", True), (True, True)])
def test_no_means_no(said, meant, monkeypatch):
    def load(*given):
        raise InputError(f"download is {given[4]}")

    monkeypatch.setattr(answering.Loaded, "load", load)
    with pytest.raises(InputError, match=f"download is {meant}"):
        PruneKitChat(pretrained="x", download=said)


def test_a_system_prompt_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"Be br\xefef.")
    with pytest.raises(InputError, match=r"system_prompt: the file '.*prompt\.txt' is not UTF-8"):
        PruneKitChat(pretrained="x", system_prompt=str(tmp_path / "prompt.txt"))


def test_misfits_are_refused(loaded):
    with pytest.raises(SpecError, match="no layer 40"):
        adapter(loaded, {"name": "far", "stages": [{"use": "fastv", "at": 40, "keep": 0.5}]})


def test_wrong_device_maps_are_refused(monkeypatch):
    for wrong, message in (
        ({"device_map": "split"}, "not one of auto"),
        ({"device_map": "{cpu}"}, "no JSON mapping"),
        ({"device_map": "auto", "device": "cpu"}, "exclude one another"),
    ):
        with pytest.raises(InputError, match=message):
            PruneKitChat(pretrained="x", **wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="for one process"):
        PruneKitChat(pretrained="x", device_map="auto")


def test_parts_on_the_disk_answer_as_one_piece(loaded, checkpoint, tmp_path, monkeypatch):
    places = ("model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens")
    places += ("model.language_model.norm", "model.language_model.rotary_emb", "lm_head")
    where = dict.fromkeys(places, "cpu")
    where |= {f"model.language_model.layers.{n}": ("cpu", "disk")[n % 2] for n in range(4)}
    about = {"pipeline": json.dumps(FASTV), "device_map": json.dumps(where), "batch_size": 3}
    spread = PruneKitChat(pretrained=str(checkpoint), **about)
    assert spread.loaded.model.hf_device_map["model.language_model.layers.1"] == "disk"
    rows = docs(5)
    spread.task_dict = {"toy": {"test": rows}}
    asked = requests(rows, chat=True)
    assert texts(spread.generate_until(asked)) == texts(adapter(loaded, rows=rows, batch_size=3).generate_until(asked))
    assert spread.device == torch.device("cpu")
    monkeypatch.setattr(spread.loaded.model, "hf_device_map", {"a": 0, "b": 1, "c": "cpu"})
    monkeypatch.setattr(answering.loading, "load", lambda *_: (spread.loaded.model, None))
    with pytest.raises(Unsupported, match="spreads the model over 0, 1, across which"):
        answering.Loaded.load("x", device_map="auto")


def test_each_process_takes_its_share(loaded, data_root, tmp_path, monkeypatch):
    """Two ranks by the rule of lmms-eval: no question twice, none left out, and the answers of one process."""
    built = tasks.build(tasks.find(["pope"])[0], tasks.data_at(data_root), None)

    def answers(rank, world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        made = adapter(loaded, journal=tmp_path / f"{world}.jsonl", batch_size=4)
        made.task_dict = {"pope": built.task.dataset}
        built.task._instances = []
        built.task.build_all_requests(limit=11, rank=rank, world_size=world)
        said = texts(made.generate_until(built.task.instances))
        made.clean()
        assert (made.rank, made.world_size) == (rank, world)
        return {request.doc_id: text for request, text in zip(built.task.instances, said, strict=True)}

    whole, first, second = answers(0, 1), answers(0, 2), answers(1, 2)
    assert not set(first) & set(second) and len(first) == 6
    assert first | second == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl.rank0", "2.jsonl.rank1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_with_two_processes(checkpoint, data_root, tmp_path):
    """Over gloo on the CPU: the scores and the answers of one process."""
    found = {}
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
        command = [
            sys.executable, *launch, "-m", "lmms_eval", "--model", "prunekit", "--tasks", "pope", "--batch_size", "4",
            "--device", "cpu", "--model_args", f"pretrained={checkpoint},pipeline={json.dumps(FASTV)}", "--limit", "11",
            "--output_path", str(tmp_path / str(world)), "--log_samples",
        ]  # fmt: skip
        own = {**os.environ, "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=data_root, env=own, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads(next((tmp_path / str(world)).rglob("*_results.json")).read_text())
        lines = next((tmp_path / str(world)).rglob("*_samples_pope.jsonl")).read_text().splitlines()
        samples = sorted((one["doc_id"], one["filtered_resps"]) for one in map(json.loads, lines))
        found[world] = (results["results"]["pope"], samples)
    assert found[1] == found[2] and len(found[1][1]) == 11


def test_several_images_between_words(loaded):
    """Where a message puts an image, the prompt shows it, and each is pruned."""
    parts = [("text", "First "), ("image", picture(1)), ("text", " then "), ("image", picture(2)), ("text", ": same?")]
    content = [{"type": kind, "text" if kind == "text" else "url": value} for kind, value in parts]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{"type": "image", "url": picture(3)}, {"type": "text", "text": "And this?"}]},
    ]
    prompt = from_messages(turns, loaded.processor, "")
    assert prompt.text == (
        "USER: First <image>\n then <image>\n: same?\nASSISTANT: no\nUSER: <image>\nAnd this?\nASSISTANT:"
    )
    tally = answering.Tally()
    fastv = {"stages": [{"use": "fastv", "at": 2, "keep": 0.25}]}
    (said,) = answering.answer(loaded, prunekit.load(fastv), [prompt], decoding({}, 2), tally)
    assert (said.facts.visual_tokens, said.facts.kept_tokens) == (48, 12)


def test_prompts_know_pictures_and_videos_only(loaded):
    for part in ({"type": "audio", "url": "x.wav"}, {"type": "image", "url": "x.wav"}):
        with pytest.raises(Unsupported, match="images and videos only"):
            from_messages([{"role": "user", "content": [part]}], loaded.processor, "")


def test_placeholders_in_the_text_say_where_pictures_stand(loaded):
    shown = [picture(1), picture(2)]
    inside = from_visuals(shown, "First <image> then <image>: same?", loaded.processor, "")
    before = from_visuals(shown, "Same?", loaded.processor, "")
    assert inside.text == "USER: First <image>\n then <image>\n: same?\nASSISTANT:"
    assert before.text == "USER: <image>\n<image>\nSame?\nASSISTANT:"
    assert len(inside.images) == len(before.images) == 2


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("count", [1, 2], ids=["as many as images", "more than images"])
def test_placeholders_in_a_question_are_text_on_both_routes(wordy, chat, count):
    plain, tagged = docs(1)[0], docs(1)[0]
    tagged["q"] = f"What does {'<image> and ' * (count - 1)}<image> mean?"
    made = adapter(wordy, rows=[plain, tagged], batch_size=2, kind=PruneKitChat if chat else PruneKitSimple)
    asked = requests([plain, tagged], chat)
    assert len(texts(made.generate_until(asked))) == 2
    assert [one.visual_tokens for one in made.tally.facts] == [16, 16]
    (batch,) = made._batches(asked, {})
    assert batch[1].prompt.text == f"USER: <image>\n{tagged['q'].replace('<image>', '< image>')}\nASSISTANT:"


def test_every_placeholder_of_a_processor_is_known():
    class Processor:
        def __init__(self):
            self.image_token, self.video_token, self.boi_token = "<|image_pad|>", "<|video_pad|>", "<img>"
            self.chat_template, self.image_token_id, self.note_token = "<x>", 7, "a"

    assert placeholders(Processor()) == ("<|image_pad|>", "<|video_pad|>", "<img>")
    assert as_text("a <img> <img src=b> <|video_pad|>", Processor()) == "a < img> <img src=b> < |video_pad|>"


def test_images_stand_upright_and_truncated_ones_are_refused(wordy, tmp_path):
    lying = Image.new("RGB", (30, 60), "red")
    exif = lying.getexif()
    exif[Base.Orientation] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif)
    with Image.open(tmp_path / "lying.jpg") as opened:
        content = [{"type": "image", "url": one} for one in (opened, str(tmp_path / "lying.jpg"))]
        prompt = from_messages([{"role": "user", "content": content}], wordy.processor, "")
    assert [one.size for one in prompt.images] == [(60, 30)] * 2
    picture(3).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    adapter(wordy)  # lmms-eval has told PIL to fill such images up
    with Image.open(tmp_path / "cut.png") as opened:
        for source in (str(tmp_path / "cut.png"), opened):
            with pytest.raises((InputError, OSError), match="truncated"):
                from_messages([{"role": "user", "content": [{"type": "image", "url": source}]}], wordy.processor, "")


def broken(rows, *numbers):
    """The requests of these rows; of some the images cannot be read."""
    asked = requests(rows, chat=True)
    for number in numbers:
        context, _, *rest = asked[number].args
        asked[number].arguments = (context, lambda doc: (_ for _ in ()).throw(OSError("image is truncated")), *rest)
    return asked


def test_documents_that_cannot_be_answered_are_recorded_and_the_others_answered(wordy, monkeypatch):
    rows = docs(7)
    rows[5]["q"] = "POISON"
    whole = texts(adapter(wordy, rows=rows, batch_size=3).generate_until(requests(rows, chat=True)))
    usual = answering.encode

    def encode(loaded, prompts):
        if any("POISON" in prompt.text for prompt in prompts):
            raise RuntimeError("no kernel\nfor this")
        return usual(loaded, prompts)

    monkeypatch.setattr(answering, "encode", encode)
    made = adapter(wordy, rows=rows, batch_size=3)
    made.unanswered.tolerant, told = True, []
    made.progress = told.append
    answered = texts(made.generate_until(broken(rows, 0, 3)))
    assert answered == ["", whole[1], whole[2], "", whole[4], "", whole[6]]
    assert made.unanswered.of("toy") == {
        0: "OSError: image is truncated", 3: "OSError: image is truncated", 5: "RuntimeError: no kernel for this",
    }  # fmt: skip
    assert (made.tally.computed, sum(told)) == (4, 7)
    strict = adapter(wordy, rows=rows, batch_size=3)  # as lmms-eval's own command line has it
    with pytest.raises(OSError, match="truncated"):
        strict.generate_until(broken(rows, 0))


def test_many_failures_in_a_row_are_no_accident_of_documents(wordy):
    rows = docs(20)
    made = adapter(wordy, rows=rows)
    made.unanswered.tolerant = True
    with pytest.raises(OSError, match="truncated"):
        made.generate_until(broken(rows, *range(2, 18)))
    assert len(made.unanswered.reasons) == 15


def test_a_system_prompt_takes_the_place_of_the_task_s_own(loaded):
    given = [{"role": "system", "content": "Old."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert from_messages(given, loaded.processor, "New.").text == "SYSTEM: New.\nUSER: Hi\nASSISTANT:"
    assert from_messages(given, loaded.processor, "").text == "SYSTEM: Old.\nUSER: Hi\nASSISTANT:"


def test_a_model_without_a_chat_template_is_refused(loaded):
    class Bare:
        chat_template = None

    with pytest.raises(InputError, match="chat template"):
        from_messages([{"role": "user", "content": "Hi"}], Bare(), "")


def test_digests_see_every_pixel():
    base = picture(1)
    other = base.copy()
    other.putpixel((3, 3), (1, 2, 3))
    assert Prompt("a", (base,)).digest() == Prompt("a", (base.copy(),)).digest()
    assert len({Prompt("a", (base,)).digest(), Prompt("b", (base,)).digest(), Prompt("a", (other,)).digest()}) == 3


def test_an_image_s_identity_is_that_of_its_pixels_whatever_is_asked():
    base = picture(1)
    assert Prompt("a", (base,)).image_id == Prompt("b", (base.copy(),)).image_id
    assert Prompt("a", (base,)).image_id != Prompt("a", (picture(2),)).image_id
    assert Prompt("a", (base, base)).image_id != Prompt("a", (base,)).image_id
    assert Prompt("a", ()).image_id is None


def test_the_base_class_is_simple_and_the_chat_class_is_not():
    assert (PruneKit.is_simple, PruneKitSimple.is_simple, PruneKitChat.is_simple) == (True, True, False)
    assert decoding({}, 1024) == decoding({}, 1024)
