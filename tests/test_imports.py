"""The plan of the house, read off the source: who may import whom, who may know which names, how long things may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import prunekit
from prunekit import plugins

ROOT = Path(__file__).parent.parent
PACKAGES = {"prunekit": "prunekit", "prunekit_strategies": "strategies", "prunekit_evals": "evals"}

# A room imports only from rooms further up. docs/architecture.md says why.
ORDER = (
    "version", "errors", "ops", "registry", "upstream", "probes", "strategy", "cost", "records", "hookspecs", "loose",
    "plugins", "spec", "families", "pipeline", "loading", "image_files", "video_files", "estimate", "engine", "verify",
    "training", "apply", "serving", "trace", "testing", "cli",
)  # fmt: skip
LEVEL = {room: level for level, room in enumerate(ORDER)}
# The same for `evals`, where modules at the top are rooms as well. `studies` is not in the wheel: nothing may need it.
EVALS_ORDER = (
    "shapes", "run", "compare", "leaderboard", "micro", "smol", "lmms", "bench", "runner", "sweep", "search", "cli",
    "plugin", "studies",
)  # fmt: skip
# Beside what `prunekit` itself exports.
PUBLIC_MODULES = {"prunekit.ops", "prunekit.registry"}
MAX_FILE, MAX_FUNCTION = 400, 45  # a file is judged by its subject; beyond this it surely has two


@dataclass(frozen=True)
class Source:
    """A source file as the module that it is."""

    module: str
    path: Path

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return self.module


def sources(package: str) -> list[Source]:
    base = ROOT / PACKAGES[package]
    found = []
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        found.append(Source(".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))), path))
    return found


ALL = [source for package in PACKAGES for source in sources(package)]
BY_NAME = {source.module: source for source in ALL}


def imports(source: Source) -> Iterator[str]:
    """Full names of what a module imports at run time, also inside functions; `from a import b` gives `a.b`."""
    for node in _run_time_nodes(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative imports hide who imports whom"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def every_import(source: Source) -> Iterator[str]:
    """As `imports`, with those for type checkers."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _run_time_nodes(child)


def module_of(name: str) -> str:
    """The module that a full name lies in: `prunekit.sites.Site` -> `prunekit.strategy.sites`."""
    while name not in BY_NAME and "." in name:
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str | None:
    """`prunekit.engine.cache.ragged` -> `engine`, `prunekit.cost` -> `cost`; None for `prunekit`, which is lazy."""
    if "." not in module:
        return None
    name = module.split(".")[1]
    return "cli" if name == "__main__" else name


def test_every_room_has_its_place() -> None:
    rooms = {room(source.module) for source in sources("prunekit")} - {None}
    assert rooms <= set(LEVEL), "give the new rooms a place in ORDER and in docs/architecture.md"


def test_the_order_is_the_documented_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert " < ".join(ORDER) in " ".join(text.split())


def test_every_file_stands_in_the_documented_rooms() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w*]+\.py|\w+/", text.partition("## Who may import whom")[0]))
    for source in (*sources("prunekit"), *sources("prunekit_evals")):
        folders = [f"{name}/" for name in source.path.relative_to(ROOT).parts[1:-1]]
        if not folders:
            assert source.path.name in listed, source
        else:
            assert folders[0] in listed, source


@pytest.mark.parametrize("source", sources("prunekit"), ids=str)
def test_the_core_imports_only_upwards(source: Source) -> None:
    """Also for type checkers; what `prunekit` exports it may name so."""
    here = room(source.module)
    for name in imports(source) if here is None else every_import(source):
        assert name.split(".")[0] not in ("prunekit_strategies", "prunekit_evals", "lmms_eval"), name
        there = module_of(name)
        if not there.startswith("prunekit.") or source.module == there:
            continue
        assert here is not None, f"prunekit/__init__.py imports {name} at once; its names are lazy"
        assert room(there) == here or LEVEL[str(room(there))] < LEVEL[here], f"{source} must not import {there}"


@pytest.mark.parametrize("source", sources("prunekit_evals"), ids=str)
def test_evals_import_only_upwards(source: Source) -> None:
    own = room(source.module)
    level = {name: number for number, name in enumerate(EVALS_ORDER)}
    assert own is None or own in level, "give the new room a place in EVALS_ORDER and in docs/architecture.md"
    for name in every_import(source):
        assert own == "lmms" or name.split(".")[0] != "lmms_eval", f"only evals/lmms imports lmms_eval, not {source}"
        imported = module_of(name)
        if imported.startswith("prunekit_evals."):
            assert own is not None, f"prunekit_evals/__init__.py imports {name}"
            assert level[str(room(imported))] <= level[own], f"{source} must not import {imported}"


def test_the_order_of_evals_is_the_documented_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert " < ".join(EVALS_ORDER) in " ".join(text.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_through_others(package: str) -> None:
    """Also for type checkers. `prunekit` itself exports lazily."""
    edges = {one.module: {module_of(name) for name in every_import(one)} for one in sources(package)}
    edges.pop("prunekit", None)
    graph = {module: {one for one in targets if one in edges and one != module} for module, targets in edges.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


ENGINE = (
    "tracing", "overrides", "patches", "callers", "calibrated", "tokens", "attention", "cache", "prompt", "asking",
    "details", "tower", "decoder", "summary", "reporting", "keep_maps", "observers", "attach",
)  # fmt: skip


@pytest.mark.parametrize("source", [one for one in sources("prunekit") if room(one.module) == "engine"], ids=str)
def test_the_rooms_of_the_engine_import_only_upwards(source: Source) -> None:
    if source.module == "prunekit.engine":
        return
    own = ENGINE.index(source.module.split(".")[2])
    for name in every_import(source):
        there = module_of(name)
        if there.startswith("prunekit.engine."):
            assert ENGINE.index(there.split(".")[2]) <= own, f"{source} must not import {there}"


REFERENCE = ("muting", "oracle", "precision", "reported", "shortened", "stock", "tower")


@pytest.mark.parametrize("module", REFERENCE)
def test_the_reference_shares_no_code_with_the_engine(module: str) -> None:
    """Nor with what the engine is made of: it reads families and records, and knows transformers."""
    mine = {module_of(name) for name in imports(BY_NAME[f"prunekit.verify.{module}"]) if name.startswith("prunekit.")}
    assert {str(room(name)) for name in mine} <= {"families", "records", "strategy", "upstream", "verify"}
    own = {name.rpartition(".")[2] for name in mine if room(name) == "verify"}
    assert own <= set(REFERENCE)


@pytest.mark.parametrize("source", sources("prunekit_strategies"), ids=str)
def test_strategies_import_public_names_only(source: Source) -> None:
    own = ".".join(source.module.split(".")[:2]) + "."  # a strategy in several files has a folder of its own
    for name in imports(source):
        module, _, attribute = name.rpartition(".")
        assert not name.startswith(("prunekit_", "lmms_eval")) or name.startswith(own), f"{source} imports {name}"
        if module == "prunekit":
            assert attribute in prunekit.__all__ or name in PUBLIC_MODULES, f"{source}: {attribute} is not public"
        elif module.startswith("prunekit."):
            assert module in PUBLIC_MODULES, f"{source}: {module} is not public"
            exported = getattr(sys.modules.get(module) or __import__(module, fromlist=["x"]), "__all__", None)
            assert exported is None or attribute in exported, f"{source}: {name} is not public"


def test_the_public_names_exist() -> None:
    assert [name for name in prunekit.__all__ if not hasattr(prunekit, name)] == []


def _text(source: Source) -> str:
    """The file as it is, comments and all."""
    return source.path.read_text(encoding="utf-8").casefold()


def _constants(source: Source) -> set[str]:
    """Its string constants, docstrings left out."""
    tree, documented = source.tree, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    strings = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in strings
    }


def _named(names: set[str], text: str) -> list[str]:
    return [name for name in sorted(names) if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text)]


CORE = sources("prunekit")
# Tiny models of the families are for tests; the probes look at modules of transformers.
OF_FAMILIES = ("families", "testing", "upstream", "probes")
# What has no reason to name a strategy anywhere; elsewhere docstrings may show one, and comments say whose rule it is.
WITHOUT_EXAMPLES = ("engine", "families", "verify", "apply", "loading", "cost", "records")
# Strategies whose names are words of the language, and where those words are values that mean something else.
WORDS = {"dense", "random", "pool", "stride", "blind", "first", "last", "downsample"}
VALUES = {
    ("families", "downsample"), ("training", "random"), ("cli", "random"), ("strategy", "pool"), ("cli", "dense"),
    ("estimate", "dense"),
}  # fmt: skip


def test_the_core_knows_no_family() -> None:
    from prunekit.families import families

    names = {name.casefold() for family in families() for name in (family.name, *family.model_types)}
    assert "llava" in names
    for source in CORE:
        if room(source.module) == "engine":
            assert [name for name in names if name in _text(source)] == [], source
        elif room(source.module) not in OF_FAMILIES:  # papers may carry a family's name in their own
            assert _named(names, _text(source)) == [], source


def test_the_core_knows_no_strategy() -> None:
    names = {entry.name for entry in plugins.registry().strategies()}
    assert names > WORDS
    for source in CORE:
        where = room(source.module)
        constants = _constants(source)
        values = {(str(where), name) for name in (names - {"first", "last"}) & constants}  # words of many things
        assert values <= VALUES, source
        if where in WITHOUT_EXAMPLES:
            assert _named(names - WORDS, _text(source)) == [], source
        elif where != "cli":  # its help shows examples
            assert _named(names - WORDS, " ".join(constants)) == [], source


def test_the_core_knows_no_benchmark() -> None:
    tasks = {"mmbench", "textvqa", "scienceqa", "vqav2", "gqa", "mmmu", "chartqa", "docvqa", "vizwiz", "seedbench"}
    assert [(str(source), _named(tasks, _text(source))) for source in CORE if _named(tasks, _text(source))] == []


@pytest.mark.parametrize("source", ALL, ids=str)
def test_length(source: Source) -> None:
    lines = len(source.path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{source.path.name} has {lines} lines"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"


HEAVY = ("torch", "transformers", "lmms_eval", "datasets", "numpy", "omegaconf", "pandas", "PIL", "scipy")
LOOK = """
import sys
sys.argv = ["prunekit", *{arguments!r}]
from prunekit.cli.main import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print(code, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["list", "pipelines"]], ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = LOOK.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1:] == ["0 []"] or done.stderr.splitlines()[-1:] == ["None []"], done.stderr


def test_import_prunekit_imports_nothing_heavy() -> None:
    code = f"import sys, prunekit; print([n for n in {(*HEAVY, 'pluggy', 'yaml')!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
