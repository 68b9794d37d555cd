"""A hub of our own that this process's client asks."""

import pytest
from huggingface_hub.utils import close_session

from helpers.hub_server import Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that runs, and a cache of its own. What waits between attempts does not."""
    found = Hub().start()
    for key, value in {
        "ENDPOINT": found.address, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": False,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    }.items():  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.constants.{key}", value)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    close_session()
    yield found
    found.stop()
    close_session()
