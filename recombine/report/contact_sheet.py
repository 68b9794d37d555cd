"""One picture of what the runs of an experiment drew: a row for each label of its rows, a column for each prompt.

Where the experiment's table has columns, such as the subjects, every column has its own prompts.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from recombine.report.records import Record
from recombine.runner.grid import Experiment

FILE = "pictures.png"
EACH, LARGEST = 4, 256  # pictures of a prompt; pixels of their sides
NARROWEST = 150  # pixels of a column at least, where its heading needs them
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
    font = ImageFont.load_default(12)
    cell = max(grid * size, min(NARROWEST, max(round(font.getlength(prompt)) for prompt in prompts)))
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
    """label of a row -> heading of a column -> the files that are there, of the first record that has some for both."""
    rows, columns, found = experiment.report.get("rows"), experiment.report.get("columns"), {}
    among = {record.labels.get(columns) for record in records} if isinstance(columns, str) else {None}
    for record in records:
        label = record.labels.get(rows if isinstance(rows, str) else "", record.cell)
        before = f"{Path(record.labels[columns]).name}: " if len(among) > 1 else ""
        files = {
            before + prompt: [path for name in names if (path := experiment.folder / record.cell / name).is_file()][
                :EACH
            ]
            for prompt, names in (record.result.get("pictures") or {}).items()
        }
        if any(files.values()):
            found[label] = files | found.get(label, {})
    return found


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut where it would be wider than that."""
    while font.getlength(text) > width and len(text) > 4:
        text = text[:-4] + "..."
    return text
