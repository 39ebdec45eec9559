"""The built-in strategies: one file per paper, written against prunekit's public names only."""
