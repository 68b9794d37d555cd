"""CustomConcept101 (Custom Diffusion, arXiv 2212.04488): 101 subjects of a few pictures each, in folders of one kind.

``root`` is the folder benchmark_dataset of its release, or one that holds it. A task is a subject's folder:
``data.task=toy_duck``. dataset.json, where it lies beside them, says the noun of each.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from recombine.data.base import require_known
from recombine.data.prompted.dreambooth import DreamBooth
from recombine.errors import UsageError
from recombine.runtime.kinds import Name, Place, Word


class CustomConcept(DreamBooth):
    """A subject of CustomConcept101; the other arguments are those of `DreamBooth`.

    Raises:
        UsageError: there is no such folder, or no such subject in it.
    """

    name = group = "customconcept"
    label = "CustomConcept101"

    def __init__(self, *, root: Place, task: Word, noun: Name | None = None, **kwargs):
        folder = Path(root).expanduser()
        inner = folder / "benchmark_dataset" if (folder / "benchmark_dataset").is_dir() else folder
        if not inner.is_dir():
            raise UsageError(f"data.root={root}: there is no such folder; set it to CustomConcept101's subjects")
        known = sorted(path.name for path in inner.iterdir() if path.is_dir() and not path.name.startswith("."))
        require_known("data.task", "subject", task, known)
        super().__init__(root=inner / task, task=task, noun=noun or said(folder, task), **kwargs)

    @property
    def title(self) -> str:
        return f"{self.label} {self.task}"


def said(folder: Path, task: str) -> str | None:
    """The noun that dataset.json gives a subject: its class_prompt, where that is no list of prompts; None: none.

    Raises:
        UsageError: the file cannot be read.
    """
    file = next((path for path in (folder / "dataset.json", folder.parent / "dataset.json") if path.is_file()), None)
    if file is None:
        return None
    try:
        rows = {Path(row["instance_data_dir"]).name: row for row in json.loads(file.read_text())}
        prompt = rows.get(task, {}).get("class_prompt", "")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{file} cannot be read ({type(error).__name__}); restore it, or remove it") from error
    return None if not prompt or "/" in prompt else re.sub(r"^(?:a|an|the|photo of a) ", "", prompt)
