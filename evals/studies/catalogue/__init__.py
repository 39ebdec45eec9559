"""The catalogue: a card for every strategy, from code, from what was measured, and from what papers report."""
