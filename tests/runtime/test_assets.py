"""Fetching, refusing and reading packages, with a stand-in for the registry's client."""

import hashlib
import io
import subprocess
import tarfile
import zipfile

import pytest

from recombine.errors import UsageError
from recombine.runtime import archives, assets

BODY = b"forty-two"
TOY = assets.Asset("toy", "npm", "toy", "1.0", "toy-1.0.tgz", hashlib.sha256(BODY).hexdigest(), "MIT")


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A cache of its own and a client that delivers ``client.body``; counts its calls."""

    class Client:
        body, calls, code, stderr = BODY, 0, 0, ""
        path = tmp_path / "cache" / "assets" / TOY.file

        def run(self, command, cwd, **kwargs):
            self.calls += 1
            if not self.code:
                with open(f"{cwd}/{TOY.file}", "wb") as file:
                    file.write(self.body)
            return subprocess.CompletedProcess(command, self.code, "", self.stderr)

    client = Client()
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(assets.ASSETS, "toy", TOY)
    monkeypatch.setitem(assets.ASSETS, "other", assets.Asset("other", "npm", "o", "1", "o-1.tgz", TOY.sha256, "MIT"))
    monkeypatch.setattr(assets.subprocess, "run", client.run)
    return client


def refusal(name="toy") -> str:
    with pytest.raises(UsageError) as error:
        assets.fetch(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fetches_once_and_hashes_once(client, monkeypatch):
    assert assets.fetch("toy").read_bytes() == BODY
    monkeypatch.setattr(assets, "file_digest", None)  # the marker vouches for the file from now on
    assert assets.fetch("toy") == client.path and client.calls == 1
    assert sorted(p.name for p in client.path.parent.iterdir()) == [TOY.file, TOY.file + ".ok"]


def test_a_file_put_there_by_hand_needs_no_client(client):
    client.path.parent.mkdir(parents=True)
    client.path.write_bytes(BODY)
    assert assets.fetch("toy") == client.path and client.calls == 0


def test_refuses_and_removes_a_wrong_download(client):
    client.body = b"something else"
    line = refusal()
    assert TOY.sha256 in line and hashlib.sha256(client.body).hexdigest() in line and str(client.path) in line
    assert not client.path.exists()
    client.body = BODY
    assert assets.fetch("toy").read_bytes() == BODY


def test_notices_a_file_that_changed_after_it_was_verified(client):
    assets.fetch("toy").write_bytes(b"corrupted")
    assert "sha256" in refusal() and not client.path.exists()


def test_takes_up_what_is_missing(client):
    assets.fetch("toy")
    client.code = 1
    refusal("other")
    client.code = 0
    assert [assets.fetch("toy"), client.calls][1] == 2
    assert assets.main(["toy"]) == 0 and client.calls == 2


def test_names_the_command_and_the_way_out(client, monkeypatch):
    client.code, client.stderr = 1, "npm http\nnpm error 404\n"
    line = refusal()
    assert "npm pack --silent toy@1.0" in line and "npm error 404" in line and str(client.path) in line
    assert assets.main(["toy"]) == 2

    def absent(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(assets.subprocess, "run", absent)
    assert "no npm here" in refusal() and str(client.path) in refusal()


def test_unknown_asset_and_unwritable_cache(client, tmp_path, monkeypatch):
    assert "did you mean 'toy'" in refusal("toyy")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "file"))
    assert "set RECOMBINE_CACHE" in refusal()


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("RECOMBINE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / "recombine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir().parts[-2:] == (".cache", "recombine")


def test_the_list(capsys):
    assert assets.main([]) == 0
    out = capsys.readouterr().out
    assert all(asset.licence in out and len(asset.sha256) == 64 for asset in assets.ASSETS.values())


FILES = {"a/one.txt": b"1" * 3, "a/two.txt": b"22" * 5}


def tar(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{mode}") as archive:
        for name, body in FILES.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def deb(data: bytes, name: str) -> bytes:
    out = b"!<arch>\n"
    for member, body in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, data)):
        out += (
            f"{member:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(body):<10}".encode() + b"`\n" + body + b"\n" * (len(body) % 2)
        )
    return out


def write_wheel(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in FILES.items():
            archive.writestr(name, body)


@pytest.mark.parametrize("file", ["x.whl", "x.tgz", "xz.deb", "gz.deb", "zst.deb"])
def test_readers_round_trip(tmp_path, file):
    path = tmp_path / file
    if file == "zst.deb":
        zstd = pytest.importorskip("zstandard")
        path.write_bytes(deb(zstd.compress(tar("")), "data.tar.zst"))
    elif file.endswith("deb"):
        path.write_bytes(deb(tar(path.stem), f"data.tar.{path.stem}"))
    elif file == "x.tgz":
        path.write_bytes(tar("gz"))
    else:
        write_wheel(path)
    assert sorted(archives.members(path)) == sorted(FILES)
    assert archives.read_many(path, FILES) == FILES
    with pytest.raises(UsageError, match="no member 'b'"):
        archives.read(path, "b")
