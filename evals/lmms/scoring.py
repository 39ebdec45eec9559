"""One score in [0, 1] for every question, read from what the task's own code said about it.

Tasks report aggregates; intervals and paired differences need questions. Where a task's per-question record has no
clear score, there is none, and only its aggregate is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prunekit_evals.run.results import Question

# The metric that stands for a task where it reports several.
PRIMARY = {"pope": "pope_accuracy", "mmbench_en_dev_static": "gpt_eval_score"}


def questions(
    task: str,
    samples: Sequence[Mapping[str, Any]],
    images: Mapping[int, str] | None = None,
    unanswered: Mapping[int, str] | None = None,
) -> tuple[Question, ...]:
    """The questions of one task, by number, with their answers, scores and images.

    samples: as `simple_evaluate` logs them. images: question -> identity of its images, where known. unanswered:
    question -> why it could not be answered: it is wrong, whatever the task makes of an empty answer.
    """
    lost = unanswered or {}
    known = images or {}
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    mmbench = _mmbench(ordered) if task.startswith("mmbench") else None
    by_number: dict[int, Question] = {}
    for sample in ordered:
        number = int(sample["doc_id"])
        score = mmbench.get(number) if mmbench is not None else _score(task, sample)
        # Several filters log a question several times; the last word is that of the last filter, as in the table.
        group = known.get(number) or _group(sample)
        asked = (_document(sample), _asked(sample), _told(sample.get("target")))
        said = _text(sample.get("filtered_resps"))
        if number in lost:
            said, score = "", None if score is None else 0.0
        by_number[number] = Question(number, said, score, group, *asked, lost.get(number, ""))
    return tuple(by_number.values())


def _score(task: str, sample: Mapping[str, Any]) -> float | None:
    metrics = {name: value for name, value in sample.items() if name not in NOT_METRICS}
    if PRIMARY.get(task) in metrics:
        metrics = {PRIMARY[task]: metrics[PRIMARY[task]]}
    return next((score for value in metrics.values() if (score := _number(value)) is not None), None)


NOT_METRICS = frozenset(
    {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media"}
)


SAID = ("pred", "parsed_pred", "pred_answer")  # what tasks call a prediction beside its `answer`


def _number(value: Any) -> float | None:
    """A score, from a number, from `{"score": ...}`, or from a prediction beside its answer."""
    if isinstance(value, Mapping):
        if "score" in value:
            return _number(value["score"])
        said = next((value[name] for name in SAID if name in value), None)
        if isinstance(said, str) and isinstance(value.get("answer"), str):
            return float(said.strip().lower() == value["answer"].strip().lower())
        return None
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    return None


def _mmbench(samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """MMBench scores a question together with its rotations, which count only with it: its own rule, one at a time."""
    import pandas
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    rows: dict[int, list[dict[str, Any]]] = {}
    place: dict[int, int] = {}
    for sample in samples:
        row = sample.get("gpt_eval_score")
        if not isinstance(row, Mapping):
            return {}
        index = int(row["index"])
        rows.setdefault(index % 10**6, []).append({key if key in "ABCDE" else key.lower(): row[key] for key in row})
        place.setdefault(index % 10**6, int(sample["doc_id"]))
    scores = {}
    for main, group in rows.items():
        table = pandas.DataFrame(group)
        answers = dict(zip(table["index"], table["answer"], strict=True))
        scores[place[main]] = float(mmbench_evaluator.eval_sub_data(table, answers, static_only=True))
    return scores


def _group(sample: Mapping[str, Any]) -> str | None:
    """MME asks twice about each image; the two answers are no independent draws."""
    for name in ("mme_perception_score", "mme_cognition_score"):
        if isinstance(sample.get(name), Mapping):
            return str(sample[name].get("question_id"))
    return None


# What data sets call the name of a row.
DOCUMENT = ("question_id", "questionId", "qid", "id", "uid", "index", "data_id", "sample_id")


def _document(sample: Mapping[str, Any]) -> str:
    """The data's own name for a question; empty where it has none."""
    doc = sample.get("doc")
    names = [doc[name] for name in DOCUMENT if doc.get(name) is not None] if isinstance(doc, Mapping) else []
    return next((str(name) for name in names if isinstance(name, str | int)), "")


def _asked(sample: Mapping[str, Any]) -> str:
    """The text of the request, as the task's code made it."""
    arguments = sample.get("arguments")
    while isinstance(arguments, list | tuple) and arguments:
        arguments = arguments[0]
    return arguments if isinstance(arguments, str) else ""


def _told(target: Any) -> str:
    if target is None or isinstance(target, str):
        return target or ""
    return json.dumps(target, ensure_ascii=False, default=str)


def _text(responses: Any) -> str:
    while isinstance(responses, list | tuple) and responses:
        responses = responses[0]
    return responses if isinstance(responses, str) else str(responses)
