"""A processor of another model, and prompts with other numbers of visual tokens than features: both sides are named."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

import prunekit
from prunekit.errors import InputError
from prunekit.families import find
from prunekit.testing.tiny import IMAGE_SIZE, PATCH, VOCABULARY, tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model, tiny_names

FASTV = {"stages": [{"use": "fastv", "at": 2, "keep": 0.4}]}
DENSE = {"stages": [{"use": "dense"}]}
MODEL = rf"LlavaConfig\(.*vision_config.patch_size={PATCH}, vision_config.image_size={IMAGE_SIZE}\)"


def processor_of(patch=PATCH, side=IMAGE_SIZE):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", *(f"w{number}" for number in range(5, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        images, fast, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


@pytest.fixture
def model():
    model = tiny_llava(dtype=torch.float32)
    model.ran = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: model.ran.append(1))
    return model


def call(model, processor, way):
    inputs = processor(images=[Image.new("RGB", (20, 14))], text=["w9 <image> w8"], return_tensors="pt")
    options = {"beams": {"num_beams": 2}, "static": {"cache_implementation": "static"}}.get(way, {})
    return model(**inputs) if way == "forward" else model.generate(**inputs, max_new_tokens=2, **options)


@pytest.mark.parametrize("stages", [FASTV, DENSE], ids=["pruned", "dense"])
@pytest.mark.parametrize("way", ["forward", "generate", "beams", "static"])
def test_a_processor_of_another_patch_size(model, way, stages):
    with prunekit.apply(model, stages, processor=processor_of()):
        call(model, processor_of(), way)
    model.ran.clear()
    wrong = processor_of(patch=PATCH // 2)
    counts = "tokens, for which the model makes (16|32) features"
    with prunekit.apply(model, stages, processor=wrong) as run:
        both = rf"{counts}; .*{MODEL}, the processor LlavaProcessor\(patch_size={PATCH // 2}, "
        with pytest.raises(InputError, match=both):
            call(model, wrong, way)
        assert run.report is None and not model.ran
    alone = rf"{counts}; .*{MODEL}; with apply\(..., processor=processor\)"
    with prunekit.apply(model, stages), pytest.raises(InputError, match=alone):
        call(model, wrong, way)
    assert not model.ran


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_processor_of_another_image_size(model, way):
    wrong = processor_of(side=IMAGE_SIZE // 2)
    said = rf"the model could not encode its images \(.*{IMAGE_SIZE // 2}.*\); .*{MODEL}, the processor LlavaProcessor"
    with prunekit.apply(model, FASTV, processor=wrong), pytest.raises(InputError, match=said):
        call(model, wrong, way)
    assert not model.ran


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("family", tiny_names())
def test_one_visual_token_too_few_or_too_many(family, more):
    """Of every family; also where the stock model would not notice."""
    model = tiny_model(family, dtype=torch.float32)
    inputs = tiny_batch(model)
    (token,) = {
        token for modality in find(model).modalities if modality.name == "image" for token in modality.token_ids
    }
    ids = inputs["input_ids"]
    row, column = (ids == token).nonzero()[-1].tolist()
    text = int(ids[ids != token][-1])
    place = column if more < 0 else column + 1
    ids[row, place] = text if more < 0 else token
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name][row, place] = int(more > 0)
    ran = []
    find(model).layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with prunekit.apply(model, FASTV), pytest.raises(InputError, match="for which the model makes"):
        model(**inputs)
    assert not ran


def test_other_errors_stay_what_they_are(model):
    def fail(*_):
        raise ValueError("of somebody's hook")

    handle = model.get_decoder().layers[1].register_forward_pre_hook(fail)
    with prunekit.apply(model, FASTV), pytest.raises(ValueError, match=r"^of somebody's hook$") as caught:
        model(**tiny_inputs(dtype=torch.float32))
    assert not isinstance(caught.value, prunekit.PrunekitError)
    handle.remove()

    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate a tensor of some size")

    model.model.vision_tower.register_forward_pre_hook(full)
    with prunekit.apply(model, FASTV), pytest.raises(torch.OutOfMemoryError):
        model(**tiny_inputs(dtype=torch.float32))


def test_masked_images_are_no_fault_of_the_processor(model):
    """Half an image may be masked; that the prompt has its tokens is what counts."""
    inputs = tiny_inputs(dtype=torch.float32)
    inputs["attention_mask"][0, (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:4, 0]] = 0
    with prunekit.apply(model, FASTV) as run:
        model(**inputs)
    assert run.report.visual_tokens == (12,)


LONG = "more than the model's max_position_embeddings of"


def notes(model, inputs, way, stages=FASTV):
    with prunekit.apply(model, stages) as run:
        model(**inputs) if way == "forward" else model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert LONG not in str(run.report) or any(LONG in note for note in run.report.notes)
    return [note for note in run.report.notes if LONG in note]


@pytest.mark.parametrize("stages", [FASTV, DENSE], ids=["pruned", "dense"])
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_prompts_beyond_the_positions_of_the_model_are_noted(way, stages):
    model, inputs = tiny_llava(dtype=torch.float32), tiny_inputs((1, 2), (9, 14), dtype=torch.float32)
    length = inputs["input_ids"].shape[1]
    model.config.text_config.max_position_embeddings = length
    assert notes(model, inputs, way, stages) == []
    model.config.text_config.max_position_embeddings = length - 1
    (note,) = notes(model, inputs, way, stages)
    assert note.startswith(f"the prompt takes {length} positions, {LONG} {length - 1}: ")


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_tokens_of_an_image_may_share_positions(way):
    """With one position for each row and column, a prompt takes fewer than it has tokens."""
    model = tiny_model("qwen2_vl", dtype=torch.float32)
    inputs = tiny_batch(model)
    seen = []
    model.get_decoder().rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(int(args[1].max()) + 1))
    model(**inputs)
    (needed,) = seen
    assert needed < inputs["input_ids"].shape[1]
    for limit, wanted in ((needed, 0), (needed - 1, 1)):
        model.config.text_config.max_position_embeddings = limit
        assert len(notes(model, inputs, way)) == wanted
