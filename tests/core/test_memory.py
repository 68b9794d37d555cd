"""Calibration under a limit of memory: more passes, factors in files, and the very same model."""

import re
import resource
from itertools import product

import pytest
import torch
from filelock import FileLock

import recombine
from helpers import MIB, refusal
from recombine import Asvd, Balf, BasisSharing, Cersa, Crisp, DobiSvd, Fwsvd, Jactus, KfacSvd, Rosa, Svd, SvdLlm
from recombine.core import memory, stream
from recombine.core.kept import Spilled
from recombine.core.memory import Memory, joined, sums
from recombine.core.method import Site
from recombine.core.rewrite import find_sites
from recombine.runtime import memory as sizes
from recombine.runtime.schema import typed
from recombine.stages.settings import CalibrationSettings
from zoo import build, losses

METHODS = {
    "svd_llm": (SvdLlm(), "retained_60"),
    "svd_llm refit": (SvdLlm(refit=True), "retained_60"),
    "svd_llm anchored": (SvdLlm(refit="anchored"), "retained_60"),
    "kfac_svd anchored": (KfacSvd(allocation="share", refit="anchored"), "retained_60"),
    "fwsvd": (Fwsvd(), "retained_60"),
    "asvd": (Asvd(rank=5), None),
    "kfac_svd": (KfacSvd(), "retained_60"),
    "kfac_svd share": (KfacSvd(allocation="share", refit=True), "retained_60"),
    "kfac_svd lems": (KfacSvd(allocation="lems", multiple_of=4), "retained_60"),
    "basis_sharing": (BasisSharing(), "retained_60"),
    "balf": (Balf(), "retained_60"),
    "balf pivot": (Balf(factor="pivot"), "retained_60"),
    "dobi_svd": (DobiSvd(steps=2), "retained_60"),
    "crisp": (Crisp(fit="aware", chunk=16, basis_rank=9), None),
    "jactus": (Jactus(top_k=4), "retained_60"),
    "jactus turned": (Jactus(gain="weight+grad", top_k=4), "retained_80"),
    "rosa": (Rosa(density=0.05), "trainable_9k"),
    "cersa": (Cersa(), "energy_80"),
    "svd": (Svd(), "energy_80"),
}


class Passes:
    """The calibration losses of a model; counts how often they were asked for, and fails in one of those passes."""

    def __init__(self, model, fails_in=None):
        self.losses, self.count, self.fails_in = losses(model), 0, fails_in

    def __call__(self):
        self.count += 1
        if self.count == self.fails_in:
            raise KeyboardInterrupt
        return self.losses()


def applied(arch, method, budget, given=None):
    """The parameters of the rewritten model, and how many passes over the batches it took."""
    torch.manual_seed(0)
    model = build(arch)
    passes = Passes(model)
    recombine.apply(model, method, budget, passes, given)
    return dict(model.named_parameters()), passes.count


def least(arch, method, budget):
    """The smallest limit that holds one layer, as the refusal of a smaller one says it."""
    with pytest.raises(recombine.UsageError) as error:
        applied(arch, method, budget, "0kb")
    line = str(error.value)
    assert "\n" not in line and re.match(r"memory=0kb: \S+ and the layers that go with it need", line)
    return re.search(r"say memory=(\S+) or more", line)[1]


@pytest.mark.parametrize("arch, name", [*product(["tiny_llama"], METHODS), *product(["tiny_vit"], ["jactus", "rosa"])])
def test_a_limit_changes_nothing(arch, name, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "WORK", 0)  # tiny sums, beside the work on one layer
    method, budget = METHODS[name]
    wanted, once = applied(arch, method, budget)
    monkeypatch.setattr(memory, "KEPT", 1e-9)  # nothing waits in memory
    small = least(arch, method, budget) if method.statistics_needed() else "0kb"
    folder, written = tmp_path / "spill", []
    write = recombine.core.kept.tensor_file.write
    monkeypatch.setattr(recombine.core.kept.tensor_file, "write", lambda p, *a: (written.append(p), write(p, *a)))
    found, several = applied(arch, method, budget, Memory(sizes.parse(small, "memory"), folder))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[n], p, rtol=1e-10, atol=1e-10) for n, p in wanted.items())
    assert written and not folder.exists()
    if method.statistics_needed():
        assert several > once


@pytest.mark.parametrize("name", [name for name, (method, _) in METHODS.items() if method.statistics_needed()])
def test_block_by_block_changes_nothing(name, tmp_path, monkeypatch):
    """Factors and hidden states all lie in files, side by side."""
    method, budget = METHODS[name]
    wanted, _ = applied("tiny_llama", method, budget)
    monkeypatch.setattr(memory, "WORK", 0)
    monkeypatch.setattr(memory, "KEPT", 1e-9)
    swept, sweep = [], stream.Chain.sweep
    monkeypatch.setattr(stream.Chain, "sweep", lambda chain, *given: (swept.append(chain), sweep(chain, *given)))
    sites = find_sites(build("tiny_llama"), method)
    folder = tmp_path / "spill"
    limit = sums(sites, method.statistics_needed()) - 1
    found, _ = applied("tiny_llama", method, budget, Memory(limit, folder))
    assert swept and not folder.exists()
    assert all(torch.allclose(found[n], p, rtol=1e-10, atol=1e-10) for n, p in wanted.items())


def test_a_killed_run_goes_on_and_a_damaged_file_is_computed_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "WORK", 0)
    monkeypatch.setattr(memory, "KEPT", 1e-9)
    method, folder = Jactus(top_k=4), tmp_path / "spill"
    given = Memory(sizes.parse(least("tiny_llama", method, None), "memory"), folder)
    wanted, whole = applied("tiny_llama", method, None, given)

    model = build("tiny_llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        recombine.apply(model, method, losses=Passes(model, fails_in=whole - 1), memory=given)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 4
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"\x07")
    passes = Passes(model)
    recombine.apply(model, method, losses=passes, memory=given)
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())
    assert passes.count <= 3 < whole and not folder.exists()
    assert str(files[1]) in caplog.text and "damaged" in caplog.text

    with pytest.raises(KeyboardInterrupt):
        model = build("tiny_llama")
        recombine.apply(model, method, losses=Passes(model, fails_in=whole - 1), memory=given)
    fresh = build("tiny_llama", seed=1)  # other weights: what lies there is not theirs
    passes = Passes(fresh)
    recombine.apply(fresh, method, losses=passes, memory=given)
    assert passes.count == whole


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_file_that_is_damaged_while_it_waits_is_named_and_computed_anew(harm, tmp_path, monkeypatch):
    """Of a method that digests all layers first and reads them when it rewrites."""
    folder, harmed, whole = tmp_path / "spill", [], build("tiny_llama")
    method = Jactus(top_k=4)
    given = Memory(sizes.parse(least("tiny_llama", method, None), "memory"), folder)
    recombine.apply(whole, method, losses=losses(whole))
    model, getitem = build("tiny_llama"), Spilled.__getitem__

    def harming(self, name):
        if not harmed:
            harmed.append(self.path)
            content = self.path.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            self.path.write_bytes(content[:middle] if harm == "cut" else flipped)
        return getitem(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Spilled, "__getitem__", harming)
        said = refusal(recombine.apply, model, method, losses=losses(model), memory=given)
    assert harmed and f"{harmed[0]}: damaged since it was written" in said and not harmed[0].exists()
    recombine.apply(model, method, losses=losses(model), memory=given)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    model = build("tiny_llama")
    method = Jactus(top_k=4)
    limit = sizes.parse(least("tiny_llama", method, None), "memory")
    said = refusal(recombine.apply, model, method, losses=losses(model), memory=Memory(limit, tmp_path))
    assert "holds other files, such as mine.txt" in said and (tmp_path / "mine.txt").read_text() == "mine"


def test_a_full_disk_and_a_folder_in_use_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 1e-9)
    model, folder = build("tiny_vit"), tmp_path / "spill"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def refused():
        with pytest.raises(recombine.UsageError) as error:
            recombine.apply(model, SvdLlm(), losses=losses(model), memory=Memory(64 * MIB, folder))
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and "\n" not in str(error.value)
        return str(error.value)

    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most[1]))
    try:
        assert "free some space" in refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    with FileLock(folder / ".lock"):
        assert f"{folder}: another process" in refused()
    recombine.apply(model, SvdLlm(), losses=losses(model), memory=Memory(64 * MIB, folder))


def test_layers_with_one_input_stay_together_and_their_sums_are_counted():
    made = {"q": (48, 48), "k": (24, 48), "v": (24, 48), "o": (48, 48), "gate": (80, 48), "up": (80, 48)}
    sites = [
        Site(f"{block}.{'attn' if role in 'qkvo' else 'mlp'}.{role}", role, torch.nn.Linear(n, m))
        for block, (role, (m, n)) in product((0, 1), made.items())
    ]
    alone = [[site] for site in sites]
    assert [[s.role for group in unit for s in group] for unit in joined(alone)] == [
        [*"qkv"],
        ["o"],
        ["gate", "up"],
    ] * 2
    over_blocks = [[a, b] for a, b in zip(sites[:6], sites[6:], strict=True)]
    assert [len(unit) for unit in joined(over_blocks)] == [3, 1, 2]
    assert sums(sites[:3], {"inputs", "outputs"}) == 8 * (48**2 + 48**2 + 2 * 24**2)
    assert sums(sites[4:6], {"cross", "fisher"}) == 8 * 2 * 3 * 80 * 48


@pytest.mark.parametrize("word", ["8", "8 gb", "gb", "-1gb", 8, "8pb"])
def test_words_that_are_no_sizes_are_refused(word):
    with pytest.raises(recombine.UsageError, match="calibration.memory=.*must be a size"):
        typed(CalibrationSettings, {"memory": word}, "calibration")
    with pytest.raises(recombine.UsageError, match="memory=.*must be a size"):
        recombine.apply(build("tiny_vit"), Svd(), memory=word)
    assert sizes.parse("1.5gb", "memory") == 1536 * MIB and sizes.shown(1536 * MIB + 1) == "1.6gb"
