"""Writes what follows from the code into reference pages: `python tests/reference_pages.py`. Tests compare them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from prunekit import hookspecs
from prunekit.strategy.inputs import IMAGE_HOOK, INPUTS, TOKEN_HOOKS, Input

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
GROUPS = {
    "Token hooks": hookspecs.TokenHooks,
    "Image hooks": hookspecs.ImageHooks,
    "Layer hooks": hookspecs.LayerHooks,
    "Router hooks": hookspecs.RouterHooks,
    "Statements": hookspecs.StatementHooks,
    "Host hooks": hookspecs.HostHooks,
    "Observer hooks": hookspecs.ObserverHooks,
}
SITES = {"pixels": "pixels", "tower": "tower", "encoder": "encoder", "decoder": "layers", "end": "end"}


def hooks() -> str:
    """Every hook by its specification: signature and text."""
    parts = []
    for title, group in GROUPS.items():
        parts.append(f"## {title}\n\n{_flowing(inspect.getdoc(group) or '')}")
        for name, function in vars(group).items():
            if hasattr(function, "prunekit_spec"):
                arguments = "..." if name in (*TOKEN_HOOKS, IMAGE_HOOK, "route") else ", ".join(_arguments(function))
                parts.append(f"### `{name}({arguments})`\n\n{_flowing(inspect.getdoc(function) or '')}")
    return "\n\n".join(parts)


def inputs() -> str:
    """The table of inputs, for token hooks and for `route`."""
    return "\n\n".join(
        [
            "## Inputs of token hooks",
            _table([one for one in INPUTS if any(hook in TOKEN_HOOKS for hook in one.hooks)], sites=True),
            f"## Inputs of `{IMAGE_HOOK}`",
            _table([one for one in INPUTS if IMAGE_HOOK in one.hooks], sites=False),
            "## Inputs of `route`",
            _table([one for one in INPUTS if "route" in one.hooks], sites=False),
        ]
    )


def _table(rows: list[Input], sites: bool) -> str:
    head = "| input | what it is | " + ("exists at | " if sites else "") + "request |"
    lines = [head, "| --- " * (4 if sites else 3) + "|"]
    for one in rows:
        only = f"; for `{one.hooks[0]}` only" if len(one.hooks) == 1 and one.hooks[0] in TOKEN_HOOKS else ""
        where = "everywhere" if len(one.regions) == len(SITES) else ", ".join(SITES[region] for region in one.regions)
        request = f"`{one.request.__name__}`" if one.request else ""
        about = f"{one.shape}: {one.about}{only}"
        lines.append(f"| `{one.name}` | {about} | " + (f"{where} | " if sites else "") + f"{request} |")
    return "\n".join(lines)


def _arguments(function: Callable[..., object]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _flowing(text: str) -> str:
    """A docstring as Markdown: wrapped lines joined, a list item for each `Arguments:`, `Returns:` and the like."""
    blocks = []
    for block in text.split("\n\n"):
        lines = re.sub(r"\n(?=(?:Arguments|Returns|Stops|Raises)\b)", "\n\n", block).split("\n\n")
        blocks.append("  \n".join(" ".join(line.split()) for line in lines))
    return "\n\n".join(blocks)


def write(page: str, mark: str, text: str) -> str:
    """The page with `text` between its marks."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    assert rest and after, f"the page has no {begin} ... {end}"
    return f"{before}{begin}\n{text}\n{end}{after}"


def written() -> str:
    """docs/reference/hooks.md as it should be."""
    page = (REFERENCE / "hooks.md").read_text(encoding="utf-8")
    return write(write(page, "hooks", hooks()), "inputs", inputs())


if __name__ == "__main__":
    (REFERENCE / "hooks.md").write_text(written(), encoding="utf-8")
