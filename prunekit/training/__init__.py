"""Training routers beside a frozen LVLM: `prunekit train`. Knows no router by name.

A router that can be trained has a method `learner(shape, layers, theta)`, which gives what `learner.Learner` describes.
The LVLM itself is the teacher: no labels, and no gradient through it.
"""
