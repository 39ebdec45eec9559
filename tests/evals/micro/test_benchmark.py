import io
import time
from collections import Counter

import pytest

pq = pytest.importorskip("pyarrow.parquet")
from PIL import Image
from prunekit_evals.micro import benchmark
from prunekit_evals.run import stamp


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    benchmark.write(folder, questions_per_task=60)
    return folder


def _rows(root, name):
    return pq.read_table(root / "lmms-lab-encoder" / name).to_pylist()


def test_pope(root):
    rows = _rows(root, "POPE/default/test.parquet")
    assert len(rows) == 60
    assert Counter((r["category"], r["answer"]) for r in rows) == {
        (c, a): 10 for c in ("random", "popular", "adversarial") for a in ("yes", "no")
    }
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (168, 168)


def test_mme_asks_each_picture_twice(root):
    pairs: dict[str, list] = {}
    for row in _rows(root, "MME/default/test.parquet"):
        pairs.setdefault(row["question_id"], []).append(row)
    for pair in pairs.values():
        assert [r["answer"] for r in pair] == ["Yes", "No"]
        assert pair[0]["category"] == pair[1]["category"]
        assert pair[0]["image"] == pair[1]["image"]
        assert pair[0]["question"] != pair[1]["question"]
    assert {p[0]["category"] for p in pairs.values()} == {"existence", "color", "position", "OCR"}


def test_gqa_pictures_are_found_by_id(root):
    pictures = {r["id"] for r in _rows(root, "GQA/testdev_balanced_images/testdev.parquet")}
    rows = _rows(root, "GQA/testdev_balanced_instructions/testdev.parquet")
    assert {r["imageId"] for r in rows} == pictures
    assert max(Counter(r["answer"] for r in rows).values()) <= 0.1 * len(rows)


def test_words_to_read(root):
    rows = _rows(root, "textvqa/default/validation.parquet")
    assert len(rows) == 60
    assert all(r["answers"] == [r["answers"][0]] * 10 and r["answers"][0] in r["ocr_tokens"] for r in rows)
    assert all(r["question"] == r["question"].capitalize() for r in rows)  # as the task's own prompt writes it
    assert max(Counter(r["answers"][0] for r in rows).values()) <= 8


def test_multiple_choice_letters(root):
    for name in ("MMBench/en/dev.parquet", "ScienceQA/ScienceQA-IMG/test.parquet"):
        counts = Counter(r["answer"] for r in _rows(root, name))
        assert len(counts) == 4
        assert max(counts.values()) <= 18
    assert all(len(r["choices"]) == 4 and r["hint"] for r in _rows(root, "ScienceQA/ScienceQA-IMG/test.parquet"))


def test_the_datasets_library_reads_every_configuration(root, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, config, split in (
        ("POPE", None, "test"),
        ("MME", None, "test"),
        ("GQA", "testdev_balanced_images", "testdev"),
        ("MMBench", "en", "dev"),
        ("ScienceQA", "ScienceQA-IMG", "test"),
        ("textvqa", None, "validation"),
    ):
        folder = str(root / "lmms-lab-encoder" / name)
        loaded = datasets.load_dataset(folder, config, split=split, cache_dir=str(tmp_path))
        assert loaded[0]["image"].size == (168, 168)


def test_writing_again_is_free_and_the_content_never_changes(root, tmp_path):
    start = time.perf_counter()
    benchmark.write(root, questions_per_task=60)
    assert time.perf_counter() - start < 0.5
    benchmark.write(tmp_path, questions_per_task=60)
    for path in sorted(root.rglob("*.parquet")):
        assert path.read_bytes() == (tmp_path / path.relative_to(root)).read_bytes()


def test_prompts_are_those_of_the_unmodified_tasks():
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks.mmbench.en_utils import mmbench_doc_to_text
    from lmms_eval.tasks.mme.utils import mme_doc_to_text
    from lmms_eval.tasks.scienceqa.utils import sqa_doc_to_text
    from prunekit_evals.micro import prompts

    letter = {"format": "default", "pre_prompt": "", "post_prompt": f"\n{prompts.LETTER}"}
    _, question = benchmark.mmbench_items(4)[0]
    doc = dict(zip("ABCD", question.choices, strict=True)) | {"question": question.text, "hint": "nan", "index": 0}
    doc |= {"category": "", "L2-category": "", "source": "", "split": ""}
    assert mmbench_doc_to_text(doc, letter) == prompts.mmbench(question)
    _, question = benchmark.scienceqa_items(4)[0]
    doc = {"question": question.text, "hint": question.hint, "choices": list(question.choices)}
    assert sqa_doc_to_text(doc, letter) == prompts.scienceqa(question)
    _, question = benchmark.mme_items(4)[0]
    word = {"pre_prompt": "", "post_prompt": f"\n{prompts.WORD}"}
    assert mme_doc_to_text({"question": prompts.bare(question)}, word) == prompts.word(question)


def test_the_version_names_the_content():
    """Moving code does not make results stale; another question or picture does."""
    assert benchmark.digest() == stamp.VERSION
