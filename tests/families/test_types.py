"""Every image-text-to-text type of transformers: some always, all of them in the slow suite."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))
import families_table as table

# Forms of inputs that no family file has, refusals of each kind.
EXACT = ("glm_ocr", "video_llama_3", "granite_docling", "fuyu", "lighton_ocr")
REFUSED = {
    "mllama": "images enter its decoder by cross-attention",
    "florence2": "it is an encoder-decoder: ",
    "evolla": "it takes no images",
}
# Fewer than the pinned version has pruned; a refusal that comes back is noticed.
LEAST = 60


def there(kind: str) -> str:
    """This type, or the test is skipped where the installed transformers has no such."""
    if kind not in table.types():
        pytest.skip(f"this transformers has no {kind}")
    return kind


@pytest.mark.parametrize("kind", EXACT)
def test_types_without_a_file_are_pruned_exactly(kind: str) -> None:
    found = table.tried(there(kind))
    assert found.how == "generic" and found.error is not None and found.error < 1e-9, found


@pytest.mark.parametrize("kind", list(REFUSED))
def test_refusals_say_what_is_lacking(kind: str) -> None:
    found = table.tried(there(kind))
    assert found.how == "refused" and found.reason.startswith(REFUSED[kind]), found


def test_a_crash_and_a_timeout_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(kind: str) -> Any:
        raise SystemExit(3) if kind == "raises" else MemoryError

    monkeypatch.setattr(table, "tried", crash)
    assert table.apart("dies").how == "failed" and "MemoryError" in table.apart("dies").reason
    assert "SystemExit" in table.apart("raises").reason
    monkeypatch.setattr(table, "LIMIT", 0)
    assert table.apart("hangs").reason == "took more than 0 seconds"


def test_the_page_shows_what_was_found() -> None:
    data = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    results = {kind: table.Result(**one) for kind, one in data["types"].items()}
    found = table.BLOCK.search(table.PAGE.read_text(encoding="utf-8"))
    assert found and found[0].split("\n", 1)[1].rsplit("\n", 1)[0] == "\n".join(
        table.table(results, data["transformers"])
    )
    assert all(one.how != "failed" for one in results.values())
    assert sum(one.error is not None for one in results.values()) >= LEAST


@pytest.mark.slow
@pytest.mark.parametrize("kind", table.types())
def test_every_type_is_exact_or_refused(kind: str) -> None:
    found = table.apart(kind)
    assert found.how != "failed", found
    assert found.error is None or found.error < 1e-8, found
