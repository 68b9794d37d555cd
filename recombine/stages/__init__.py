"""What `run.py` runs. A stage takes a `Run` and returns what it adds to result.json.

retrofit: rewrite the model, count, compare with the original; no training.
compress: rewrite under a budget, distil from the original, then train the classifier alone.
adapt:    rewrite, then train what the method trains and the classifier.
joint:    compress, then adapt.
evaluate: score a checkpoint on the test set.
"""

from recombine.stages.adapt import adapt, fit, test
from recombine.stages.compress import compress, joint
from recombine.stages.evaluate import evaluate
from recombine.stages.retrofit import retrofit
from recombine.stages.run import Run

STAGES = {"retrofit": retrofit, "compress": compress, "adapt": adapt, "joint": joint, "evaluate": evaluate}

__all__ = ["STAGES", "Run", "fit", "test"]
