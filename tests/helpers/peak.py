"""Peak memory of one run beside what its imports take: python peak.py FOLDER override ... prints bytes.

Large tensors are mapped one by one, so that the process holds no freed ones, whatever the allocator would keep.
"""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import torch
import transformers  # noqa: F401
from hydra import compose, initialize_config_dir
from peft import LoraConfig  # noqa: F401
from transformers import BertForSequenceClassification, BertModel, LlamaForCausalLM  # noqa: F401

from helpers import CONF
from recombine import data
from recombine.runner import plan, ranks

with suppress(ImportError):  # an extra
    import recombine.models.diffusion  # noqa: F401

M_MMAP_THRESHOLD = -3  # of mallopt(3)


def peak() -> int:
    """Bytes that this process has held at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    data.known_classes()
    torch.linalg.svd(torch.ones(8, 8, dtype=torch.float64))
    torch.ones(8, 8, requires_grad=True).sum().backward()
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    plan.at_start = lambda spec: None
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", sys.argv[2:])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = peak()
    ranks.main(config, Path(sys.argv[1]))
    print(f"own {peak() - before}")
