"""A plugin that watches: an observer of every run, and a wrapper to put around the hooks of single stages."""

from __future__ import annotations

from prunekit import hookimpl

FINISHED = []


@hookimpl
def prunekit_run_finished(report):
    FINISHED.append(report.pipeline)


class Watch:
    """Put around a stage (`stage.manager.register(Watch())`), it sees every call of its token hooks and the results."""

    def __init__(self):
        self.calls = []

    @hookimpl(wrapper=True)
    def score_tokens(self, coords):
        scores = yield
        self.calls.append(("score_tokens", tuple(coords.shape), tuple(scores.shape)))
        return scores

    @hookimpl(wrapper=True)
    def select_tokens(self, valid, count):
        keep = yield
        self.calls.append(("select_tokens", tuple(valid.shape), count))
        return keep
