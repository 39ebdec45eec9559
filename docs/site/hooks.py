"""What the site has beside the pages in `docs`: files of the repository that they link to, and the public names.

mkdocs calls the functions whose names begin with `on_`. https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\[[^\]\n]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
SHOWN = {".py": "python", ".yaml": "yaml", ".toml": "toml", "": "text"}  # as pages of code
SOURCE, NAMES = "source", "reference/names.md"


def on_files(files: Files, config: Any) -> Files:
    """Add every file of the repository that some page links to, also those that such pages link to."""
    waiting = [(file.src_uri, file.content_string) for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page, text = waiting.pop()
        for _, target, _ in LINK.findall(text):
            uri, path = _target(page, target)
            if uri is None or path is None or files.get_file_from_path(uri):
                continue
            made = _page(path)
            if isinstance(made, bytes):
                files.append(File.generated(config, uri, content=made))
                continue
            files.append(File.generated(config, uri, content=made))
            waiting.append((uri, made))
    files.append(File.generated(config, NAMES, content=_names()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files of the repository to where they are on the site."""

    def led(match: re.Match[str]) -> str:
        uri, _ = _target(page.file.src_uri, match[2])
        if uri is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{match[3]}"

    return LINK.sub(led, markdown)


def _target(page: str, target: str) -> tuple[str | None, Path | None]:
    """Where on the site a link of a page leads that leaves `docs`, or to a folder; and the file that it names."""
    if "://" in target or target.startswith(("#", "mailto:")):
        return None, None
    origin = page.removeprefix(f"{SOURCE}/").removesuffix(".md") if page.startswith(f"{SOURCE}/") else f"docs/{page}"
    here = posixpath.dirname(origin if (ROOT / origin).exists() else f"{origin}.md")
    name = posixpath.normpath(posixpath.join(here, target))
    path = ROOT / name
    if not path.exists() or (name.startswith("docs/") and path.is_file()):
        return (name.removeprefix("docs/"), None) if page.startswith(f"{SOURCE}/") and path.is_file() else (None, None)
    page_like = path.is_dir() or (path.suffix in SHOWN and path.suffix != ".md")
    return f"{SOURCE}/{name}.md" if page_like else f"{SOURCE}/{name}", path


def _page(path: Path) -> str | bytes:
    """A folder as a list, code as a block, anything else as it is."""
    if path.is_dir():
        inside = sorted(one.name for one in path.iterdir() if not one.name.startswith((".", "__")))
        return f"# {path.relative_to(ROOT)}\n\n" + "".join(f"- [{name}]({path.name}/{name})\n" for name in inside)
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if path.suffix in SHOWN:
        text = path.read_text(encoding="utf-8")
        return f"# {path.relative_to(ROOT)}\n\n````{SHOWN[path.suffix]}\n{text}\n````\n"
    return path.read_bytes()


def _names() -> str:
    """Every public name with its docstring, as mkdocstrings shows it."""
    tree = ast.parse((ROOT / "prunekit" / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(one.value) for one in tree.body
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name) and one.targets[0].id == "__all__"
    )  # fmt: skip
    shown = [name for name in names if not name.startswith("__")]
    return "# Public names\n\nWhat `prunekit` exports.\n\n" + "\n".join(f"::: prunekit.{name}\n" for name in shown)
