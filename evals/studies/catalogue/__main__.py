"""Write the cards of all strategies and the sweeps that repeat their rows, and measure these on the bundled model.

make cards                                              # write the cards from code and from what was measured
python -m prunekit_evals.studies.catalogue measure      # add the rows that are missing, and write the cards
python -m prunekit_evals.studies.catalogue draw         # draw what each keeps of one image, and write the cards
python -m prunekit_evals.studies.catalogue measure --again fastv,dart   # rows of changed strategies anew
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from prunekit_evals.studies.catalogue.places import CARDS, COMMAND, IMAGES, MEASURED, REPRODUCE


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n\n")[0])
    asked = ("write", "measure", "draw")
    made.add_argument("what", choices=asked, help="write the cards; before that measure rows, or draw keep maps")
    made.add_argument("--questions", type=int, default=40, metavar="N", help="questions of each task (40)")
    made.add_argument("--only", default="", metavar="A,B", help="measure these strategies alone")
    made.add_argument("--again", default="", metavar="A,B", help="measure these although their rows are there")
    made.add_argument("--cache", type=Path, default=Path("runs/catalogue"), metavar="DIR", help="keeps answers")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure if wanted, then write."""
    made = parser()
    arguments = made.parse_args(argv)
    if not 2 <= arguments.questions <= 600:
        made.error("--questions is from 2 to 600, which each task has")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    if arguments.what == "measure":
        import torch
        from prunekit_evals.studies.catalogue import measure

        torch.set_num_threads(1)
        only, again = ([name for name in text.split(",") if name] for text in (arguments.only, arguments.again))
        measure.run(MEASURED, arguments.questions, arguments.cache, only or again, again)
    if arguments.what == "draw":
        from prunekit_evals.studies.catalogue import draw

        draw.run(IMAGES, arguments.cache)
    from prunekit_evals.studies.catalogue import pages

    for path, text in pages.written().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for stale in {*CARDS.glob("*.md"), *REPRODUCE.glob("*.yaml")} - set(pages.written()):
        stale.unlink()
    print(f"cards: {CARDS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
