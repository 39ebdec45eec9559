"""Registers the strategies by name; nothing heavy is imported."""

from prunekit import hookimpl


@hookimpl
def prunekit_register(registry):
    registry.strategy("corner", "prunekit_example.corner:Corner", summary="the tokens nearest to a corner")
    registry.strategy("sandwich", "prunekit_example.sandwich:Sandwich", summary="every second of the middle layers")
    registry.strategy("by_length", "prunekit_example.by_length:ByLength", summary="likeness, more layers for long text")
    registry.strategy("blend", "prunekit_example.blend:Blend", summary="neighbours in the tower become one")
    registry.strategy("moving", "prunekit_example.moving:Moving", summary="what changes from frame to frame")
