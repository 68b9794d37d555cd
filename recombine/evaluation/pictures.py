"""Scores of drawn pictures, by the features of models that have seen many.

dino       how alike the subject's drawn pictures are to its real ones: the mean cosine of all pairs (DreamBooth, arXiv
           2208.12242, Sec. 4.2)
dino_prior  the same between what is drawn for the class and what the model drew for it before
dino_leak   between what is drawn for the class and the subject: high where the subject has taken the place of its class
           (DreamBooth's PRES)
diversity  1 - the mean cosine between pictures drawn for one prompt (DreamBooth's DIV, which takes LPIPS)
clip_i, clip_t  as dino, by CLIP; and between a picture and its prompt, without the subject's word, over the prompts
           that are not the class's. Where `sample.clip` names one.

Paper (DreamBooth): DINO ViT-S/16. Here: the packaged DINOv2 ViT-S/14 at 98 px, its class token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine import models
from recombine.errors import UsageError, first_line
from recombine.models.hf_folder import UNREADABLE
from recombine.models.weights import hub_folder, silence

SIDE = 98  # pixels, of DINOv2
AT_ONCE = 32  # pictures
CLIP_MEAN, CLIP_STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)  # of CLIP's training (arXiv 2103.00020)
CLIP_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "model.safetensors")
Features = Callable[[Tensor], Tensor]  # pictures uint8 (N, 3, S, S) -> (N, d), each of length 1


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a prompt, uint8 (N, 3, S, S).

    kind: subject, class, or other, which is drawn for neither. beside: real pictures of that kind; None: there are
    none. subject: pictures of the subject itself, of every kind. plain: the prompt without the subject's word.
    """

    prompt: str
    kind: str
    pictures: Tensor
    beside: Tensor | None = None
    subject: Tensor | None = None
    plain: str | None = None


def scores(drawn: Sequence[Drawn], dino: Features, clip: "Clip | None" = None) -> dict[str, float]:
    """The scores that the prompts give, each the mean over its prompts."""
    found: dict[str, list[float]] = {}

    def add(name: str, value: Tensor) -> None:
        found.setdefault(name, []).append(value.item())

    for one in drawn:
        mine = dino(one.pictures)
        if one.beside is not None:
            add("dino" if one.kind == "subject" else "dino_prior", alike(mine, dino(one.beside)))
        if one.kind == "class" and one.subject is not None:
            add("dino_leak", alike(mine, dino(one.subject)))
        if len(mine) > 1:
            add("diversity", 1 - among(mine))
        if clip is not None:
            seen = clip(one.pictures)
            if one.kind != "class":
                add("clip_t", alike(seen, clip.words([one.plain or one.prompt])))
            if one.kind == "subject" and one.beside is not None:
                add("clip_i", alike(seen, clip(one.beside)))
    return {name: sum(values) / len(values) for name, values in found.items()}


def alike(a: Tensor, b: Tensor) -> Tensor:
    """The mean cosine between rows of a (N, d) and rows of b (M, d), all of length 1."""
    return a.mean(0) @ b.mean(0)


def among(a: Tensor) -> Tensor:
    """The mean cosine between different rows of a (N, d), all of length 1."""
    count = len(a)
    return (a.sum(0).square().sum() - count) / (count * (count - 1))


class Dino:
    """The class token of a timm ViT, the packaged DINOv2 where none is given."""

    def __init__(self, model: nn.Module | None = None):
        if model is None:
            model = models.build("dinov2_s14", arch="vit_small_patch14_dinov2", tag="packaged", image_size=SIDE)
        self.model, source = model.eval().requires_grad_(False), model.recombine_source
        self.size, self.mean, self.std = source["image_size"], source["mean"], source["std"]

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 (N, 3, S, S) -> features (N, d) of length 1."""
        given = prepared(pictures, self.size, self.mean, self.std)
        return F.normalize(torch.cat([self.model(part) for part in given.split(AT_ONCE)]), dim=1)


class Clip:
    """A CLIP model of transformers.

    Args:
        name: its folder, or its name on the hub.

    Raises:
        UsageError: it cannot be had, or is no CLIP.
    """

    def __init__(self, name: str):
        from transformers import AutoTokenizer, CLIPModel

        folder = clip_folder(name)
        try:
            with silence():
                self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
                self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except UNREADABLE as error:
            raise UsageError(f"sample.clip={name}: no CLIP can be read ({first_line(error)}); name another") from error

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 (N, 3, S, S) -> features (N, d) of length 1."""
        given = prepared(pictures, self.model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
        seen = [
            self.model.visual_projection(self.model.vision_model(part).pooler_output) for part in given.split(AT_ONCE)
        ]
        return F.normalize(torch.cat(seen), dim=1)

    def words(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> features (N, d) of length 1."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        said = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(self.model.text_projection(said.pooler_output), dim=1)


def clip_folder(name: str) -> Path:
    """The folder of a CLIP model, fetched where it is a name on the hub.

    Raises:
        UsageError: there is none.
    """
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    if name.startswith((".", "/", "~")):
        raise UsageError(f"sample.clip={name}: there is no such folder; name one that transformers saved, or drop it")
    wanted = "drop sample.clip, or name a folder that transformers saved"
    return hub_folder("clip", name, None, lambda names: [n for n in names if n in CLIP_FILES], wanted)


def prepared(pictures: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures uint8 (N, 3, S, S) as float32 (N, 3, size, size), resized bicubically and normalised."""
    given = F.interpolate(pictures.float() / 255, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return (given - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
