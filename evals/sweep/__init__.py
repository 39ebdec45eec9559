"""Sweeps: pipelines x models x tasks x budgets x seeds from one file, by workers of one machine or of Ray."""
