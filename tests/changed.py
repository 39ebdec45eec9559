"""Run the tests of what has changed, at most two minutes long: changed ones, and those that name a changed module.

make check                          # ruff, mypy, and these
python tests/changed.py [COMMIT]    # of what differs from a commit; default: from where main was left, or the last one
"""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"prunekit": "prunekit", "strategies": "prunekit_strategies", "evals": "prunekit_evals"}
ALWAYS = ("tests/test_imports.py",)
SECONDS = 100


def changed(since: str | None = None) -> list[str]:
    """Paths, relative to the root, of files that differ from `since`, those that git does not know among them."""
    since = since or _left() or "HEAD"
    files = _git("diff", "--name-only", since) + _git("ls-files", "--others", "--exclude-standard")
    return sorted(set(files) or set(_git("diff", "--name-only", "HEAD~1")))


def tests_of(files: Iterable[str]) -> list[str]:
    """Test files, relative to the root: changed ones first, then those that name a changed module."""
    found = dict.fromkeys([*ALWAYS, *(file for file in files if Path(file).name.startswith("test_"))])
    users: dict[str, set[str]] = {}
    every = {path.relative_to(ROOT).as_posix(): _names(path) for path in sorted(ROOT.glob("tests/**/test_*.py"))}
    for file in files:
        path = Path(file)
        if file.startswith("docs/") or file == "README.md":
            found["tests/test_docs.py"] = None
        elif path.suffix == ".py":
            users = users or _users()
            found.update(dict.fromkeys(_naming(_module(path), every, users)))
    return [test for test in found if (ROOT / test).is_file()]


def _naming(module: str, tests: Mapping[str, set[str]], users: Mapping[str, set[str]]) -> list[str]:
    """Tests that name a module; where none does, those that name a module that imports it, and so on."""
    asked, seen = {module}, {module}
    while asked:
        stems = {f"test_{name.rpartition('.')[2]}" for name in asked}
        named = [test for test, names in tests.items() if names & asked or Path(test).stem in stems]
        if named:
            return named
        asked = {user for name in asked for user in users.get(name, ())} - seen
        seen |= asked
    rooms = module.replace("prunekit_", "").split(".")  # found by name alone, as plugins and commands are
    return [test for test in tests if set(rooms[:-1]) & set(re.split(r"[/_.]", test)) - {"prunekit"}]


def _users() -> dict[str, set[str]]:
    """Module -> modules of the three packages that import it."""
    users: dict[str, set[str]] = {}
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            for name in _imported(ast.parse(path.read_text(encoding="utf-8"))):
                users.setdefault(name, set()).add(_module(path.relative_to(ROOT)))
    return users


def _module(path: Path) -> str:
    """As tests import it: `prunekit.trace.png`, or a helper beside tests by its bare name."""
    top = PACKAGES.get(path.parts[0])
    if top is None:
        return path.stem
    return ".".join([top, *path.parts[1:-1], path.stem]).removesuffix(".__init__")


def _names(path: Path) -> set[str]:
    """Modules that a test imports, and shipped strategies that it names in quotes."""
    text = path.read_text(encoding="utf-8")
    return set(_imported(ast.parse(text))) | {
        f"prunekit_strategies.{name}" for name in re.findall(r"[\"'](?:use: )?(\w+)[\"'\s,]", text)
    }


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _left() -> str | None:
    """Where this branch left main, if it is another."""
    if _git("rev-parse", "--abbrev-ref", "HEAD") in ([], ["main"], ["HEAD"]):
        return None
    return next(iter(_git("merge-base", "HEAD", "main")), None)


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def run(tests: list[str]) -> int:
    """Run them on two processes up to the first failure; what two minutes have no room for is left to `make test`."""
    words = [sys.executable, "-m", "pytest", "-n", "2", "-x", "-m", "not slow and not browser", *tests]
    running = subprocess.Popen(words, cwd=ROOT)
    try:
        return running.wait(SECONDS)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)
        running.wait()
        print(f"no failure in {SECONDS} s; the rest is left to `make test`")
        return 0


if __name__ == "__main__":
    chosen = tests_of(changed(*sys.argv[1:2]))
    print("of what has changed:", *chosen, sep="\n  ")
    sys.exit(run(chosen))
