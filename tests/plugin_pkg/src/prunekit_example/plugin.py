"""Registers the strategy by name; nothing heavy is imported."""

from prunekit import hookimpl


@hookimpl
def prunekit_register(registry):
    registry.strategy("corner", "prunekit_example.corner:Corner", summary="the tokens nearest to a corner")
