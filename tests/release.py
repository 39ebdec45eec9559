"""Build `dist/` for a package index, from a copy whose README leads to the public repository: an index has no files.

make release REPOSITORY=https://example.org/owner/prunekit    # without it, links stay as they are, and it says so
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")
BRANCH = "main"


def absolute(text: str, repository: str) -> str:
    """Markdown with links and pictures of the repository as addresses there."""

    def led(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository}/{kind}/{BRANCH}/{match[3]})"

    return LINK.sub(led, text)


def with_urls(pyproject: str, repository: str) -> str:
    """`pyproject.toml` with the project's addresses."""
    pages = {
        "Repository": repository,
        "Documentation": f"{repository}/blob/{BRANCH}/docs/index.md",
        "Changelog": f"{repository}/blob/{BRANCH}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    table = "".join(f'{name} = "{address}"\n' for name, address in pages.items())
    return f"{pyproject.rstrip()}\n\n[project.urls]\n{table}"


def main(repository: str) -> int:
    """Build wheel and source distribution."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "prunekit"
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(copy)], check=True)
        if repository:
            for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
                path = copy / name
                path.write_text(change(path.read_text(encoding="utf-8"), repository.rstrip("/")), encoding="utf-8")
        else:
            print("no REPOSITORY: links of the README lead nowhere on a package index")
        words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(ROOT / "dist"), str(copy)]
        return subprocess.run(words).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
