"""Short runs that are watched, with nothing of who runs the tests."""

import os

import pytest

SVD = ["method=svd", "method.train_core=true"]


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    """No login, no setting and no server of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    yield
    import wandb

    wandb.teardown()  # it keeps the environment that it has seen
