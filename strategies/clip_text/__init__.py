"""Strategies that read the question with the text tower of the CLIP model that the vision tower was taken from.

trim.py       TRIM
cdpruner.py   CDPruner, and its variant that needs no CLIP model
pair.py       that model: found, checked, loaded
"""
