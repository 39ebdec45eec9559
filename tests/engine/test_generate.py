"""`generate` in all the ways that are claimed, each equal to the masked reference without a cache."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from cases import pipeline

import prunekit
from prunekit.testing.tiny import IMAGE, PAD, row_of, tiny_inputs, tiny_llava
from prunekit.upstream import CACHE
from prunekit.verify.equivalence import generate
from prunekit.verify.oracle import MaskedReference
from prunekit.verify.precision import Float64Throughout

EXACT, LENGTH = 1e-9, 7
# An image token that is decoded would make the uncached reference ask for another image.
NO_IMAGE = {"suppress_tokens": [IMAGE]}
IMAGES, TEXT = (1, 2, 1), (14, 6, 9)
# Before 5.20 `generate` repeats the batch's pictures one by one for beams, and prompts with two get each other's.
WHOLE_PROMPTS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20)
BEAM_IMAGES = IMAGES if WHOLE_PROMPTS else (1, 1, 1)
NAMES = ["divprune-fastv-skip", "random-pool-divprune", "pool-pool-mlp"]
model_of = cache(tiny_llava)


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return model_of(request.param)


def batch(images=IMAGES):
    return tiny_inputs(images, TEXT)


def repeated(inputs, times):
    """Each row `times` times, as beams and several returned sequences expand it."""
    rows = inputs["pixel_values"].split(BEAM_IMAGES)
    wide = {key: value.repeat_interleave(times, 0) for key, value in inputs.items() if key != "pixel_values"}
    return wide | {"pixel_values": torch.cat([images for images in rows for _ in range(times)])}


def reference_of(model, name, inputs, run):
    from twins import pool_merges

    return MaskedReference(model, inputs, run.report, pool_merges(pipeline(name)["stages"])(run.report))


@pytest.mark.parametrize("name", NAMES)
def test_sampling_draws_the_tokens_of_the_reference(model, name):
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, **NO_IMAGE}
    with prunekit.apply(model, pipeline(name)) as run:
        torch.manual_seed(3)
        pruned = generate(model, batch(), max_new_tokens=LENGTH, **options)
    with reference_of(model, name, batch(), run).installed():
        torch.manual_seed(3)
        masked = generate(model, batch(), max_new_tokens=LENGTH, use_cache=False, **options)
    assert torch.equal(pruned.sequences, masked.sequences)
    greedy = generate(model, batch(), max_new_tokens=LENGTH, **NO_IMAGE)
    assert not torch.equal(greedy.sequences, pruned.sequences)
    for ours, theirs in zip(pruned.logits, masked.logits, strict=True):
        assert (ours - theirs).abs().max() < EXACT


@pytest.mark.parametrize("name", NAMES)
def test_three_beams_find_the_sequences_of_the_reference(model, name):
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, **NO_IMAGE}
    with prunekit.apply(model, pipeline(name)) as run:
        pruned = generate(model, batch(BEAM_IMAGES), max_new_tokens=LENGTH, **options)
    wide = repeated(batch(BEAM_IMAGES), 3)
    reference = reference_of(model, name, wide, run)
    with reference.installed():
        masked = generate(model, batch(BEAM_IMAGES), max_new_tokens=LENGTH, use_cache=False, **options)
    assert torch.equal(pruned.sequences, masked.sequences)
    assert (pruned.sequences_scores - masked.sequences_scores).abs().max() < EXACT
    tokens = pruned.sequences[:, wide["input_ids"].shape[1] :]
    taken = [pruned.logits[step][pruned.beam_indices[:, step]] for step in range(LENGTH)]
    assert (reference.logits(tokens) - torch.stack(taken, 1)).abs().max() < EXACT
    assert len({tuple(row.tolist()) for row in tokens}) > len(IMAGES), "beams must differ"
    for event in run.report.events:
        assert [event.kept[3 * row + beam] for row in range(3) for beam in range(3)] == list(event.kept)
        assert all(len(set(event.kept[3 * row : 3 * row + 3])) == 1 for row in range(3)), "beams share their prompt"


def test_several_sampled_sequences_for_each_prompt(model):
    options = {"do_sample": True, "num_return_sequences": 2}
    with prunekit.apply(model, pipeline("pool-fastv-vtw")) as run:
        torch.manual_seed(0)
        output = generate(model, batch(BEAM_IMAGES), max_new_tokens=LENGTH, **options)
    wide = repeated(batch(BEAM_IMAGES), 2)
    tokens = output.sequences[:, wide["input_ids"].shape[1] :]
    logits = reference_of(model, "pool-fastv-vtw", wide, run).logits(tokens)
    assert (logits - torch.stack(output.logits, 1)).abs().max() < EXACT


def test_rows_that_end_early(model):
    """A row that has ended is padded on; the others are not disturbed."""
    spec = pipeline("divprune-fastv-skip")
    with prunekit.apply(model, spec):
        free = generate(model, batch(), max_new_tokens=LENGTH)
    tokens = free.sequences[:, batch()["input_ids"].shape[1] :]
    stop = int(tokens[1, 2])
    with prunekit.apply(model, spec):
        ended = generate(model, batch(), max_new_tokens=LENGTH, min_new_tokens=0, eos_token_id=stop)
    decoded = ended.sequences[:, batch()["input_ids"].shape[1] :]
    for row in range(3):
        until = (tokens[row] == stop).nonzero()
        length = int(until[0, 0]) + 1 if len(until) else LENGTH
        assert decoded[row, :length].tolist() == tokens[row, :length].tolist()
        assert not decoded[row, length:].any(), "padding after the end"


def test_generate_twice_on_one_apply(model):
    """The second prompt batch, of another size, sees nothing of the first."""
    second = tiny_inputs((2, 1), (5, 11), seed=4)
    with prunekit.apply(model, pipeline("divprune-fastv-skip")) as run:
        first = generate(model, batch(), max_new_tokens=LENGTH)
        kept = run.report.events[0].kept
        output = generate(model, second, max_new_tokens=LENGTH)
        report = run.report
        again = generate(model, batch(), max_new_tokens=LENGTH)
        assert run.report.events[0].kept == kept
    assert torch.equal(first.sequences, again.sequences)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, again.logits, strict=True))
    assert report.samples == 2
    tokens = output.sequences[:, second["input_ids"].shape[1] :]
    logits = MaskedReference(model, second, report).logits(tokens)
    assert (logits - torch.stack(output.logits, 1)).abs().max() < EXACT


def test_two_applies_one_after_the_other(model):
    def logits(name):
        with prunekit.apply(model, pipeline(name)):
            return torch.stack(generate(model, batch(), max_new_tokens=LENGTH).logits, 1)

    first, other, second = logits("fastv"), logits("pool-3"), logits("fastv")
    assert torch.equal(first, second)
    assert (first - other).abs().max() > 1e-3


def test_after_exit_the_model_is_dense_and_the_report_stays(model):
    dense = generate(model, batch(), max_new_tokens=LENGTH)
    with prunekit.apply(model, pipeline("fastv")) as run:
        pruned = generate(model, batch(), max_new_tokens=LENGTH)
    report = run.report
    after = generate(model, batch(), max_new_tokens=LENGTH)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, after.logits, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(dense.logits, pruned.logits, strict=True))
    assert run.report is report
    assert report.kept_tokens == (8, 16, 8)


def test_a_pruned_cache_is_refused_outside(model):
    with prunekit.apply(model, pipeline("fastv")):
        output = model(**batch())
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    mask = torch.cat([batch()["attention_mask"], torch.ones_like(token)], 1)
    with pytest.raises(prunekit.Unsupported, match="pruned under"):
        model(input_ids=token, attention_mask=mask, **{CACHE: output[CACHE]})
    with prunekit.apply(model, pipeline("pool")), pytest.raises(prunekit.Unsupported):
        model(input_ids=token, attention_mask=mask, **{CACHE: output[CACHE]})


def test_a_loop_written_by_hand(model):
    """Without `generate` nobody passes positions: they come from the cache, which must answer for the full prompt."""
    with prunekit.apply(model, pipeline("divprune-fastv-skip")) as run:
        output = model(**batch())
        mask, logits, tokens = batch()["attention_mask"], [output.logits[:, -1]], []
        for _ in range(LENGTH):
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            output = model(input_ids=tokens[-1], attention_mask=mask, **{CACHE: output[CACHE]})
            logits.append(output.logits[:, -1])
        assert output[CACHE].get_seq_length() == mask.shape[1]
    reference = MaskedReference(model, batch(), run.report).logits(torch.cat([*tokens, tokens[-1]], 1))
    assert (torch.stack(logits, 1) - reference).abs().max() < EXACT


def test_several_tokens_at_once_after_the_prompt(model):
    with prunekit.apply(model, pipeline("divprune-fastv-skip")) as run:
        output = model(**batch())
        more = torch.randint(IMAGE + 1, 100, (3, 4), generator=torch.Generator().manual_seed(0))
        mask = torch.cat([batch()["attention_mask"], torch.ones_like(more)], 1)
        second = model(input_ids=more, attention_mask=mask, **{CACHE: output[CACHE]})
    reference = MaskedReference(model, batch(), run.report).logits(torch.cat([more, more[:, :1]], 1))
    assert (second.logits - reference[:, 1:]).abs().max() < EXACT


def test_a_second_turn_on_the_pruned_cache(model):
    prompt = tiny_inputs()
    with prunekit.apply(model, pipeline("divprune-fastv-skip")) as run:
        first = generate(model, prompt, max_new_tokens=4)
        words = torch.randint(IMAGE + 1, 100, (1, 5), generator=torch.Generator().manual_seed(0))
        longer = torch.cat([first.sequences, words], 1)
        turn = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        second = generate(model, turn, max_new_tokens=4, **{CACHE: first[CACHE]})
    tokens = second.sequences[:, prompt["input_ids"].shape[1] :]
    reference = MaskedReference(model, prompt, run.report).logits(tokens)[:, -4:]
    assert (torch.stack(second.logits, 1) - reference).abs().max() < EXACT


def test_prompt_lookup_decoding(model):
    """Guessed tokens are cropped from the cache again when they were wrong."""
    prompt = tiny_inputs()
    with prunekit.apply(model, pipeline("divprune-fastv-skip")) as run:
        output = generate(model, prompt, max_new_tokens=LENGTH, prompt_lookup_num_tokens=3, eos_token_id=PAD)
    tokens = output.sequences[:, prompt["input_ids"].shape[1] :]
    assert torch.equal(MaskedReference(model, prompt, run.report).logits(tokens).argmax(-1), tokens)


@pytest.mark.parametrize("name", ["fastv", "fastv-1", "pool-3", "divprune-fastv-skip", "stride-random-fastv"])
def test_right_padding_in_forward(model, name):
    left = batch()
    rows = [row_of(left, row)["input_ids"][0] for row in range(3)]
    longest = max(map(len, rows))
    right = {
        "input_ids": torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(longest) < len(row)).long() for row in rows]),
        "pixel_values": left["pixel_values"],
    }
    with prunekit.apply(model, pipeline(name)) as run:
        logits = model(**right).logits
        events = run.report.events
        other = model(**left).logits
    for row, tokens in enumerate(rows):
        assert (logits[row, len(tokens) - 1] - other[row, -1]).abs().max() < EXACT
    assert [event.kept for event in events] == [event.kept for event in run.report.events]


def test_a_masked_token_inside_the_prompt(model):
    prompt = tiny_inputs()
    prompt["attention_mask"][0, 3] = 0
    with prunekit.apply(model, pipeline("divprune-fastv-skip")) as run:
        output = generate(model, prompt, max_new_tokens=LENGTH)
    assert run.report.prompt_tokens == (prompt["input_ids"].shape[1] - 1,)
    tokens = output.sequences[:, prompt["input_ids"].shape[1] :]
    reference = MaskedReference(model, prompt, run.report).logits(tokens)
    assert (torch.stack(output.logits, 1) - reference).abs().max() < EXACT


def test_one_forward_without_a_cache(model):
    with prunekit.apply(model, pipeline("divprune-fastv-skip")) as run:
        output = model(**batch(), use_cache=False)
    assert output.get(CACHE) is None
    reference = MaskedReference(model, batch(), run.report).logits(torch.zeros(3, 1, dtype=torch.long))
    assert (output.logits[:, -1:] - reference).abs().max() < EXACT


def test_a_batch_without_images_runs_dense_and_says_so(model):
    prompt = tiny_inputs((0, 0), (12, 7))
    dense = generate(model, prompt, max_new_tokens=LENGTH)
    with (
        pytest.warns(prunekit.PrunekitWarning, match="no visual tokens"),
        prunekit.apply(model, pipeline("divprune-fastv-skip")) as run,
    ):
        output = generate(model, prompt, max_new_tokens=LENGTH)
    assert any("no visual tokens" in note for note in run.report.notes)
    assert run.report.visual_tokens == run.report.kept_tokens == (0, 0)
    tokens = output.sequences[:, prompt["input_ids"].shape[1] :]
    reference = MaskedReference(model, prompt, run.report).logits(tokens)
    assert (torch.stack(output.logits, 1) - reference).abs().max() < EXACT
    with pytest.warns(prunekit.PrunekitWarning), prunekit.apply(model, pipeline("fastv")):
        plain = generate(model, prompt, max_new_tokens=LENGTH)
    assert torch.equal(plain.sequences, dense.sequences)


def test_a_mixed_batch_says_which_rows_had_nothing_to_prune(model):
    with prunekit.apply(model, pipeline("fastv")) as run:
        generate(model, tiny_inputs((1, 0), (12, 9)), max_new_tokens=2)
    assert any("no visual tokens" in note and "1" in note for note in run.report.notes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"use_cache": False}, "use_cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_supported_is_refused_by_name(model, options, reason):
    with prunekit.apply(model, pipeline("fastv")), pytest.raises(prunekit.Unsupported, match=reason):
        generate(model, tiny_inputs(), max_new_tokens=3, **options)


def test_calls_without_token_ids_are_refused(model):
    prompt = tiny_inputs()
    embeddings = model.get_input_embeddings()(prompt["input_ids"])
    with prunekit.apply(model, pipeline("fastv")), pytest.raises(prunekit.Unsupported, match="input_ids"):
        model(inputs_embeds=embeddings, attention_mask=prompt["attention_mask"])
