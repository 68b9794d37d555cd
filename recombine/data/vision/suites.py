"""The papers' picture sets, a row each. How they are read and cut: `recombine.data.vision.suite_base`.

fgvc      CRISP's six (arXiv text: Tab. 2, 7-9)
vision8   CERSA's and JACTUS's eight (arXiv 2605.08174, Tab. 7, 9)
imagenet  2 % of ImageNet-1k to distil with, its validation set as test (CRISP Fig. 4)
"""

from __future__ import annotations

import re
from pathlib import Path

from recombine.data.vision.folder import is_tree
from recombine.data.vision.source import Part
from recombine.data.vision.suite_base import Row, Suite
from recombine.errors import UsageError

AIRCRAFT = Row(
    100, "HuggingFaceM4/FGVC-Aircraft", "e18a7c97147c90dc7f4a60d74a7f4258e9264e97",  # its pull request 1: parquet
    {"train": 3334, "validation": 3333, "test": 3333}, label="variant", note="100 variants",
)  # fmt: skip
CIFAR100 = Row(
    100, "uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", {"train": 50_000, "test": 10_000},
    "cifar100/{split}-*.parquet", "img", "fine_label",
)  # fmt: skip
CIFAR10 = Row(
    10, "uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", {"train": 50_000, "test": 10_000},
    "plain_text/{split}-*.parquet", "img",
)  # fmt: skip


class Fgvc(Suite):
    """CRISP's six fine-grained sets."""

    name, label, experiment = "fgvc", "FGVC", "crisp/tab02_upper"
    task_labels = {
        "flowers102": "Flowers-102", "aircraft": "Aircraft", "mit67": "MIT-67", "cifar100": "CIFAR-100",
        "cifar10": "CIFAR-10", "cub200": "CUB-200",
    }  # fmt: skip
    rows = {
        "flowers102": Row(
            102, "dpdl-benchmark/oxford_flowers102", "544b55c9af69a05742ead7571cd7ae23cfcd758b",
            {"train": 1020, "validation": 1020, "test": 6149},
            note="the set has 8,189; perhaps the 6,552 of a repackaged training folder, and one",
        ),
        "aircraft": AIRCRAFT,
        "mit67": Row(
            67, "keremberke/indoor-scene-classification", "refs/convert/parquet",
            {"train": 10_885, "validation": 3128, "test": 1558}, "full/{split}/*.parquet", label="labels",
            licence="MIT", note="repackaged: 15,571 of 15,620 pictures, stretched to 416 px",
        ),
        "cifar100": CIFAR100,
        "cifar10": CIFAR10,
        "cub200": Row(
            200, "bentrevett/caltech-ucsd-birds-200-2011", "1ef09e021b0b65b40337f6f285909656f407f6e0",
            {"train": 5994, "test": 5794}, note="the set has 11,788",
        ),
    }  # fmt: skip
    suite = dict.fromkeys(rows, "fine-grained")
    papers = {
        task: ("CRISP Tab. 7", *printed)
        for task, printed in {
            "flowers102": (102, 6553), "aircraft": (55, 10_001), "mit67": (67, 15_614), "cifar100": (100, 60_000),
            "cifar10": (10, 60_000), "cub200": (200, 11_789),
        }.items()
    }  # fmt: skip


class Vision8(Suite):
    """CERSA's and JACTUS's eight sets.

    EuroSAT has no official split: this one is 16,200 / 5,400 / 5,400. Which of its ten folds DTD's is, the repository
    does not say.
    """

    name, label, experiment = "vision8", "Vision8", "cersa/tab09"
    task_labels = {
        "cifar100": "CIFAR-100", "eurosat": "EuroSAT", "resisc45": "RESISC45", "cars": "Stanford Cars",
        "aircraft": "Aircraft", "dtd": "DTD", "cifar10": "CIFAR-10", "pets": "Oxford Pets",
    }  # fmt: skip
    rows = {
        "cifar100": CIFAR100,
        "eurosat": Row(
            10, "timm/eurosat-rgb", "b4e28552cd5f3932b6abc37eb20d3e84901ad728",
            {"train": 16_200, "validation": 5400, "test": 5400}, licence="MIT",
        ),
        "resisc45": Row(
            45, "timm/resisc45", "fe12fc5f1b7606543b0355eda392f1ddc54625c6",
            {"train": 18_900, "validation": 6300, "test": 6300},
        ),
        "cars": Row(
            196, "tanganke/stanford_cars", "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40", {"train": 8144, "test": 8041},
        ),
        "aircraft": AIRCRAFT,
        "dtd": Row(
            47, "tanganke/dtd", "d2afa97d9f335b1a6b3b09c637aef667f98f966e", {"train": 3760, "test": 1880},
            note="one of ten folds",
        ),
        "cifar10": CIFAR10,
        "pets": Row(
            37, "timm/oxford-iiit-pet", "089695c834a7deb60505b7cc506672db1c31a6aa", {"train": 3680, "test": 3669},
            licence="CC-BY-SA-4.0",
        ),
    }  # fmt: skip
    suite = dict.fromkeys(rows, "vision8")


class Imagenet(Suite):
    """2 % of ImageNet-1k, whose repository is gated, to distil with.

    Of its training rows, in the order of its files, 25,624 (a seeded list) are used, a tenth of those for validation
    unless ``select="last"``. Its validation set of 50,000 is the test set.

    A model keeps its own head where that tells 1,000 classes apart. So their order matters, which is that of the
    WordNet ids: class folders must be named by them.
    """

    name, label = "imagenet", "ImageNet-1K (2 %)"
    task_labels = {"imagenet": ""}
    uses_pretrained_classes = True
    protocols = ("official",)
    rows = {
        "imagenet": Row(
            1000, "ILSVRC/imagenet-1k", "49e2ee26f3810fb5a7536bbf732a7b07389a47b5",
            {"train": 1_281_167, "validation": 50_000}, splits={"train": "train", "test": "validation"}, share=0.02,
            licence="ImageNet's terms of access", note="2 % of train; test is the validation set",
        ),
    }  # fmt: skip
    suite = {"imagenet": "imagenet"}

    def read(self, folder: Path) -> tuple[list[str] | None, dict[str, Part], list[Path]]:
        names, parts, watched = super().read(folder)
        if is_tree(folder) and (other := [name for name in names if not re.fullmatch(r"n\d{8}", name)]):
            raise UsageError(
                f"{folder}: class folder {other[0]!r} is no WordNet id, whose order is that of the models' classes: "
                "name the folders n01440764 and so on"
            )
        return names, parts, watched
