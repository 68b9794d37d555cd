"""Applying a method to a model of 135 million parameters takes memory for what it adds, and for one layer's work."""

import json
import os
import subprocess
import sys

import pytest

from helpers import MIB

WORK = 64 * MIB  # one layer's: a float64 SVD of (1536, 576) with its copies takes 40
GIVEN_BACK = {  # to the system at once: what glibc keeps of freed tensors for later would count as held
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
PROGRAM = """
import ctypes, json, re, sys
from pathlib import Path
import torch
import recombine
from recombine import models
from recombine.core.rewrite import find_sites
from recombine.methods.from_config import from_name
from recombine.models import roles
from recombine.runtime import conf

torch.set_num_threads(1)
status = lambda key: 1024 * int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def risen(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

def method(name, **fields):
    return from_name(name, fields, "method")

name, fields = sys.argv[1], json.loads(sys.argv[2])
warm = models.build(**conf.load("model", "tiny_llama"))  # the libraries that the method needs are loaded here
recombine.apply(warm, method(name, **fields | ({"rank": 4} if "rank" in fields else {})))
del warm
model = models.build(**conf.load("model", "smollm2_135m") | {"tag": None, "pretrained": False})
held = {id(p) for p in model.parameters()}
chosen = method(name, **fields)
looked = risen(lambda: (find_sites(model, chosen), roles.find(model, chosen.targets)))
peak = risen(lambda: recombine.apply(model, chosen))
added = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in held)
total = sum(p.numel() for p in model.parameters())
print(json.dumps({"looked": looked, "peak": peak, "added": added, "total": model.recombined.total}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name, fields",
    [("lora", {}), ("svd", {"targets": ["up"], "ratio": 0.5}), ("cersa", {"targets": ["q"], "rank": 32})],
    ids=["lora", "svd", "cersa"],
)
def test_the_peak_rises_by_what_the_method_adds(name, fields):
    command = [sys.executable, "-c", PROGRAM, name, json.dumps(fields)]
    done = subprocess.run(command, env=os.environ | GIVEN_BACK, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["total"] == 134_515_008  # SmolLM2-135M
    assert found["looked"] < 5 * MIB
    assert found["peak"] < found["added"] + WORK
