"""Keys of the configuration that came after the first results, so that results of all versions compare."""

from collections.abc import Iterable

LATER = {  # key -> what it was by then
    "base": None,
    "calibration.memory": "auto",
    "data.test_size": None,
    "calibration.sha256": None,
    "export": None,
    "optim.lr_ratio": 1.0,
    "optim.name": "adamw",
    "optim.relative": False,
    "quantize.bits": None,
    "quantize.group": 64,
    "sample.clip": None,
    "sample.guidance": 3.0,
    "sample.prompts": None,
    "sample.scheduler": "ddim",
    "sample.seeds": [0, 1, 2, 3],
    "sample.steps": 30,
    "stage.distil.l1": 0.0,
    "stage.distil.relative": False,
    "stage.order": "compress_first",
    "trainer.accumulate": 1,
    "trainer.compile": False,
    "trainer.gradient_checkpointing": False,
    "trainer.matmul": "highest",
} | {
    f"{slot}.{key}": value
    for slot in ("method", "compressor")
    for key, value in {
        "allocation": "uniform",
        "as_paper": False,
        "anchor": [1.0, 1.0],
        "factor": "plain",
        "judged": None,
        "loss": "plain",
        "multiple_of": 8,
        "compensate": "none",
        "mimicry.factor": 1.0,
        "mimicry.noise": 0.0,
        "mimicry.clip": None,
    }.items()
}


def added(one_sided: Iterable[str], typed: Iterable[str]) -> str | None:
    """A key that no version brought: it was typed with a plus for one of two runs. None: there is none.

    Args:
        one_sided: the keys that one configuration has and the other lacks.
        typed: the overrides of both.
    """
    plus = {word.lstrip("+").partition("=")[0] for word in typed if word.startswith("+")}
    found = (key for key in sorted(one_sided) for own in plus if f"{key}.".startswith(f"{own}."))
    return next((f"only one of them has {key}" for key in found), None)
