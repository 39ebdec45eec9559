"""`prunekit new`: a plugin to begin with, a distribution of its own that passes its own tests.

The files come from `templates/`, filled in by `string.Template`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from prunekit.errors import InputError

# Of each kind: what it does, in a sentence, and as the summary of the list.
KINDS = {
    "token": ("Keeps the visual tokens that are least like the average one.", "least like the average token"),
    "layer": ("Leaves out the decoder layers right before the last one.", "the layers before the last one"),
    "router": ("Decides for each sample which tokens stay and which layers run.", "tokens like the text, drawn layers"),
}
# File of the distribution, and its template; {kind} is that of the strategy.
FILES = {
    "pyproject.toml": "pyproject.toml", "README.md": "README.md", "LICENSE": "LICENSE",
    "src/{name}/__init__.py": "plugin.py", "src/{name}/strategy.py": "{kind}.py",
    "src/{name}/{name}.yaml": "{kind}.yaml", "tests/test_{name}.py": "test_{kind}.py",
}  # fmt: skip
TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z][a-z0-9_]*")
ARXIV = re.compile(
    r"(?:arxiv:|https?://(?:www\.)?arxiv\.org/(?:abs|pdf)/)?(\d{2}(?:0[1-9]|1[0-2])\.\d{4,5}(?:v\d+)?)", re.I
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "new",
        help="begin a plugin: a package with a strategy, a pipeline and tests",
        description="Write a distribution of its own into ./NAME: a small strategy that runs and is exact, a pipeline, "
        "its contract test, README and licence. Comments say what to replace.",
        epilog="example: prunekit new my_idea --kind token --paper 2403.06764",
    )
    command.add_argument("name", metavar="NAME", help="of the folder, the package, the strategy and the pipeline")
    command.add_argument("--kind", choices=tuple(KINDS), default="token", help="what it decides about (token)")
    command.add_argument(
        "--paper", metavar="ARXIV", help="the arXiv id or address of its paper; without it, a baseline"
    )
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Write the plugin, and say how to go on."""
    name, kind = namespace.name, namespace.kind
    paper = _arxiv(namespace.paper)
    _refuse(name)
    folder = Path(name)
    for file, template in FILES.items():
        path = folder / file.format(name=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATES / f"{template.format(kind=kind)}.txt").read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(_words(name, kind, paper)), encoding="utf-8")
    print(f"{folder}/: a {kind} strategy '{name}' and a pipeline of this name, in a package of its own")
    for line in (
        f"try it:   prunekit --plugin {name}/src/{name} show {name} --model micro",
        f"test it:  cd {name} && python -m pytest",
        f"then:     replace the rule in {name}/src/{name}/strategy.py; pip install -e {name}",
    ):
        print(f"  {line}")
    return 0


def _words(name: str, kind: str, paper: str) -> dict[str, str]:
    about, summary = KINDS[kind]
    declared = f'paper="{paper}"' if paper else ""
    baseline = "Baseline: it has no paper. Link one here and in `@strategy(paper=...)` once it has."
    return {
        "name": name, "project": name.replace("_", "-"), "title": name.replace("_", " "), "about": about,
        "cls": "".join(part.capitalize() for part in name.split("_")), "summary": summary,
        "source": f"Paper: https://arxiv.org/abs/{paper}" if paper else baseline,
        "paper": declared and f"{declared}, ", "only_paper": declared, "year": str(datetime.date.today().year),
    }  # fmt: skip


def _arxiv(text: str | None) -> str:
    """The id alone; empty for None. Raises InputError."""
    if text is None:
        return ""
    if (found := ARXIV.fullmatch(text.strip())) is None:
        raise InputError(f"--paper: '{text}' is no arXiv id: write one such as 2403.06764, or leave --paper out")
    return found[1]


def _refuse(name: str) -> None:
    """Raise InputError for a name that is no module's, or that something has already."""
    from prunekit import plugins

    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        near = f"'{plain}'" if NAME.fullmatch(plain) and not keyword.iskeyword(plain) else "'my_idea'"
        raise InputError(f"'{name}' is no name for a package: lower-case letters, digits and '_', such as {near}")
    if Path(name).exists():
        raise InputError(f"{Path(name).absolute()} exists: choose another name, or remove it first")
    registry = plugins.registry()
    for kind, entries in (("strategy", registry.strategies()), ("pipeline", registry.pipelines())):
        for entry in entries:
            if entry.name == name:
                raise InputError(f"{entry.origin} has a {kind} '{name}': choose another name, such as 'my_{name}'")
    if (found := importlib.util.find_spec(name)) is not None and found.origin:
        raise InputError(f"Python has a module '{name}' ({found.origin}): choose another name, such as 'my_{name}'")
