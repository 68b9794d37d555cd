"""The data of a run beside its own: what calibrates in its place, and the tasks that are probed before and after."""

from recombine import data, models
from recombine.data.base import DataModule
from recombine.errors import UsageError
from recombine.runner.config import RunSpec


def build_calibration_data(spec: RunSpec, module: DataModule, source: dict) -> DataModule | None:
    """The data that calibrates in the place of the run's own; None: there is no other."""
    if spec.calibration_data is None:
        return None
    other, name = data.build(**spec.calibration_data), spec.calibration_data["name"]
    if module.objective != other.objective or module.objective not in ("lm", "denoising"):
        raise UsageError(
            f"calibration.data={name}: a loss on it says nothing of data={module.name}; only language models and those "
            "that draw calibrate on other data than their own, so set calibration.data.name=null"
        )
    other.attach_model(**models.for_data(source))
    return other


def build_transfer_data(spec: RunSpec, module: DataModule, source: dict) -> dict[str, DataModule]:
    """The tasks that are probed before and after, other than the run's own; of language models, other texts."""
    names = [task for task in spec.transfer_tasks if task != module.task]
    transfer = {}
    for task in names:
        try:
            transfer[task] = data.build(**spec.data | {"task": task})
        except UsageError as error:
            raise UsageError(f"analyse.elsewhere=[{task}]: {error}") from error
    for task, other in transfer.items():
        if not other.num_classes and other.objective != "lm":
            raise UsageError(f"analyse.elsewhere={task}: data={module.name} has no classes to probe; set it to []")
        other.attach_model(**models.for_data(source))
    return transfer
