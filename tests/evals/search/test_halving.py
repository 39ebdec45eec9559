"""The search itself, with someone to ask who knows the truth: who wins, what it costs, what is repeated."""

import pickle

import pytest
from prunekit_evals.search.asking import Answered, Rung
from prunekit_evals.search.candidates import Infeasible
from prunekit_evals.search.halving import Halving
from prunekit_evals.search.space import Choices, Range, Run, Searched, Sites, Space

import prunekit
from prunekit.errors import InputError, Unsupported

pytest.importorskip("optuna")

LEVELS = 3


class Knowing:
    """Answers as well as `truth(keep)` says, of rungs of 10, 20 and 60 questions; remembers what it was asked."""

    levels = LEVELS

    def __init__(self, truth):
        self.truth, self.asked = truth, []

    def ask(self, pipeline, level):
        self.asked.append((pipeline.name, level))
        return Answered(tuple(self._rung(pipeline, count) for count in (10, 20, 60)[: level + 1]))

    def _rung(self, pipeline, count):
        right = round(self.truth(pipeline.stages[0].keeps[0].fraction) * count)
        return Rung({"pope": (1.0,) * right + (0.0,) * (count - right)}, None, None, None)


def keeping(trial):
    keep = trial.suggest_int("keep", 1, 99) / 100
    if keep > 0.9:
        raise Infeasible(f"stages[0].keep: {keep} is too much")
    return prunekit.load({"name": f"keep-{keep}", "stages": [{"use": "stride", "keep": keep}]})


def peak(keep):
    return 1 - abs(keep - 0.4)


def search(asker, trials=20, seed=0, draw=keeping, **options):
    return Halving(asker, trials, 3, seed, **options).over(draw)


def test_it_finds_what_is_good_and_asks_the_others_little():
    asker = Knowing(peak)
    found = search(asker)
    assert len(found.trials) == len({one.pipeline.sha for one in found.trials}) == 20
    assert abs(found.best.pipeline.stages[0].keeps[0].fraction - 0.4) < 0.1
    assert found.best.accuracies[-1] == max(one.accuracies[-1] for one in found.trials if len(one.accuracies) == LEVELS)
    reached = [len(one.accuracies) for one in found.trials]
    assert reached.count(1) > reached.count(3) >= 1
    assert len(set(asker.asked)) == sum(reached) < 0.7 * LEVELS * 20
    assert sum(found.refusals.counts.values()) >= 1 and len(found.refusals.counts) == 1  # one reason, several numbers
    assert found.refusals.listed()[0][1].endswith("is too much") and not found.exhausted


def test_the_seed_says_all_and_more_trials_go_on_from_fewer():
    one, two = search(Knowing(peak)), search(Knowing(peak))
    assert told(one) == told(two) and one.refusals == two.refusals
    assert told(search(Knowing(peak), seed=1))[:5] != told(one)[:5]
    fewer = search(Knowing(peak), trials=7)
    assert [sha for sha, *_ in told(fewer)] == [sha for sha, *_ in told(one)[:7]]


def told(found):
    return [(one.pipeline.sha, one.accuracies, one.times, one.failed) for one in found.trials]


def test_nothing_is_pickled(monkeypatch):
    for name in ("dumps", "loads", "dump", "load", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *args, **options: pytest.fail("something was pickled"))
    assert len(search(Knowing(peak), trials=15).trials) == 15


def test_a_small_space_ends_the_search(monkeypatch):
    monkeypatch.setattr("prunekit_evals.search.halving.DRAWS", 12)
    numbers = []
    found = search(Knowing(peak), draw=three, told=lambda number, trial: numbers.append(number))
    assert len(found.trials) == 3 and found.exhausted
    assert sum(one.times for one in found.trials) > 3 and set(numbers) == {1, 2, 3}


def three(trial):
    keep = Choices((0.2, 0.4, 0.6)).draw(trial, "keep")
    return prunekit.load({"name": "c", "stages": [{"use": "stride", "keep": keep}]})


def test_a_candidate_that_fails_is_told_and_the_others_go_on():
    class Failing(Knowing):
        def ask(self, pipeline, level):
            if pipeline.stages[0].keeps[0].fraction < 0.3:
                raise Unsupported("this one\ndoes not run")
            return super().ask(pipeline, level)

    found = search(Failing(peak), draw=three, trials=3)
    assert [one.failed for one in found.trials if not one.accuracies] == ["this one does not run"]
    with pytest.raises(InputError, match="nothing could be asked to the end: c failed: this one does not run"):
        search(Failing(lambda keep: 0.0), draw=lambda trial: prunekit.load(LOW), trials=2)
    with pytest.raises(InputError, match="nothing could be asked to the end: 200 times never"):
        search(Knowing(peak), draw=never)


LOW = {"name": "c", "stages": [{"use": "stride", "keep": 0.1}]}


def never(trial):
    raise Infeasible("never")


def test_accuracy_is_over_all_rungs_and_every_task_counts_the_same():
    rungs = (Rung({"a": (1.0, 0.0), "b": (1.0,)}, 30, 16, 0.5), Rung({"a": (0.0, 0.0), "b": (0.0,)}, 60, None, 0.3))
    answered = Answered(rungs)
    assert answered.accuracy(0) == pytest.approx(0.75)
    assert answered.accuracy(1) == pytest.approx((0.25 + 0.5) / 2)
    assert answered.mean("input_tokens") == 45 and answered.mean("visual_tokens") is None


def test_what_is_drawn_is_plain_and_in_its_domain():
    import optuna

    space = Space(
        (
            Searched("fastv", False, {"at": Sites(("encoder",), 1, 7), "keep": Range(0.2, 0.9, 0.05),
                                      "domain": Choices(("softmax", "logits"))}),
            Searched("divprune", False, {"at": Choices((None,)), "keep": Range(10, 60, log=True)}),
            Searched("skip_layers", True, {"layers": Run(1, 7, 3)}),
        ),
        most=2,
    )  # fmt: skip
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.draw(study.ask()) for _ in range(200)]
    stages = [stage for candidate in drawn for stage in candidate]
    fastv = [stage for stage in stages if stage["use"] == "fastv"]
    assert {stage["at"] for stage in fastv} == {"encoder", *range(1, 8)}
    assert all(0.2 <= stage["keep"] <= 0.9 and len(str(stage["keep"])) <= 4 for stage in fastv)
    others = [stage for stage in stages if stage["use"] == "divprune"]
    assert all("at" not in stage and type(stage["keep"]) is int for stage in others)
    skipped = [stage["layers"] for stage in stages if stage["use"] == "skip_layers"]
    assert 0 < len(skipped) < 200 and {len(layers) for layers in skipped} == {1, 2, 3}
    for layers in skipped:
        assert layers == list(range(layers[0], layers[-1] + 1)) and 1 <= layers[0] <= layers[-1] <= 7
    assert {sum(one["use"] != "skip_layers" for one in candidate) for candidate in drawn} == {1, 2}
