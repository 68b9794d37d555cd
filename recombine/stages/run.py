"""What every stage works on: one model, one method, one data set, one folder."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor, nn

from recombine.budget import Budget
from recombine.data.vision import VisionData
from recombine.methods import Method
from recombine.probe import Probe


@dataclass
class Run:
    """cfg is the whole composed configuration; `seconds` fills up as parts of the run finish."""

    cfg: DictConfig
    out: Path
    model: nn.Module
    method: Method
    budget: Budget
    data: VisionData
    probe: Probe | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str):
        start = time.perf_counter()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - start, 3)

    def sample(self) -> Tensor:
        """One normalised image (1, 3, H, W) on the model's device."""
        images, _ = self.data.val.__getitems__([0])
        return self.data.normalise(images.to(next(self.model.parameters()).device))
