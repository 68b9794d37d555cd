"""What a logger shows of a finished run: its numbers, the table of its layers and the plot of their ranks."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from recombine import results

SHEET = "pictures/sheet.png"  # in the folder of a run that drew


def numbers(result: dict) -> dict[str, float]:
    """The numbers of a result under one flat name each: score, test/acc, account/retained, linear_probe/test ..."""
    parts = ("test", "account", "linear_probe", "distil", "weight_error", "logit_error", "best_epoch", "seconds")
    parts += ("profile", "elsewhere", "subspaces")
    values = {key: result[key] for key in parts if result.get(key) is not None}
    values |= {"best": result["val"], "score": result["test"].get(result["metric"])}
    if errors := values.pop("weight_error", None):
        values["weight_error"] = sum(errors.values()) / len(errors)
    return {k.replace(".", "/"): v for k, v in results.flat(values).items() if isinstance(v, int | float)}


def layer_table(layers: list[dict]) -> tuple[list[str], list[list]]:
    """The column names and the rows of `account.layer_report`."""
    columns = list(dict.fromkeys(key for row in layers for key in row))
    cell = lambda value: "x".join(map(str, value)) if isinstance(value, list) else value  # noqa: E731
    return columns, [[cell(row.get(column)) for column in columns] for row in layers]


def images(result: dict, out: Path) -> dict[str, Image.Image]:
    """The plot of the ranks, and what was drawn, where there are any. out: the run's folder."""
    found = {"ranks": rank_plot(result["layers"])} if result["layers"] else {}
    return found | ({"pictures": Image.open(out / SHEET).convert("RGB")} if result.get("pictures") else {})


def media(result: dict, out: Path, as_table: Callable[..., Any], as_image: Callable[..., Any]) -> dict[str, Any]:
    """The table of the layers and the images, as a logger's own classes."""
    table = {"layers": as_table(*layer_table(result["layers"]))} if result["layers"] else {}
    return table | {name: as_image(image) for name, image in images(result, out).items()}


def rank_plot(layers: list[dict]) -> Image.Image:
    """A plot of rank by depth, one line a role (CERSA Fig. 3, JACTUS Fig. 3).

    Where layers have no rank, it shows the share of its dense weights that each holds.
    """
    from matplotlib.figure import Figure  # only runs that are watched need it

    ranks = [row.get("rank", row.get("basis_rank")) for row in layers]
    label = "held share of the dense weights" if None in ranks else "rank"
    values = [row["held"] for row in layers] if None in ranks else ranks
    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for role in dict.fromkeys(row["role"] for row in layers):
        series = [value for row, value in zip(layers, values, strict=True) if row["role"] == role]
        axes.plot(range(len(series)), series, marker="o", markersize=3, label=role)
    axes.set(xlabel="depth", ylabel=label)
    axes.legend(ncols=2, fontsize="small")
    pixels = BytesIO()
    figure.savefig(pixels, format="png")
    return Image.open(pixels).convert("RGB")
