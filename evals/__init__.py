"""Evaluation of pruning pipelines: benchmarks, results, and the bundled real LVLM."""
