"""Installs the wheel as a user does, without constraints, and prunes with it; docs/exactness.md shows what it saw.

    python tests/fresh_install.py            # `make test-matrix` does this first

The wheel goes into an empty virtual environment in .matrix/, where pip resolves all that its metadata asks for; PyTorch
alone is lent by the environment that runs this script. There README's ten lines of Python run, on the bundled model.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from wheels import ROOT, build

WHERE, RESULT, PAGE = ROOT / ".matrix" / "wheel", ROOT / "tests" / "fresh_install.json", ROOT / "docs" / "exactness.md"
BLOCK = re.compile(r"(<!-- wheel: begin -->\n).*?(<!-- wheel: end -->)", re.S)
LINES = re.compile(r"^## Ten lines of Python\n.*?^```python\n(.*?)^```", re.M | re.S)
CHECKPOINT = '"llava-hf/llava-1.5-7b-hf"'
# What belongs to PyTorch, by the beginning of its name.
WITH_TORCH = ("nvidia", "cuda", "triton")
BEFORE = """
import pathlib, prunekit.loading
from PIL import Image
Image.new("RGB", (640, 480), "red").save("cat.png")
micro = str(prunekit.loading.resolve("micro"))
"""
AFTER = """
import json
from importlib.metadata import distributions
said = {
    "installed": {one.name.lower(): one.version for one in distributions()},
    "visual": run.report.visual_tokens,
    "kept": run.report.kept_tokens,
    "home": prunekit.__file__,
}
pathlib.Path("said.json").write_text(json.dumps(said))
"""


@dataclass(frozen=True)
class Result:
    """What the wheel did. installed: versions of its dependencies. visual, kept: tokens of the image."""

    wheel: str
    python: str
    installed: dict[str, str]
    visual: int
    kept: int
    date: str


def lent() -> list[str]:
    """Names of PyTorch's files and folders among the packages of the environment that runs this."""
    names, waiting = set(), ["torch"]
    while waiting:
        try:
            one = distribution(waiting.pop())
        except PackageNotFoundError:  # for another platform
            continue
        names |= {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}
        asked = (re.match(r"[\w.-]+", requirement) for requirement in one.requires or ())
        waiting += [name[0] for name in asked if name and name[0].lower().startswith(WITH_TORCH)]
    return sorted(names)


def environment() -> Path:
    """The Python of an empty environment that sees PyTorch."""
    shutil.rmtree(WHERE, ignore_errors=True)
    venv, loan = WHERE / "venv", WHERE / "torch"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    loan.mkdir()
    home = Path(str(distribution("torch").locate_file("")))  # perhaps lent to that environment itself
    for name in lent():
        (loan / name).symlink_to(home / name)
    packages = sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)})
    (Path(packages) / "torch.pth").write_text(f"{loan}\n", encoding="utf-8")
    return venv / "bin" / "python"


def install(python: Path, wheel: Path) -> None:
    """Let pip resolve what the wheel asks for, and nothing else."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PIP_CONSTRAINT", "PYTHONPATH")}
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-input", str(wheel)]
    subprocess.run(command, check=True, env=clean)


def prune(python: Path) -> dict[str, object]:
    """What README's lines said, run on the bundled model in an empty folder."""
    (lines,) = LINES.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert lines.count(CHECKPOINT) == 2, f"README's lines name {CHECKPOINT} twice"
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "lines.py"
        script.write_text(BEFORE + lines.replace(CHECKPOINT, "micro") + AFTER, encoding="utf-8")
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([str(python), "-I", str(script)], cwd=folder, check=True, env=offline)
        said: dict[str, object] = json.loads((Path(folder) / "said.json").read_text(encoding="utf-8"))
    return said


def run() -> Result:
    """Build, install and prune. Raises CalledProcessError or AssertionError where one of it fails."""
    python = environment()
    wheel = build(WHERE / "dist")
    install(python, wheel)
    said = prune(python)
    assert Path(str(said["home"])).is_relative_to(WHERE / "venv"), f"it ran {said['home']}"
    names = [re.match(r"[\w.-]+", one) for one in _required(python)]
    installed = {name[0]: said["installed"][name[0].lower()] for name in names if name}  # type: ignore[index]
    (visual,), (kept,) = said["visual"], said["kept"]  # type: ignore[misc]
    assert 0 < kept < visual, f"{kept} of {visual} visual tokens were kept"
    today = datetime.date.today().isoformat()
    return Result(wheel.name, ".".join(map(str, sys.version_info[:3])), installed, visual, kept, today)


def _required(python: Path) -> list[str]:
    """What the installed prunekit asks for without its extras."""
    code = "import json; from importlib.metadata import requires; print(json.dumps(requires('prunekit')))"
    said = subprocess.run([str(python), "-I", "-c", code], check=True, capture_output=True, text=True).stdout
    return [one for one in json.loads(said) if "extra ==" not in one]


def text(one: Result) -> str:
    """The result as a paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in one.installed.items() if name != "torch")
    return (
        f"`{one.wheel}`, installed on {one.date} without constraints into an empty environment of Python {one.python}\n"
        f"beside PyTorch {one.installed['torch']}: pip chose {versions}.\n"
        f"README's ten lines then kept {one.kept} of {one.visual} visual tokens."
    )


def stored() -> Result:
    """What is in the file."""
    return Result(**json.loads(RESULT.read_text(encoding="utf-8")))


def main() -> None:
    """Run, and write the file and the page."""
    one = run()
    print(text(one), flush=True)
    RESULT.write_text(json.dumps(asdict(one), indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda m: f"{m[1]}{text(one)}\n{m[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
