"""What a serving engine can do with a pipeline: shallower checkpoints, and which stages engines could carry out.

export = shallow(model, "skip-two", processor)     # prunekit export
advice = [of_stage(stage, bound) for stage in bound.stages]    # prunekit doctor MODEL --serving PIPELINE
"""

from prunekit.serving.advice import Advice, of_stage
from prunekit.serving.shallow import Shallow, shallow

__all__ = ["Advice", "Shallow", "of_stage", "shallow"]
