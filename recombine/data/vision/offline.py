"""The offline benchmark: VTAB-1K's form (800 train, 200 val, test) on data that comes out of packages or out of code.

``splits/sha256.csv`` pins every split: decoded pictures and labels. A generated or photographic task that differs is
refused; drawings are rasterised by resvg, whose pixels may move with its version or the processor, so those warn.
"""

from __future__ import annotations

import csv
import warnings
from functools import cache
from itertools import permutations

from recombine.data.base import log_once
from recombine.data.vision import packaged, synthetic
from recombine.data.vision.base import VisionData
from recombine.data.vision.source import Source
from recombine.errors import UsageError, did_you_mean
from recombine.runtime.assets import cache_dir
from recombine.runtime.kinds import Count, Word

TASKS = {  # name: group, classes, what builds it
    "emoji": ("natural", 19, packaged.emoji),
    "openclipart": ("natural", 25, packaged.openclipart),
    "fashion_mnist": ("natural", 10, packaged.fashion_mnist),
    "elpv": ("specialised", 4, packaged.elpv),
    "dsprites_loc": ("structured", 16, synthetic.build),
    "dsprites_ori": ("structured", 16, synthetic.build),
    "clevr_count": ("structured", 8, synthetic.build),
    "clevr_dist": ("structured", 6, synthetic.build),
    "snorb_azim": ("structured", 18, synthetic.build),
    "snorb_elev": ("structured", 9, synthetic.build),
}
SUITE = tuple(TASKS)
TASKS |= {f"emoji_{vendor}": ("natural", 19, packaged.emoji) for vendor in packaged.VENDORS}
TASKS |= {f"emoji_{a}_{b}": ("shift", 19, packaged.emoji) for a, b in permutations(packaged.VENDORS, 2)}
DRAWN = (packaged.emoji, packaged.openclipart)  # by resvg
MOST = {synthetic.build: 10_000, packaged.fashion_mnist: 10_000}  # test pictures, where there are more than 1,000


@cache
def pins() -> dict[str, dict[str, str]]:
    """task -> split -> sha256"""
    with (packaged.SPLITS / "sha256.csv").open(newline="") as file:
        return {row.pop("task"): row for row in csv.DictReader(file)}


class Offline(VisionData):
    """A task of TASKS; the other arguments are those of `VisionData`.

    Args:
        test_size: test pictures, whatever the limit is; None: at most 1,000. Generated tasks have any number.
    """

    name = "offline"
    suite = {task: TASKS[task][0] for task in SUITE}

    def __init__(self, *, task: Word, test_size: Count | None = None, **kwargs):
        if task not in TASKS:
            hint = did_you_mean(str(task), list(TASKS))
            shift = "emoji_<vendor>, emoji_<from>_<to>"
            vendors = ", ".join(packaged.VENDORS)
            choices = f"{', '.join(SUITE)}, {shift} (vendors: {vendors})"
            raise UsageError(f"data.task={task}: there is no such task; {hint}choose from {choices}")
        super().__init__(task=task, **kwargs)
        self.group, self.num_classes, self._builder = TASKS[task]
        self.test_size = test_size
        if test_size is not None and test_size > (most := MOST.get(self._builder, packaged.SIZES["test"])):
            raise UsageError(f"data.test_size={test_size}: {task} has at most {most} test pictures; take fewer")

    @property
    def foreseen(self) -> dict[str, int]:
        return {split: min(size, self.limits[split] or size) for split, size in self.sizes.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Pictures by split, without a limit."""
        return packaged.SIZES | ({"test": self.test_size} if self.test_size else {})

    @property
    def limits(self) -> dict[str, int | None]:
        return super().limits | ({"test": self.test_size} if self.test_size else {})

    def identity(self) -> str:
        more = f" test {self.test_size}" if self.test_size else ""
        return f"offline {self.task} {pins().get(self.task)}{more}"

    def source(self) -> Source:
        more = (self.test_size,) if self.test_size and self._builder in MOST else ()
        return self._builder(self.task, *more)

    def check(self, digests: dict[str, str]) -> None:
        for split, digest in digests.items():
            expected = pins().get(self.task, {}).get(split)
            if expected in (digest, None):
                continue
            line = f"{self.task}: sha256 of {split} is {digest}, expected {expected}"
            if self._builder not in DRAWN:
                raise UsageError(
                    f"{line}: other pictures or labels than the pinned ones; remove {cache_dir()} and run again"
                )
            warnings.warn(f"{line}: another resvg or processor drew it; compare with care", stacklevel=2)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if "non-commercial" in self.meta["licence"]:
            log_once(f"{self.task}: licence {self.meta['licence']}")
