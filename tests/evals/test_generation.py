"""Stop strings and generation arguments, as tasks write them."""

import pytest
from prunekit_evals.run.generation import decoding

from prunekit.errors import InputError


def test_the_few_shot_break_does_not_cut_answers():
    how = decoding({"until": ["\n\n"]}, 1024)
    assert how.stops == ()
    assert how.cut("First I look.\n\nIt is B.") == "First I look.\n\nIt is B."


def test_real_stop_strings_cut_at_the_first_of_them():
    how = decoding({"until": ["ASSISTANT:", "\n\n", "USER:"]}, 1024)
    assert how.cut("B USER: again ASSISTANT: no") == "B "
    assert how.cut("nothing to cut") == "nothing to cut"


def test_until_may_be_one_string_or_empty():
    assert decoding({"until": "USER:"}, 8).cut("a USER: b") == "a "
    assert decoding({"until": [""]}, 8).cut("abc") == "abc"
    assert decoding({}, 8).stops == ()


@pytest.mark.parametrize(("honor", "answer"), [("all", "a"), ("stops", "a\n\nb "), ("none", "a\n\nb USER: c")])
def test_what_is_honoured_is_a_choice(honor, answer):
    assert decoding({"until": ["\n\n", "USER:"]}, 8, honor).cut("a\n\nb USER: c") == answer


def test_an_unknown_choice_is_refused():
    with pytest.raises(InputError, match="honor_until"):
        decoding({}, 8, "sometimes")


def test_greedy_names_no_sampling_setting():
    task = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "top_k": 5, "num_beams": 1, "do_sample": False}
    arguments = dict(decoding(task, 1024).arguments)
    assert arguments == {
        "max_new_tokens": 16, "num_beams": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "sampled", "temperature"),
    [
        ({}, False, None),
        ({"temperature": 0, "do_sample": True}, False, None),
        ({"temperature": 0.7}, True, 0.7),
        ({"temperature": 0.7, "do_sample": False}, False, None),
        ({"do_sample": True}, True, None),
    ],
)
def test_when_it_samples(task, sampled, temperature):
    arguments = dict(decoding(task, 8).arguments)
    assert arguments["do_sample"] is sampled
    assert arguments.get("temperature") == temperature


def test_only_known_arguments_pass_and_the_task_is_not_changed():
    task = {"until": ["x"], "image_aspect_ratio": "original", "max_gen_toks": 32, "n": 4, "num_beams": 3}
    before = dict(task)
    arguments = dict(decoding(task, 1024).arguments)
    assert task == before
    assert arguments["max_new_tokens"] == 32
    assert set(arguments) == {"max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k"}


def test_a_task_without_a_length_gets_ours():
    assert dict(decoding({"until": ["\n\n"]}, 77).arguments)["max_new_tokens"] == 77


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "many"])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(InputError, match="max_new_tokens"):
        decoding({"max_new_tokens": length}, 8)
