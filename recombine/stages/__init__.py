"""What `run.py` runs. A stage takes a `RunContext` and returns its part of result.json.

retrofit: rewrite the model, count, compare with the original; no training.
compress: rewrite under a budget, distil from the original, then train the classifier alone.
adapt:    rewrite, then train what the method trains and the classifier.
joint:    compress, then adapt.
evaluate: score a checkpoint, or the original model, on the test set.
sample:   draw pictures with a checkpoint, or the original model, and score them.
profile:  rewrite, count and time, beside a reference; no training.
"""

from recombine.stages.adapt import adapt
from recombine.stages.compress import compress, joint
from recombine.stages.evaluate import evaluate
from recombine.stages.profile import profile
from recombine.stages.retrofit import retrofit
from recombine.stages.sample import sample

STAGES = {stage.__name__: stage for stage in (retrofit, compress, adapt, joint, evaluate, sample, profile)}

__all__ = ["STAGES"]
