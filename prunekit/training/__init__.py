"""Training routers beside a frozen LVLM: `prunekit train`. It names no router.

A router that can be trained has a method `learner(shape, layers, theta)`, which gives what `learner.Learner` describes.
The LVLM itself is the teacher: no labels, and no gradient through it.
"""
