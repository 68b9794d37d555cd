"""Merging, saving all of a model and writing it dense take memory for one layer, not for a second model."""

import json
import os
import subprocess
import sys

import pytest

from helpers import MIB

GIVEN_BACK = {  # to the system at once: what glibc keeps of freed tensors for later would count as held
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
WORK = 72 * MIB  # one layer's: a matrix of 16 MiB, its copy, the layer's old weight, and a buffer of the writer
FACTORS = 200 * MIB  # one layer's SVD in float64: its difference of 32 MiB, U, and what U comes from
PROGRAM = """
import copy, json, re, sys, threading
from pathlib import Path
import torch
import recombine
from recombine import models
from recombine.methods.from_config import from_name

torch.set_num_threads(1)
LLAMA = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8)
KINDS = {
    "llama": ("tiny_llama", LLAMA | {"num_hidden_layers": 6}, {"num_hidden_layers": 1}),
    "vit": ("vit_l16", {"depth": 8}, {"depth": 1}),
}
kind, name, work, folder = *sys.argv[1:4], Path(sys.argv[4])
arch, large, small = KINDS[kind]
bases = []

def held(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def made(size):
    from recombine.runtime import conf
    model = models.build(**conf.load("model", arch) | {"tag": None, "pretrained": False} | size)
    if work == "lora":
        bases.append(copy.deepcopy(model))
    recombine.apply(model, from_name(name, {"rank": 8}, "method"))
    return model.eval()

def done(model, folder):
    folder.mkdir()
    if work == "merge":
        recombine.merge(model)
    elif work == "save":
        recombine.save(model, folder / "model.safetensors", whole=True)
    elif work == "lora":
        recombine.export(model, folder / "lora", "lora", base=bases.pop(), rank=4)
    else:
        recombine.export(model, folder / work, work)

def watch():  # memory that is no file's: the kernel's peak counts pages of files too, which it takes when it needs them
    while not ended.wait(0.002):
        most[0] = max(most[0], held("RssAnon"))

done(made(small), folder / "small")  # the libraries are loaded here
model = made(large)
before, most, ended = held("RssAnon"), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
done(model, folder / "large")
ended.set()
watcher.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"risen": most[0] - before, "end": held("RssAnon") - before, "size": size}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "kind, method, work",
    [
        ("llama", "pc_lora", "merge"),  # a layer holds its old weight: all of them would be the model again
        ("vit", "lora", "merge"),  # q, k and v become one layer again
        ("llama", "pc_lora", "save"),
        ("llama", "svd", "dense"),  # rank 8: what is written is many times the model
        ("vit", "lora", "dense"),
        ("llama", "dora", "hf"),  # adapters are folded
        ("llama", "svd", "lora"),
    ],
)
def test_the_peak_rises_by_one_layer(kind, method, work, tmp_path):
    command = [sys.executable, "-c", PROGRAM, kind, method, work, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | GIVEN_BACK, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["risen"] < max(found["end"], 0) + (FACTORS if work == "lora" else WORK)
