"""Generated pictures: the pinned ones, with true labels."""

import hashlib

import numpy as np
import pytest

from helpers import ready
from recombine.data.sampling import stratified
from recombine.data.vision import ray_caster, synthetic
from recombine.data.vision.offline import SUITE, TASKS, Offline, pins
from recombine.data.vision.source import SIZES

GENERATED = [task for task in SUITE if TASKS[task][2] is synthetic.build]


@pytest.mark.parametrize("task", ["dsprites_loc", "dsprites_ori"])
def test_dsprites_are_the_pinned_ones(task, cache):
    module = ready(Offline(task=task, image_size=64))  # refuses another sha256 by itself
    assert module.info["sha256"] == pins()[task] and module.info["sizes"] == SIZES
    assert set(np.unique(module.train.images)) == {0, 255}


@pytest.mark.parametrize(
    ("task", "prefix"),
    [("clevr_count", "89ecd700fe445d43"), ("snorb_azim", "de46392bd90ed563"), ("snorb_elev", "d4d3aa599ed2db29")],
)
def test_ray_cast_pictures_are_the_pinned_ones(task, prefix):
    images, _ = synthetic.build(task).splits["test"]
    assert hashlib.sha256(b"".join(images[i].tobytes() for i in range(16))).hexdigest()[:16] == prefix


@pytest.mark.full
@pytest.mark.parametrize("task", GENERATED[2:])
def test_every_ray_cast_picture_is_pinned(task, cache):
    ready(Offline(task=task, image_size=32))


@pytest.mark.parametrize("task", GENERATED)
def test_generated_labels_cover_every_class(task):
    source = synthetic.build(task)
    assert {split: len(labels) for split, (_, labels) in source.splits.items()} == SIZES
    for split, (images, labels) in source.splits.items():
        counts = np.bincount(labels, minlength=len(source.classes))
        assert len(images) == len(labels) and len(counts) == len(source.classes) == TASKS[task][1]
        assert counts.min() > 0 and counts.max() < 3 * SIZES[split] / len(counts)


def test_factors_do_not_repeat_and_test_toys_are_new():
    for rows in (synthetic.dsprites_factors(2018), synthetic.snorb_factors(2004)):
        together = np.concatenate(list(rows.values()))
        assert len(np.unique(together, axis=0)) == len(together)
    toys = {split: {tuple(row[:2]) for row in part} for split, part in rows.items()}
    assert not (toys["train"] | toys["val"]) & toys["test"] and len(toys["test"]) == 25
    assert len({synthetic.toy(c, i) for c in range(5) for i in range(10)}) == 50


def test_dsprites_labels_are_where_and_how_the_glyph_lies():
    images, labels = synthetic.build("dsprites_loc").splits["val"]
    columns = np.array([np.flatnonzero(images[i].any(0)).mean() for i in range(200)])
    assert np.corrcoef(columns, labels)[0, 1] > 0.99
    row = np.array([1, 5, 0, 16, 16])  # an ellipse, which bin 0 shows lying
    lying, standing = synthetic.dsprite(row), synthetic.dsprite(row + [0, 0, 10, 0, 0])
    assert np.ptp(np.nonzero(lying)[1]) > 1.5 * np.ptp(np.nonzero(lying)[0])
    assert np.ptp(np.nonzero(standing)[0]) > 1.5 * np.ptp(np.nonzero(standing)[1])
    source = synthetic.build("dsprites_ori")
    turns = synthetic.dsprites_factors(2019)["train"][:, 2]
    assert (source.splits["train"][1] == np.floor(turns / 2.5)).all()


def test_clevr_labels_are_in_the_scene():
    count, distance = (synthetic.build(f"clevr_{kind}").splits["val"] for kind in ("count", "dist"))
    for i in range(20):
        scene = synthetic.clevr_scene(SIZES["train"] + i)
        assert len(scene.solids) == count[1][i] + 3
        gaps = [np.linalg.norm(np.subtract(s.centre, scene.camera)) for s in scene.solids]
        assert np.digitize(min(gaps), synthetic.DISTANCES) == distance[1][i]
    assert (count[0][0] == distance[0][0]).all()  # the same pictures


def test_cast_sees_a_ball_where_it_is():
    ball = ray_caster.Solid("sphere", (0.0, 0.0, 1.0), (1.0,) * 3, (1.0, 0.0, 0.0))
    view = ((6.0, 0.0, 1.0), (0.0, 0.0, 1.0), (6.0, 0.0, 8.0), 0.5, (0.0, 0.0, 1.0), (0.0, 0.0, 1.0))
    image = ray_caster.cast([ball], *view)
    red = np.argwhere(image[..., 0] > image[..., 2])
    assert np.abs(red.mean(0) - 47.5).max() < 1.5
    assert abs(np.ptp(red[:, 1]) - 96 / (0.5 * np.sqrt(35))) < 2  # tangent of its half angle: 1 / sqrt(35)


def test_stratified_keeps_shares():
    labels = np.repeat([0, 1, 3], [50, 30, 20])
    chosen = stratified(labels, 10, 0)
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 0, 2] and len(set(chosen.tolist())) == 10
    assert chosen.tolist() == stratified(labels, 10, 0).tolist() != stratified(labels, 10, 1).tolist()
