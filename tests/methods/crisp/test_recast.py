"""RECAST: the mean of its coefficient sets, and the closest template."""

import numpy as np
import pytest
import torch

import recombine
from recombine import Recast
from zoo import build


def test_recast_is_the_mean_of_its_coefficient_sets():
    model = build("tiny_vit")
    recombine.apply(model, Recast())
    fc1 = [model.get_submodule(f"blocks.{i}.mlp.fc1") for i in (0, 1)]
    assert fc1[0].mixer.shape == (2, 1) and fc1[0].basis is fc1[1].basis  # one vector of r coefficients
    templates = fc1[0].basis.detach().T.reshape(2, *fc1[0].dense_weight().shape)
    sets = fc1[0].mixer.detach().T + torch.randn(3, 2)
    sets += fc1[0].mixer.detach().T - sets.mean(0)
    folds = sum(torch.einsum("t,tmn->mn", a, templates) for a in sets) / len(sets)
    assert torch.allclose(folds, fc1[0].dense_weight(), atol=1e-5)


def test_recast_compresses_to_the_closest_template():
    model, dense = build("tiny_vit"), build("tiny_vit")
    recombine.apply(model, Recast(), "retained_50")
    assert model.recombined.steps[0].fields["basis_rank"] == 1 and recombine.count(model).retained < 0.501
    names = ["blocks.2.attn.proj", "blocks.3.attn.proj"]
    both = np.stack([dense.get_submodule(n).weight.detach().double().flatten().numpy() for n in names])
    u, s, v = np.linalg.svd(both, full_matrices=False)
    for i, name in enumerate(names):
        built = model.get_submodule(name).dense_weight().detach().flatten().numpy()
        assert np.allclose(built, s[0] * u[i, 0] * v[0], atol=1e-6)
    for fields in ({"chunk": 2}, {"gate": "silu"}):
        with pytest.raises(recombine.UsageError, match="method=crisp"):
            recombine.apply(build("tiny_vit"), Recast(**fields))
