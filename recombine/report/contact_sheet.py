"""One picture of what the runs of an experiment drew: a row for each label of its rows, a column for each prompt."""

import math
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from recombine.report.records import Record
from recombine.runner.grid import Experiment

FILE = "pictures.png"
EACH, LARGEST = 4, 256  # pictures of a prompt; pixels of their sides
GAP, LINE = 6, 16  # pixels between cells, and of a line of text


def save(experiment: Experiment, records: list[Record], folder: Path) -> list[Path]:
    """Writes the sheet where any run drew something and its files are still there; of several seeds the first is shown.

    Returns:
        The file, or nothing.
    """
    found = drawings(experiment, records)
    if not found:
        return []
    prompts = list(dict.fromkeys(prompt for row in found.values() for prompt in row))
    size = min(
        LARGEST, max(Image.open(file).width for row in found.values() for files in row.values() for file in files)
    )
    grid = math.ceil(EACH**0.5)
    cell, font = grid * size, ImageFont.load_default(12)
    left = GAP + max(round(font.getlength(label)) for label in found) + GAP
    page = Image.new("RGB", (left + (cell + GAP) * len(prompts), LINE * 2 + (cell + GAP) * len(found)), "white")
    pen = ImageDraw.Draw(page)
    for j, prompt in enumerate(prompts):
        pen.text((left + j * (cell + GAP), GAP), shortened(prompt, font, cell), "black", font)
    for i, (label, row) in enumerate(found.items()):
        top = LINE * 2 + i * (cell + GAP)
        pen.text((GAP, top + cell // 2), label, "black", font)
        for j, prompt in enumerate(prompts):
            for k, file in enumerate(row.get(prompt, ())):
                place = left + j * (cell + GAP) + k % grid * size, top + k // grid * size
                page.paste(Image.open(file).convert("RGB").resize((size, size)), place)
    page.save(folder / FILE)
    return [folder / FILE]


def drawings(experiment: Experiment, records: list[Record]) -> Mapping[str, Mapping[str, list[Path]]]:
    """label of a row -> prompt -> the files that are there, of the first record of that label that has some."""
    rows, found = experiment.report.get("rows"), {}
    for record in records:
        label = record.labels.get(rows if isinstance(rows, str) else "", record.cell)
        files = {
            prompt: [path for name in names if (path := experiment.folder / record.cell / name).is_file()][:EACH]
            for prompt, names in (record.result.get("pictures") or {}).items()
        }
        if any(files.values()):
            found.setdefault(label, files)
    return found


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut where it would be wider than that."""
    while font.getlength(text) > width and len(text) > 4:
        text = text[:-4] + "..."
    return text
