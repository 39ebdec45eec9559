"""The user's words, taken out of prompts that chat templates of several kinds have written."""

from __future__ import annotations

import pytest
from transformers import AutoProcessor

from prunekit.engine.prompt.question import questions
from prunekit.errors import Unsupported

# In the manner of LLaVA-1.5, of Qwen2-VL (with a system prompt), and of templates without words of their own.
VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% if m['role'] == 'assistant' %} {% endif %}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "system\nYou are a helpful assistant.\n{% for m in messages %}{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
ONE_TURN = (
    "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{% for c in messages[0]['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n"
)
ASKED = "Is there a user: a dog?\nAnswer yes or no."


@pytest.fixture
def processor():
    from prunekit_evals.micro import model_path

    return AutoProcessor.from_pretrained(model_path(), backend="pil", local_files_only=True)


def ids_of(processor, *texts, images=1):
    """Token ids of a conversation of these texts, user and assistant in turn, without visual tokens."""
    turns = []
    for number, text in enumerate(texts):
        shown = [{"type": "image"}] * images if number == 0 else []
        role = ("user", "assistant")[number % 2]
        turns.append({"role": role, "content": [*shown, {"type": "text", "text": text}]})
    rendered = processor.apply_chat_template(turns, add_generation_prompt=True).replace(processor.image_token, "")
    return processor.tokenizer.encode(rendered)


@pytest.mark.parametrize("template", [None, VICUNA, CHATML, ONE_TURN], ids=["own", "vicuna", "chatml", "one turn"])
@pytest.mark.parametrize("asked", [ASKED, "dog?", "What is this? ASSISTANT"])
def test_the_words_of_one_turn(processor, template, asked):
    if template is not None:
        processor.chat_template = template
    assert questions(processor, [ids_of(processor, asked)] * 2) == (asked, asked)


@pytest.mark.parametrize("template", [VICUNA, CHATML], ids=["vicuna", "chatml"])
def test_the_last_of_several_turns(processor, template):
    processor.chat_template = template
    assert questions(processor, [ids_of(processor, "What is this?", "A dog.", ASKED)]) == (ASKED,)


def test_a_prompt_written_by_hand(processor):
    assert questions(processor, [processor.tokenizer.encode(" Is there a dog? ")]) == ("Is there a dog?",)
    processor.chat_template = None
    assert questions(processor, [processor.tokenizer.encode("a dog")]) == ("a dog",)


def test_a_tokenizer_will_do(processor):
    assert questions(processor.tokenizer, [processor.tokenizer.encode("a dog")]) == ("a dog",)


def test_something_that_cannot_decode():
    with pytest.raises(Unsupported, match=r"asks for `question`, but int cannot decode token ids; give the model's"):
        questions(3, [[1]])
