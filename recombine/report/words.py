"""The words that tables, plots and the page show for the keys of configurations and results.

Only what people read goes through here. Records, CSV files and the look-up of a paper's rows keep the keys. A label
that conf/experiment writes out ("CERSA α = 0.9") is shown as it stands there.
"""

import re

KEYS = {  # where the rule of `heading` is not enough
    "method.alpha": "α, share of the energy kept",
    "method.beta": "β, share of the energy trained",
    "method.gate": "gate",
    "method.placement": "gate acts on",
    "method.targets": "adapted layers",
    "optim.lr": "learning rate",
    "method.lr": "learning rate",
    "score": "validation score",
    "val.{metric}": "validation score",
    "test.{metric}": "test score",
    "val.acc": "validation accuracy",
    "test.acc": "test accuracy",
    "test.ppl": "perplexity",
    "linear_probe.test": "linear probe, test accuracy",
    "account.trained": "trained parameters",
    "account.trained_without_head": "trained parameters without the head",
    "account.stored": "stored parameters",
    "account.retained": "share of the weights kept",
    "account.memory_mib": "memory to train (MiB)",
    "account.flops": "FLOPs of a sample",
    "seconds.total": "seconds",
    "weight_error": "relative error of the weights",
    "profile.ratio.train": "training speed relative to the reference",
    "profile.ratio.infer": "inference speed relative to the reference",
    "curves.train.loss": "training loss",
    "curves.val.loss": "validation loss",
    "curves.val.acc": "validation accuracy",
    "train.loss": "training loss",
    "val.loss": "validation loss",
    "distilled.train.loss": "distillation, training loss",
    "distilled.val.loss": "distillation, validation loss",
    "held": "share of the weights held",
}
GROUPS = ("method", "data", "model", "optim", "trainer", "account", "test", "curves", "calibration", "stage")
ROLES = {  # in the order of the panels
    "q": "query",
    "k": "key",
    "v": "value",
    "qkv": "query, key, value",
    "o": "attention output",
    "gate": "MLP gate",
    "up": "MLP up",
    "down": "MLP down",
}
TASKS = {  # as the data modules title them, which would need torch
    "aircraft": "Aircraft",
    "caltech101": "Caltech101",
    "capital_of": "capitals",
    "cars": "Stanford Cars",
    "cifar": "CIFAR-100",  # VTAB-1k's name for it
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "clevr_count": "Clevr count",
    "clevr_dist": "Clevr distance",
    "cola": "CoLA",
    "cub200": "CUB-200",
    "diabetic_retinopathy": "Diabetic Retinopathy",
    "dmlab": "DMLab",
    "dsprites_loc": "dSprites location",
    "dsprites_ori": "dSprites orientation",
    "dtd": "DTD",
    "elpv": "ELPV",
    "eurosat": "EuroSAT",
    "fashion_mnist": "Fashion-MNIST",
    "flowers102": "Flowers-102",
    "imagenet": "ImageNet",
    "kitti": "KITTI distance",
    "mit67": "MIT-67",
    "mnli": "MNLI",
    "mrpc": "MRPC",
    "oxford_flowers102": "Flowers102",
    "oxford_iiit_pet": "Pets",
    "patch_camelyon": "Patch Camelyon",
    "pets": "Oxford Pets",
    "qnli": "QNLI",
    "qqp": "QQP",
    "resisc45": "RESISC45",
    "rte": "RTE",
    "smallnorb_azi": "smallNORB azimuth",
    "smallnorb_ele": "smallNORB elevation",
    "snorb_azim": "sNORB azimuth",
    "snorb_elev": "sNORB elevation",
    "sst2": "SST-2",
    "stsb": "STS-B",
    "sun397": "Sun397",
    "svhn": "SVHN",
}
VALUES = {  # other values of a configuration whose words are not the value with spaces
    "gelu": "GELU",
    "huber": "Huber",
    "kaiming": "Kaiming",
    "l1": "L1",
    "mse": "MSE",
    "post": "the product",
    "pre": "the mixer",
    "relu": "ReLU",
    "silu": "SiLU",
    "smooth_l1": "smooth L1",
    "temp": "the basis",
    "xavier": "Xavier",
}
METHODS = {  # as tables of our own CSVs call them
    "asvd": "ASVD",
    "balf": "BALF",
    "basis_sharing": "Basis Sharing",
    "crisp": "CRISP",
    "dfjr": "DFJR",
    "dobi_svd": "Dobi-SVD",
    "fwsvd": "FWSVD",
    "jactus": "JACTUS",
    "original": "the original model",
    "svd": "SVD",
    "svd_llm": "SVD-LLM",
}
BUDGETS = {  # core.budget's words
    r"retained_([\d.]+)": r"\1 % kept",
    r"bytes_([\d.]+)": r"\1 % of the bytes",
    r"energy_([\d.]+)": r"\1 % of the energy",
    r"trainable_([\d.]+[km]?)": r"\1 trained parameters",
    r"memory_([\d.]+)mb": r"\1 MiB to train",
}


def heading(key: str) -> str:
    """The words for an axis of a grid or for a path into a result.

    The general rule: the group in front goes, dots and underscores become spaces. `method.basis_rank` -> "basis rank".
    """
    path = key.replace("/", ".")
    if path in KEYS:
        return KEYS[path]
    group, _, rest = path.partition(".")
    return re.sub(r"[._]+", " ", rest if rest and group in GROUPS else path).strip()


def label(axis: str | None, name: str) -> str:
    """The words for a label of an axis. `data.task`, `svhn` -> "SVHN"; `role`, `q` -> "query"; `budget`,
    `retained_50` -> "50 % kept". Labels of an axis that is no key of the configuration are words already."""
    if axis == "role":
        return ROLES.get(name, name)
    if axis == "budget":
        return budget(name)
    if axis == "data.task":
        return TASKS.get(name, name.replace("_", " "))
    if axis and "." in axis:
        return VALUES.get(name, name.replace("_", " "))
    return name


def method(name: str) -> str:
    """The words for a method, perhaps with what it was told: `crisp, aware` -> "CRISP, aware"."""
    key, comma, rest = name.partition(",")
    return METHODS.get(key, key) + comma + rest


def budget(word: str) -> str:
    """The words for a budget, such as `retained_50`, `energy_95`, `trainable_150k`. Others are unchanged."""
    for pattern, words in BUDGETS.items():
        if match := re.fullmatch(pattern, word):
            return match.expand(words)
    return word


def caption(plot: str) -> str:
    """The words for a plot's name: `fig06_losses` -> "Fig. 6 losses"."""
    return re.sub(r"\bfig0*(\d)", r"Fig. \1", plot).replace("_", " ")
