"""What is built for a package index: links that work there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import release

ROOT = Path(__file__).parents[1]
HOME = "https://example.org/owner/prunekit"


def test_every_link_of_the_readme_leads_somewhere_on_an_index() -> None:
    text = release.absolute((ROOT / "README.md").read_text(encoding="utf-8"), HOME)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets and all(target.startswith(("https://", "#")) for target in targets)
    ours = [target for target in targets if target.startswith(HOME)]
    assert len(ours) > 10
    for target in ours:
        kind, branch, path = target.removeprefix(f"{HOME}/").split("/", 2)
        assert branch == "main" and (ROOT / path.partition("#")[0]).exists(), target
        assert (kind == "raw") == path.endswith((".png", ".webp")), target


def test_other_text_stays_as_it_is() -> None:
    text = "`[a](b)` is [code [1]](x/y.md#z), ![p](i.png), [there](https://a.b/c), [here](#h) and f(x)[0](y z)"
    expected = text.replace("(b)", f"({HOME}/blob/main/b)").replace("(x/", f"({HOME}/blob/main/x/")
    assert release.absolute(text, HOME) == expected.replace("(i.png)", f"({HOME}/raw/main/i.png)")


def test_the_metadata_has_the_addresses() -> None:
    data = tomllib.loads(release.with_urls((ROOT / "pyproject.toml").read_text(encoding="utf-8"), HOME))
    assert data["project"]["urls"]["Repository"] == HOME and data["project"]["name"] == "prunekit"
    assert data["tool"]["pytest"]["ini_options"]  # tables that stood behind are still their own
