"""Tasks in several rounds: what is asked when, one cache where rounds go on, and exactness in float64."""

import pytest
import torch
from lmms_eval.api.instance import Instance
from prunekit_evals.lmms.adapter import PruneKitChat, PruneKitSimple
from prunekit_evals.lmms.requests import Settings
from prunekit_evals.run.answering import Tally, encode
from prunekit_evals.run.generation import decoding
from prunekit_evals.run.prompts import from_messages
from prunekit_evals.run.rounds import Rounds
from video_models import clip, video_model

import prunekit
from prunekit.errors import InputError, Unsupported
from prunekit.verify.oracle import MaskedReference

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}
WHOLE = {"name": "whole", "stages": [{"use": "fastv", "at": 2, "keep": 1.0}]}
FASTV = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.5}]}
EXACT = 1e-9
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("films") / "a.mp4")


def talk(processor, film, *said):
    """A conversation about a film: questions of the user and answers in turn."""
    turns = [{"role": "user", "content": [{"type": "video", "url": str(film)}, {"type": "text", "text": said[0]}]}]
    for number, text in enumerate(said[1:]):
        turns.append({"role": ("assistant", "user")[number % 2], "content": [{"type": "text", "text": text}]})
    return from_messages(turns, processor, "")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "internvl"])
def test_later_rounds_on_the_pruned_cache_are_exact(film, family, request):
    """At keep 1 as the dense model answers the whole conversation; below it as the masked reference."""
    parts, how = video_model(family), decoding({}, 4)
    logits = []
    handle = parts.model.register_forward_hook(lambda model, _, output: logits.append(output.logits[:, -1]))
    request.addfinalizer(handle.remove)  # what `generate` reports is float32
    for pipeline in (WHOLE, FASTV):
        logits.clear()
        first = talk(parts.processor, film, "What is it?")
        with Rounds(parts, prunekit.load(pipeline), Tally()) as rounds:
            answer = rounds.ask(first, how)
            report = rounds._run.report
            second = talk(parts.processor, film, "What is it?", answer.text, "And where?")
            rounds.ask(second, how)
            assert rounds.continued == 1
            held = torch.tensor(rounds._held)
        inputs, later = encode(parts, [first]), logits[4:8]
        told = held[inputs["input_ids"].shape[1] :][None]
        if pipeline is WHOLE:
            with torch.inference_mode():
                expected = parts.model(**encode(parts, [second])).logits[:, -1]
            assert (later[0] - expected).abs().max() < EXACT
        reference = MaskedReference(parts.model, inputs, report).logits(told)
        assert (torch.stack(later[:-1], 1) - reference[:, -3:]).abs().max() < EXACT


def test_what_was_said_otherwise_is_taken_back(film):
    """A task that shortens an answer, or changes it, goes on from where both agree; a changed question begins anew."""
    parts, how = video_model("llava_onevision"), decoding({}, 4)
    pipeline = prunekit.load(FASTV)
    with Rounds(parts, pipeline, Tally()) as rounds:
        said = rounds.ask(talk(parts.processor, film, "What?"), how).text
        on = rounds.ask(talk(parts.processor, film, "What?", said[:2] + "!", "Why?"), how)
        assert (rounds.continued, on.facts) == (1, None)
        other = rounds.ask(talk(parts.processor, film, "Who?", said, "Why?"), how)
        assert rounds.continued == 1
        assert other.facts.kept_tokens < other.facts.visual_tokens
    with Rounds(parts, pipeline, Tally()) as alone:
        assert alone.ask(talk(parts.processor, film, "Who?", said, "Why?"), how).text == other.text


def test_a_cache_that_cannot_forget_is_not_gone_on_from(film):
    """Recurrent states hold every token; an answer that was changed is then asked about anew."""
    from prunekit_evals.run.answering import Loaded

    from prunekit.testing.tiny_families import tiny_model

    parts = video_model("qwen3_vl")
    recurrent = Loaded("qwen3_5", "tiny", tiny_model("qwen3_5", layers=4), parts.processor)
    how = decoding({}, 4)
    with Rounds(recurrent, prunekit.load(FASTV | {"stages": [{"use": "stride", "keep": 0.5}]}), Tally()) as rounds:
        said = rounds.ask(talk(parts.processor, film, "What?"), how).text
        assert rounds.ask(talk(parts.processor, film, "What?", said[:1] + "~~", "Why?"), how).facts is not None
        assert rounds.continued == 0


class Quiz:
    """A task of three rounds in the way of lmms-eval's own: each asks by itself, and sees what was said before."""

    def __init__(self, film, history=False):
        self.film, self.history, self.seen = film, history, []

    def to_text(self, doc, previous_output=None, round_idx=None, previous_round_info=None):
        self.seen.append((round_idx, tuple(previous_output), previous_round_info))
        if round_idx == 3:
            return None, None, True, previous_output, None
        shown = [str(self.film)] if round_idx == 2 else []
        return shown, f"Round {round_idx} after {previous_output[-1]}?", False, previous_output, round_idx

    def to_messages(self, doc, round_idx=None, previous_output=None, previous_round_info=None):
        shown = {"type": "video", "url": str(self.film)}
        first = {"role": "user", "content": [shown, {"type": "text", "text": "Round 0?"}]}
        if round_idx is None:
            return [first]
        self.seen.append((round_idx, tuple(previous_output), previous_round_info))
        if round_idx == 3:
            return None, True, previous_output, None
        turns = [first]
        for number, said in enumerate(previous_output):
            turns.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
            turns.append({"role": "user", "content": [{"type": "text", "text": f"Round {number + 1}?"}]})
        return turns, False, previous_output, round_idx


def requests(quiz, chat, count=2):
    made = []
    for number in range(count):
        args = ("Round 0?", GREEDY, lambda doc: [str(quiz.film)], quiz.to_text) if not chat else (
            "Round 0?", quiz.to_messages, GREEDY
        )
        about = {"task": "toy", "doc_id": number, "repeats": 1}
        made.append(Instance("generate_until_multi_round", (*args, number, "toy", "test"), 0, about))
    return made


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "simple"])
@pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
def test_rounds_are_asked_as_lmms_eval_asks_them(film, chat):
    quiz = Quiz(film)
    kind = PruneKitChat if chat else PruneKitSimple
    made = kind.over(video_model("llava_onevision"), prunekit.load(FASTV), Settings())
    made.task_dict = {"toy": {"test": [{}, {}]}}
    answers = made.generate_until_multi_round(requests(quiz, chat))
    assert [len(said) for said in answers] == [3, 3] and answers[0] == answers[1]
    assert quiz.seen[:3] == [
        (1, tuple(answers[0][:1]), None), (2, tuple(answers[0][:2]), 1), (3, tuple(answers[0]), 2)
    ]  # fmt: skip
    # In messages the conversation goes on, so that one prompt is pruned; else the third round shows the film again.
    visual = [one for one in made.tally.facts if one.visual_tokens]
    assert len(visual) == (2 if chat else 4)
    assert made.tally.computed == 6


def test_a_broken_video_of_a_round_names_its_document(film, tmp_path):
    quiz = Quiz(tmp_path / "gone.mp4")
    made = PruneKitChat.over(video_model("llava_onevision"), prunekit.load(FASTV), Settings())
    made.task_dict = {"toy": {"test": [{}, {}]}}
    with pytest.raises(InputError, match=r"document 0 of task 'toy': video .*cannot be read"):
        made.generate_until_multi_round(requests(quiz, chat=True))
    with pytest.raises(Unsupported, match="'toy' wants the model to draw pictures"):
        made.generate_visual_cot(requests(quiz, chat=True))
