"""The closed forms of MoDeGPT and CORP against direct oracles, in float64."""

import numpy as np
import pytest
import torch

from recombine.methods.modegpt.closed_forms import (
    Affine,
    leverage,
    logit_maps,
    query_key,
    selected,
    value_output,
)
from recombine.methods.pruning.compensation import Moments, compensated


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def moments(x):
    """Of samples (N, n)."""
    return Moments(x.T @ x / len(x), x.mean(0))


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def samples(n, count=400):
    """Correlated, far from zero, with uneven lengths."""
    return draw(count, n) @ draw(n, n) * torch.logspace(0, -1, n, dtype=torch.float64) + 2 * draw(n)


@pytest.mark.parametrize("intercept", [True, False])
def test_compensation_is_the_least_squares_optimum_of_the_kept_units(intercept):
    h, weight, bias, kept = samples(12), draw(5, 12), draw(5), torch.tensor([1, 4, 5, 10])
    new, shift = compensated(weight, bias, moments(h), kept, ridge=0.0, intercept=intercept)
    y = (h @ weight.T).numpy()
    left = np.concatenate([h[:, kept].numpy(), np.ones((len(h), int(intercept)))], 1)
    best = np.linalg.lstsq(left, y, rcond=None)[0]
    np.testing.assert_allclose(new.numpy(), best[:4].T, rtol=1e-7)
    np.testing.assert_allclose((shift - bias).numpy(), best[4] if intercept else np.zeros(5), rtol=1e-7, atol=1e-12)


def test_compensation_is_the_nystrom_map_of_the_paper():
    """W_D C[:, S] C[S, S]^-1 without an intercept; a layer without a bias gets none."""
    h, weight, kept = samples(9), draw(4, 9), torch.tensor([0, 3, 8])
    c = moments(h).second
    new, bias = compensated(weight, None, moments(h), kept, ridge=0.0)
    assert bias is None
    assert torch.allclose(new, weight @ c[:, kept] @ torch.linalg.inv(c[kept][:, kept]), rtol=1e-8)


def test_compensation_of_everything_kept_or_nothing_known_changes_nothing():
    h, weight, bias = samples(6), draw(3, 6), draw(3)
    new, shift = compensated(weight, bias, moments(h), torch.arange(6), ridge=1e-2)
    assert torch.equal(new, weight) and torch.equal(shift, bias)
    silent = Moments(torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    new, shift = compensated(weight, bias, silent, torch.tensor([2, 3]), ridge=1e-6)
    assert torch.equal(new, weight[:, 2:4]) and torch.equal(shift, bias)


def test_leverage_scores():
    c = moments(samples(8)).second
    lam = 1e-2 * c.trace() / 8
    assert torch.allclose(leverage(c, 1e-2), (c @ torch.linalg.inv(c + lam * torch.eye(8))).diagonal(), rtol=1e-9)
    assert torch.allclose(leverage(100 * c, 1e-2), leverage(c, 1e-2))  # whatever the scale


def test_second_moments_of_an_affine_map_hold_its_bias():
    x, layer = samples(7), Affine(draw(4, 7), 3 * draw(4))
    y = x @ layer.weight.T + layer.bias
    assert torch.allclose(layer.second(moments(x)), y.T @ y / len(y))


def test_queries_and_keys_are_selected_by_the_columns_of_the_roots():
    """The CR of the paper: |C_q^1/2[:, i]| |C_k^1/2[:, i]|, with the biases in both."""
    x, q, k = samples(10), Affine(draw(6, 10), draw(6)), Affine(draw(6, 10), draw(6))
    cq, ck = q.second(moments(x)), k.second(moments(x))
    scores = root(cq).norm(dim=0) * root(ck).norm(dim=0)
    stay = scores.topk(3).indices.sort().values
    assert torch.equal(selected(cq.diagonal(), ck.diagonal(), 3, rotary=False), stay)
    queries, key, found = query_key([q], k, moments(x), 3, rotary=False, select=True, centre=False)
    assert torch.equal(found, stay)
    assert torch.equal(queries[0].weight, q.weight[stay]) and torch.equal(key.bias, k.bias[stay])


def test_a_bias_alone_can_hold_a_dimension():
    x = samples(10)
    q, k = Affine(draw(4, 10), torch.zeros(4).double()), Affine(draw(4, 10), torch.zeros(4).double())
    for part in (q, k):
        part.weight[1] *= 1e-3
        part.bias[1] += 1e3
    assert 1 in query_key([q], k, moments(x), 2, rotary=True, select=True, centre=True)[2]  # with 3, its pair


def test_rotary_dimensions_stay_in_pairs_and_count_for_the_whole_group():
    x, k = samples(10), Affine(draw(8, 10), draw(8))
    group = [Affine(draw(8, 10), draw(8)) for _ in range(3)]
    queries, key, stay = query_key(group, k, moments(x), 4, rotary=True, select=True, centre=True)
    cq = sum((x @ q.weight.T + q.bias).square().mean(0) for q in group)
    product = cq * (x @ k.weight.T + k.bias).square().mean(0)
    pairs = (product[:4] + product[4:]).topk(2).indices.sort().values
    assert torch.equal(stay, torch.cat([pairs, pairs + 4]))
    assert all(torch.equal(new.weight, old.weight[stay]) for new, old in zip(queries, group, strict=True))
    assert torch.equal(key.weight, k.weight[stay])


def logit_error(q, k, new_q, new_k, x):
    """E over independent tokens of the change of q^T k, of one head."""
    values = [x @ part.weight.T + part.bias for part in (q, k, new_q, new_k)]
    return (values[0] @ values[1].T - values[2] @ values[3].T).square().mean()


def test_maps_of_queries_and_keys_are_the_best_product_of_that_rank():
    x, q, k = samples(10), Affine(draw(6, 10), draw(6)), Affine(draw(6, 10), draw(6))
    (new_q,), new_k, _ = query_key([q], k, moments(x), 3, rotary=False, select=False, centre=False)
    cq, ck = q.second(moments(x)), k.second(moments(x))
    tail = torch.linalg.svdvals(root(cq) @ root(ck))[3:].square().sum()
    assert torch.allclose(logit_error(q, k, new_q, new_k, x), tail, rtol=1e-8)
    # no worse than CORP's affine map of the selected ones, at its own optimum
    stay = selected(cq.diagonal(), ck.diagonal(), 3, rotary=False)
    middle = torch.linalg.inv(cq[stay][:, stay]) @ cq[stay] @ ck[:, stay] @ torch.linalg.inv(ck[stay][:, stay])
    mapped = Affine(k.weight[stay], k.bias[stay]).mapped(middle)
    corp = logit_error(q, k, Affine(q.weight[stay], q.bias[stay]), mapped, x)
    plain = logit_error(q, k, Affine(q.weight[stay], q.bias[stay]), Affine(k.weight[stay], k.bias[stay]), x)
    assert tail < corp < plain


def test_softmax_drops_what_all_keys_share():
    """Centred keys: the logits less their mean over the keys are the best ones."""
    x, q, k = samples(10), Affine(draw(6, 10), draw(6)), Affine(draw(6, 10), 5 * draw(6))

    def error(centre):
        (new_q,), new_k, _ = query_key([q], k, moments(x), 3, rotary=False, select=False, centre=centre)
        change = (x @ q.weight.T + q.bias) @ (x @ k.weight.T).T
        change -= (x @ new_q.weight.T + new_q.bias) @ (x @ new_k.weight.T).T
        return (change - change.mean(1, keepdim=True)).square().mean()

    cov = moments(x).centred()
    roots = root(q.second(moments(x))) @ root(k.weight @ cov @ k.weight.T)
    assert torch.allclose(error(True), torch.linalg.svdvals(roots)[3:].square().sum(), rtol=1e-8)
    assert error(True) < error(False)


def test_queries_that_are_never_used_make_no_nan():
    maps = logit_maps(torch.zeros(4, 4, dtype=torch.float64), moments(samples(4)).second, 2)
    assert all(torch.equal(m, torch.zeros(2, 4, dtype=torch.float64)) for m in maps)


@pytest.mark.parametrize("groups", [1, 3])
def test_values_and_outputs_are_the_best_product_of_that_rank(groups):
    """The stacked output matrices times v, under C_x: the tail of the SVD of M C_x^1/2."""
    x, v, o = samples(10), Affine(draw(4, 10), torch.zeros(4).double()), [draw(7, 4) for _ in range(groups)]
    new, out, shifts = value_output(v, o, moments(x), 2, fold=True, centre=False)
    whole = torch.cat(o) @ v.weight
    tail = torch.linalg.svdvals(whole @ root(moments(x).second))[2:].square().sum()
    assert torch.allclose((x @ (whole - torch.cat(out) @ new.weight).T).square().sum(1).mean(), tail, rtol=1e-8)
    assert all(torch.equal(shift, torch.zeros(7).double()) for shift in shifts)


def test_the_bias_of_values_and_the_mean_of_what_is_cut_go_into_the_output():
    x, v, o = samples(10), Affine(draw(4, 10), draw(4)), [draw(7, 4), draw(7, 4)]
    for centre in (True, False):
        new, out, shifts = value_output(v, o, moments(x), 2, fold=True, centre=centre)
        assert not new.bias.any()
        before = (x @ v.weight.T + v.bias) @ torch.cat(o).T
        after = x @ new.weight.T @ torch.cat(out).T + torch.cat(shifts)
        moment = moments(x).centred() if centre else moments(x).second
        tail = torch.linalg.svdvals(torch.cat(o) @ v.weight @ root(moment))[2:].square().sum()
        assert torch.allclose((before - after).square().sum(1).mean(), tail, rtol=1e-8)


def test_values_keep_their_bias_where_the_output_has_none():
    x, v, o = samples(10), Affine(draw(4, 10), 3 * draw(4)), [draw(7, 4)]
    new, out, shifts = value_output(v, o, moments(x), 2, fold=False, centre=True)
    assert shifts == []
    before, after = (x @ v.weight.T + v.bias) @ o[0].T, (x @ new.weight.T + new.bias) @ out[0].T
    tail = torch.linalg.svdvals(before / len(x) ** 0.5)[2:].square().sum()
    assert torch.allclose((before - after).square().sum(1).mean(), tail, rtol=1e-8)
