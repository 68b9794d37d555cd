"""What a method costs, measured without training: parameters, bytes, FLOPs and, beside a reference, its speed.

Seconds of two processes differ by more than two methods do. So each run times its method and one reference in turns, in
one process: `ratio` is the median over the rounds of reference / method, more than 1 where it is faster, and ratios of
several runs to one reference may stand in one table. Samples a second belong to one machine and one moment.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from recombine import results
from recombine.core import account
from recombine.core.account import MIB
from recombine.core.budget import Budget
from recombine.core.method import Method
from recombine.core.rewrite import prepare
from recombine.errors import UsageError
from recombine.methods import Full
from recombine.result_schema import StagePart
from recombine.stages.context import RunContext
from recombine.stages.settings import QuantizeSettings, StageSettings
from recombine.training import objectives
from recombine.training.settings import TrainerSettings
from recombine.training.trainer import precision


def profile(run: RunContext) -> StagePart:
    """Rewrites and counts; with stage.rounds also times the method beside the reference (`profile` in the result)."""
    stage = run.settings.stage
    if not stage.rewrite:
        return predict(run)
    reference = None
    if stage.rounds:
        reference = replace(run, model=copy.deepcopy(run.model).cpu(), compressor=None, budget=Budget(), seconds={})
        reference.method = stage.reference
    run.rewrite_all()
    if reference is None:
        return {}
    reference.rewrite_all()
    batch = run.batch(run.data.train, [i % len(run.data.train) for i in range(run.data.batch_size)])
    samples = len(objectives.labels_of(batch))
    device, peaks = next(run.model.parameters()).device, {}
    subjects = {"method": Subject(run, batch, device), "reference": Subject(reference, batch, device)}
    run.model.cpu()
    for name, subject in subjects.items():  # each alone, on a GPU
        subject.model.to(device)
        peaks[name] = peak(subject, device)
        subject.model.cpu()
        subject.optimizer.state.clear()
    works = {}
    for name, subject in subjects.items():
        subject.model.to(device)
        works[name, "train"] = subject.train
        works[name, "infer"] = subject.infer
    with run.timed("profile"):
        seconds = turns(works, stage.rounds)
    measured = {part: speeds(part, seconds, samples) | {"peak_mib": peaks[part]} for part in subjects}
    ratios = {kind: ratio(seconds["reference", kind], seconds["method", kind]) for kind in ("train", "infer")}
    return {
        "profile": measured["method"] | {"ratio": ratios, "reference": measured["reference"], "batch_size": samples}
    }


class Subject:
    """A rewritten model and what one step of training and one batch of inference take of it."""

    def __init__(self, run: RunContext, batch, device: torch.device):
        self.model, self.batch, self.device, self.keep = run.model, batch, device, run.settings.stage.keep
        self.objective, self.penalty = run.objective(), run.method.penalty
        trains = [p for p in run.model.parameters() if p.requires_grad]
        # a rate of 0 costs what another does, and leaves the weights as they are
        self.optimizer = torch.optim.AdamW(trains or [nn.Parameter(torch.zeros(()))], lr=0.0)
        self.trains = bool(trains)
        self.cast = autocast(run.settings.trainer, device)

    def train(self) -> float:
        """Seconds of a whole step: forward, loss, backward, AdamW; nan where nothing trains."""
        self.model.train()
        return timed(self.step, self.device) if self.trains else float("nan")

    def step(self) -> None:
        """One training step."""
        with self.cast():
            loss, _ = self.objective.loss(self.model, self.batch)
            loss = loss + self.penalty(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self) -> float:
        """Seconds of a forward in eval mode; with `keep` what eval mode builds once is there already."""
        self.model.train().eval()
        if self.keep:
            self.forward()
        return timed(self.forward, self.device)

    def forward(self) -> Tensor:
        """The logits of the batch."""
        with self.cast():
            return objectives.call(self.model, self.batch)


def autocast(trainer: TrainerSettings, device: torch.device) -> Callable:
    """The run's precision, as Lightning would give it to a step."""
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision(trainer.precision, device.type))
    return lambda: torch.autocast(device.type, dtype=half, enabled=half is not None)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the work, until the device is through with it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits until a GPU is through with its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turns(works: Mapping, rounds: int) -> dict:
    """Each work's seconds of every round, the works taking turns; one round before that warms up."""
    seconds = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            took = work()
            if turn:
                seconds[name].append(took)
    return seconds


def peak(subject: Subject, device: torch.device) -> float | None:
    """MiB that one training step takes at most, AdamW's state included; None where the device does not tell."""
    if device.type != "cuda":
        return None
    subject.train()
    torch.cuda.reset_peak_memory_stats(device)
    subject.train()
    return torch.cuda.max_memory_allocated(device) / MIB


def speeds(part: str, seconds: Mapping, samples: int) -> dict[str, float | None]:
    """Samples a second in training (None: nothing trains) and inference, and the latency in milliseconds."""
    train, infer = (statistics.median(seconds[part, kind]) for kind in ("train", "infer"))
    return {
        "train_samples_s": samples / train if train == train else None,
        "infer_samples_s": samples / infer,
        "latency_ms": 1000 * infer / samples,  # of a sample in a batch, as CRISP Tab. 5 has it
    }


def ratio(reference: list[float], method: list[float]) -> float | None:
    """The median of reference / method over the rounds; None where one of them does not train."""
    value = statistics.median(a / b for a, b in zip(reference, method, strict=True))
    return value if value == value else None


def require_predictable(
    stage: StageSettings, method: Method, compressor: Method | None, quantize: QuantizeSettings
) -> None:
    """Refuses what the closed form does not count.

    Raises:
        UsageError: says what that is.
    """
    if getattr(stage, "rewrite", True):
        return
    if compressor is not None:
        raise UsageError("stage.rewrite=false: a pair's second needs what the first leaves; set stage.rewrite=true")
    if isinstance(method, Full):
        raise UsageError("stage.rewrite=false: counts the target layers, and full trains more; set stage.rewrite=true")
    if quantize.bits is not None:
        why = "stage.rewrite=false counts no packed weights; set stage.rewrite=true"
        raise UsageError(f"quantize.bits={quantize.bits}: {why}")


def predict(run: RunContext) -> StagePart:
    """The account by the method's closed form: nothing is rewritten, so large models cost no factorisation."""
    method = run.method.copy()
    sites = prepare(run.model, method, run.budget, run.losses, run.memory(method))
    cls = type(method)
    part = results.method_part(cls.__name__, asdict(method), run.labels["method"], cls.compresses)
    return {"method": part, "account": account.predict(method, run.model, sites).as_dict()}
