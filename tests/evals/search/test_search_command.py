"""`prunekit search` as a user calls it, on the tiny model: what it finds, keeps, says, and does not do twice."""

import json

import pytest
import repeating
from prunekit_evals.cli import search as command
from prunekit_evals.lmms import harness, parts, tasks
from prunekit_evals.run import reading

import prunekit
from prunekit.cli.main import main
from prunekit.errors import InputError

pytest.importorskip("optuna")


def call(*words):
    return main([str(word) for word in words])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two rungs already for twelve questions."""
    monkeypatch.setattr("prunekit_evals.search.split.LEAST", 4)


@pytest.fixture
def given(checkpoint, data_root, tmp_path):
    """Words of a whole search: two rungs of 4 and 12 questions a task, 10 held out."""
    return (
        "search", "--strategies", "stride,fastv", "--model", checkpoint, "--data-root", data_root, "--device", "cpu",
        "--tasks", "pope,gqa", "--flops", "0.9", "--calibration", "12", "--held-out", "10", "--trials", "3",
        "--baselines", "pool-r11,fastv-k2-r25,fastv-k2-r11,freeze-four", "--no-timing", "--out", tmp_path / "s",
    )  # fmt: skip


@pytest.fixture
def answered(monkeypatch):
    """How many questions each call of the harness was given, by pipeline."""
    calls = []
    usual = harness.evaluate

    def evaluate(model, built, files):
        calls.append((model.pipeline.name, built.name, built.questions))
        return usual(model, built, files)

    monkeypatch.setattr(harness, "evaluate", evaluate)
    return calls


def test_a_whole_search(given, answered, data_root, tmp_path, capsys, monkeypatch):
    assert call(*given) == 0
    said = capsys.readouterr()
    folder = tmp_path / "s" / "search"
    data = json.loads((folder / "report.json").read_text())
    found = prunekit.load(folder / "search.yaml")
    assert found.sha == data["sha"] and found.budget.fraction == 0.9 and found.budget.text_tokens != 64
    assert "# Found by `prunekit search`" in (folder / "search.yaml").read_text()
    assert len(data["trials"]) == 3 and len(data["baselines"]) == 2  # two of the three are one at this cost
    assert data["calibration_accuracy"] == max(
        one["accuracies"][-1] for one in data["trials"] if len(one["accuracies"]) == 2
    )
    for task in ("pope", "gqa"):
        one, other = (
            {number for image in data[side][task] for number in image} for side in ("calibration", "held_out")
        )
        assert len(one) >= 12 and len(other) >= 10 and not one & other
    found = reading.read([folder / "results"])
    cells = found.cells
    assert not found.skipped
    for cell in cells:  # by their numbers in the whole task
        assert {one.number for one in cell.questions} == {n for image in data["held_out"][cell.task] for n in image}
    assert {cell.pipeline.name for cell in cells} >= {"dense", "random-flops-0.9", "search"}
    assert all(cell.status == "done" and len(cell.questions) == 10 and "+" in cell.conditions.data for cell in cells)
    pruned = [cell.saved.flops_fraction for cell in cells if not cell.pipeline.dense]
    assert all(0.6 < one <= 0.9 for one in pruned)
    assert [one["other"] for one in data["comparisons"]][:2] == ["dense", "random-flops-0.9"]
    for one in data["comparisons"]:
        assert any(
            verb in said.out for verb in (f"beat {one['other']}: ", f"beats {one['other']}: ", f"by {one['other']}: ")
        )
    assert "no baseline, 1: " in said.out and "calibration" in said.out
    assert answered[0][0] == "dense" and {questions for _, _, questions in answered} == {4, 8, 10}
    said = repeating.check(cells, tmp_path, monkeypatch, data_root=data_root)
    assert len(said) == len({cell.pipeline.name for cell in cells}) and all("--questions" in one for one in said)
    assert call("compare", folder / "results", "--json") == 0
    (table,) = json.loads(capsys.readouterr().out)
    assert {row["pipeline"] for row in table["rows"]} == {cell.pipeline.name for cell in cells}
    # Again: nothing is answered twice, and the model is not even loaded. More trials ask only what is new.
    answered.clear()
    with monkeypatch.context() as patch:
        patch.setattr("prunekit.loading.load", lambda *args: pytest.fail("the model was loaded"))
        assert call(*given, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert answered == [] and again["trials"] == data["trials"] and again["sha"] == data["sha"]
    assert again["file"] == str(folder / "search.yaml")
    assert call(*given, "trials=4") == 0
    assert 1 <= len({name for name, _, questions in answered if questions < 10}) <= 1
    more = json.loads((folder / "report.json").read_text())["trials"]
    assert [one["pipeline"] for one in more[:3]] == [one["pipeline"] for one in data["trials"]]


def test_an_interrupted_search_goes_on(given, answered, tmp_path, capsys, monkeypatch):
    from prunekit_evals.run import answering

    usual, batches = answering.answer, []

    def answer(*args):
        batches.append(len(args[2]))
        if len(batches) == 9:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr("prunekit_evals.lmms.adapter.answer", answer)
    fewer = ("--trials", "2", "--baselines", "pool-r11", "--held-out", "4")
    assert call(*given, *fewer) == 130
    first = sum(batches[:-1])
    folder = tmp_path / "s" / "search"
    for file in (folder / "candidates").glob("*.json"):
        file.write_text(file.read_text()[:50])  # a damaged one is asked again
        break
    assert call(*given, *fewer) == 0
    whole = json.loads((folder / "report.json").read_text())
    again = sum(batches[9:])
    capsys.readouterr()
    assert call(*given[:-1], tmp_path / "other", *fewer) == 0
    other = json.loads((tmp_path / "other" / "search" / "report.json").read_text())
    assert {**whole, "table": 0} == {**other, "table": 0}
    straight = sum(batches[9:]) - again
    assert straight <= first + again <= straight + 24  # what the damaged file knew


def test_what_is_wrong_is_said_before_anything_is_computed(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prunekit.loading.load", lambda *args: pytest.fail("the model was loaded"))

    def refused(*words, without=None):
        told = [str(word) for word in given]
        if without:
            place = told.index(without)
            told = told[:place] + told[place + 2 :]
        assert main([*told, *map(str, words)]) == 2, words
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    for words, expected in (
        (("--strategies", "strid"), "strategies.strid: unknown strategy 'strid' (did you mean 'stride'?"),
        (("--tasks", "popee"), "did you mean 'pope'"),
        (("--flops", "3"), "budget.flops: must be a fraction in (0, 1], not 3"),
        (("--seed", "-1"), "seed: must be at least 0, not -1"),
        (("--baselines", "fastv-k2"), "no pipeline of that name is registered"),
        (("--calibration", "23"), "can be calibrated on"),
        (("--name", "../x"), "name: must be letters"),
        (("--write", tmp_path), "--write"),
        (("trails=4",), "trails: unknown key (did you mean 'trials'?"),
        (("one.yaml", "two.yaml"), "one search at a time"),
        (("nothing.yaml",), "no such file: 'nothing.yaml'"),
    ):
        assert expected in refused(*words), words
    assert "budget: is missing" in refused(without="--flops")
    assert call("search") == 2 and "name a search file" in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "pip install 'prunekit[search]'" in refused()


def test_parts_of_a_task_are_asked_alone(data_root):
    """Numbered anew, with their own images, in the order given; the whole task stays as it is."""
    (named,) = tasks.find(["gqa"])
    data = tasks.data_at(data_root)
    whole = tasks.build(named, data, None)
    shown = parts.images(whole.task, whole.chat)
    assert len(shown) == whole.questions == 24 and all(len(one) == 1 for one in shown)
    part = parts.select(whole.task, [5, 2])
    assert parts.images(part, whole.chat) == [shown[5], shown[2]]
    assert [doc["question"] for doc in part.eval_docs_no_media] == [
        whole.task.eval_docs_no_media[n]["question"] for n in (5, 2)
    ]
    assert len(whole.task.eval_docs_no_media) == 24
    with pytest.raises(InputError, match="cannot be asked in parts"):
        part.dataset = {"testdev": [1, 2]}
        parts.select(part, [0])
