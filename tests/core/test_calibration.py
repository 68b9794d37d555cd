"""Streamed statistics are the plain means."""

import numpy as np
import pytest
import torch

import recombine
from recombine import Jactus, Svd
from recombine.core.calibration import collect
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
