"""The documentation as a site: it builds without a network, every link leads somewhere, and public names are on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import prunekit

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built anew; a warning, such as of a link that leads nowhere, fails it."""
    config = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    folder = tmp_path_factory.mktemp("site")
    build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_page_is_there_and_every_page_can_be_reached(site: Path) -> None:
    sources = (path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
    pages = {path.with_suffix(".html") for path in sources}
    assert all((site / page).is_file() for page in pages)
    text = "\n".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
    for page in pages - {Path("index.html")}:
        assert re.search(rf'href="[^"]*{re.escape(page.name)}[#"]', text), f"nothing leads to {page}"


def test_public_names_are_on_it_with_their_docstrings(site: Path) -> None:
    text = (site / "reference" / "names.html").read_text(encoding="utf-8")
    for name in prunekit.__all__:
        assert name.startswith("__") or f'id="prunekit.{name}"' in text or f"#prunekit.{name}" in text, name
    assert re.search(r"<strong>layer_tokens</strong>", text), "fields are no list"


def test_what_pages_link_to_outside_docs_is_on_it(site: Path) -> None:
    assert (site / "source" / "strategies" / "fastv.py.html").is_file()
    assert (site / "source" / "CONTRIBUTING.html").is_file()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|source)[^>]* src="?(https?:[^" >]+)', text)
        fetched += re.findall(r'<link[^>]*rel="?(?:stylesheet|preconnect|icon)"?[^>]*href="?(https?:[^" >]+)', text)
        assert not fetched, path.relative_to(site)
