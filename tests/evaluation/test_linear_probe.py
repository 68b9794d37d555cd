"""The linear probe is the optimum that scipy finds, and is fitted once for the runs of a sweep."""

import numpy as np
import scipy.optimize
import scipy.special
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from helpers import CONF
from recombine import models, results
from recombine.evaluation import linear_probe
from recombine.evaluation.linear_probe import regress
from recombine.runner import ranks
from recombine.runtime import conf


def test_linear_probe_is_the_optimum_that_scipy_finds():
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


def test_runs_of_one_process_share_the_probe_of_an_original_model(tmp_path, monkeypatch):
    """Another method, or the same again: one fit. Another seed, or other weights in the file: another one."""
    file, fits, fit = tmp_path / "weights.safetensors", [], linear_probe.fit
    monkeypatch.setattr(linear_probe, "fit", lambda *args: fits.append(args) or fit(*args))
    tiny = ["model=tiny_vit", f"model.checkpoint={file}", "trainer=cpu", "trainer.progress=false", "data.limit=48"]
    found = {}
    for place, words in enumerate(
        (
            ["method=lora", "seed=1"],
            ["method=cersa", "seed=1", "analyse.elsewhere=[clevr_count]"],
            ["method=svd", "seed=1", "stage=retrofit", "stage.test=true", "analyse.elsewhere=[clevr_count]"],
            ["method=lora", "seed=2"],
            ["method=svd", "seed=2"],
        )
    ):
        torch.manual_seed(place // 4)
        save_file(models.build(**conf.load("model", "tiny_vit") | {"num_classes": 16}).state_dict(), file)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [*tiny, "optim.head=probe", "trainer.epochs=1", *words])
        ranks.main(cfg, tmp_path / str(place))
        found[place] = results.read(tmp_path / str(place) / "result.json"), len(fits)
    assert [count for _, count in found.values()] == [1, 3, 4, 5, 6]  # of another task: before and after, then after
    probes = [result["linear_probe"] for result, _ in found.values()]
    assert probes[0] == probes[1] == probes[2]
