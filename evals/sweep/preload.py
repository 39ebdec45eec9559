"""Imported by the server that workers are forked off: everything that takes long, nothing that starts threads."""

from __future__ import annotations

from prunekit_evals import runner  # noqa: F401
from prunekit_evals.lmms import adapter  # noqa: F401
