"""The linear probe is the optimum that scipy finds."""

import numpy as np
import scipy.optimize
import scipy.special
import torch


def test_linear_probe_is_the_optimum_that_scipy_finds():
    from recombine.evaluation.linear_probe import regress

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 12, generator=g, dtype=torch.float64), torch.randint(4, (300,), generator=g)
    xn, hot = x.numpy(), np.eye(4)[y.numpy()]

    def objective(flat):
        w, b = flat[:48].reshape(4, 12), flat[48:]
        p = scipy.special.softmax(xn @ w.T + b, 1)
        slope = (p - hot) / 300
        value = -np.log((p * hot).sum(1)).mean() + 1e-2 * (w**2).sum()
        return value, np.concatenate([(slope.T @ xn + 2e-2 * w).ravel(), slope.sum(0)])

    best = scipy.optimize.minimize(objective, np.zeros(52), jac=True, method="BFGS", options={"gtol": 1e-9})
    w, b = regress(x, y, 4, decay=1e-2)
    assert torch.allclose(w, torch.from_numpy(best.x[:48].reshape(4, 12)), atol=1e-5)
    assert objective(np.concatenate([w.numpy().ravel(), b.numpy()]))[0] <= best.fun + 1e-9
