"""Six generated tasks that are *like* VTAB's structured group; no number on them is comparable with a VTAB number.

    dsprites_loc, dsprites_ori   3 shapes x 6 scales x 40 orientations x 32 x 32 positions, 64 px, black and white
    clevr_count, clevr_dist      3..10 spheres, boxes and cylinders on a floor, 96 px, colour; both share their pictures
    snorb_azim, snorb_elev       5 categories x 10 toys x 9 elevations x 18 azimuths x 6 lights, 96 px, grey

Labels, as in VTAB: x position in 16 bins of 2, orientation in 16 bins of 2.5, the number of objects less 3, azimuth in
steps of 20 degrees, elevation 30..70 in steps of 5. VTAB cuts the depth of the closest object at fixed depths; here its
distance to the camera is cut at ``DISTANCES``, the sextiles over 20,000 scenes. Squares and ellipses look alike under
some rotations and objects may hide each other, so no task has a ceiling of 1.

The pictures are the same to the last bit on every machine, which ``splits/sha256.csv`` pins. Hence only operations
that IEEE 754 rounds exactly (+ - * / sqrt, comparisons), one ufunc each so that nothing fuses; sines are rounded to
1e-6; sums are integer or written out; randomness is ``PCG64.random`` alone; and no numpy scalars, whose promotion
numpy 2 changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from recombine.data.vision.ray_caster import Solid, cast, dot, view
from recombine.data.vision.source import SIZES, Lazy, Source

KNOWN = SIZES["train"] + SIZES["val"]
LICENCE = "generated, free of rights"
NOTE = "generated and VTAB-like: not comparable with published VTAB numbers"
DISTANCES = (7.97, 8.34, 8.70, 9.10, 9.69)  # sextiles of the distance to the closest object


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _cos(degrees: float) -> float:
    return round(math.cos(math.radians(degrees)), 6)


def _sin(degrees: float) -> float:
    return round(math.sin(math.radians(degrees)), 6)


def _draw(grid: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """``count`` different cells of a factor grid, uniformly: (count, len(grid))."""
    cells = np.argsort(_generator(seed).random(math.prod(grid)), kind="stable")[:count]
    return np.stack(np.unravel_index(cells, grid), 1)


def _split(rows: np.ndarray) -> dict[str, np.ndarray]:
    cuts = np.cumsum([SIZES["train"], SIZES["val"]])  # test has the rest
    return dict(zip(SIZES, np.split(rows, cuts), strict=True))


# dSprites-like: factors (shape, scale, orientation, x, y)

DSPRITES = (3, 6, 40, 32, 32)
_TURNS = [(_cos(360 * i / 39), _sin(360 * i / 39)) for i in range(40)]  # first and last agree, as in dSprites


def dsprites_factors(seed: int, test: int = SIZES["test"]) -> dict[str, np.ndarray]:
    """split -> factors (N, 5); no two rows are alike."""
    return _split(_draw(DSPRITES, KNOWN + test, seed))


def dsprite(factors: np.ndarray) -> np.ndarray:
    """One picture, uint8 (64, 64) of 0 and 255: a pixel is white when at least 8 of its 16 subpixels are inside."""
    shape, scale, turn, x, y = (int(f) for f in factors)
    (c, s), half = _TURNS[turn], 9.5 * (0.5 + scale / 10)
    cx, cy = 16 + 32 * x / 31, 16 + 32 * y / 31
    left, top = int(cx) - 15, int(cy) - 15  # the glyph lies within 15 pixels of its centre
    grid = (np.arange(32 * 4) + 0.5) / 4
    dx, dy = ((grid + left) - cx)[None, :] / half, ((grid + top) - cy)[:, None] / half
    u, v = dx * c + dy * s, dy * c - dx * s  # (128, 128), the glyph's own axes
    if shape == 0:
        inside = (np.abs(u) <= 1) & (np.abs(v) <= 1)
    elif shape == 1:
        u, v = u / 1.27, v / 0.64
        inside = u * u + v * v <= 1
    else:
        u, v = u * 1.12, 0.12 - v * 1.12
        uu, vv = u * u, v * v
        q = uu + vv - 0.72
        inside = q * q * q <= uu * (vv * v) * 1.15
    image = np.zeros((64, 64), np.uint8)
    covered = inside.reshape(32, 4, 32, 4).sum((1, 3)) >= 8
    image[max(top, 0) : top + 32, max(left, 0) : left + 32] = (
        255 * covered[max(-top, 0) : 64 - top, max(-left, 0) : 64 - left]
    )
    return image


# CLEVR-like


_PAINT = (
    (87, 87, 87), (173, 35, 35), (42, 75, 215), (29, 105, 20), (129, 74, 25), (129, 38, 192), (41, 208, 208),
    (255, 238, 51),
)  # fmt: skip
_TANGENT = 0.4  # of half the field of view
_CORNER = round(1 / math.sqrt(2), 6)  # a box as wide as a ball across its diagonal


@dataclass(frozen=True)
class Scene:
    """Solids on a floor, and the points where the camera and the light are."""

    solids: tuple[Solid, ...]
    camera: tuple[float, float, float]
    light: tuple[float, float, float]

    @property
    def distance(self) -> float:
        """From the camera to the centre of the closest object."""
        gaps = ([c - k for c, k in zip(s.centre, self.camera, strict=True)] for s in self.solids)
        return math.sqrt(min(dot(g, g) for g in gaps))


_TARGET = (0.0, 0.0, 0.2)


def clevr_scene(index: int) -> Scene:
    """Scene ``index``. Objects keep apart on the floor, stay inside the picture and never line up with the camera."""
    random = _generator(2017, index).random

    def pick(count: int) -> int:
        return int(random() * count)

    camera = (7.2 + random() - 0.5, -6.5 + random() - 0.5, 5.4 + random() - 0.5)
    light = (3 + 2 * random(), -6.0, 9.0)
    forward, right, up = view(camera, _TARGET)
    count, solids, tries = 3 + pick(8), [], 0
    spots: list[tuple[float, ...]] = []  # x, y, size, and where it is in the picture
    while len(solids) < count:
        tries += 1
        if tries % 400 == 0:
            solids, spots = [], []
        size, kind, metal, paint, turn = (0.35, 0.7)[pick(2)], pick(3), pick(2), pick(8), 360 * pick(64) / 64
        x, y = 6 * random() - 3, 6 * random() - 3
        half = size * _CORNER if kind == 1 else size
        gap = [a - c for a, c in zip((x, y, half), camera, strict=True)]
        depth = dot(gap, forward) * _TANGENT
        px, py = dot(gap, right) / depth, dot(gap, up) / depth  # in -1 .. 1
        clear = all(
            (x - a) * (x - a) + (y - b) * (y - b) > (size + other + 0.25) * (size + other + 0.25)
            and (px - qx) * (px - qx) + (py - qy) * (py - qy) > 0.0225
            for a, b, other, qx, qy in spots
        )
        if not clear or abs(px) > 0.9 or abs(py) > 0.9:
            continue
        spots.append((x, y, size, px, py))
        colour = tuple(channel / 255 * (1.0 if metal else 0.95) for channel in _PAINT[paint])
        shine = 0.9 if metal else 0.1
        kind = ("sphere", "box", "cylinder")[kind]
        solids.append(Solid(kind, (x, y, half), (half,) * 3, colour, shine, (_cos(turn), _sin(turn))))
    return Scene(tuple(solids), camera, light)


def clevr(index: int) -> np.ndarray:
    """The picture of a scene, uint8 (96, 96, 3)."""
    scene = clevr_scene(int(index))
    return cast(scene.solids, scene.camera, _TARGET, scene.light, _TANGENT, (0.55,) * 3, (0.5, 0.5, 0.52))


# smallNORB-like: factors (category, toy, elevation, azimuth, light)


SNORB = (5, 5, 9, 18, 6)  # five toys a category for train and val, five others for test
CATEGORIES = ("animal", "human", "plane", "truck", "car")


@cache
def toy(category: int, instance: int) -> tuple[Solid, ...]:
    """A toy out of boxes and balls; its instance sets the proportions."""
    j = [0.75 + 0.55 * float(x) for x in _generator(1995, category, instance).random(12)]

    def box(x, y, z, a, b, c):
        return Solid("box", (x, y, z), (a, b, c), (0.55,))

    def ball(x, y, z, r):
        return Solid("sphere", (x, y, z), (r, r, r), (0.55,))

    if category == 0:
        legs = [box(x * 0.55 * j[0], y * 0.22 * j[1], 0.24, 0.09, 0.09, 0.24) for x in (-1, 1) for y in (-1, 1)]
        head, tail = ball(0.95 * j[0], 0, 1.1, 0.27 * j[3]), box(-0.95 * j[0], 0, 0.95, 0.2 * j[4], 0.05, 0.05)
        return (box(0, 0, 0.75, 0.8 * j[0], 0.32 * j[1], 0.28 * j[2]), head, tail, *legs)
    if category == 1:
        legs = box(0.1, 0.14, 0.27, 0.1, 0.1, 0.28), box(-0.1, -0.14, 0.27, 0.1, 0.1, 0.28)
        arms = box(0.2 * j[4], 0.45 * j[1], 1.0, 0.22, 0.07, 0.09), box(0, -0.45 * j[1], 0.95, 0.08, 0.07, 0.3)
        return (box(0, 0, 0.95, 0.18 * j[0], 0.32 * j[1], 0.4 * j[2]), ball(0, 0, 1.62, 0.22 * j[3]), *legs, *arms)
    if category == 2:
        body, wings = box(0, 0, 0.6, 1.1 * j[0], 0.16 * j[1], 0.16), box(0.1, 0, 0.62, 0.28 * j[2], 1.1 * j[3], 0.05)
        tail = box(-0.95 * j[0], 0, 0.68, 0.15, 0.42 * j[4], 0.04)
        fin = box(-0.98 * j[0], 0, 0.9, 0.14, 0.04, 0.28 * j[5])
        return body, wings, tail, fin
    if category == 3:
        load = box(-0.3, 0, 0.75, 0.8 * j[0], 0.42 * j[1], 0.42 * j[2])
        cabin = box(0.78 * j[0] + 0.1, 0, 0.55, 0.28, 0.4 * j[1], 0.3 * j[3])
        return (load, cabin, *(ball(x, y, 0.2, 0.2) for x in (-0.8, 0, 0.75) for y in (-0.4, 0.4)))
    body = box(0, 0, 0.42, 1.0 * j[0], 0.42 * j[1], 0.2 * j[2])
    roof = box(-0.1 * j[3], 0, 0.78, 0.5 * j[4], 0.36 * j[1], 0.2 * j[5])
    return (body, roof, *(ball(x, y, 0.2, 0.2) for x in (-0.6, 0.6) for y in (-0.4, 0.4)))


def snorb_factors(seed: int, test: int = SIZES["test"]) -> dict[str, np.ndarray]:
    """Train and val see toys 0..4 of each category, test sees 5..9, as smallNORB splits its ten."""
    known = _draw(SNORB, KNOWN, seed)
    new = _draw(SNORB, test, seed + 1) + [0, 5, 0, 0, 0]
    return _split(np.concatenate([known, new]))


def snorb(factors: np.ndarray) -> np.ndarray:
    """One picture, uint8 (96, 96)."""
    category, instance, elevation, azimuth, light = (int(f) for f in factors)
    e, a, b = 30 + 5 * elevation, 20 * azimuth, 20 * azimuth + 60 * light  # the light turns with the camera
    camera = (5.2 * _cos(e) * _cos(a), 5.2 * _cos(e) * _sin(a), 5.2 * _sin(e) + 0.5)
    lamp = (5 * _cos(b), 5 * _sin(b), 6.0 + 2 * (light % 2))
    return cast(toy(category, instance), camera, (0.0, 0.0, 0.55), lamp, 0.305731, (0.8,), (0.8,))[..., 0]


# The tasks


def build(task: str, test: int = SIZES["test"]) -> Source:
    """A task of the six: factors and labels now, pictures when they are asked for."""
    family, target = task.split("_")
    if family == "dsprites":
        rows, make = dsprites_factors(2018 if target == "loc" else 2019, test), dsprite
        labels = {s: r[:, 3] // 2 if target == "loc" else r[:, 2] * 2 // 5 for s, r in rows.items()}
        step, unit = ("2", "columns") if target == "loc" else ("2.5", "steps of 360/39 degrees")
        classes = [f"bin {i} of {step} {unit}" for i in range(16)]
    elif family == "clevr":
        rows, make = _split(np.arange(KNOWN + test)), clevr
        scenes = {s: [clevr_scene(int(i)) for i in r] for s, r in rows.items()}
        if target == "count":
            labels = {s: np.array([len(x.solids) - 3 for x in r]) for s, r in scenes.items()}
            classes = [f"{i} objects" for i in range(3, 11)]
        else:
            labels = {s: np.searchsorted(DISTANCES, [x.distance for x in r]) for s, r in scenes.items()}
            classes = [f"below {d} m" for d in DISTANCES] + [f"from {DISTANCES[-1]} m"]
    else:
        rows, make = snorb_factors(2004 if target == "azim" else 2006, test), snorb
        labels = {s: r[:, 3 if target == "azim" else 2] for s, r in rows.items()}
        angles = range(0, 360, 20) if target == "azim" else range(30, 75, 5)
        classes = [f"{angle} degrees" for angle in angles]
    splits = {s: (Lazy(make, rows[s]), labels[s].astype(np.int64)) for s in SIZES}
    return Source(classes=classes, licence=LICENCE, note=NOTE, splits=splits)
