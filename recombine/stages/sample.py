"""Draw pictures for prompts, keep them beside the result, and score them."""

import re
from pathlib import Path

import torch
from torch import Tensor

from recombine.data.prompted.base import Asked, PromptedData, at_once
from recombine.errors import UsageError
from recombine.evaluation.pictures import Clip, Dino, Drawn, clip_folder, scores
from recombine.result_schema import StagePart
from recombine.runtime import progress
from recombine.runtime.atomic import atomic_write
from recombine.stages.checkpoints import load_checkpoint
from recombine.stages.context import RunContext
from recombine.training import distributed
from recombine.training.logged_values import SHEET

GAP = 2  # pixels between the pictures of a sheet


def sample(run: RunContext) -> StagePart:
    """The pictures of a checkpoint, or of the original model, and their scores.

    Raises:
        UsageError: the model does not draw.
    """
    path = load_checkpoint(run)
    run.quantize()
    return {"test": drawn_scores(run), "checkpoint": path}


def require_prompts(data, settings) -> None:
    """Refuses prompts that the data cannot ask for, and a stage that cannot draw, before anything runs.

    Args:
        settings: of the run.

    Raises:
        UsageError: names the prompt, or the model and the data to take.
    """
    if isinstance(data, PromptedData):
        data.asked(settings.sample.prompts)
        if settings.sample.clip and settings.sample.seeds:
            clip_folder(settings.sample.clip)  # before anything is trained
    elif settings.stage.name == "sample":
        raise UsageError(f"stage=sample: data={data.name} is not drawn; take data=dreambooth model=sd21_base")


def drawn_scores(run: RunContext) -> dict[str, float]:
    """Draws what `sample` says into the run's folder, and scores it. Of several ranks the first one does."""
    found: dict[str, float] = {}
    if run.settings.sample.seeds and distributed.rank() == 0:
        with run.timed("drawing"), torch.no_grad():
            drawn = [answered(run, asked) for asked in run.data.asked(run.settings.sample.prompts)]
            keep(run, drawn)
            clip = Clip(name) if (name := run.settings.sample.clip) else None
            found = scores(drawn, Dino(), clip)
    distributed.wait()
    return found


def answered(run: RunContext, asked: Asked) -> Drawn:
    """The pictures for one prompt, one for each seed."""
    how, tokens, found = run.settings.sample, run.data.tokens([asked.prompt]), []
    size = at_once(run.data.image_size)
    for start in progress.of(range(0, len(how.seeds), size), f"drawing: {asked.prompt[:40]}", "batches"):
        seeds = how.seeds[start : start + size]
        prompts = {key: value.expand(len(seeds), -1) for key, value in tokens.items()}
        options = {"steps": how.steps, "guidance": how.guidance, "scheduler": how.scheduler}
        found.append(run.model.draw(prompts, run.data.empty, seeds, **options))
    return Drawn(asked.prompt, asked.kind, torch.cat(found), asked.beside, asked.subject, asked.plain)


def keep(run: RunContext, drawn: list[Drawn]) -> None:
    """Writes every picture as PNG, and a sheet with a row a prompt, the subject's own pictures first."""
    for number, one in enumerate(drawn):
        slug = re.sub(r"[^a-z0-9]+", "-", one.prompt.lower()).strip("-")[:60]
        names = [f"{Path(SHEET).parent}/{number:02}-{slug}-{seed}.png" for seed in run.settings.sample.seeds]
        for name, picture in zip(names, one.pictures, strict=True):
            write(run, name, picture)
        run.pictures[one.prompt] = names
    own = next((one.subject for one in drawn if one.subject is not None), None)
    rows = ([] if own is None else [own]) + [one.pictures for one in drawn]
    write(run, SHEET, sheet(rows))


def write(run: RunContext, name: str, picture: Tensor) -> None:
    """A picture uint8 (3, H, W) as a PNG in the run's folder."""
    from PIL import Image

    with atomic_write(run.out / name) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(temporary, "PNG")


def sheet(rows: list[Tensor]) -> Tensor:
    """Rows of pictures uint8 (N, 3, S, S) as one picture uint8 (3, H, W), on white."""
    size, most = rows[0].shape[-1], max(map(len, rows))
    step = size + GAP
    page = torch.full((3, GAP + step * len(rows), GAP + step * most), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * step, GAP + j * step
            page[:, top : top + size, left : left + size] = picture
    return page
