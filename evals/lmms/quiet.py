"""Keep the harness's chatter off the screen: bars, log lines, printed tables."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any


def before_imports(download: bool) -> None:
    """Set what libraries read when they are imported; call it before torch, transformers or lmms-eval are."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not download:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ.setdefault(name, "1")


def libraries() -> None:
    """Turn down what reports through settings of its own."""
    import datasets
    import lmms_eval.models  # noqa: F401  (it sets loguru up when it is imported, so it must be before us)
    import loguru
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    loguru.logger.remove()


@contextlib.contextmanager
def harness() -> Iterator[None]:
    """Take what the harness and its tasks print, and its own bars; stdout is for our output, and we have a bar."""
    from lmms_eval import evaluator

    bars = evaluator.tqdm
    evaluator.tqdm = lambda *args, **kwargs: bars(*args, **{**kwargs, "disable": True})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        evaluator.tqdm = bars
