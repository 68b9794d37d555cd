"""What is measured of a model after its stage, beside its score: the keys of `analyse`, from CERSA (arXiv 2605.08174).

subspaces (Tab. 16, Fig. 11 and 12): see recombine/evaluation/subspaces.py.

elsewhere (Tab. 15, Fig. 10): how well the backbone's features still serve other tasks. The forgetting rate is
(before - after) / before of the means over them. Paper: how a model tuned for one task classifies another is not said.
Here: a linear probe on the features in front of the head, fitted on that task's training set, before and after. Of a
language model: the perplexity on the test sets of other texts, after.
"""

import copy

from torch import nn

from recombine.core.account import stored_in_targets
from recombine.evaluation import harness, linear_probe
from recombine.evaluation.subspaces import subspaces
from recombine.layers.packed import entries
from recombine.result_schema import AnalysisPart
from recombine.stages.context import RunContext


def before(run: RunContext) -> nn.Module | None:
    """A copy of the pretrained model, where an analysis will compare with it."""
    asked = run.settings.analyse
    probes = run.transfer_data and run.data.objective != "lm"
    return copy.deepcopy(run.model) if asked.subspaces or asked.maps or probes else None


def after(run: RunContext, original: nn.Module | None) -> AnalysisPart:
    """What the analyses add to the result. original: as `before` returned it."""
    part = costs(run)
    if run.transfer_data and run.data.objective == "lm":
        size = run.data.batch_size
        scores = {
            task: harness.perplexity(run.model, data.test, batch_size=size) for task, data in run.transfer_data.items()
        }
        part["elsewhere"] = {"after": scores}
    if original is None:
        return part
    asked, device = run.settings.analyse, next(original.parameters()).device
    run.model.to(device)  # Lightning leaves it on the CPU
    if asked.subspaces or asked.maps:
        part["subspaces"] = subspaces(original, run.model, asked.subspaces or 1.0, asked.maps)
    if run.transfer_data and run.data.objective != "lm":
        was, now = {}, {}
        for task, data in run.transfer_data.items():
            was[task] = linear_probe.shared(f"{run.original} {task}", original, data).test
            now[task] = linear_probe.fit(run.model, data).test
        part["elsewhere"] = {"before": was, "after": now, "forgetting": forgetting(was, now)}
    return part


def costs(run: RunContext) -> AnalysisPart:
    """What training took of memory and time, as CERSA's tables have it.

    memory_rate: weights + gradients + AdamW's moments over the pretrained weights, of the target layers alone
    (CERSA's (mr + nr + 4 r^2) / (mn)) and of the whole model. images_per_second: of the training, validation included.
    """
    part, record = {}, getattr(run.model, "recombined", None)
    if record is not None:
        trained = {id(p): p.numel() for p in run.model.parameters() if p.requires_grad}
        layers = [run.model.get_submodule(name) for name in record.targets]
        inside = {id(p) for layer in layers for n, p in layer.named_parameters() if not n.endswith("bias")}
        stored = sum(entries(run.model).values())
        targets = stored_in_targets(run.model) + 3 * sum(trained.get(p, 0) for p in inside)
        part["memory_rate"] = {
            "targets": targets / record.dense,
            "model": (stored + 3 * sum(trained.values())) / record.total,
        }
    if (seconds := run.seconds.get("train_best")) and (epochs := len(run.curves["best"].get("train/loss", ()))):
        part["images_per_second"] = epochs * len(run.data.train) / seconds
    return part


def forgetting(was: dict[str, float], now: dict[str, float]) -> float:
    """The drop of the mean accuracy as a share of the mean accuracy before; negative where it rose."""
    return 1 - sum(now.values()) / sum(was.values())
