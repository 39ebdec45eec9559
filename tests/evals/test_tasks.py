"""Finding and building lmms-eval's own tasks, and scoring single questions as its metrics do."""

import os
from pathlib import Path

import pytest
from prunekit_evals.lmms import scoring, tasks

from prunekit.errors import InputError, UnknownName


def build(name, root, limit=None):
    return tasks.build(tasks.find([name])[0], tasks.data_at(root), limit)


def test_unknown_tasks_get_a_suggestion():
    with pytest.raises(UnknownName, match="did you mean 'pope'"):
        tasks.find(["popee"])
    with pytest.raises(InputError, match="is a group of tasks"):
        tasks.find(["mmbench"])


def test_only_one_folder_is_read():
    found = tasks.find(["pope", "mme", "pope"])
    assert [(one.name, one.file.name) for one in found] == [("pope", "pope.yaml"), ("mme", "mme.yaml")]


def test_tasks_are_built_from_a_data_root_and_the_working_folder_stays(data_root):
    before = os.getcwd()
    built = build("pope", data_root, limit=10)
    assert os.getcwd() == before
    assert (built.questions, built.limit, built.chat) == (10, 10, True)
    assert built.task.config.process_results.__name__ == "pope_process_results"  # lmms-eval's own


def test_the_bundled_benchmark_is_labelled(data_root, tmp_path):
    assert tasks.data_at(data_root).label("pope") == "micro/pope"
    assert tasks.data_at(tmp_path).label("pope") == "pope"
    assert tasks.data_at(None).label("pope") == "pope"


def test_the_identity_of_data_changes_with_it(tmp_path):
    file = tmp_path / "org" / "set" / "a.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    first = tasks.data_at(tmp_path).identity
    assert tasks.data_at(tmp_path).identity == first
    file.write_bytes(b"12")
    assert tasks.data_at(tmp_path).identity != first


@pytest.mark.parametrize("micro", [True, False])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_another_data_root_is_not_answered_from_the_cache_of_the_first(tmp_path, monkeypatch, micro):
    import datasets
    from prunekit_evals.micro import benchmark
    from prunekit_evals.run import stamp

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = {}
    for count in (8, 12):
        root = tmp_path / f"of{count}"
        benchmark.write(root, questions_per_task=count)
        if not micro:
            (root / stamp.STAMP).unlink()
        for name in ("pope", "gqa"):
            found[name, count] = build(name, root)
    assert all(built.questions == count for (_, count), built in found.items())
    assert all(built.task.eval_docs[0]["image"].size == (168, 168) for built in found.values())
    assert tmp_path / "cache" == datasets.config.HF_DATASETS_CACHE
    assert tasks.HARNESS_CACHE not in os.environ


def test_missing_data_is_named(tmp_path):
    with pytest.raises(InputError, match=r"lmms-lab-encoder.POPE', which is not there \(there is: nothing\)"):
        build("pope", tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        tasks.data_at(tmp_path / "nowhere")


@pytest.mark.parametrize(("limit", "asked"), [(1, 2), (2, 2), (5, 6), (23, 24), (24, 24), (100, 24)])
def test_a_limit_never_splits_a_pair_of_mme(data_root, limit, asked):
    built = build("mme", data_root, limit)
    assert built.questions == asked
    assert built.limit == (None if asked == 24 else asked)


def test_groups_may_lie_apart():
    assert tasks.whole_groups(["a", "b", "a", "b", "c", "c"], 1) == 4
    assert tasks.whole_groups(["a", "b", "a", "b", "c", "c"], 5) == 6
    assert tasks.whole_groups(["a", "a", "b", "b"], 2) == 2
    assert tasks.whole_groups(["a", "b", "a"], 1) == 3


def test_random_subsets_are_drawn_by_their_seed_and_keep_pairs_of_mme_whole(data_root):
    def ask(name, limit, seed):
        return tasks.build(tasks.find([name])[0], tasks.data_at(data_root), limit, subset_seed=seed)

    whole = build("pope", data_root)
    one, again, other = (ask("pope", 7, seed) for seed in (3, 3, 4))
    assert one.numbers == again.numbers == tuple(sorted(set(one.numbers))) and len(one.numbers) == one.questions == 7
    assert other.numbers != one.numbers != tuple(range(7))
    for docs in (one.task.eval_docs, one.task.eval_docs_no_media):
        assert [doc["question"] for doc in docs] == [whole.task.eval_docs[n]["question"] for n in one.numbers]
    pairs = ask("mme", 7, 3)
    assert pairs.questions == 8
    assert set(tasks.Counter(pairs.task.eval_docs["question_id"]).values()) == {2}
    assert ask("pope", 24, 3).numbers is None  # all of them


def test_drawn_groups_may_lie_apart():
    assert tasks.drawn("abab", 1, 0) in ((0, 2), (1, 3))
    assert tasks.drawn("abab", 3, 0) == (0, 1, 2, 3)
    counts = [0] * 6
    for seed in range(300):
        for number in tasks.drawn(range(6), 2, seed):
            counts[number] += 1
    assert sum(counts) == 600 and min(counts) > 60  # each one in three times out of nine


def test_own_tasks_are_found_beside_the_harness_s(own_tasks, data_root):
    found = tasks.find(["pope", "mine"], own_tasks)
    assert [(one.name, one.own) for one in found] == [("pope", False), ("mine", True)]
    data = tasks.data_at(data_root)
    assert tasks.data_of(found[0], data) is data
    own = tasks.data_of(found[1], data)
    assert own.label("mine") == "mine" and own.identity.startswith("own-")
    assert own == tasks.data_of(found[1], data)
    built = tasks.build(found[1], own, None)
    assert (built.questions, built.task.eval_docs[0]["question"]) == (4, "Is there a cat in 0?")
    rows = own_tasks / "rows.jsonl"
    rows.write_text(rows.read_text().replace("cat in 0", "dog in 0"))
    changed = tasks.data_of(found[1], data)
    assert changed.identity != own.identity
    assert tasks.build(found[1], changed, None).task.eval_docs[0]["question"] == "Is there a dog in 0?"


def test_wrong_folders_of_own_tasks_are_refused(own_tasks, tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        tasks.find(["mine"], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file `\*\.yaml` in it says `task: NAME`"):
        tasks.find(["mine"], tmp_path / "empty")
    with pytest.raises(UnknownName, match="did you mean 'mine'"):
        tasks.find(["minee"], own_tasks)
    file = own_tasks / "mine.yaml"
    text = file.read_text()
    file.write_text(text.replace("task: mine", "task: pope"))
    with pytest.raises(InputError, match="lmms-eval has 'pope' itself"):
        tasks.find(["pope"], own_tasks)
    file.write_text(text + "metric_list: [")
    with pytest.raises(InputError, match=r"mine\.yaml' is no task of lmms-eval"):
        tasks.data_of(tasks.find(["mine"], own_tasks)[0], tasks.data_at(None))


def test_likelihood_tasks_are_not_asked_in_messages(tmp_path):
    import datasets

    folder = tmp_path / "lmms-lab-encoder" / "SEED-Bench"
    folder.mkdir(parents=True)
    row = {"answer": "A", "question": "?", "data_type": "image", "question_id": "1", **dict.fromkeys(SEED, "x")}
    datasets.Dataset.from_list([row]).to_parquet(folder / "test-0.parquet")
    assert not build("seedbench_ppl", tmp_path).chat


SEED = ("choice_a", "choice_b", "choice_c", "choice_d")


def sample(number, **metrics):
    return {"doc_id": number, "doc": {"score": 1.0}, "target": "yes", "filtered_resps": ["yes"], **metrics}


def test_scores_of_the_standard_tasks():
    pope = {"question_id": "1", "prediction": "no", "ground_truth": "yes"}
    logged = [sample(n, pope_accuracy={**pope, "score": 1.0 - n}, pope_f1_score={**pope, "score": 0.5}) for n in (1, 0)]
    assert [(q.number, q.score) for q in scoring.questions("pope", logged)] == [(0, 1.0), (1, 0.0)]
    assert {q.answer for q in scoring.questions("pope", logged)} == {"yes"}
    mme = [sample(0, mme_perception_score={"question_id": "a", "category": "color", "score": 1.0})]
    assert [(q.score, q.group) for q in scoring.questions("mme", mme)] == [(1.0, "a")]
    assert [q.group for q in scoring.questions("mme", mme, {0: "pixels"})] == ["pixels"]
    gqa = [sample(number, exact_match=1.0) for number in (0, 1)]
    assert [q.group for q in scoring.questions("gqa", gqa, {1: "pixels"})] == [None, "pixels"]
    assert [q.score for q in scoring.questions("gqa", [sample(0, exact_match=1.0)])] == [1.0]
    assert [q.score for q in scoring.questions("textvqa_val", [sample(0, exact_match=0.3, submission={})])] == [0.3]
    seed = [sample(0, seed_all={"pred": "A", "answer": "B", "question_id": 1})]
    assert [q.score for q in scoring.questions("seedbench", seed)] == [0.0]
    assert [q.score for q in scoring.questions("chairs", [sample(0, chair_i=17.0, caption={"text": "x"})])] == [None]


def mmbench(number, index, answer, said):
    row = {"index": index, "answer": answer, "prediction": said, "category": "c", "L2-category": "d", "split": "dev"}
    choices = {"A": "cat", "B": "dog", "C": "cow", "D": "hen", "E": "nan"}
    return sample(number, gpt_eval_score={**row, **choices, "question": "?", "hint": "nan", "source": "s"})


def test_mmbench_is_scored_as_it_scores_itself(capsys):
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    logged = [
        mmbench(0, 1, "A", "A"), mmbench(1, 2, "B", "A"), mmbench(2, 3, "C", "The answer is C."),
        mmbench(3, 4, "D", ""), mmbench(4, 1000001, "B", "C"), mmbench(5, 1000003, "A", "A."),
    ]  # fmt: skip
    found = scoring.questions("mmbench_en_dev_static", logged)
    assert [(one.number, one.score) for one in found] == [(0, 0.0), (1, 0.0), (2, 1.0), (3, 0.0), (4, None), (5, None)]
    overall = mmbench_evaluator.eval_result([dict(one["gpt_eval_score"]) for one in logged], eval_method="static")[0]
    scores = [one.score for one in found if one.score is not None]
    assert sum(scores) / len(scores) == pytest.approx(overall)
    capsys.readouterr()


def test_where_lmms_eval_is_missing_both_routes_are_named(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"prunekit\[evals\].*--no-deps"):
        tasks.find(["pope"])


def test_tasks_lie_in_the_installed_harness():
    assert all(Path(one.file).is_file() for one in tasks.find(["pope", "gqa", "textvqa_val"]))
