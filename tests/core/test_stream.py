"""Block by block: the statistics of one pass over the whole model, and what is no chain."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recombine import Jactus, Svd, SvdLlm, apply
from recombine.core import memory, stream
from recombine.core.calibration import collect
from recombine.core.kept import Kept
from recombine.core.layer_statistics import KINDS
from recombine.core.rewrite import find_sites
from recombine.core.sites import Site
from recombine.models import roles
from recombine.runtime import mapped
from zoo import build, losses


def both(arch, kinds, given=None, limit=None):
    """(statistics of one pass, statistics block by block, in which order the blocks came)"""
    model = build(arch)
    given = given or losses(model)
    roles.split_fused(model, ("q", "k", "v"))
    sites = find_sites(model, Svd())
    whole = collect(model, sites, given, kinds)
    names, found, order = roles.block_names(model), {}, []
    by_block = [[site for site in sites if site.name.startswith(f"{name}.")] for name in names]

    def done(stats):
        order.append(next(iter(stats)))
        found.update(stats)

    store = Kept(limit)
    stream.Chain(model, names, given, store).sweep(by_block, kinds, done)
    left = [name for name in store.groups if not name.startswith(("gradient", f"{len(names)} "))]
    store.close(True)
    assert not left and not any("forward" in vars(module) for module in model.modules())
    return whole, found, order


def tensors(stats) -> dict[str, Tensor | float]:
    return {**vars(stats.inputs), **vars(stats)} | {"version": 0, "inputs": 0}


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama", "tiny_deberta"])
@pytest.mark.parametrize("kinds", [{"inputs", "magnitudes"}, set(KINDS)], ids=["forward", "all"])
def test_statistics_are_those_of_one_pass(arch, kinds, limit):
    whole, found, order = both(arch, kinds, limit=limit)
    assert whole.keys() == found.keys()
    for name, stats in whole.items():
        for key, value in tensors(stats).items():
            other = tensors(found[name])[key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, (name, key)
    assert order == sorted(order, reverse=bool(kinds & {"outputs"}))
    assert found[order[0]].inputs.layers == whole[order[0]].inputs.layers


def test_a_model_that_works_between_its_blocks_is_no_chain():
    model = build("tiny_swin")
    with pytest.raises(stream.NoChain, match="between two blocks"):
        stream.Chain(model, roles.block_names(model), losses(model), Kept())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_cache_of_keys_and_values_is_no_chain():
    model = build("tiny_llama")
    ids = torch.randint(model.config.vocab_size, (2, 8))
    cached = lambda: (model(input_ids=ids, labels=ids, use_cache=True).loss for _ in range(2))  # noqa: E731
    with pytest.raises(stream.NoChain, match="something else than tensors"):
        stream.Chain(model, roles.block_names(model), cached, Kept())


@pytest.mark.parametrize("kinds", [{"inputs"}, {"outputs"}])
def test_a_block_that_writes_into_its_input_is_no_chain(kinds):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return x.add_(self.up(x))

    model = nn.Sequential(nn.Linear(8, 8), Adds(), Adds(), nn.Linear(8, 3))
    given = lambda: (model(torch.ones(2, 8)).sum() for _ in range(2))  # noqa: E731
    chain, found = stream.Chain(model, ["1", "2"], given, Kept()), []
    sites = [[Site(f"{name}.up", "up", model.get_submodule(f"{name}.up"))] for name in ("1", "2")]
    with pytest.raises(stream.NoChain, match="writes into its input"):
        chain.sweep(sites, kinds, found.append)
    assert not found


def test_a_loss_of_several_calls_is_one_batch():
    model = build("tiny_llama")
    ids = torch.randint(model.config.vocab_size, (4, 2, 8))
    twice = lambda: (sum(model(input_ids=x, labels=x).loss for x in ids[i : i + 2]) for i in (0, 2))  # noqa: E731
    sites = find_sites(model, Svd())
    whole = collect(model, sites, twice, {"fisher", "inputs"})
    found = {}
    chain = stream.Chain(model, roles.block_names(model), twice, Kept())
    by_block = [[site for site in sites if site.name.startswith(f"{name}.")] for name in chain.names]
    chain.sweep(by_block, {"fisher", "inputs"}, found.update)
    assert chain.batches == [[0, 1], [2, 3]]
    for name, stats in whole.items():
        assert stats.batches == found[name].batches == 2
        torch.testing.assert_close(stats.fisher, found[name].fisher, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("method", "limit", "passes"), [(SvdLlm(), "300kb", 1), (Jactus(top_k=4), "600kb", 2)], ids=["svd_llm", "jactus"]
)
def test_a_limit_that_takes_several_passes_takes_a_stream_where_there_is_a_chain(method, limit, passes, monkeypatch):
    monkeypatch.setattr(memory, "WORK", 0)
    whole = build("tiny_llama")
    wanted = apply(whole, method, "retained_60", losses(whole)).state_dict()
    model, count = build("tiny_llama"), []
    given = losses(model)

    def counted():
        count.append(1)
        return given()

    apply(model, method, "retained_60", counted, limit)
    assert len(count) == passes and model.config.use_cache
    assert all(torch.allclose(p, wanted[name], rtol=1e-10, atol=1e-10) for name, p in model.state_dict().items())


def test_pages_of_a_file_are_given_back_and_read_again(tmp_path):
    size = 2**22
    torch.arange(size, dtype=torch.float32).numpy().tofile(tmp_path / "weights")
    layer = nn.Linear(size // 1024, 1024, bias=False, device="meta")
    layer.weight = nn.Parameter(
        torch.from_file(str(tmp_path / "weights"), False, size).view(1024, -1), requires_grad=False
    )
    total, before = layer.weight.double().sum(), resident(layer.weight)
    mapped.release([layer.weight])
    after = resident(layer.weight)
    assert before >= 4 * size and (after == 0 or after == before)  # the system may lack the call
    assert layer.weight.double().sum() == total
    layer.weight.data[0, 0] = 7.0
    mapped.release([layer.weight])
    assert layer.weight[0, 0] == 7.0 and layer.weight[0, 1] == 1.0


def resident(tensor: Tensor) -> int:
    """Bytes of the tensor's memory that are in use now, as the system says."""
    found, lines = 0, Path("/proc/self/smaps").read_text().splitlines()
    for line in lines:
        if "-" in line.split()[0]:
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            here = start <= tensor.data_ptr() < end
        elif here and line.startswith("Rss:"):
            found = 1024 * int(line.split()[1])
    return found
