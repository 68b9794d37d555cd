"""Tiny vision models, and the line that refuses a setting."""

import pytest
import torch

from helpers import config
from recombine.errors import UsageError
from recombine.models import build

TINY = ("tiny_vit", "tiny_swin")


def refused(**kwargs) -> str:
    """The one line that build gives for these settings."""
    with pytest.raises(UsageError) as error:
        build(**kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(params=TINY)
def tiny(request):
    torch.manual_seed(0)
    return build(**config(request.param)).eval()
