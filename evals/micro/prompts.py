"""The user prompts of the standard tasks, word for word as lmms-eval builds them from a document."""

from __future__ import annotations

from prunekit_evals.micro.questions import LETTERS, Question

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
YES_NO = "Please answer yes or no."


def word(question: Question) -> str:
    """POPE, MME, GQA and TextVQA."""
    return f"{question.text}\n{WORD}"


def bare(question: Question) -> str:
    """The question alone; a yes-no question the way MME's authors put it."""
    return f"{question.text} {YES_NO}" if question.answer in ("Yes", "No") else question.text


def mmbench(question: Question) -> str:
    options = "\n".join(f"{letter}. {c}" for letter, c in zip(LETTERS, question.choices, strict=True))
    hint = f"{question.hint} " if question.hint else ""
    return f"{hint}{question.text} There are several options:\n{options}\n\n{LETTER}"


def scienceqa(question: Question) -> str:
    options = "\n".join(f"{letter}. {c}" for letter, c in zip(LETTERS, question.choices, strict=True))
    hint = f"Context: {question.hint}\n" if question.hint else ""
    return f"{hint}{question.text}\n{options}\n{LETTER}"


BY_TASK = {
    "pope": word, "mme": word, "gqa": word, "mmbench_en_dev_static": mmbench, "scienceqa_img": scienceqa,
    "textvqa_val": word, "easy_vqa": word,
}  # fmt: skip
