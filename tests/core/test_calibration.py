"""Streamed statistics are the plain means."""

import numpy as np
import pytest
import torch

import recombine
from recombine import Jactus, Svd
from recombine.core.calibration import collect
from recombine.core.layer_statistics import STRIPE, WIDE, gram_added, mirrored
from recombine.core.rewrite import find_sites
from recombine.models import roles
from zoo import ARCHS, batch, build, loss, losses

EVERYTHING = {"inputs", "mean", "magnitudes", "outputs", "cross", "fisher"}


@pytest.mark.parametrize("arch", ARCHS)
def test_statistics_are_the_plain_means(arch):
    """Against the activations and gradients of every layer, kept whole; padding left out; the model as it was."""
    model, method = build(arch).double().train(), Svd(targets=("q", "k", "v", "o", "up", "down", "gate?"))
    roles.split_fused(model, method.targets)
    sites = find_sites(model, method)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [batch(model, seed=s) for s in (3, 4)]
    if isinstance(batches[0], torch.Tensor):
        batches = [x.double() for x in batches]
    stats = collect(model, sites, lambda: (loss(model, x) for x in batches), EVERYTHING)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())

    model.eval()
    for site in sites[:: 3 if len(sites) > 9 else 1]:
        xs, gs, fisher = [], [], []
        for x in batches:
            seen = []
            hook = site.module.register_forward_hook(lambda m, a, y, seen=seen: seen.append((a[0], y)))
            value = loss(model, x)
            hook.remove()
            grads = torch.autograd.grad(value, [y for _, y in seen] + [site.module.weight])
            for (source, _), grad in zip(seen, grads, strict=False):
                keep = slice(None)
                if isinstance(x, dict) and source.shape[:2] == x["attention_mask"].shape:
                    keep = x["attention_mask"].bool()
                xs.append(source[keep].detach().flatten(0, -2).numpy())
                gs.append(grad[keep].flatten(0, -2).numpy())
            fisher.append(grads[-1].square().numpy())
        x, g, one = np.concatenate(xs), np.concatenate(gs), stats[site.name]
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12 * abs(np.asarray(b)).max())  # noqa: E731
        close(one.inputs.xx.numpy(), x.T @ x / len(x))
        close(one.inputs.mean.numpy(), x.mean(0))
        close(one.inputs.absolute.numpy(), abs(x).mean(0))
        close(one.inputs.x4, ((x**2).sum(1) ** 2).mean())
        close(one.gg.numpy(), g.T @ g / len(g))
        close(one.gx.numpy(), g.T @ x / len(x))
        close(one.fisher.numpy(), np.mean(fisher, 0))


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_swin", "tiny_llama"])
def test_clipped_gradients_keep_to_the_mean_norm_of_their_sequence(arch):
    """C_g with plain loops over sequences, padding left out; nothing else changes."""
    model = build(arch).double()
    method = Svd()
    roles.split_fused(model, method.targets)
    sites = find_sites(model, method)
    x = batch(model)
    x = x.double() if isinstance(x, torch.Tensor) else x
    stats = collect(model, sites, lambda: [loss(model, x)], {"outputs", "cross", "clipped"})
    plain = collect(model, sites, lambda: [loss(model, x)], {"outputs", "cross"})
    changed = 0
    for site in sites:
        seen = []
        hook = site.module.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        value = loss(model, x)
        hook.remove()
        found = []
        for i, g in enumerate(torch.autograd.grad(value, seen)[0]):
            keep = x["attention_mask"][i].bool() if isinstance(x, dict) else slice(None)
            g = g[keep].flatten(0, -2).numpy()
            norms = np.linalg.norm(g, axis=1)
            mean = norms[norms > 0].mean() if norms.any() else 0.0
            wanted = np.clip(norms, 0.1 * mean, 10 * mean)
            found.append(g * np.divide(wanted, norms, out=np.zeros_like(norms), where=norms > 0)[:, None])
        g = np.concatenate(found)
        np.testing.assert_allclose(stats[site.name].gg.numpy(), g.T @ g / len(g), rtol=1e-8, atol=1e-18)
        assert torch.equal(stats[site.name].gx, plain[site.name].gx)
        changed += not torch.equal(stats[site.name].gg, plain[site.name].gg)
    assert changed


def test_layers_that_read_the_same_tensor_share_their_statistics():
    model = build("tiny_llama")
    sites = find_sites(model, Svd(targets=("q", "k", "v", "gate", "up", "down")))
    stats = collect(model, sites, losses(model), {"inputs"})
    q, k, v = (stats[f"model.layers.1.self_attn.{r}_proj"].inputs for r in "qkv")
    gate, up, down = (stats[f"model.layers.1.mlp.{r}_proj"].inputs for r in ("gate", "up", "down"))
    assert q is k and k is v and gate is up and up is not down and q is not gate


def test_no_batches_are_refused():
    with pytest.raises(recombine.UsageError, match="no batch"):
        recombine.apply(build("tiny_vit"), Jactus(), losses=lambda: iter(()))
    with pytest.raises(recombine.UsageError, match="losses="):
        recombine.apply(build("tiny_vit"), Jactus())


@pytest.mark.parametrize("n", [7, WIDE, WIDE + 100])
def test_of_a_wide_gram_matrix_one_half_is_computed(n):
    total, xs = 0.0, torch.randn(3, 5, n)
    for x in xs:
        total = gram_added(total, x)
    whole, x = mirrored(total), xs.flatten(0, 1).double()
    torch.testing.assert_close(whole, x.T @ x, rtol=1e-5, atol=1e-5)
    assert whole.dtype == torch.float64
    assert torch.equal(whole.triu(STRIPE), whole.tril(-STRIPE).T)
