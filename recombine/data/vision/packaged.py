"""Real data out of registry packages, in VTAB-1K's form. Sources, licences and hashes are in ``runtime.assets``.

    emoji                     19 classes; four vendors pooled
    emoji_<vendor>            one vendor: noto, twemoji, openmoji, fluent
    emoji_<a>_<b>             shift: train and val drawn by vendor a, test by vendor b
    openclipart               25 classes of drawings
    fashion_mnist             10 classes, 28 px, grey; train and val out of its 60,000, test out of its 10,000
    elpv                      4 degrees of defect in electroluminescence photos of solar cells, 300 px, grey

Emoji and clip art split by *group* (near-identical drawings, variants of one emoji), never by picture: twins across a
split are worth 10 points. ``splits/*.csv`` hold groups and the test mask; validation takes whole groups too. All
vendors share test emoji and validation groups, so a shift meets new emoji as well as a new hand.

SVGs are drawn without system fonts, so a machine's fonts change nothing (text in a drawing is left out).
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
from pathlib import Path

import numpy as np

from recombine.data.sampling import shuffled, stratified
from recombine.data.vision import icons
from recombine.data.vision.source import SIZES, Lazy, Source
from recombine.errors import UsageError
from recombine.runtime.archives import read, read_many
from recombine.runtime.assets import ASSETS, fetch

SPLITS = Path(__file__).parents[1] / "splits"
VENDORS = ("noto", "twemoji", "openmoji", "fluent")
SVG_SIZE = 128  # pixels of a rasterised drawing
FASHION_HUB = "zalando-datasets/fashion_mnist"
FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def read_table(name: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """A split file as columns, with ``label`` and ``split`` added, and the class names."""
    with (SPLITS / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    classes, table["label"] = np.unique(table["class"], return_inverse=True)
    table["group"] = table["group"].astype(int)
    return table, classes.tolist()


def _grouped(table: dict[str, np.ndarray], share: float, seed: int) -> np.ndarray:
    """A split name a row. In each class shuffled groups go to val while they fit into its share of what is not test."""
    split = np.where(table["test"] == "1", "test", "train").astype("<U5")
    for label in np.unique(table["label"]):
        mine = (table["label"] == label) & (split == "train")
        room = round(share * mine.sum())
        groups, sizes = np.unique(table["group"][mine], return_counts=True)
        for i in shuffled(len(groups), seed + int(label)):
            if sizes[i] <= room:
                split[mine & (table["group"] == groups[i])] = "val"
                room -= sizes[i]
    return split


def _raster(svg: str, **size: int):
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, dpi=96, **size)  # dpi 0 refuses millimetres
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _on_white(image, side: int) -> np.ndarray:
    """The picture centred on a white square of ``side``, then at SVG_SIZE."""
    from PIL import Image

    page = Image.new("RGBA", (side, side), "white")
    page.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(page.convert("RGB").resize((SVG_SIZE, SVG_SIZE), Image.Resampling.BICUBIC))


# Emoji


def emoji_picture(svg: str) -> np.ndarray:
    """An emoji on white, uint8 (128, 128, 3)."""
    return _on_white(_raster(svg, width=SVG_SIZE, height=SVG_SIZE), SVG_SIZE)


def emoji(task: str) -> Source:
    """``emoji``, ``emoji_<vendor>`` or ``emoji_<a>_<b>``."""
    _, *vendors = task.split("_")
    table, classes = read_table("emoji19.csv")
    split = _grouped(table, 0.2, 1960)
    learn, test = (vendors[:1], vendors[-1:]) if vendors else (VENDORS, VENDORS)
    drawn = {v: icons.drawings(v, table["emoji"], table["name"]) for v in dict.fromkeys([*learn, *test])}

    def pool(name: str, by) -> tuple[Lazy, np.ndarray]:
        rows = [(drawn[v][i], table["label"][i]) for v in by for i in np.flatnonzero(split == name) if drawn[v][i]]
        labels = np.array([label for _, label in rows], np.int64)
        chosen = stratified(labels, min(SIZES[name], len(rows)), 1961)
        return Lazy(emoji_picture, [rows[i][0] for i in chosen]), labels[chosen]

    splits = {"train": pool("train", learn), "val": pool("val", learn), "test": pool("test", test)}
    licence = "; ".join(f"{v}: {ASSETS[f'emoji_{v}'].licence}" for v in drawn)
    return Source(classes, licence, splits, "labels are Unicode subgroups; grouped split")


# Clip art


def clipart_picture(svg: bytes) -> np.ndarray:
    """A drawing, perhaps packed, cut to what is in it and centred on white, uint8 (128, 128, 3)."""
    svg = gzip.decompress(svg) if svg[:2] == b"\x1f\x8b" else svg
    image = _raster(svg.decode("utf8", "replace"), width=2 * SVG_SIZE)
    image = image.crop(image.getchannel("A").getbbox())
    return _on_white(image, max(image.size))


def openclipart(task: str) -> Source:
    """Drawings of Debian's openclipart-svg."""
    table, classes = read_table("openclipart25.csv")
    split = _grouped(table, 0.3, 2004)  # more than 200 / 1000: some classes are one group, which train keeps
    root = "usr/share/openclipart/svg/"
    files = read_many(fetch("openclipart"), [root + path for path in table["path"]])

    def pool(name: str) -> tuple[Lazy, np.ndarray]:
        rows = np.flatnonzero(split == name)
        rows = rows[stratified(table["label"][rows], min(SIZES[name], len(rows)), 2005)]
        return Lazy(clipart_picture, [files[root + path] for path in table["path"][rows]]), table["label"][rows]

    note = "labels are the folders of the collection and somewhat noisy; grouped split"
    return Source(classes, ASSETS["openclipart"].licence, {name: pool(name) for name in SIZES}, note)


# Fashion-MNIST


def _idx(data: bytes) -> np.ndarray:
    """The MNIST format: 4 bytes of which the last is the rank, the shape as big-endian int32, then uint8."""
    data = gzip.decompress(data)
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _fashion_arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The official 60,000 and 10,000 from the Debian package, else the hub; the pinned sha256 judges both alike."""
    try:
        path = fetch("fashion_mnist")
    except UsageError as error:
        print(f"{error}; trying the hub's {FASHION_HUB}", file=sys.stderr)
        return _fashion_hub(error)
    folder = "usr/share/datasets/fashion-mnist/"
    kinds = ("images-idx3", "labels-idx1")
    files = read_many(path, [f"{folder}{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in kinds])
    arrays = [_idx(files[f"{folder}{part}-{kind}-ubyte.gz"]) for part in ("train", "t10k") for kind in kinds]
    return {"train": tuple(arrays[:2]), "test": tuple(arrays[2:])}


def _fashion_hub(first: UsageError) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        from datasets import load_dataset

        parts = load_dataset(FASHION_HUB)
        return {s: (np.stack([np.asarray(i) for i in parts[s]["image"]]), np.array(parts[s]["label"])) for s in parts}
    except Exception as error:  # whatever the hub's client raises without a network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{first}; the hub's {FASHION_HUB} failed too ({reason})") from error


def fashion_mnist(task: str, test: int = SIZES["test"]) -> Source:
    """Fashion-MNIST (arXiv 1708.07747)."""
    arrays = _fashion_arrays()
    images, labels = arrays["train"]
    labels = labels.astype(np.int64)
    known = stratified(labels, SIZES["train"] + SIZES["val"], 2017)
    val = stratified(labels[known], SIZES["val"], 2018)
    rows = {"train": np.delete(known, val), "val": known[val]}
    splits = {name: (images[r], labels[r]) for name, r in rows.items()}
    images, labels = arrays["test"]
    labels = labels.astype(np.int64)
    chosen = stratified(labels, test, 2019)
    splits["test"] = images[chosen], labels[chosen]
    note = f"1,000 + {test:,} of the 60,000 + 10,000"
    return Source(FASHION_CLASSES, ASSETS["fashion_mnist"].licence, splits, note)


# ELPV


def elpv(task: str) -> Source:
    """Solar cells of the ELPV dataset."""
    from PIL import Image

    path = fetch("elpv")
    folder = "elpv_dataset/data/"
    rows = [line.split() for line in read(path, folder + "labels.csv").decode().splitlines() if line.strip()]
    labels = np.array([round(3 * float(probability)) for _, probability, _ in rows])
    left, chosen = np.arange(len(rows)), {}
    for seed, name in enumerate(("test", "val", "train"), 2018):
        picked = stratified(labels[left], SIZES[name], seed)
        chosen[name], left = left[picked], np.delete(left, picked)
    files = read_many(path, [folder + rows[i][0] for part in chosen.values() for i in part])

    def picture(i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(files[folder + rows[i][0]])).convert("L"))

    splits = {name: (Lazy(picture, chosen[name]), labels[chosen[name]]) for name in SIZES}
    classes = [f"probability of a defect {p}" for p in ("0", "1/3", "2/3", "1")]
    return Source(classes, ASSETS["elpv"].licence, splits, "unbalanced: report the balanced accuracy too")
