"""The linear probe: logistic (or ridge) regression on the frozen features in front of the head's last layer."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recombine.core.calibration import BACKWARD
from recombine.core.method import Method
from recombine.errors import UsageError
from recombine.models import roles
from recombine.runtime import progress
from recombine.runtime.atomic import atomic_write
from recombine.training import distributed, finite, objectives, resume

FITTED: dict[str, "Probe"] = {}  # the newest SHARED of this process, whose runs may be those of a sweep
SHARED = 32
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # L2 on standardised features; validation chooses


@dataclass(frozen=True)
class Probe:
    """A fitted probe: weight (classes, d) and bias (classes,) act on the raw features (N, d).

    decay: the L2 decay that validation chose. val, test: accuracies, or Pearson's r of a regression; None: not tested.
    """

    weight: Tensor
    bias: Tensor
    decay: float
    val: float
    test: float | None

    @torch.no_grad()
    def init_head(self, head: nn.Linear) -> None:
        """Starts the last layer of a head from the probe."""
        head.weight.copy_(self.weight)
        if head.bias is not None:
            head.bias.copy_(self.bias)


def asked(settings: Any, parts: Iterable[Method | None]) -> tuple[bool, bool, bool]:
    """Whether a run fits a probe, whether it scores it on the test set, and whether the head starts from it.

    It starts from it where the head has to be good: where the original model teaches, where a method reads the task's
    loss, and with optim.head=probe. A retrofit or a profile reports no probe, and reads the test set only for scores of
    its own.

    Args:
        settings: of the run.
        parts: its compressor and its method.
    """
    stage = settings.stage
    reads = any(part.needs_trained_head or part.statistics_needed() & BACKWARD for part in parts if part is not None)
    starts = stage.name in ("compress", "joint") or reads or settings.optim.head == "probe"
    reports = stage.name not in ("retrofit", "profile")
    return starts or (settings.probe and reports), reports or getattr(stage, "test", False), starts


def load_or_fit(path: Path, model: nn.Module, data, test: bool, key: str) -> Probe:
    """The probe out of the file where there is one, or else fitted and written there.

    The first rank fits, the others wait for its file. A resumed run finds the file of an earlier process.

    Args:
        key: as in `shared`.
    """
    if distributed.rank() == 0 and resume.verified_manifest(path) is None:
        probe = shared(key, model, data, test)
        with atomic_write(path) as temporary:
            save_file({"weight": probe.weight.contiguous(), "bias": probe.bias.contiguous()}, temporary)
        resume.write_manifest(path, decay=probe.decay, val=probe.val, test=probe.test)
    distributed.wait()
    facts = resume.verified_manifest(path)
    return Probe(**load_file(path), **{key: facts[key] for key in ("decay", "val", "test")})


def shared(key: str, model: nn.Module, data, test: bool = True) -> Probe:
    """The probe of an original model, fitted once in a process: the runs of a sweep differ in what they do to it.

    Args:
        key: the same for equal models with equal data.
    """
    key = f"{key} {test}"
    if key not in FITTED:
        FITTED[key] = fit(model, data, test)
        if len(FITTED) > SHARED:
            del FITTED[next(iter(FITTED))]
    return FITTED[key]


@torch.no_grad()
def features(model: nn.Module, data, split: str) -> tuple[Tensor, Tensor]:
    """The inputs (N, d) of the head's last layer in eval mode, and the labels (N,). split: "train", "val" or "test"."""
    head, device, caught, labels = roles.output_layer(model), next(model.parameters()).device, [], []
    hook = head.register_forward_pre_hook(lambda _, args: caught.append(args[0].double().cpu()))
    training = model.training
    model.eval()
    try:
        samples = getattr(data, split)
        for start in progress.of(range(0, len(samples), 64), f"features of {split}", "batches"):
            batch = objectives.fetch(data, samples, list(range(start, min(start + 64, len(samples)))), device)
            objectives.call(model, batch)
            labels.append(objectives.labels_of(batch).cpu())
            if not caught[-1].isfinite().all():
                raise UsageError(f"features of {split} are not finite: {finite.blame(model, batch)}")
    finally:
        hook.remove()
        model.train(training)
    return torch.cat(caught), torch.cat(labels)


def fit(model: nn.Module, data, test: bool = True) -> Probe:
    """Fits on train for each decay, keeps the best on val, and reads test once, where it is asked for.

    Without a validation set, a fifth of train chooses the decay, and the accuracy `val` is that of the fifth.
    """
    x, y = features(model, data, "train")
    if data.val is None:
        held = torch.arange(len(y)) % 5 == 0
        (x, y), (xv, yv) = (x[~held], y[~held]), (x[held], y[held])
    else:
        xv, yv = features(model, data, "val")
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    best = None
    numbers = data.objective == "regression"
    score_of = pearson if numbers else accuracy
    for decay in DECAYS:
        z = (x - mean) / std
        w, b = ridge(z, y, decay) if numbers else regress(z, y, data.num_classes, decay)
        w, b = w / std, b - (w / std) @ mean
        score = score_of(xv, yv, w, b)
        if best is None or score > best.val:
            best = Probe(w.float(), b.float(), decay, score, None)
    if not test:
        return best
    return replace(best, test=score_of(*features(model, data, "test"), best.weight.double(), best.bias.double()))


def accuracy(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> float:
    """The share of x (N, d) whose largest logit is at y (N,)."""
    return ((x @ w.T + b).argmax(1) == y).double().mean().item()


def pearson(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> float:
    """Pearson's r between the outputs for x (N, d) and y (N,); 0 where one of them does not vary."""
    return torch.corrcoef(torch.stack([(x @ w.T + b).squeeze(1), y.double()]))[0, 1].nan_to_num(0.0).item()


def ridge(x: Tensor, y: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Least squares with L2 decay in float64: weight (1, d), bias (1,); x is centred."""
    gram = x.T @ x / len(x) + decay * torch.eye(x.shape[1], dtype=x.dtype)
    mean = y.double().mean()
    return torch.linalg.solve(gram, x.T @ (y.double() - mean) / len(x))[None], mean[None]


def regress(x: Tensor, y: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with L2 decay, by L-BFGS in float64: weight (classes, d), bias (classes,)."""
    w = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    b = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(x @ w.T + b, y) + decay * w.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return w.detach(), b.detach()
