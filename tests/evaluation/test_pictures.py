"""Scores of drawn pictures, by hand and by CLIP in transformers' own class."""

import json

import pytest
import torch
import transformers

from helpers import refusal
from recombine.evaluation.pictures import CLIP_MEAN, CLIP_STD, Clip, Dino, Drawn, alike, among, prepared, scores
from zoo import build


def rows(count: int, seed: int):
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def direct(pictures):
    return torch.nn.functional.normalize(pictures.float().flatten(1) - 128, dim=1)


def cosines(a, b):
    return torch.nn.functional.cosine_similarity(direct(a)[:, None], direct(b)[None], dim=-1)


def test_the_scores_are_means_of_cosines():
    mine, class_, other, own, before = (rows(n, i) for i, n in enumerate((3, 2, 2, 4, 5)))
    found = scores([
        Drawn("a sks cat", "subject", mine, own, own), Drawn("a cat", "class", class_, before, own),
        Drawn("rain", "other", other, None, own),
    ], direct)  # fmt: skip
    spread = [1 - cosines(x, x)[~torch.eye(len(x), dtype=bool)].mean() for x in (mine, class_, other)]
    expected = {
        "dino": cosines(mine, own).mean(), "dino_prior": cosines(class_, before).mean(),
        "dino_leak": cosines(class_, own).mean(), "diversity": sum(spread) / 3,
    }  # fmt: skip
    assert found == {name: pytest.approx(value.item(), abs=1e-6) for name, value in expected.items()}
    assert alike(direct(own), direct(own)) < 1 and among(direct(torch.cat([mine[:1]] * 3))) == pytest.approx(1)
    assert "diversity" not in scores([Drawn("a sks cat", "subject", mine[:1], own, own)], direct)


def test_dino_takes_any_timm_model_and_a_picture_is_most_like_itself():
    dino = Dino(build("tiny_vit"))
    pictures = rows(3, 0)
    found = dino(pictures)
    assert torch.allclose(found.norm(dim=1), torch.ones(3)) and found.shape[0] == 3
    assert torch.equal((found @ dino(pictures.flip(0)).T).argmax(1), torch.tensor([2, 1, 0]))
    assert prepared(pictures, 16, [0.5] * 3, [0.5] * 3).abs().max() <= 1


def test_clip_is_that_of_transformers(tmp_path):
    torch.manual_seed(0)
    text = {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "hidden_size": 16}
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes = {"image_size": 16, "patch_size": 8, "hidden_size": 16}
    config = transformers.CLIPConfig(text_config=text | sizes, vision_config=eyes | sizes, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    clip, pictures = Clip(str(tmp_path)), rows(2, 0)
    found = scores([Drawn("a cat", "subject", pictures, pictures, pictures)], direct, clip)
    ids = clip.tokenizer(["a cat"], return_tensors="pt")
    with torch.no_grad():
        said = clip.model(pixel_values=prepared(pictures, 16, CLIP_MEAN, CLIP_STD), **ids)
    cosine = (said.image_embeds @ said.text_embeds.T).mean().item()
    assert found["clip_t"] == pytest.approx(cosine, abs=1e-5)
    assert found["clip_i"] == pytest.approx((said.image_embeds @ said.image_embeds.T).mean().item(), abs=1e-5)
    (empty := tmp_path / "empty").mkdir()
    assert f"sample.clip={empty}: no CLIP can be read" in refusal(Clip, str(empty))
