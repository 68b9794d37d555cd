"""Subjects out of packages: five drawings each in a style that data=captions leaves out, OpenMoji's.

    openmoji_cat    five faces of its cat
    openmoji_moon   five of its moons
    openmoji_clock  five of its clocks

The prompts are like those of data=captions: "sks cat, emoji" and, of the class, "cat, emoji".
"""

from __future__ import annotations

from torch import Tensor, stack

from recombine.data.base import require_known
from recombine.data.prompted.dreambooth import DreamBooth
from recombine.data.prompted.pictures import square
from recombine.data.vision import packaged
from recombine.data.vision.icons import Icons
from recombine.runtime.assets import ASSETS
from recombine.runtime.kinds import Name, Word

TASKS = {
    "openmoji_cat": ("cat", "grinning-cat cat-with-tears-of-joy smiling-cat-with-heart-eyes kissing-cat weary-cat"),
    "openmoji_moon": ("moon", "full-moon new-moon-face full-moon-face first-quarter-moon-face last-quarter-moon-face"),
    "openmoji_clock": ("clock", "one-oclock three-oclock five-oclock eight-oclock eleven-oclock"),
}


class Subject(DreamBooth):
    """A subject of TASKS; the other arguments are those of `DreamBooth`."""

    name = group = "subject"
    label = "packaged subject"
    suite = dict.fromkeys(TASKS, "openmoji")

    def __init__(
        self,
        *,
        task: Word = "openmoji_cat",
        noun: Name | None = None,
        prompt: Name = "{token} {noun}, emoji",
        class_prompt: Name = "{noun}, emoji",
        **kwargs,
    ):
        require_known("data.task", "subject", task, TASKS)
        named = {"noun": noun or TASKS[task][0], "prompt": prompt, "class_prompt": class_prompt}
        super().__init__(task=task, root=None, **named, **kwargs)

    @property
    def title(self) -> str:
        return f"{self.noun} (OpenMoji)"

    def found(self) -> list[str]:
        """The names of the drawings."""
        return TASKS[self.task][1].split()

    def pictures(self) -> Tensor:
        """The drawings, uint8 (5, 3, S, S)."""
        icons = Icons("openmoji")
        return stack([square(packaged.emoji_picture(icons.svg(name)), self.image_size) for name in self.files])

    @property
    def info(self) -> dict:
        return super().info | {"licence": f"emoji_openmoji: {ASSETS['emoji_openmoji'].licence}"}
