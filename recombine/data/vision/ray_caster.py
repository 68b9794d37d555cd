"""A small ray caster: spheres, boxes and upright cylinders over a floor at z = 0, one point light.

Everything is float32 arithmetic that IEEE 754 rounds exactly, so a picture is the same to the last bit on every machine
(`recombine.data.vision.synthetic` says how). Hence vectors are lists of three arrays, and sums are written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FAR = np.float32(np.inf)


@dataclass(frozen=True)
class Solid:
    """A coloured thing to look at. Lengths are in the scene's unit, colours in [0, 1], one number a channel."""

    kind: str  # sphere, box, cylinder
    centre: tuple[float, float, float]
    half: tuple[float, float, float]  # half sizes; a sphere's radius is half[0], a cylinder's half[0]
    colour: tuple[float, ...]
    shine: float = 0.1
    turn: tuple[float, float] = (1.0, 0.0)  # cosine and sine about the vertical

    @property
    def reach(self) -> float:
        """Squared radius of a ball around the centre that holds the solid."""
        a, b, c = self.half
        return {"sphere": a * a, "box": a * a + b * b + c * c, "cylinder": a * a + c * c}[self.kind] * 1.0001


def cast(solids, camera, target, light, tangent, floor, sky, size=96):
    """One picture, uint8 (size, size, channels): four rays a pixel, hard shadows, Phong highlights.

    Args:
        solids: what stands on the floor.
        camera, target, light: points (x, y, z); the camera looks at the target.
        tangent: of half the field of view.
        floor, sky: colours in [0, 1], one number a channel.
    """
    forward, right, up = view(camera, target)
    n = 2 * size
    grid = (tangent * ((np.arange(n) + 0.5) * 2 / n - 1)).astype(np.float32)
    x, y = np.tile(grid, n), np.repeat(-grid, n)  # (n * n,)
    ray = unit([f + x * r + y * u for f, r, u in zip(forward, right, up, strict=True)])
    with np.errstate(all="ignore"):  # rays parallel to a face divide by zero: they miss, as they should
        t, what, normal = _nearest(solids, camera, ray)
        seen = np.flatnonzero(what)
        d, normal = [a[seen] for a in ray], [a[seen] for a in normal]
        point = [c + t[seen] * a for c, a in zip(camera, d, strict=True)]
        to_light = unit([a - b for a, b in zip(light, point, strict=True)])
        start = [p + a * 2e-3 for p, a in zip(point, normal, strict=True)]  # off the surface: no shadow on itself
        dark = np.zeros(len(seen), bool)
        for solid in solids:
            dark[_hits(solid, start, to_light)[0]] = True

    lambert = np.maximum(dot(normal, to_light), 0) * np.where(dark, np.float32(0.25), np.float32(1))
    shine = np.array([0, 0, *(s.shine for s in solids)], np.float32)[what[seen]]
    gloss = np.where(dark, np.float32(0), _highlight(normal, to_light, d) * shine)
    image = np.empty((size, size, len(sky)), np.uint8)
    table = np.array([sky, floor, *(s.colour for s in solids)], np.float32)
    for channel, colours in enumerate(table.T):
        value = colours[what]
        value[seen] = value[seen] * (0.35 + 0.75 * lambert) + gloss
        value = value.reshape(size, 2, size, 2)
        value = ((value[:, 0, :, 0] + value[:, 0, :, 1]) + (value[:, 1, :, 0] + value[:, 1, :, 1])) * np.float32(0.25)
        image[..., channel] = np.minimum(value, 1) * 255
    return image


def view(camera, target):
    """The unit vectors forward, right and up of a camera, as Python floats."""
    f = [float(x) for x in unit([t - c for t, c in zip(target, camera, strict=True)])]
    r = [float(x) for x in unit([f[1], -f[0], 0.0])]
    u = [r[1] * f[2] - r[2] * f[1], r[2] * f[0] - r[0] * f[2], r[0] * f[1] - r[1] * f[0]]
    return f, r, u


def dot(a, b):
    """The scalar product of two vectors, each a list of three numbers or arrays."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(a):
    """The vector of length 1 in the direction of a."""
    length = np.sqrt(dot(a, a))
    return [x / length for x in a]


def _nearest(solids, camera, ray):
    """Of each ray (n,): the distance to what it meets first, which row of the colour table that is, and its normal.

    Rows are 0 for the sky, 1 for the floor, then the solids.
    """
    down = ray[2] < -1e-6
    t = np.where(down, -camera[2] / np.minimum(ray[2], np.float32(-1e-6)), FAR)
    t = np.where(t < 60, t, FAR)
    what = np.where(t < 60, 1, 0)
    normal = [np.zeros_like(t), np.zeros_like(t), np.ones_like(t)]
    for row, solid in enumerate(solids, 2):
        ids, near, facing = _hits(solid, camera, ray)
        closer = near < t[ids]
        ids = ids[closer]
        t[ids], what[ids] = near[closer], row
        for axis, value in zip(normal, facing, strict=True):
            axis[ids] = value[closer]
    return t, what, normal


def _highlight(normal, to_light, d):
    """Phong's highlight, (n,): the cosine of the half vector to the 40th."""
    gloss = np.maximum(dot(normal, unit([a - b for a, b in zip(to_light, d, strict=True)])), 0)
    for _ in range(3):
        gloss = gloss * gloss  # to the 8th
    gloss32 = gloss * gloss
    return gloss * (gloss32 * gloss32)


def _hits(solid: Solid, origin, ray):
    """Which rays hit: indices (k,), distances (k,), normals 3 x (k,). ``origin`` is a point or one point a ray."""
    w = [o - c for o, c in zip(origin, solid.centre, strict=True)]
    b = dot(w, ray)
    ids = np.flatnonzero(dot(w, w) - b * b < solid.reach)  # rays whose line passes the ball
    d = [x[ids] for x in ray]
    w = [x[ids] if isinstance(x, np.ndarray) else np.full(len(ids), x, np.float32) for x in w]
    c, s = solid.turn
    d = [c * d[0] + s * d[1], c * d[1] - s * d[0], d[2]]
    w = [c * w[0] + s * w[1], c * w[1] - s * w[0], w[2]]
    t, normal = {"sphere": _sphere, "box": _box, "cylinder": _cylinder}[solid.kind](solid.half, w, d)
    hit = np.flatnonzero((t > 1e-3) & (t < FAR))
    x, y, z = (n[hit] for n in normal)
    return ids[hit], t[hit], [c * x - s * y, s * x + c * y, z]


# Each shape takes the rays in its own axes, origins w and directions d, 3 x (k,). It returns distances (k,), FAR or
# not above 0 where a ray misses, and normals 3 x (k,).


def _sphere(half, w, d):
    r = half[0]
    b = dot(w, d)
    q = b * b - (dot(w, w) - r * r)
    t = np.where(q > 0, -b - np.sqrt(np.maximum(q, 0)), FAR)
    return t, [(x + np.where(q > 0, t, 0) * y) / r for x, y in zip(w, d, strict=True)]


def _box(half, w, d):
    enter, leave = [], []
    for x, y, h in zip(w, d, half, strict=True):
        t1, t2 = (-h - x) / y, (h - x) / y
        enter.append(np.minimum(t1, t2))
        leave.append(np.maximum(t1, t2))
    face = np.maximum(np.maximum(enter[0], enter[1]), enter[2])
    t = np.where(face < np.minimum(np.minimum(leave[0], leave[1]), leave[2]), face, FAR)
    normal, free = [], np.ones(len(face), bool)
    for e, y in zip(enter, d, strict=True):
        mine = free & (e == face)  # the face entered last; one of them on an edge
        free &= ~mine
        normal.append(np.where(mine, -np.sign(y), np.float32(0)))
    return t, normal


def _cylinder(half, w, d):
    r, h = half[0], half[2]
    a = d[0] * d[0] + d[1] * d[1] + 1e-12
    b = w[0] * d[0] + w[1] * d[1]
    q = b * b - a * (w[0] * w[0] + w[1] * w[1] - r * r)
    side = (-b - np.sqrt(np.maximum(q, 0))) / a
    side = np.where((q > 0) & (side > 1e-3) & (np.abs(w[2] + side * d[2]) < h), side, FAR)
    top = np.sign(w[2])
    cap = (top * h - w[2]) / np.where(np.abs(d[2]) < 1e-9, np.float32(1e-9), d[2])
    x, y = w[0] + cap * d[0], w[1] + cap * d[1]
    cap = np.where((cap > 1e-3) & (x * x + y * y < r * r), cap, FAR)
    t, flat = np.minimum(side, cap), cap < side
    at = np.where(t < FAR, t, 0)
    normal = [
        np.where(flat, 0, (w[0] + at * d[0]) / r),
        np.where(flat, 0, (w[1] + at * d[1]) / r),
        np.where(flat, top, 0).astype(np.float32),
    ]
    return t, normal
