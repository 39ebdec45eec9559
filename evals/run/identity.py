"""What a result depends on besides the pipeline: the model's weights, the code that ran, and the versions around it."""

from __future__ import annotations

import hashlib
import inspect
import platform
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prunekit.pipeline.build import Pipeline

# Files of a model folder that can change an answer: weights, configs, tokenizer, processor, chat template.
MATTERS = {".json", ".jinja", ".safetensors", ".bin", ".model", ".txt"}
WHOLE = 256 * 2**20
BLOCK, BLOCKS = 2**20, 64
# Modules of the two packages that have no part in an answer.
APART = (
    "testing/", "cli", "micro/", "arguments", "commands", "compare", "plugin", "progress", "quiet", "registration",
    "stats", "table",
)  # fmt: skip


def model_identity(where: Path | str) -> str | None:
    """Names the weights at `where`: 12 hex digits of a folder's files, the revision of a hub id in the local cache.

    A file of more than 256 MiB counts by its size and 64 evenly spread blocks of 1 MiB. None for a hub id that is not
    in the local cache yet.
    """
    if isinstance(where, Path):
        return _folder(where.resolve())
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(where, "config.json")
    return Path(config).parent.name[:12] if isinstance(config, str) else None


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
    found = {"python": platform.python_version()}
    for name in ("prunekit", "lmms_eval", "torch", "transformers", "datasets", "pillow"):
        try:
            found[name.replace("_", "-")] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def _folder(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in MATTERS and not any(part.startswith(".") for part in file.parts[-2:]):
            total.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
            for block in _blocks(file):
                total.update(block)
    return total.hexdigest()[:12]


def _blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE:
            while block := stream.read(BLOCK):
                yield block
            return
        for number in range(BLOCKS):
            stream.seek((size - BLOCK) * number // (BLOCKS - 1))
            yield stream.read(BLOCK)


@cache
def _packages() -> str:
    total = hashlib.sha256()
    import prunekit

    for root in (Path(prunekit.__file__).parent, Path(__file__).parent):
        for file in sorted(root.rglob("*.py")):
            name = file.relative_to(root).as_posix()
            if not name.startswith(APART):
                total.update(name.encode() + file.read_bytes())
    return total.hexdigest()
