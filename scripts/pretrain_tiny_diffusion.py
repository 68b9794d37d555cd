"""Trains the weights of model=tiny_diffusion on packaged drawings, into the cache. 90 minutes of two cores.

    python scripts/pretrain_tiny_diffusion.py                  until --steps are done, or --minutes have passed
    python scripts/pretrain_tiny_diffusion.py --minutes 30     half an hour more; what is there already goes on
    python scripts/pretrain_tiny_diffusion.py --bf16           twice as fast where the processor multiplies bfloat16

The rate is constant and the weights are averaged, so what lies in the cache is of use at any time. Beside the folder
lies the state that the next call goes on from. Every step depends on the seed and its number alone.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import recombine  # noqa: F401  before diffusers: see recombine/runtime/torchvision_guard.py
from recombine import data, models
from recombine.data.batch_sampler import seed_of
from recombine.errors import UsageError
from recombine.models.diffusion_folder import trained_here
from recombine.runtime import conf
from recombine.training import objectives

NAME = "tiny_diffusion"
OPTIONS = ("batch", "lr", "seed", "task", "bf16")  # which every call that goes on has to share
AVERAGED = 0.999  # of the averaged weights, from step to step, once there are some


def main(arguments: list[str]) -> None:
    """Trains for so many steps or minutes, and writes the folder every --every steps and at the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=90.0, help="of this call, 90 if not said")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps from one saved state to the next")
    parser.add_argument("--task", default="drawings", help="of data=captions")
    parser.add_argument("--bf16", action="store_true", help="autocast; the weights and their averages stay in float32")
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    model = models.build(**read("model", NAME) | {"pretrained": False})
    module = data.build("captions", task=given.task, batch_size=given.batch, seed=given.seed)
    module.attach_model(**models.for_data(model.recombine_source))
    module.prepare_data()
    module.setup()
    train(model, module, given, trained_here(NAME))


def train(model: nn.Module, module, given: argparse.Namespace, folder: Path) -> None:
    """The loop, from the state beside the folder where there is one."""
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), given.lr, weight_decay=0.01)
    objective, history, step, start = objectives.build(module), [], 0, time.monotonic()
    path, options = folder.with_suffix(".state.pt"), {key: getattr(given, key) for key in OPTIONS}
    if path.is_file():
        state = torch.load(path, weights_only=True)
        if state["options"] != options:
            sys.exit(f"{path} was trained with {state['options']}, not {options}: say the same, or move it away")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, history = state["average"], state["step"], state["history"]
    recent, first = [], step
    while step < given.steps and time.monotonic() - start < 60 * given.minutes:
        batch = drawn(module, given, step)
        for group in optimizer.param_groups:
            group["lr"] = given.lr * min(1, (step + 1) / 200)
        with autocast() if given.bf16 else nullcontext():
            loss, _ = objective.loss(model, batch)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent.append(loss.item())
        keep = min(AVERAGED, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - keep)
        if step % given.every == 0:
            history.append([step, sum(recent) / len(recent)])
            speed = (time.monotonic() - start) / (step - first)
            print(f"step {step}, loss {history[-1][1]:.4f}, {speed:.2f} s a step", file=sys.stderr, flush=True)
            recent = []
            save(model, average, optimizer, {"step": step, "history": history, "options": options}, folder)
    save(model, average, optimizer, {"step": step, "history": history, "options": options}, folder)


@contextmanager
def autocast() -> Iterator[None]:
    """In bfloat16, with attention in matrix products: torch's own for a CPU has a slow backward in that type."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def drawn(module, given: argparse.Namespace, step: int) -> dict[str, torch.Tensor]:
    """The batch of a step: rows, noise and dropped prompts."""
    generator = torch.Generator().manual_seed(seed_of(given.seed, step))
    rows = torch.randint(len(module.train), (given.batch,), generator=generator).tolist()
    batch = module.on_after_batch_transfer(module.train.__getitems__(rows), 0)
    batch["draw"] = torch.randint(2**40, (given.batch,), generator=generator)
    drop = torch.rand(given.batch, generator=generator) < 0.1
    for key, value in module.empty.items():
        batch[key] = torch.where(drop[:, None], value, batch[key])
    return batch


def save(model: nn.Module, average: dict, optimizer, where: dict, folder: Path) -> None:
    """The averaged weights as a folder of diffusers, and the state beside it; a reader sees the whole of each."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
    state |= where
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        torch.save(state, part := Path(scratch) / "state.pt")
        os.replace(part, folder.with_suffix(".state.pt"))
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        fill(model, average)
        model.unet.save_pretrained(part := Path(scratch) / "new", safe_serialization=True)
        fill(model, own)
        whole = Path(scratch) / folder.name
        part.rename((whole.mkdir(), whole / "unet")[1])
        model.schedule.save_pretrained(whole / "scheduler")
        (whole / "trained.json").write_text(
            json.dumps({"steps": where["step"], "loss": where["history"], **where["options"]})
        )
        if folder.is_dir():
            folder.rename(Path(scratch) / "old")
        shutil.move(whole, folder)


@torch.no_grad()
def fill(model: nn.Module, values: dict) -> None:
    """Puts these values into the parameters of that name."""
    for name, p in model.named_parameters():
        p.copy_(values[name])


def read(group: str, name: str) -> dict:
    """A file of conf/."""
    return yaml.safe_load((conf.CONF / group / f"{name}.yaml").read_text())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        sys.exit(str(error))
