"""Two instances of one strategy in a pipeline, a wrapper around one of them; prints what was seen as JSON."""

import json
import sys

from prunekit_example import watch

import prunekit
from prunekit import plugins
from prunekit.testing.tiny import tiny_inputs, tiny_llava

model = tiny_llava()
pipeline = prunekit.load(
    {
        "name": "watched",
        "stages": [
            {"use": "corner", "keep": 0.5},
            {"use": "corner", "at": 2, "keep": 0.25, "corner": "bottom-right"},
        ],
    }
)


def kept():
    with prunekit.apply(model, pipeline) as run:
        model.generate(**tiny_inputs((1, 2), (9, 4)), max_new_tokens=4, do_sample=False)
        model.generate(**tiny_inputs((1,), (9,)), max_new_tokens=4, do_sample=False)
    return [event.kept for event in run.report.events]


plain = kept()
watcher = watch.Watch()
pipeline.stages[1].manager.register(watcher, name="watch")
watched = kept()
seen = list(watcher.calls)
pipeline.stages[1].manager.unregister(name="watch")
unchanged = plain == watched == kept()
json.dump(
    {
        "calls": seen,
        "after": len(watcher.calls),
        "unchanged": unchanged,
        "finished": watch.FINISHED,
        "origin": plugins.registry().strategy_entry("corner").origin,
        "plugins": plugins.names(),
    },
    sys.stdout,
)
