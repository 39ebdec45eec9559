"""Scenes and questions: the public names. Everything is a pure function of integer seeds."""

from __future__ import annotations

from prunekit_evals.micro.compose import Scene, Thing, patch_owner, scene
from prunekit_evals.micro.questions import FAMILIES, Question, ask, questions

__all__ = ["FAMILIES", "Question", "Scene", "Thing", "ask", "patch_owner", "questions", "scene"]
