"""The refit after a truncation is least squares."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recombine
from helpers import ALL
from helpers.weighted import INPUTS, WEIGHTS, double_losses, inputs_of, weight_of
from recombine import BasisSharing, SvdLlm
from recombine.methods.svd.refit import least_squares
from recombine.models import roles
from zoo import build

REFITS = [SvdLlm(targets=ALL, rank=7, refit=True), BasisSharing(targets=ALL, rank=9, shared=("qkv", "up"), refit=True)]


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama"])
@pytest.mark.parametrize("method", REFITS, ids=["svd_llm", "basis_sharing"])
def test_refit_is_least_squares_on_what_the_compressed_blocks_give(arch, method):
    """left, of every layer, by lstsq from explicit inputs, its own block dense and those before it compressed."""
    dense = build(arch).double()
    model, once = copy.deepcopy(dense), copy.deepcopy(dense)
    recombine.apply(model, method, losses=double_losses(model))
    recombine.apply(once, replace(method, refit=False), losses=double_losses(once))
    blocks = roles.block_names(dense)
    for i, block in enumerate(blocks):
        run = copy.deepcopy(dense)
        roles.split_fused(run, ALL)
        for before in blocks[:i]:
            run.set_submodule(before, copy.deepcopy(model.get_submodule(before)))
        for name in (name for name in model.recombined.targets if name.startswith(f"{block}.")):
            seen, masks = [], []

            def keep(_, args, seen=seen, masks=masks):
                x, mask = args[0], masks[-1]
                seen.append((x if mask is None else x[mask.bool()]).flatten(0, -2))

            hooks = [
                run.register_forward_pre_hook(
                    lambda _, args, kwargs, masks=masks: masks.append(kwargs.get("attention_mask")), with_kwargs=True
                ),
                run.get_submodule(name).register_forward_pre_hook(keep),
            ]
            with torch.no_grad():
                for _ in double_losses(run)():
                    pass
            for hook in hooks:
                hook.remove()
            x, layer = torch.cat(seen).numpy(), model.get_submodule(name)
            w, right, left = (t.detach().numpy() for t in (run.get_submodule(name).weight, layer.right, layer.left))
            fitted = np.linalg.lstsq(x @ right.T, x @ w.T, rcond=None)[0].T
            assert np.linalg.norm((left - fitted) @ right @ x.T) <= 1e-7 * np.linalg.norm(w @ x.T)
            plain = once.get_submodule(name)
            assert np.allclose(plain.right.detach().numpy(), right)  # that factor stays
            errors = [np.linalg.norm((w - f.dense_weight().detach().numpy()) @ x.T) for f in (layer, plain)]
            assert errors[0] <= errors[1] * (1 + 1e-9)
            assert i == 0 or errors[0] < errors[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 9), WEIGHTS, INPUTS, st.integers(0, 99), st.data())
def test_refit_bears_degenerate_inputs_and_leaves_what_they_do_not_reach(m, n, kind, inputs, seed, data):
    w, x = weight_of(kind, m, n, seed), inputs_of(inputs, n, seed)
    rng, k = np.random.default_rng(seed), data.draw(st.integers(1, min(m, n)))
    left, right = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    moment = torch.from_numpy(x @ x.T)
    new = least_squares(*(torch.from_numpy(t) for t in (w, left, right)), moment).numpy()
    fitted = np.linalg.lstsq(x.T @ right.T, x.T @ w.T, rcond=None)[0].T @ right
    scale = np.linalg.norm(x) * (np.linalg.norm(w) + np.linalg.norm(left) * np.linalg.norm(right)) + 1e-300
    assert np.linalg.norm((w - new @ right) @ x) <= np.linalg.norm((w - fitted) @ x) + 1e-5 * scale
    if inputs == "zero":
        assert np.array_equal(new, left)
