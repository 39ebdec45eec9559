"""The tokenizer: byte-level BPE, so that no text is ever unknown, with the scenes' words as single tokens."""

from __future__ import annotations

import random

import numpy as np
from prunekit_evals.micro import prompts
from prunekit_evals.micro.compose import scene
from prunekit_evals.micro.lexicon import THEMES
from prunekit_evals.micro.questions import questions
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
SIZE = 1024

# Instructions that end most prompts of the standard tasks are one token each: they carry no information
# about the image, and at this size ten tokens of them would be half of every question.
PHRASES = (prompts.WORD, prompts.LETTER, prompts.YES_NO)

ENGLISH = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said what
its about than into them can only other time new some could these two may first then do any like my now over
such our man me even most made after also did many off before must well back through years much where your way
down should because long each just state people those too mister how little good world make very year still see
work life men day get here between under never same another know while last might us great old come since go
right used take three himself few house use again place around small found thought went say part once general
high upon school every answer question image picture photo describe detail shown following correct option
select choose read write word number count how many people person text sign street red green blue yellow
purple white black orange brown pink gray left right top bottom middle center above below next front behind
circle rectangle triangle shape teal brown gray contain present kind object color sign
yes no true false none both either neither zero four five six seven eight nine ten hello please thank
"""


def _corpus() -> list[str]:
    """Prompts of a few thousand scenes, and plain English words for everything else."""
    lines: list[str] = []
    for seed in range(1500):
        for q in questions(scene(seed)):
            lines += [f" {q.answer}", prompts.scienceqa(q) if q.choices else q.text]
            lines.append(q.text + " There are several options:\nUSER: ASSISTANT:")
    lines += [f" {noun} {theme}" for theme, nouns in THEMES.items() for noun in nouns] * 40
    shuffled = random.Random(0)
    words = ENGLISH.split()
    for _ in range(120):
        shuffled.shuffle(words)
        lines.append(" " + " ".join(words))
    return lines


def train() -> PreTrainedTokenizerFast:
    """Train the tokenizer; deterministic."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Answers start with a space after "ASSISTANT:"; like LLaVA's own tokenizer, decoding drops it, since
    # metrics such as GQA's exact match compare without trimming.
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(PHRASES),
        special_tokens=[BOS, EOS, PAD, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
        extra_special_tokens={"image_token": IMAGE}, model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def single_tokens(tokenizer: PreTrainedTokenizerFast, words: tuple[str, ...]) -> np.ndarray:
    """The token id of each word with its leading space; raises where a word is more than one token."""
    ids = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in words]
    split = [w for w, i in zip(words, ids, strict=True) if len(i) != 1]
    if split:
        raise ValueError(f"not single tokens: {split}")
    return np.array([i[0] for i in ids])
