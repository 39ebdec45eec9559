"""Videos: which frames are shown, their way through the processors, damaged files, and the standard tasks' schemas."""

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils import load_video
from prunekit_evals.lmms import harness, scoring, tasks
from prunekit_evals.lmms.adapter import PruneKitChat, PruneKitSimple
from prunekit_evals.lmms.requests import Settings
from prunekit_evals.run import answering
from prunekit_evals.run.generation import decoding
from prunekit_evals.run.prompts import from_messages, from_visuals
from video_models import FAMILIES, clip, video_model

import prunekit
from prunekit import video_files
from prunekit.errors import InputError, Unsupported
from prunekit.video_files import Clip, Sampling

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}
FASTV = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.5}]}
GREEDY = {"until": ["\n\n"], "max_new_tokens": 4, "temperature": 0, "do_sample": False}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Three clips of 12, 9 and 3 frames, 4 frames a second."""
    folder = tmp_path_factory.mktemp("films")
    return [clip(folder / f"{number}.mp4", frames, seed=number) for number, frames in enumerate((12, 9, 3))]


@pytest.mark.parametrize("rate", [None, 1.0, 2.5])
@pytest.mark.parametrize("most", [1, 5, 32])
def test_frames_are_those_of_lmms_eval(films, most, rate):
    for film in films:
        expected = load_video.read_video(str(film), num_frm=most, fps=rate)
        if rate and not int(len(load_video.read_video(str(film), num_frm=99)) / 4 * rate):
            expected = expected[:1]  # it would show all frames of a video too short for one
        frames, _ = Clip(film, Sampling(most, rate)).shown
        assert np.array_equal(frames, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.floats(1, 120), st.integers(1, 200), st.none() | st.floats(0.01, 60))
def test_frames_follow_the_rule_of_lmms_eval(total, rate, most, fps):
    count = load_video._compute_sample_count(total, most, fps, rate)
    expected = load_video._compute_uniform_indices(total, count).tolist()
    assert Sampling(most, fps).frames(total, rate) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.floats(1, 60), st.integers(1, 64), st.floats(0, 20), st.floats(0, 20))
def test_a_piece_of_a_video_lies_in_it(total, rate, most, start, length):
    frames = Sampling(most).frames(total, rate, start, start + length)
    assert 1 <= len(frames) <= most
    assert frames == sorted(set(frames))
    assert frames[0] >= 0 and frames[-1] < total
    if len(frames) > 1:
        assert start - 1e-6 <= frames[0] / rate and frames[-1] / rate <= start + length + 1e-6


@pytest.mark.parametrize("ending", ["mkv", "avi", "webm"])
def test_containers_that_do_not_say_how_long_they_are(tmp_path, films, ending):
    film = clip(tmp_path / f"a.{ending}", 12, codec="libvpx-vp9" if ending == "webm" else "mpeg4")
    frames, origin = Clip(film, Sampling(5)).shown
    assert (origin["total_num_frames"], origin["fps"], origin["frames_indices"]) == (12, 4.0, [0, 2, 5, 8, 11])
    assert np.abs(frames.astype(int) - Clip(films[0], Sampling(5)).shown[0]).mean() < 12  # the same pictures


def test_damaged_files_are_refused_by_name(tmp_path, films, monkeypatch):
    whole = films[0].read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello " * 99}.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"{name}.mp4' cannot be decoded"):
            Clip(path, Sampling()).shown  # noqa: B018
    with pytest.raises(InputError, match=r"gone.mp4' cannot be read: No such file"):
        Clip(tmp_path / "gone.mp4", Sampling()).identity  # noqa: B018
    monkeypatch.setattr(video_files, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"PyAV, which is not installed: pip install 'prunekit\[video\]'"):
        Clip(films[0], Sampling()).shown  # noqa: B018


def test_a_few_frames_may_be_missing_at_the_end_and_no_more(films, monkeypatch):
    pick = video_files._pick

    def without(count):
        return lambda frames, wanted: pick(list(frames)[: 12 - count], wanted)

    monkeypatch.setattr(video_files, "_pick", without(2))
    frames, origin = Clip(films[0], Sampling(4)).shown
    assert (len(frames), origin["frames_indices"]) == (4, [0, 3, 6, 9])
    monkeypatch.setattr(video_files, "_pick", without(6))
    with pytest.raises(InputError, match="is not whole: 6 of its 12 frames"):
        Clip(films[0], Sampling(4)).shown  # noqa: B018


@pytest.mark.parametrize("most", [0, True, 2.5])
def test_wrong_samplings_are_refused(most):
    with pytest.raises(InputError, match="max_frames"):
        Sampling(most)
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="fps"):
            Sampling(8, rate)


def ask(family, shown, sampling=None):
    parts = video_model(family)
    return [from_visuals([str(film)], text, parts.processor, "", sampling or Sampling(6)) for text, film in shown]


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_go_through_the_model_s_own_processor(films, family):
    """The same answers, one by one, in a batch, and from a plain call of processor and `generate`."""
    parts, how = video_model(family), decoding({}, 3)
    prompts = ask(family, [("What?", films[0]), ("Who is it?", films[1])])
    assert [prompt.shape for prompt in prompts] == [(False, (6,))] * 2
    tally = answering.Tally()
    for pipeline in map(prunekit.load, (DENSE, FASTV)):
        together = answering.answer(parts, pipeline, prompts, how, tally)
        alone = [answering.answer(parts, pipeline, [prompt], how, tally)[0] for prompt in prompts]
        assert [one.text for one in together] == [one.text for one in alone]
        assert [one.facts for one in together] == [one.facts for one in alone]
        with torch.inference_mode(), prunekit.apply(parts.model, pipeline):
            frames = np.stack(prompts[0].images or Clip(films[0], Sampling(6)).shown[0])
            origin = {"total_num_frames": 12, "fps": 4.0, "frames_indices": [0, 2, 4, 6, 8, 11]}
            plain = parts.processor(
                text=[prompts[0].text], videos=[frames], video_metadata=[origin], do_sample_frames=False,
                return_tensors="pt",
            ).to(torch.float64)  # fmt: skip
            said = parts.model.generate(**plain, max_new_tokens=3, do_sample=False)
        assert parts.processor.tokenizer.decode(said[0, plain["input_ids"].shape[1] :]) == together[0].text
    assert all(one.facts.kept_tokens < one.facts.visual_tokens for one in together)


def test_frames_are_images_to_a_model_without_videos(loaded, films):
    prompt = from_visuals([str(films[0])], "What?", loaded.processor, "", Sampling(3))
    assert prompt.text == "USER: <image>\n<image>\n<image>\nWhat?\nASSISTANT:"
    assert (prompt.shape, len(prompt.images)) == ((True, ()), 3)
    assert np.array_equal(np.stack(prompt.images), Clip(films[0], Sampling(3)).shown[0])


def requests(rows, chat=True, arguments=GREEDY):
    """As lmms-eval makes them of tasks whose `doc_to_visual` gives paths."""

    def messages(doc):
        shown = [{"type": "video", "url": str(film)} for film in doc["films"]]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": doc["q"]}]}]

    def visuals(doc):
        return [str(film) for film in doc["films"]]

    made = []
    for number, doc in enumerate(rows):
        args = (
            (doc["q"], messages, arguments) if chat else (doc["q"], arguments, lambda doc: list(map(str, doc["films"])))
        )
        about = {"task": "toy", "doc_id": number, "repeats": 1}
        made.append(Instance("generate_until", (*args, number, "toy", "test"), 0, about))
    return made


def adapter(family, rows, pipeline=FASTV, kind=PruneKitChat, journal="", **settings):
    made = kind.over(video_model(family), prunekit.load(pipeline), Settings(**settings), str(journal))
    made.task_dict = {"toy": {"test": rows}}
    return made


def texts(results):
    return [result.text for result in results]


def test_questions_with_different_numbers_of_frames_and_without(films):
    rows = [{"q": f"Is it {n}?", "films": [films[n % 3]] if n % 4 else []} for n in range(9)]
    with pytest.warns(prunekit.errors.PrunekitWarning, match="no visual tokens"):
        several = adapter("llava_onevision", rows, batch_size=4)
        together = texts(several.generate_until(requests(rows)))
        alone = texts(adapter("llava_onevision", rows).generate_until(requests(rows, chat=False)))
    assert together == alone
    assert len(set(together)) > 4
    shown = {number: several.tally.images.get(("toy", number)) for number in range(9)}
    assert shown[0] is None
    assert shown[1] == shown[7] != shown[2]  # the same film, which groups questions in statistics


def test_a_journal_knows_videos_by_file_and_frames(films, tmp_path, monkeypatch):
    rows = [{"q": "Is it?", "films": [films[0]]}]
    first = adapter("qwen2_5_vl", rows, journal=tmp_path / "j.jsonl")
    said = texts(first.generate_until(requests(rows)))
    first.clean()
    for other in ({"sampling": Sampling(4)}, {"sampling": Sampling(32, 1.0)}):
        again = adapter("qwen2_5_vl", rows, journal=tmp_path / "j.jsonl", **other)
        again.generate_until(requests(rows))
        again.clean()
        assert again.tally.journaled == 0
    last = adapter("qwen2_5_vl", rows, journal=tmp_path / "j.jsonl")
    last.tally.first_prompts.append(None)  # nothing is left to be timed, so nothing has to be decoded
    monkeypatch.setattr(video_files, "_decode", lambda clip: pytest.fail("decoded for nothing"))
    assert texts(last.generate_until(requests(rows))) == said


def test_a_document_with_a_broken_video_is_named(films, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(films[0].read_bytes()[:900])
    for bad, reason in ((tmp_path / "bad.mp4", "cannot be decoded"), (tmp_path / "no.mp4", "cannot be read")):
        rows = [{"q": "Is it?", "films": [films[0]]}, {"q": "Or not?", "films": [bad]}]
        with pytest.raises(InputError, match=f"document 1 of task 'toy': video .*{reason}"):
            adapter("qwen2_5_vl", rows, batch_size=4).generate_until(requests(rows))


def test_a_task_that_would_end_the_process_ends_its_document(films):
    def gone(doc):
        sys.exit("video path: x.mp4 does not exist, please check")

    request = Instance(
        "generate_until", ("Q", GREEDY, gone, 0, "toy", "test"), 0, {"task": "toy", "doc_id": 0, "repeats": 1}
    )
    with pytest.raises(InputError, match=r"document 0 of task 'toy': video path: x.mp4 does not exist"):
        adapter("qwen2_5_vl", [{}]).generate_until([request])


def test_pieces_of_videos_and_what_is_none(films):
    parts = video_model("qwen2_5_vl").processor
    for piece in (
        {"type": "video", "url": {"path": str(films[0]), "video_start": 1, "video_end": 2}},
        {"type": "video", "url": str(films[0]), "start_time": 1, "end_time": 2},
    ):
        (shown,) = from_messages([{"role": "user", "content": [piece]}], parts, "", Sampling(32)).videos
        assert shown.shown[1]["frames_indices"] == [4, 5, 6, 7, 8]
    for bad, reason in (
        ({"type": "audio", "url": "a.wav"}, "has audio in a prompt"),
        ({"type": "video", "url": "a.wav"}, "cannot be read"),
        ({"type": "video", "url": 5}, "shows int as a video"),
        ({"type": "audio", "url": {"array": [0.0], "sampling_rate": 8000}}, "has audio in a prompt"),
    ):
        with pytest.raises((Unsupported, InputError), match=reason):
            from_messages([{"role": "user", "content": [bad]}], parts, "").digest()
    film = from_messages([{"role": "user", "content": [{"type": "audio", "url": "a.webm"}]}], parts, "")
    assert len(film.videos) == 1  # lmms-eval takes every .webm for a sound


def test_a_template_that_leaves_videos_out_is_refused(films):
    class Deaf:
        video_processor, video_token, image_token, chat_template = object(), "<video>", "<image>", "yes"

        def apply_chat_template(self, messages, **kwargs):
            return "USER: What?"

    with pytest.raises(InputError, match="does not write '<video>' once for each video"):
        from_visuals([str(films[0])], "What?", Deaf(), "")


# The columns that the tasks read, as on the hub.
SCHEMAS = {
    "videomme": ("lmms-eval/Video-MME", "test", "videomme/data", lambda n: {
        "video_id": f"{n:03}", "duration": "short", "domain": "Knowledge", "sub_category": "Astronomy", "url": "",
        "videoID": f"film{n % 2}", "question_id": f"{n:03}-1", "task_type": "Counting Problem", "question": "How many?",
        "options": ["A. 1.", "B. 2.", "C. 3.", "D. 4."], "answer": "ABCD"[n % 4],
    }),
    "mvbench_action_antonym": ("OpenGVLab/MVBench", "train", "mvbench_video/ssv2_video_mp4", lambda n: {
        "video": f"film{n % 2}.mp4", "question": "What is it?", "candidates": ["up", "down"],
        "answer": ["up", "down"][n % 2],
    }),
    "mlvu_dev": ("sy1998/MLVU_dev", "test", "mlvu", lambda n: {
        "video_name": f"film{n % 2}.mp4", "question": "Which one?\n(A) a\n(B) b", "answer": "AB"[n % 2],
        "task_type": ["count", "ego"][n % 2], "duration": 3.0,
    }),
}  # fmt: skip
METRICS = {
    "videomme": "videomme_perception_score",
    "mvbench_action_antonym": "mvbench_accuracy",
    "mlvu_dev": "mlvu_percetion_score",
}


def video_root(folder, task, films, rows=4):
    """A data root with one task: its rows under the name on the hub, its videos where it looks for them."""
    import datasets

    name, split, place, row = SCHEMAS[task]
    (folder / name).mkdir(parents=True)
    datasets.Dataset.from_list([row(n) for n in range(rows)]).to_parquet(folder / name / f"{split}-0.parquet")
    card = f"configs:\n- config_name: {'action_antonym' if 'mvbench' in task else 'default'}\n"
    card += f"  data_files:\n  - split: {split}\n    path: {split}-0.parquet\n"
    (folder / name / "README.md").write_text(f"---\n{card}---\n")
    (folder / place).mkdir(parents=True)
    for number, film in enumerate(films[:2]):
        (folder / place / f"film{number}.mp4").write_bytes(film.read_bytes())
    return folder


@pytest.mark.parametrize("task", SCHEMAS)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:invalid escape:DeprecationWarning")
def test_the_standard_video_tasks(task, films, tmp_path, monkeypatch):
    """lmms-eval's own tasks and metrics, on rows in their schemas."""
    if task == "videomme":  # its code reads subtitles by it, which this task has none of
        monkeypatch.setitem(sys.modules, "cv2", sys.modules.get("cv2") or ModuleType("cv2"))
    data = tasks.data_at(video_root(tmp_path / "data", task, films))
    built = tasks.build(tasks.find([task])[0], data, None)
    made = PruneKitChat.over(video_model("qwen2_5_vl"), prunekit.load(FASTV), Settings(2, sampling=Sampling(6)))
    found = harness.evaluate(made, built, tmp_path / "files")
    assert len(found["samples"][task]) == 4
    assert f"{METRICS[task]},none" in found["results"][task]
    assert [(one.visual_tokens, one.kept_tokens) for one in made.tally.facts] == [(12, 6)] * 4
    assert len(set(made.tally.images.values())) == 2
    scored = scoring.questions(task, found["samples"][task], {n: made.tally.images[task, n] for n in range(4)})
    assert {one.score for one in scored} <= {0.0, 1.0} and len({one.group for one in scored}) == 2
    simple = PruneKitSimple.over(video_model("qwen2_5_vl"), prunekit.load(FASTV), Settings(1, sampling=Sampling(6)))
    simple.task_dict = {task: built.task.dataset}
    asked = Instance(
        "generate_until", ("Q", GREEDY, built.task.doc_to_visual, 1, task, built.task.config.test_split), 0,
        {"task": task, "doc_id": 1, "repeats": 1},
    )  # fmt: skip
    assert len(texts(simple.generate_until([asked]))) == 1


def test_videos_that_are_nowhere_are_named_before_anything_is_fetched(tmp_path, films, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    root = video_root(tmp_path / "data", "mlvu_dev", films)
    (root / "mlvu").rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"'mlvu_dev' looks for its videos in .*data/mlvu or .*home/mlvu"):
        tasks.build(tasks.find(["mlvu_dev"])[0], tasks.data_at(root), None)
    (tmp_path / "home").mkdir()
    (root / "elsewhere").rename(tmp_path / "home" / "mlvu")
    built = tasks.build(tasks.find(["mlvu_dev"])[0], tasks.data_at(root), None)
    assert built.task.doc_to_visual(built.task.dataset["test"][1]) == [str(tmp_path / "home" / "mlvu" / "film1.mp4")]


def test_what_a_task_lacks_is_said_before_its_data_is_looked_for(tmp_path, films, monkeypatch):
    data = tasks.data_at(video_root(tmp_path, "mlvu_dev", films))
    monkeypatch.setattr(video_files, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="PyAV, which is not installed"):
        tasks.build(tasks.find(["mlvu_dev"])[0], data, None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match="'videomme' needs the module 'cv2', which is not installed"):
        tasks.build(tasks.find(["videomme"])[0], data, None)


def test_videos_are_part_of_the_identity_of_data(tmp_path, films):
    root = video_root(tmp_path, "mlvu_dev", films)
    first = tasks.data_at(root).identity
    (root / "mlvu" / "film0.mp4").write_bytes(b"other")
    assert tasks.data_at(root).identity != first


def test_settings_are_values():
    assert replace(Settings(), sampling=Sampling(8)) == Settings(sampling=Sampling(8)) != Settings()
