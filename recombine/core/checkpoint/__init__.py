"""Checkpoints: one safetensors file with a checksum, with or without the backbone's untouched tensors; and merging.

A checkpoint stores tensors and the shapes of the layers. Loading factorises nothing again: signs and gauges stay, so a
resumed model gives the same output. A file is data: nothing is unpickled, and what it says of the model is checked
against `metadata` before it reaches any library.
"""

from recombine.core.checkpoint.loading import load
from recombine.core.checkpoint.merging import merge, merged, merged_copy
from recombine.core.checkpoint.saving import save, save_best

__all__ = ["load", "merge", "merged", "merged_copy", "save", "save_best"]
