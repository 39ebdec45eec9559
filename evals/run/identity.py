"""What a result depends on besides the pipeline: the code that ran, the versions around it, the machine below it."""

from __future__ import annotations

import hashlib
import inspect
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.pipeline.build import Pipeline

if TYPE_CHECKING:
    import torch

# Modules of the two packages that have no part in an answer.
APART = (
    "testing/", "trace/", "cli/", "micro/", "smol/", "compare/", "leaderboard/", "studies/", "bench/cpu",
    "bench/drawn", "bench/gpu", "bench/llava_7b", "bench/sections", "bench/selection", "bench/sweeping", "bench/timing",
    "bench/workload", "lmms/quiet", "lmms/registration", "plugin", "run/annotated", "run/claims", "run/export",
    "run/reading", "run/variants", "search/", "sweep/",
)  # fmt: skip


def code_identity(pipeline: Pipeline) -> str:
    """12 hex digits of the source of prunekit, of this package, and of the modules of the pipeline's strategies.

    Within one version, code under work must not be answered from results of older code.
    """
    total = hashlib.sha256(_packages().encode())
    for name in sorted({type(stage.strategy).__module__ for stage in pipeline.stages}):
        source = inspect.getsourcefile(sys.modules[name])
        if source:
            total.update(Path(source).read_bytes())
    return total.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of what computes and scores. lmms-eval's own version string is the commit of whatever is around it."""
    numbers = {"python": platform.python_version()}
    for name in ("prunekit", "lmms_eval", "torch", "transformers", "datasets", "pillow"):
        try:
            numbers[name.replace("_", "-")] = version(name)
        except PackageNotFoundError:
            continue
    return numbers


def machine(device: torch.device) -> str:
    """What times depend on: the GPU, or the processor and the threads that compute."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def _processor() -> str:
    """The name of the processor: the kernel's, where the platform knows none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


@cache
def _packages() -> str:
    total = hashlib.sha256()
    import prunekit

    for root in (Path(prunekit.__file__).parent, Path(__file__).parent.parent):
        for file in sorted(root.rglob("*.py")):
            name = file.relative_to(root).as_posix()
            if not name.startswith(APART):
                total.update(name.encode() + file.read_bytes())
    return total.hexdigest()
