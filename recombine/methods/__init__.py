"""One file for each paper or library; a method's fields are its configuration."""

from recombine.methods.base import Method, Record, Site, Step, apply, finish, train_only
from recombine.methods.baselines import Full, LinearProbe
from recombine.methods.cersa import Cersa
from recombine.methods.crisp import Crisp
from recombine.methods.peft import Peft
from recombine.methods.svd import Svd

__all__ = [
    "Cersa",
    "Crisp",
    "Full",
    "LinearProbe",
    "Method",
    "Peft",
    "Record",
    "Site",
    "Step",
    "Svd",
    "apply",
    "finish",
    "train_only",
]
