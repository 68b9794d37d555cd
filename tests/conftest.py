import pytest
import torch

import recombine  # noqa: F401  before timm and transformers: see recombine/runtime/torchvision_guard.py

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
pytest.register_assert_rewrite("helpers")  # their assertions explain themselves too
