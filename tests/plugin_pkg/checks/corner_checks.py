"""What the author of a plugin writes: the contract in one line, and a test of the idea itself."""

import prunekit
from prunekit.testing.contract import contract
from prunekit.testing.tiny import tiny_inputs, tiny_llava

TestCorner = contract("corner", options={"corner": "bottom-right"})


def test_it_keeps_the_corner():
    model = tiny_llava()
    with prunekit.apply(model, {"name": "corner", "stages": [{"use": "corner", "keep_tokens": 3}]}) as run:
        model(**tiny_inputs())
    assert run.report.events[0].kept == ((0, 1, 4),)
