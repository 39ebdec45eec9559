"""`-p tests.noskip`, with which `.ci/run` calls the tests, turns skips into failures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

FILES = {
    "test_skips.py": """
        import pytest

        def test_passes(): pass
        def test_skips(): pytest.skip("no screen")
        @pytest.mark.skip(reason="later")
        def test_marked(): pass
        @pytest.mark.xfail(reason="known", strict=True)
        def test_expected(): raise ValueError
    """,
    "test_imports_nothing.py": """
        import pytest
        pytest.importorskip("a_module_that_nobody_has")
    """,
}


def test_every_skip_is_a_failure(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text("\n".join(line[8:] for line in text.splitlines()))
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "tests.noskip", "-p", "no:cacheprovider", "-rA"]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "1 failed, 1 passed, 1 xfailed, 2 errors" in done.stdout
    assert "no screen (nothing may be skipped here)" in done.stdout
