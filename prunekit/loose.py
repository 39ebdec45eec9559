"""A plugin without packaging: a `.py` file, or a folder with an `__init__.py`, imported under its own name."""

from __future__ import annotations

import hashlib
import importlib.util
import keyword
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from prunekit.errors import PluginError


def name_of(path: Path) -> str:
    """The name of the module, and of the plugin: that of the file without `.py`, or that of the folder."""
    return path.stem if path.suffix == ".py" else path.name


def load(path: Path) -> ModuleType:
    """Import `path`, so that targets such as `mine:Mine` find it; a second call gives the same module.

    Raises PluginError for what is no module or has the name of another one, and whatever its code raises.
    """
    name, file = name_of(path), _file(path)
    if (holder := _holder(name)) is not None and not (holder.exists() and holder.samefile(file)):
        raise PluginError(f"'{name}' is also the name of a module at {holder}: rename the file")
    if name in sys.modules:
        return sys.modules[name]
    folder = [str(file.parent)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folder)
    if spec is None or spec.loader is None:
        raise PluginError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@cache  # as it was when this process imported it
def digest(path: Path) -> str:
    """12 hex digits of the contents, in place of a version: results of an edited file are computed anew."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    hashed = hashlib.sha256()
    for file in files:
        if "__pycache__" not in file.parts:
            hashed.update(f"{file.relative_to(path).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return hashed.hexdigest()[:12]


def _file(path: Path) -> Path:
    """The absolute path of what is to be run."""
    file = (path / "__init__.py" if path.is_dir() else path).absolute()
    if not file.is_file():
        raise PluginError(f"there is no file {file}")
    if file.suffix != ".py":
        raise PluginError(f"{file} is no Python file: a plugin is a .py file, or a folder with an __init__.py")
    name = name_of(path)
    if not name.isidentifier() or keyword.iskeyword(name):
        raise PluginError(f"'{name}' is no name for a Python module: rename it, with letters, digits and '_' only")
    return file


def _holder(name: str) -> Path | None:
    """Where the module lies that `import name` gives, as far as it has a place; None: there is none."""
    if name in sys.modules:
        return Path(getattr(sys.modules[name], "__file__", None) or f"<built-in {name}>")
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec is not None and spec.origin else None  # a mere folder on the path is no module
