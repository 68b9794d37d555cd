"""FSDP2 on two gloo ranks: the weights and scores of one process, and no file where a shard is missing."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import recombine
from recombine.core.twin import sharing
from recombine.errors import UsageError
from recombine.training import sharding
from zoo import batch, build
from zoo import outputs as logits

METHODS = {  # what shards differ in: shared bases over blocks, frozen and trained mixes, new dense layers
    "crisp": lambda: recombine.Crisp(chunk=16),
    "recast": lambda: recombine.Recast(),
    "cersa": lambda: recombine.Cersa(targets=("q", "k", "v")),
    "lora": lambda: recombine.Peft(targets=("q", "v")),
    "full": lambda: recombine.Full(),
}
CASES = [("tiny_vit", name) for name in METHODS] + [("tiny_llama", "cersa"), ("tiny_llama", "crisp")]


def model_of(arch: str, method: str) -> nn.Module:
    model = recombine.apply(build(arch), METHODS[method]())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def train(model: nn.Module, x, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        logits(model, x).square().mean().backward()
        optimizer.step()


def rows(x, rank: int):
    return {k: v[rank::2] for k, v in x.items()} if isinstance(x, dict) else x[rank::2]


def rank_of_two(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    for arch, method in CASES:
        model = model_of(arch, method)
        names, shapes = list(model.state_dict()), {n: p.shape for n, p in model.named_parameters()}
        kept = sharing(model, buffers=True)
        sharding.shard(model, mesh)
        assert list(model.state_dict()) == names and {n: p.shape for n, p in model.named_parameters()} == shapes
        mine = sum(sharding.local(p).numel() for p in model.parameters())
        assert mine < 0.6 * sum(p.numel() for p in model.parameters())
        train(model, rows(same_lengths(batch(model_of(arch, method))), rank))
        with torch.no_grad():
            logits(model.eval(), batch(model_of(arch, method)))  # leaves the outermost unit whole
        trained = sharding.trained_weights(model.train())
        state = sharding.gathered(dict(model.named_parameters()) | trained)
        assert all(type(p) is nn.Parameter for p in kept.parameters())
        if rank == 0:
            torch.save(state, folder / f"{arch}-{method}")
    lose_a_shard(model, rank, folder)
    dist.destroy_process_group()


def lose_a_shard(model: nn.Module, rank: int, folder: Path) -> None:
    parameters = dict(model.named_parameters())
    name, p = next((n, p) for n, p in parameters.items() if sharding.local(p).numel())
    if rank == 1:
        p._local_tensor = p._local_tensor[:0]
    try:
        sharding.gathered(parameters)
    except UsageError as error:
        (folder / f"lost{rank}").write_text(f"{name} {error}")


def same_lengths(x):
    """Rows with equally many tokens, so that the mean of the ranks' means is the mean over all."""
    return x if not isinstance(x, dict) else x | {"attention_mask": torch.ones_like(x["attention_mask"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks leave that trained every case in shards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, context = tmp_path_factory.mktemp("shards"), multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of_two, args=(rank, port, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("arch, method", CASES)
def test_two_ranks_in_shards_are_one(arch, method, folder):
    model = model_of(arch, method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, same_lengths(batch(model)))
    found = torch.load(folder / f"{arch}-{method}")
    assert found.keys() == before.keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-4, atol=2e-5, msg=name)
        assert torch.equal(found[name], before[name]) == (not p.requires_grad) or torch.equal(p, before[name])


def test_a_missing_shard_is_an_error_on_every_rank(folder):
    for rank in range(2):
        name, message = (folder / f"lost{rank}").read_text().split(" ", 1)
        assert message.startswith(f"{name}: the ranks hold ") and "a shard is missing and nothing is saved" in message


def test_blocks_that_share_a_basis_make_one_unit():
    alone, pairs, rest = (recombine.apply(build("tiny_vit"), m) for m in (
        recombine.Crisp(group_size=1, chunk=16), recombine.Crisp(group_size=2, chunk=16), recombine.Recast()
    ))  # fmt: skip
    assert [len(unit) for unit in sharding.units(alone)] == [1, 1, 1, 1]
    assert sorted(len(unit) for unit in sharding.units(pairs)) in ([2, 2], [1, 1, 1, 1])
    assert sum(len(unit) for unit in sharding.units(rest)) == 4
    alone.blocks[0].norm1.weight = alone.norm.weight  # shared with what is no block
    assert len(sharding.units(alone)) == 3
