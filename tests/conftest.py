import signal

import pytest
import torch

import recombine  # noqa: F401  before timm and transformers: see recombine/runtime/torchvision_guard.py

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell: what tests start shall see Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
pytest.register_assert_rewrite("helpers")  # their assertions explain themselves too
