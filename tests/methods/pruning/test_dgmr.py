"""DGMR against QR with column pivoting, and what a pruned MLP computes."""

import copy

import numpy as np
import pytest
import scipy.linalg
import timm
import torch

import recombine
from helpers import ALL
from helpers.pruned import CUTTERS, ids
from recombine import Dgmr
from recombine.core.rewrite import find_sites
from recombine.methods.pruning.dgmr import gram_schmidt
from recombine.methods.pruning.mlp import rows
from recombine.models import roles
from zoo import ARCHS, batch, build, outputs


def pivots(w, count):
    """Greedy Gram-Schmidt with rounds, as the paper has it: the residual of every row, written out."""
    picked = []
    while len(picked) < count:
        left = [i for i in range(len(w)) if i not in picked]
        residual = {i: w[i].copy() for i in left}
        for _ in range(w.shape[1]):
            new = {i: np.linalg.norm(r) for i, r in residual.items()}
            lengths = {i: size for i, size in new.items() if size > 1e-8 * np.linalg.norm(w[i])}
            if not lengths:
                break
            pick = max(lengths, key=lengths.get)
            q = residual.pop(pick) / lengths[pick]
            residual = {i: r - q * (q @ r) for i, r in residual.items()}
            picked.append(pick)
        if not np.any(w[[i for i in range(len(w)) if i not in picked]]):
            break
    picked += [i for i in range(len(w)) if i not in picked]
    return picked[:count]


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (30, 30)])
def test_gram_schmidt_is_qr_with_column_pivoting(shape):
    w = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -3, shape[1])
    order = scipy.linalg.qr(w.T.numpy(), mode="r", pivoting=True)[1]
    assert gram_schmidt(w, min(shape)).tolist() == order[: min(shape)].tolist()


@pytest.mark.parametrize("count", [1, 9, 12, 13, 31, 40])
def test_gram_schmidt_goes_on_in_rounds(count):
    w = torch.randn(40, 12, dtype=torch.float64)
    assert gram_schmidt(w, count).tolist() == pivots(w.numpy(), count)


def test_gram_schmidt_of_duplicate_parallel_and_zero_rows():
    w = torch.randn(6, 10, dtype=torch.float64)
    both = torch.cat([w, w, 1e-3 * w, torch.zeros(3, 10)])
    assert sorted(gram_schmidt(both, 6) % 6) == list(range(6))  # every direction once before any twice
    for count in range(1, 22):
        picked = gram_schmidt(both, count)
        assert len(set(picked.tolist())) == count
        assert torch.allclose(both[picked].norm(dim=1), both[pivots(both.numpy(), count)].norm(dim=1))
    low = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)  # rank 3: rounds of 3
    assert gram_schmidt(low, 20).tolist() == pivots(low.numpy(), 20)
    assert gram_schmidt(torch.zeros(5, 4, dtype=torch.float64), 3).tolist() == [0, 1, 2]


def test_dgmr_at_half_of_a_vit_b_leaves_a_quarter_of_its_neurons():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = Dgmr(targets=ALL, ratio=0.5)
    sites = find_sites(model, method)
    assert method.counts(sites) == [768] * 12 and method.sizes(sites)[0] == 28_311_552 + 14_155_776


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("method", CUTTERS[:2], ids=ids(CUTTERS[:2]))
def test_a_pruned_mlp_is_the_mlp_without_those_neurons(method, arch):
    model, x = build(arch), batch(build(arch))
    masked = copy.deepcopy(model)
    recombine.apply(model, method)
    with torch.no_grad():
        for name in roles.find(masked, ("down",)):
            whole, left = masked.get_submodule(name), model.get_submodule(name)
            gone = ~(whole.weight[:, :, None] == left.weight[:, None]).all(0).any(1)
            assert int(gone.sum()) == whole.in_features - left.in_features
            whole.weight[:, gone] = 0
        assert torch.allclose(outputs(model, x), outputs(masked, x), atol=1e-5)


def test_a_gated_neuron_is_a_row_of_gate_and_up():
    model = build("tiny_llama")
    method = Dgmr(ratio=0.5)
    mlp = method.mlps(find_sites(model, method))[0]
    both = torch.cat([mlp.gate.weight, mlp.up.weight], 1).detach().double()
    assert torch.equal(rows(mlp), both)
    order = scipy.linalg.qr(both.T.numpy(), mode="r", pivoting=True)[1][:40]
    up = mlp.up.weight.detach()[sorted(order)]
    recombine.apply(model, method)
    assert torch.equal(model.get_submodule("model.layers.0.mlp.up_proj").weight, up)


@pytest.mark.parametrize("targets", [("up", "down"), ("up", "down", "q")])
def test_a_gate_must_be_named(targets):
    with pytest.raises(recombine.UsageError, match="gate"):
        recombine.apply(build("tiny_llama"), Dgmr(targets=targets, ratio=0.8))


def test_a_pruned_llama_is_an_ordinary_one_again(tmp_path):
    """Its config says how wide it is, so Hugging Face's own loader takes it; other models keep the old config."""
    from transformers import LlamaForCausalLM

    model = build("tiny_llama")
    other = LlamaForCausalLM(model.config)
    recombine.merge(recombine.apply(model, Dgmr(ratio=0.5)))
    model.save_pretrained(tmp_path)
    again, x = LlamaForCausalLM.from_pretrained(tmp_path), batch(model)
    assert torch.allclose(outputs(again.eval(), x), outputs(model, x), atol=1e-6)
    assert (model.config.intermediate_size, other.config.intermediate_size) == (40, 80)
