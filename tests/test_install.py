"""What pip makes of a clone: an editable install and a wheel, offline, each in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What git would bring of the build, in a folder called recombine."""
    folder = tmp_path_factory.mktemp("above") / "recombine"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("recombine", "hydra_plugins", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def environment(folder: Path) -> str:
    """The Python of a fresh environment that sees this one's packages, recombine itself excepted."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the .pth files there are not read
    return str(folder / "bin" / "python")


def run(*command, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_editable_install_from_the_folder_above(clone, tmp_path):
    python = environment(tmp_path / "venv")
    run(python, *PIP, "install", *OFFLINE, "-e", clone, cwd=tmp_path)
    code = "import recombine, timm; print(recombine.__file__, recombine.Cersa.__name__)"
    found = run(python, "-c", code, cwd=clone.parent).stdout.split()  # the clone's name is the package's
    assert found == [str(clone / "recombine" / "__init__.py"), "Cersa"]


def test_wheel_is_the_library(clone, tmp_path):
    python = environment(tmp_path / "venv")
    run(python, *PIP, "wheel", *OFFLINE, "-w", tmp_path, clone, cwd=tmp_path)
    (wheel,) = tmp_path.glob("recombine-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = [path for top in ("recombine", "hydra_plugins") for path in (clone / top).rglob("*")]
    needed = {
        str(path.relative_to(clone)) for path in sources if path.suffix in (".py", ".csv", ".yaml", ".css", ".js")
    }
    assert needed > {"recombine/data/tasks/gsm8k_metamath.yaml", "recombine/data/splits/sha256.csv"}
    assert held >= needed and not any(name.startswith(("conf/", "tests/")) for name in held)

    run(python, *PIP, "install", *OFFLINE, wheel, cwd=tmp_path)
    (tmp_path / "example.py").write_text(
        "import sys, torch\n"
        "loader = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))]\n"
        f"{library_example()}\n"
        "assert type(model).__name__ == 'VisionTransformer' and not hasattr(model, 'recombined')\n"
        "built = recombine.models.build('mine', arch='vit_tiny_patch16_224', pretrained=False, image_size=32)\n"
        "print(recombine.__file__)\n"
    )
    out = run(python, "example.py", cwd=tmp_path).stdout
    assert str(tmp_path / "venv") in out.splitlines()[-1] and (tmp_path / "cersa.safetensors").is_file()
    told = run(python, "-m", "recombine.report", "start", cwd=tmp_path, code=2).stderr
    assert told.count("\n") == 1 and "experiment=start: reads conf/, which no wheel brings" in told


def library_example() -> str:
    """The README's Python block, without pretrained weights."""
    blocks = (ROOT / "README.md").read_text().split("```python")[1:]
    code = next(block for block in blocks if "recombine.merge" in block).split("```")[0]
    assert "pretrained=True" in code
    return code.replace("pretrained=True", "img_size=32")
