import functools

import pytest

pytest.importorskip("transformers")
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_evals.micro import prompts
from prunekit_evals.micro.scenes import questions, scene
from prunekit_evals.studies.micro import tokenizer
from prunekit_evals.studies.micro.model import WORDS


@functools.cache
def _tokenizer():
    return tokenizer.train()


@pytest.fixture
def trained():
    return _tokenizer()


def test_words_of_the_scenes_are_single_tokens(trained):
    assert len(set(tokenizer.single_tokens(trained, WORDS))) == len(WORDS)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives_the_round_trip_but_for_one_leading_space(text):
    tok = _tokenizer()
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.unk_token is None
    assert tok.decode(ids) == text.removeprefix(" ")


def test_standard_prompts_are_short(trained):
    for question in questions(scene(11)):
        build = prompts.scienceqa if question.choices else prompts.word
        assert len(trained(build(question))["input_ids"]) < 50
