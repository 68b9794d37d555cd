"""The README's picture: accuracy against the memory to train, of all methods at one setting, from committed results.

    python scripts/readme_figure.py [--out docs/methods.svg]

One setting for all: DINOv2 ViT-S/14 at 42 px on dSprites location, 300 pictures to train, 3 epochs, seeds 0 and 1.
Points are means, pale bars sample standard deviations. Full fine-tuning, PiSSA, SVFit and CERSA start from a random
head, the others from a fitted one. What offline/crisp_tab02 and offline/crisp_tab09 compress is also distilled, on the
same pictures for 4 epochs. A method that stands in several experiments is taken from the first one of EXPERIMENTS.

Nothing here imports torch.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from recombine import report
from recombine.report.plot_axes import Dot
from recombine.report.plot_drawing import COLOURS, STYLE, Drawing, Options
from recombine.report.plot_kinds import positions

TASK = "dsprites_loc"
EXPERIMENTS = {  # -> the axis of its methods
    "offline/jactus_vision": "method",
    "offline/crisp_tab02": "pair",
    "offline/crisp_tab09": "pair",
    "offline/cersa_tab07_09": "method",
}
SHORT = {"SVD + SVD Eigenvalues": "SVD", "CRISP aware + CRISP": "CRISP (aware)", "FT": "full fine-tuning"}
SIZE = 7.6, 5.4  # inches
PLACES = {  # of the labels that would hide something on the right of their point, in points from it
    "CERSA": (7, -1),
    "CRISP 49%": (10, 4),
    "DGMR + LoRA": (-6, 10),
    "DGMR + SSF": (-14, 0),
    "DoRA": (7, 4),
    "Isomorphic + LoRA": (-14, 3),
    "Isomorphic + SSF": (10, -12),
    "Isomorphic + SVFT": (7, -2),
    "JACTUS 40%": (-7, 0),
    "JACTUS 60%": (7, -1),
    "JACTUS 80%": (6, -8),
    "RECAST 50%": (-7, -3),
    "SVD 25%": (7, -5),
    "SVD 50%": (-7, 4),
    "SVD-LLM + LoRA 40%": (12, -11),
    "SVD-LLM + LoRA 80%": (9, 0),
    "SVFT": (5, 9),
    "SVFit": (7, -5),
    "WeCoLoRA + SSF": (-14, -8),
    "full fine-tuning": (-7, 0),
}
WHOLE, COMPRESSED = COLOURS[0], COLOURS[1]


def dots() -> Iterator[tuple[bool, Dot]]:
    """(whether weights were left out, point) of every method; x in MiB, y in percent."""
    known = set()
    for experiment, axis in EXPERIMENTS.items():
        shown = {"where": {"data.task": TASK}, "point": axis, "scale": 100}
        options = Options(kind="xy", x="account.memory_mib", y="test.acc", **shown)
        drawing = Drawing("methods", options, report.load(experiment).runs)
        adapted = [item for item in drawing.items if item.record.get("stage") != "compress"]
        retained = {item.labels[axis]: item.record.get("account.retained") for item in adapted}
        for dot in positions(drawing, adapted, None, {}):
            name = short(dot.label, retained[dot.label])
            if name not in known:
                yield retained[dot.label] < 1, dot._replace(label=name)
            known.add(name)


def short(label: str, retained: float) -> str:
    """CRISP + CRISP -> CRISP 49%: one method that compresses and adapts, and the share of the weights that it keeps."""
    first, _, second = label.partition(" + ")
    name = SHORT.get(label, first if first == second else label.replace("Isomorphic Pruning", "Isomorphic"))
    return f"{name} {100 * retained:.0f}%" if " + " in label and " + " not in name else name


def original() -> tuple[float, float]:
    """The memory of the original model's weights in MiB, and the test accuracy of a linear probe on it in percent."""
    records = report.load("offline/cersa_tab07_09").runs.records
    weights = next(r.get("account.bytes_weights") for r in records if r.labels["method"] == "FT") / 2**20
    probed = (r for r in report.load("offline/jactus_vision").runs.records if r.labels["data.task"] == TASK)
    return weights, 100 * next(probed).get("linear_probe.test")


def draw() -> Figure:
    figure, ax = plt.subplots(figsize=SIZE)
    points = list(dots())
    for compressed, dot in points:
        colour, marker = (COMPRESSED, "s") if compressed else (WHOLE, "o")
        ax.errorbar(dot.x, dot.y, dot.spread, color=colour, marker=marker, ecolor=(*to_rgb(colour), 0.25))
    weights, probe = original()
    for line in (ax.axvline(weights), ax.axhline(probe)):
        line.set(color="#555555", linestyle="--", linewidth=1)
    dim = {"color": "#555555", "fontsize": 7.5, "va": "bottom"}
    ax.text(weights, 71.8, f" weights of the original model alone: {weights:.0f} MiB", **dim)
    ax.text(365, probe, f"linear probe on the original: {probe:.0f} %", ha="right", **dim)
    ax.text(19.4, 71.8, "compressed and adapted", color=COMPRESSED, fontsize=9, weight="bold", va="bottom")
    ax.text(19.4, 71.6, "(% of the weights that are kept)", color=COMPRESSED, fontsize=7.5, va="top")
    ax.text(365, 69.5, "adapters on the whole model", color=WHOLE, fontsize=9, weight="bold", ha="right", va="top")
    ax.set_xscale("log")
    ax.set_xlim(19, 370)
    ax.set_ylim(34, 73)
    ax.set_xticks([20, 40, 80, 160, 320], ["20", "40", "80", "160", "320"])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("memory to train: weights, gradients and AdamW's moments (MiB)")
    ax.set_ylabel("test accuracy (%)")
    for _, dot in points:
        x, y = PLACES.get(dot.label, (7, 0))
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#555555", "shrinkA": 0, "shrinkB": 3}
        place = {"xytext": (x, y), "textcoords": "offset points", "arrowprops": line if abs(y) > 5 else None}
        look = {"va": "center", "fontsize": 7, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}}
        ax.annotate(dot.label, (dot.x, dot.y), **place, ha="left" if x > 0 else "right", **look)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/methods.svg"), help="an SVG, or a PNG to look at")
    out = parser.parse_args().out
    with plt.rc_context(STYLE | {"svg.hashsalt": "methods"}):
        draw().savefig(out, facecolor="white", metadata={"Date": None} if out.suffix == ".svg" else None)
    print(f"wrote {out} ({out.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
