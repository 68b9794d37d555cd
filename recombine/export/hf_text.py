"""The text of the exported layers, which a folder's module begins with."""

import inspect

from recombine.export import hf_layers, hf_parts

TORCH = "from torch import Tensor, nn\n"


def layers() -> tuple[str, str]:
    """(docstring and imports of torch, the rest) of the text of `hf_parts` and `hf_layers`."""
    head, imports, rest = inspect.getsource(hf_layers).partition(TORCH)
    _, line, own = rest.partition("weight_of\n")
    assert line, "hf_layers imports what is in hf_parts on its last line of imports"
    return head + imports, inspect.getsource(hf_parts).partition(TORCH)[2] + own
