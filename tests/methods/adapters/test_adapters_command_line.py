"""Every adapter runs from the command line."""

import pytest

from helpers.command import execute


@pytest.mark.parametrize(
    "name, more",
    [
        *((name, []) for name in ("pissa", "boft", "ia3", "hira", "svfit", "svft", "ssf", "rosa")),
        *((name, []) for name in ("rslora", "eva", "corda", "randlora", "lokr", "tinylora", "waveft")),
        *((name, ["method.rank=8"]) for name in ("miss", "vera", "gralora", "psoft")),
        ("eva", ["optim=lora_plus", "budget=trainable_2k"]),
        ("oft", ["method.options.oft_block_size=8"]),
        ("road", ["method.options.group_size=8"]),
        ("vblora", ["method.options.vector_length=24"]),
        ("ssf", ["method@compressor=svd"]),
        ("dora", ["method@compressor=svd"]),
    ],
)
def test_runs_from_the_command_line(name, more, tmp_path):
    result = execute(tmp_path, f"method={name}", *more, "trainer.epochs=1", "data.limit=32")
    assert 0 <= result["test"]["acc"] <= 1 and result["account"]["trained_without_head"] > 0
    again = f"stage.checkpoint={tmp_path}/best.safetensors"
    same = execute(tmp_path / "again", f"method={name}", *more, "stage=evaluate", again, "data.limit=32")
    assert same["test"]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-5)
