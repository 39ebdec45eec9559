"""Runs what shows exactness on several versions of transformers, and puts what it saw into docs/exactness.md.

    python tests/versions.py                 # all versions; `make test-matrix` does this
    python tests/versions.py 5.4.0 5.24.0    # only these; the others stay as they were in the file

Every version gets a virtual environment in .matrix/ that holds that transformers and what it pins (tokenizers,
huggingface-hub); all else, PyTorch included, is seen through it from the environment that runs this script.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHERE, RESULTS, PAGE = ROOT / ".matrix", ROOT / "tests" / "versions.json", ROOT / "docs" / "exactness.md"
# The oldest that pyproject.toml allows, minors in between, and the pinned one.
VERSIONS = ("5.4.0", "5.6.2", "5.12.1", "5.18.0", "5.23.0", "5.24.0")
# Families whose models generate in older versions, too, but whose decoders are not cut inside there: the first minor in
# which they are. Layers of Gemma 3n handed keys and values on through the cache, not by an argument; recurrent states
# of Qwen3.5 were kept in another form (see prunekit/upstream.py).
FIRST = {"gemma3n": (5, 6), "qwen3_5": (5, 14), "qwen3_5_moe": (5, 14)}
SUITE = ("test_upstream", "engine/test_generate", "engine/test_generate_static", "engine/test_cache")
# Of the cells that `make test` runs, every one in so many.
SHARE = 8
# Left to the pinned version: eager attention, simulated flash kernels, and tracing, which takes long.
LESS = "not eager and not compiled and not flash"
BLOCK = re.compile(r"(<!-- versions: begin -->\n).*?(<!-- versions: end -->)", re.S)


@dataclass(frozen=True)
class Result:
    """What one version did. failed: names of the tests. seconds: of the whole run. left_out: families whose stock model
    cannot be built or does not generate there, without any pipeline. whole: families whose decoder is not
    cut inside there, which are left out as well.
    """

    transformers: str
    torch: str
    passed: int
    failed: tuple[str, ...]
    skipped: int
    seconds: int
    date: str
    left_out: tuple[str, ...]
    whole: tuple[str, ...]


def environment(version: str) -> Path:
    """The Python of an environment with that transformers; made if it is not there."""
    folder = WHERE / version
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        outer = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (Path(packages) / "_outer.pth").write_text(outer, encoding="utf-8")
        # pip complains that prunekit's other dependencies want another transformers; they are not run here.
        command = [str(python), "-m", "pip", "install", "-q", "--no-input", f"transformers=={version}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        (folder / ".installed").touch()
    return python


# Of each family whose stock model does not generate, or which prunekit does not cut inside: what of both, and its name.
STOCK = """
import warnings
from prunekit import families
from prunekit.testing.tiny_families import tiny_batch, tiny_model, tiny_names
warnings.simplefilter("ignore")
for name in tiny_names():
    try:
        model = tiny_model(name)
        model.generate(**tiny_batch(model), max_new_tokens=2, do_sample=False)
    except Exception:
        print("fails", name)
        continue
    if families.find(model).opaque is not None:
        print("whole", name)
"""


def cells() -> list[str]:
    """Some of the matrix's cells, as pytest names them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "not slow", "tests/engine/test_matrix.py"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return [line for line in listed if "::" in line][::SHARE]


def run(version: str, chosen: list[str]) -> Result:
    """The suite on one version, and of the matrix the cells that are chosen."""
    python, report = environment(version), WHERE / f"{version}.xml"
    minor = tuple(map(int, version.split(".")[:2]))
    left_out, whole = families_of(python)
    if set(whole) != {name for name, first in FIRST.items() if minor < first}:
        raise SystemExit(f"transformers {version}: not cut inside: {', '.join(whole) or 'none'}; FIRST says otherwise")
    beams = minor >= (5, 20)  # with several pictures in a prompt, as in the matrix
    there = [cell for cell in chosen if not any(f"[{name}-" in cell for name in left_out + whole)]
    there = [cell for cell in there if beams or not cell.endswith("-beams]")]
    files = [f"tests/{name}.py" for name in SUITE] + there
    options = ["-q", "-m", "not slow", "-k", LESS, "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}"]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begin = time.monotonic()
    subprocess.run([str(python), "-m", "pytest", *options, *files], cwd=ROOT, env=os.environ | quiet, check=False)
    seconds = round(time.monotonic() - begin)
    ask = "import torch, transformers; print(transformers.__version__, torch.__version__)"
    found = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    if found[0] != version:
        raise SystemExit(f"{python} runs transformers {found[0]}, not {version}; remove {WHERE / version}")
    passed, failed, skipped = counts(report)
    today = datetime.date.today().isoformat()
    return Result(version, found[1], passed, failed, skipped, seconds, today, left_out, whole)


def families_of(python: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Families whose stock model does not run under that Python, and those whose decoder is not cut inside there."""
    done = subprocess.run([str(python), "-c", STOCK], cwd=ROOT, check=True, capture_output=True, text=True)
    said = [line.split() for line in done.stdout.splitlines()]
    return tuple(name for what, name in said if what == "fails"), tuple(name for what, name in said if what != "fails")


def counts(report: Path) -> tuple[int, tuple[str, ...], int]:
    """Tests passed, names of tests that failed, tests skipped, from a JUnit file."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [f"{one.get('classname')}::{one.get('name')}" for one in cases if {"failure", "error"} & {c.tag for c in one}]
    skipped = sum(any(child.tag == "skipped" for child in one) for one in cases)
    return len(cases) - len(bad) - skipped, tuple(bad), skipped


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| transformers | torch | passed | failed | skipped | seconds | run on | stock models fail | not cut inside |",
        "| --- | --- |" + " ---: |" * 5 + " --- | --- |",
    ]
    for r in results:
        row = (r.transformers, r.torch, r.passed, len(r.failed), r.skipped, r.seconds, r.date)
        without = (", ".join(r.left_out), ", ".join(r.whole))
        lines.append("| " + " | ".join(map(str, row + without)) + " |")
    return "\n".join(lines)


def stored() -> list[Result]:
    """What is in the file."""
    data = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    return [Result(**{key: tuple(v) if isinstance(v, list) else v for key, v in one.items()}) for one in data]


def keep(results: list[Result]) -> None:
    """Write the file and the page."""
    RESULTS.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda m: f"{m[1]}{table(results)}\n{m[2]}", page), encoding="utf-8")


def main() -> int:
    """Run, write after each version, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), help=f"which ({', '.join(VERSIONS)})")
    chosen, some, failed = parser.parse_args().versions, cells(), False
    for version in chosen:
        one = run(version, some)
        print(f"transformers {version}: {one.passed} passed, {len(one.failed)} failed", flush=True)
        found = {result.transformers: result for result in stored()} | {version: one}
        keep(sorted(found.values(), key=lambda one: [int(part) for part in one.transformers.split(".")]))
        failed |= bool(one.failed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
