"""The journal keeps every answer that was written before a kill, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from prunekit_evals.run.journal import Answer, Facts, Journal, key_of

from prunekit.errors import InputError

ONE = Answer("yes\nno", 12, 2, Facts(16, 4, 10, 20, 3, 6))
TWO = Answer("ü", 7, 1)


def test_answers_come_back(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path) as journal:
        journal.add([("a", ONE), ("b", TWO)])
        assert journal.get("a") == ONE
    again = Journal(path)
    assert (again.get("a"), again.get("b"), again.get("c"), len(again)) == (ONE, TWO, None, 2)


def test_a_torn_line_is_ignored_and_swallows_nothing(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add([("a", ONE), ("b", TWO)])
    path.write_bytes(path.read_bytes()[:-9])
    with Journal(path) as journal:
        assert journal.get("a") == ONE
        assert journal.get("b") is None
        journal.add([("c", TWO)])
    again = Journal(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == (ONE, None, TWO)


@pytest.mark.parametrize(
    "line", ["", "[]", "null", '"text"', '{"key": "x"}', '{"key": 3, "facts": {"a": 1}}', "\x00\xff"]
)
def test_lines_that_are_no_answers_are_ignored(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add([("a", ONE)])
    path.write_text(line + "\n" + path.read_text(), encoding="latin-1")
    assert Journal(path).get("a") == ONE
    assert len(Journal(path)) == 1


def test_no_file_remembers_nothing():
    journal = Journal(None)
    journal.add([("a", ONE)])
    assert journal.get("a") is None


def test_a_folder_is_no_journal(tmp_path):
    with pytest.raises(InputError, match="cannot be used"):
        Journal(tmp_path)


def test_keys_depend_on_every_part():
    parts = {"task": "pope", "doc": 3, "arguments": {"temperature": 0, "until": ["a"]}}
    assert key_of(**parts) == key_of(**json.loads(json.dumps(parts)))
    for changed in ({"task": "mme"}, {"doc": 4}, {"arguments": {"temperature": 0, "until": ["b"]}}):
        assert key_of(**{**parts, **changed}) != key_of(**parts)


def test_what_add_returned_from_survives_kill_9(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys, time, pathlib\n"
        "from prunekit_evals.run.journal import Answer, Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "for number in range(10**6):\n"
        "    journal.add([(str(number), Answer('x' * 50, 1, 1))])\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline()
        time.sleep(0.2)
        os.kill(writer.pid, signal.SIGKILL)
        said = writer.stdout.read().split()
    last = max(map(int, said[:-1] or [0]))
    journal = Journal(path)
    assert all(journal.get(str(number)) is not None for number in range(last + 1))
