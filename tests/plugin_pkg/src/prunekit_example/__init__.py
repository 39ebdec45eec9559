"""An example of a plugin that lives in a distribution of its own."""
