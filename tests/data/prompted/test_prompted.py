"""Pictures with prompts: captions, packaged subjects, CustomConcept101's folders, and batches of all of them."""

import copy
import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")  # an extra

from PIL import Image  # noqa: E402

from helpers import drawing, refusal  # noqa: E402
from recombine import data, models  # noqa: E402
from recombine.data.prompted import captions, customconcept, dreambooth  # noqa: E402
from recombine.data.prompted.pictures import square  # noqa: E402
from recombine.training import objectives  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    from recombine.runtime.assets import cache_dir

    (folder := tmp_path / "cache").mkdir()
    (folder / "assets").symlink_to(cache_dir() / "assets")
    monkeypatch.setenv("RECOMBINE_CACHE", str(folder))


@pytest.fixture(scope="module")
def model():
    return drawing.build()


def ready(found, model):
    found.attach_model(**models.for_data(model.recombine_source))
    found.prepare_data()
    found.setup()
    return found


@pytest.mark.parametrize("path, kind, prompt", [
    ("food/beverages/ice_cube_jarno_vasamaa_.svg", "beverage", "ice cube jarno, beverage clip art"),
    ("animals/mammals/bluewhale-md.svg", "mammal", "bluewhale, mammal clip art"),
    ("shapes/jigsaw/01_06.svg", "jigsaw", "jigsaw clip art"),
])  # fmt: skip
def test_a_drawings_prompt_is_its_files_name(path, kind, prompt):
    assert captions.caption(path, kind) == prompt


def test_captions_of_emoji(model):
    rows = captions.emoji()
    prompts = [prompt for prompt, _, _ in rows]
    assert len(rows) > 4000 and len(set(prompts)) == len(prompts)
    assert "grinning cat, noto emoji" in prompts and not [p for p in prompts if "openmoji" in p or "skin tone" in p]
    module = ready(data.build("captions", task="emoji", limit=12, batch_size=4), model)
    batch = objectives.fetch(module, module.train, [0, 5], torch.device("cpu"))
    assert batch["pixels"].shape == (2, 3, 16, 16) and batch["pixels"].abs().max() <= 1 and batch["labels"].all()
    assert module.sizes == {"train": 12, "val": 12, "test": 12} and len(module.asked(None)) == captions.SHOWN
    tested = {p for p, _, test in rows if test}
    shown = module.asked(None)
    assert {one.prompt for one in shown} <= tested and shown[0].beside.shape == (1, 3, 16, 16)


def test_a_packaged_subject(model):
    module = ready(data.build("subject", task="openmoji_moon", prior=0), model)
    assert module.subject.shape == (5, 3, 16, 16) and module.prompt == "sks moon, emoji"
    assert len({picture.numpy().tobytes() for picture in module.subject}) == 5
    assert "CC-BY-SA" in module.info["licence"] and len(module.test) == 5 * dreambooth.DRAWS
    assert "did you mean openmoji_cat" in refusal(data.build, "subject", task="openmoji_cut")


def test_customconcept_takes_the_noun_that_the_release_says(tmp_path, model):
    root = tmp_path / "benchmark_dataset"
    root.mkdir()
    drawing.subject(root)
    rows = [{"instance_data_dir": "./benchmark_dataset/cat", "class_prompt": "kitten"}]
    (tmp_path / "dataset.json").write_text(json.dumps(rows))
    module = ready(data.build("customconcept", root=str(tmp_path), task="cat", prior=0), model)
    assert module.prompt == "a photo of sks kitten" and module.title == "CustomConcept101 cat"
    assert customconcept.said(root, "cat") == "kitten" and customconcept.said(root, "dog") is None
    assert "there is no such subject" in refusal(data.build, "customconcept", root=str(tmp_path), task="dog")
    (tmp_path / "dataset.json").write_text("[{]")
    assert "restore it" in refusal(data.build, "customconcept", root=str(tmp_path), task="cat")


def test_pictures_are_cut_to_the_square_around_their_middle():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 200
    assert square(pixels, 8).eq(200).all()


def test_photographs_stand_upright(tmp_path, model):
    folder = drawing.subject(tmp_path)
    lying = np.zeros((20, 40, 3), np.uint8)
    lying[:, :20] = 200  # as the camera wrote it; upright it is 40 high, and bright at the top
    Image.fromarray(lying).save(folder / "5.png", exif=turned(6))
    module = drawing.module(model, folder, prior=0)
    last = module.subject[-1].float().mean((0, 2))
    assert last[0] > 190 and last[-1] < 10


def turned(how: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = how
    return exif


@pytest.mark.parametrize("token", ["S*", "[V]", "sks!", "<new1>", "V1 cat"])
def test_any_word_can_be_the_subjects(token, tmp_path):
    module = data.build("dreambooth", root=str(drawing.subject(tmp_path)), token=token)
    one, two = module.asked(None)
    assert (one.kind, two.kind) == ("subject", "class") and one.plain == two.plain == "a photo of cat"
    assert module.asked([f"{token}, on the moon"])[0].plain == ", on the moon"
    assert "is in none of them" in refusal(module.asked, ["a photo of cats"])


def test_the_prior_is_no_larger_than_what_is_trained_on(tmp_path):
    root = str(drawing.subject(tmp_path))
    assert data.build("dreambooth", root=root, prior=200, repeats=3).prior_count == 15
    assert "data.limit=1: a subject needs two pictures" in refusal(data.build, "dreambooth", root=root, limit=1)


def test_another_schedule_draws_another_prior(tmp_path, model):
    root = drawing.subject(tmp_path)
    one = drawing.module(model, root)
    other = copy.deepcopy(model)
    other.schedule = type(other.schedule).from_config(dict(other.schedule.config) | {"prediction_type": "epsilon"})
    two = drawing.module(other, root)
    assert not torch.equal(one.before, two.before) and one.info["sha256"]["prior"] != two.info["sha256"]["prior"]


def test_the_prior_is_the_models_own_and_drawn_once(tmp_path, model, monkeypatch):
    root = drawing.subject(tmp_path)
    one = drawing.module(model, root)
    monkeypatch.setattr(type(model), "draw", lambda *_, **__: pytest.fail("drawn again"))
    assert torch.equal(drawing.module(model, root).before, one.before)
    monkeypatch.undo()
    other = drawing.module(drawing.build(seed=1), root)
    assert not torch.equal(other.before, one.before)
    tokens = one.tokens([one.class_prompt])
    assert torch.equal(model.draw(tokens, one.empty, [dreambooth.APART], steps=2, guidance=3.0)[0], one.before[0])


def test_a_seed_draws_the_same_picture_in_any_company(model, tmp_path):
    module = drawing.module(model, drawing.subject(tmp_path), prior=0)
    tokens = module.tokens(["a photo of sks cat", "a photo of cat"])
    both = model.draw(tokens, module.empty, [3, 4], steps=2)
    alone = model.draw({key: value[1:] for key, value in tokens.items()}, module.empty, [4], steps=2)
    assert (both[1].int() - alone[0].int()).abs().max() <= 1 and not torch.equal(both[0], both[1])
    for scheduler in ("dpm", "euler"):
        assert model.draw(tokens, module.empty, [3, 4], steps=2, scheduler=scheduler).shape == (2, 3, 16, 16)


def test_training_draws_other_noise_every_step_and_drops_prompts(model, tmp_path):
    class Trainer:
        training, global_step, global_rank, world_size = True, 0, 0, 1

    module = drawing.module(model, drawing.subject(tmp_path), drop_prompt=0.5)
    raw = module.train.__getitems__([0, 1, 2, 3])
    still = module.on_after_batch_transfer(dict(raw), 0)
    module.trainer = Trainer()
    first = module.on_after_batch_transfer(dict(raw), 0)
    again = module.on_after_batch_transfer(dict(raw), 0)
    Trainer.global_step = 1
    later = module.on_after_batch_transfer(dict(raw), 0)
    assert torch.equal(first["draw"], again["draw"]) and torch.equal(first["input_ids"], again["input_ids"])
    assert not set(first["draw"].tolist()) & (set(later["draw"].tolist()) | set(still["draw"].tolist()))
    empty = first["input_ids"].eq(module.empty["input_ids"]).all(1)
    assert 0 < empty.sum() < len(empty) and not still["input_ids"].eq(module.empty["input_ids"]).all(1).any()
