"""Imports work without torchvision's extension, and a working one is left alone."""

import recombine  # isort: skip  (its guard comes before timm)

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

GUARD_FILE = Path(recombine.__file__).with_name("runtime") / "torchvision_guard.py"
GUARD = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("torchvision_guard", {str(GUARD_FILE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", GUARD + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_guard_makes_imports_work_without_the_extension():
    python("""
def refuse(path):
    raise OSError(path)
torch.ops.load_library = refuse
assert module.guard() and module.guard()
import torchvision, timm
from timm.data import create_transform
from transformers import AutoModel
assert module.guard()
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except RuntimeError as error:
    assert "custom C++ ops" in str(error)
""")


def test_guard_leaves_a_working_extension_alone(tmp_path):
    """A package in torchvision's place whose _C loads, then one whose _C is damaged, then none."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the guard must not import it')")
    extension = package / f"_C{EXTENSION_SUFFIXES[0]}"
    extension.symlink_to(torch._C.__file__)
    python(f"""
sys.path.insert(0, {str(tmp_path)!r})
assert module.guard() is False and not module._declared
assert not hasattr(torch.ops.torchvision, "nms")
library = torch.library.Library("torchvision", "DEF")  # as a real extension would: no clash
library.define(module.SCHEMAS[0])
path = __import__("pathlib").Path({str(extension)!r})
path.unlink()
path.write_bytes(b"not a library")
assert not module.extension_loads(str(path.parent))
path.unlink()
assert not module.extension_loads(str(path.parent))
assert module.guard() and hasattr(torch.ops.torchvision, "qnms")  # nms is there already: only qnms is declared
""")
