"""The hub's own client against a hub of our own: what is asked, what the cache serves, what is said when it fails."""

import logging
import shutil
from collections import namedtuple

import huggingface_hub
from huggingface_hub.utils import close_session

from helpers import refusal
from helpers.hub_server import TOKEN, Hub
from recombine.models.hf_folder import model_files
from recombine.runtime import hub as client
from recombine.runtime import logs

PINNED = "0123456789abcdef0123456789abcdef01234567"
PARTS = {f"data/part-{i}.parquet": bytes([i]) * 5000 for i in range(7)} | {"other/x.parquet": b"x", "card.json": b"{}"}
WEIGHTS = {
    "config.json": b"{}", "tokenizer.json": b"{}", "original/params.json": b"{}", "tf_model.h5": b"h",
    "model-00001-of-00002.safetensors": b"1" * 3000, "model-00002-of-00002.safetensors": b"2" * 3000,
}  # fmt: skip
wanted = client.named("data/*.parquet")


def asked(hub: Hub) -> list[str]:
    """The requests since this was last called."""
    requests, hub.requests = hub.requests, []
    return requests


def test_a_commit_is_asked_for_once(hub, capsys):
    hub.add("datasets", "some/set", PARTS, commit=PINNED)
    folder = client.snapshot("some/set", PINNED, wanted, "dataset")
    assert folder.name == PINNED and (folder / "data/part-6.parquet").read_bytes() == PARTS["data/part-6.parquet"]
    assert not (folder / "other").exists() and not (folder / "card.json").exists()
    assert f"fetching some/set at {PINNED[:8]}: 7 files, 35.0 kB" in capsys.readouterr().err
    requests = asked(hub)
    assert sum("cursor=" in one for one in requests) == 6  # eleven files, three a page, listed by us and by the client
    assert sum(one.startswith("GET store /") for one in requests) == 7
    hub.stop()
    assert client.snapshot("some/set", PINNED, wanted, "dataset") == folder
    hub.start()
    assert client.snapshot("some/set", PINNED, wanted, "dataset") == folder and asked(hub) == []
    (folder / "data/part-3.parquet").unlink()
    assert client.snapshot("some/set", PINNED, wanted, "dataset") == folder
    assert (folder / "data/part-3.parquet").is_file() and asked(hub) != []
    assert client.snapshot("some/set", PINNED, client.named("other/*"), "dataset") == folder
    assert (folder / "other/x.parquet").is_file()


def test_a_file_that_lost_its_end_is_fetched_again(hub):
    """As in a cache that was copied half. The client itself links what it has, whatever its size."""
    name, content = "model-00001-of-00002.safetensors", WEIGHTS["model-00001-of-00002.safetensors"]
    hub.add("models", "some/model", WEIGHTS, commit=PINNED)
    path = client.snapshot("some/model", PINNED, model_files) / name
    blob = path.resolve()
    for has_link in (True, False):
        blob.write_bytes(content[:100])
        if not has_link:
            path.unlink()
        assert client.snapshot("some/model", PINNED, model_files) / name == path and path.read_bytes() == content
    hub.stop()
    blob.write_bytes(content[:100])
    assert f"no connection to {hub.address}" in refusal(client.snapshot, "some/model", PINNED, model_files)


def test_a_cached_file_is_whole(hub):
    hub.add("models", "some/model", WEIGHTS)
    name = "model-00001-of-00002.safetensors"
    assert client.cached_file("some/model", name) is None
    path = client.snapshot("some/model", None, model_files) / name
    asked(hub)
    assert client.cached_file("some/model", name) == path and asked(hub) == []
    path.resolve().write_bytes(b"1")
    assert client.cached_file("some/model", name) is None


def test_a_branch_is_remembered(hub, monkeypatch):
    first = hub.add("datasets", "some/set", PARTS, branch="refs/convert/parquet")
    args = ("some/set", "refs/convert/parquet", wanted, "dataset")
    folder = client.snapshot(*args)
    assert folder.name == first and asked(hub)
    assert client.snapshot(*args) == folder and len(asked(hub)) == 2  # is somebody there, and where is the branch
    hub.stop()
    assert client.snapshot(*args) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert client.snapshot(*args) == folder and client.commit("some/set", args[1], "dataset") == first
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.start()
    hub.status = 503
    assert client.snapshot(*args) == folder
    hub.status = None
    second = hub.add("datasets", "some/set", PARTS | {"data/part-0.parquet": b"new"}, branch="refs/convert/parquet")
    moved = client.snapshot(*args)
    assert moved.name == second != first and (moved / "data/part-0.parquet").read_bytes() == b"new"
    assert client.snapshot("some/set", first, wanted, "dataset") == folder


def test_a_model_is_cached_by_what_is_wanted_of_it(hub):
    hub.add("models", "some/model", WEIGHTS, commit=PINNED)
    folder = client.snapshot("some/model", PINNED, model_files)
    assert {path.name for path in folder.rglob("*")} == {*WEIGHTS} - {"original/params.json", "tf_model.h5"}
    asked(hub)
    assert client.snapshot("some/model", PINNED, model_files) == folder and asked(hub) == []
    hub.stop()
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert f"no connection to {hub.address}" in refusal(client.snapshot, "some/model", PINNED, model_files)


def test_the_cache_of_another_client(hub):
    """Which keeps no list of files: what lies there is taken where nobody can be asked."""
    hub.add("models", "some/model", WEIGHTS, commit=PINNED)
    for file in ("config.json", "model-00001-of-00002.safetensors"):
        path = huggingface_hub.hf_hub_download("some/model", file, revision=PINNED)
    folder = client.snapshot("some/model", PINNED, model_files)
    assert str(folder / "model-00001-of-00002.safetensors") == path
    assert (folder / "model-00002-of-00002.safetensors").is_file()
    shutil.rmtree(folder.parents[1] / "trees")
    hub.stop()
    assert client.snapshot("some/model", PINNED, model_files) == folder
    assert "no connection" in refusal(client.snapshot, "some/model", PINNED, client.named("spm.model"))


def test_every_failure_is_a_reason(hub, monkeypatch):
    hub.add("models", "some/model", WEIGHTS, commit=PINNED)
    hub.add("models", "some/gated", WEIGHTS, commit=PINNED, gated=True)

    def said(name="some/model", revision=PINNED) -> str:
        text = refusal(client.snapshot, name, revision, model_files)
        assert "Client Error" not in text and not text.endswith(".")
        return text

    assert "the hub has no model no/model, or it is private" in said("no/model", "main")
    assert "the hub has no model no/model, or it is private" in said("no/model")
    assert "some/model has no such revision" in said(revision="dev")
    page = f"{hub.address}/some/gated"
    assert f"some/gated is gated: accept its terms at {page}, then `hf auth login` or set HF_TOKEN" in said(
        "some/gated"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert f"the account of your token has no access: ask for it at {page}" in said("some/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert client.snapshot("some/gated", PINNED, model_files).name == PINNED
    assert "the hub has no model no/model" in said("no/model", "main")
    monkeypatch.delenv("HF_TOKEN")
    hub.drops_headers = True
    assert f"what answers at {hub.address} leaves out the hub's headers, as some proxies do" in said()
    hub.drops_headers, hub.status = False, 503
    assert f"{hub.address} answers 503: try again later" in said()
    assert f"{hub.address} answers 503: try again later" in said(revision="main")
    hub.status = None
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda _: usage(10, 6, 4))
        assert "is full: 6.0 kB are needed there, 4 bytes are free; free some space, or set HF_HOME" in said()
    with monkeypatch.context() as proxy:
        proxy.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
        proxy.setenv("NO_PROXY", "")
        proxy.setenv("no_proxy", "")
        close_session()
        text = said()
        close_session()
    assert f"no connection to {hub.address} through the proxy http://127.0.0.1:9: " in text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert said() == "HF_HUB_OFFLINE is set"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert client.snapshot("some/model", PINNED, model_files).name == PINNED


def test_a_download_goes_on_where_it_broke_off_and_tells_no_signature(hub, caplog):
    hub.add("datasets", "some/set", {"data/big.parquet": bytes(range(256)) * 400}, commit=PINNED)
    hub.cut = 40_000
    caplog.set_level(logging.INFO)
    logs.quiet_libraries()
    folder = client.snapshot("some/set", PINNED, wanted, "dataset")
    assert (folder / "data/big.parquet").read_bytes() == bytes(range(256)) * 400
    assert sum(one.startswith("GET store /") for one in hub.requests) == 2
    assert "Trying to resume download" in caplog.text and "Signature" not in caplog.text


def test_sizes_in_words():
    said = {0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 35_000: "35.0 kB", 4_660_000_000: "4.7 GB"}
    assert {count: client.in_bytes(count) for count in said} == said
