"""Every model of scripts/tiny_models.py with five methods: apply, train two steps, save, load, merge.

python scripts/model_matrix.py            writes the table of docs/models.md
python scripts/model_matrix.py BLOOM      prints what it finds for one model
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import recombine  # noqa: E402
from recombine.models import roles  # noqa: E402
from scripts.tiny_models import MODELS, Tiny  # noqa: E402

METHODS = {
    "CRISP": (recombine.Crisp(chunk=8), None),
    "CERSA": (recombine.Cersa(), None),
    "SVD": (recombine.Svd(), "retained_50"),
    "JACTUS": (recombine.Jactus(), "retained_50"),
    "LoRA": (recombine.Peft(rank=2), None),
}
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table of scripts/model_matrix.py -->\n", "<!-- end of the table -->\n"


def output(model: nn.Module, inputs: Tensor | dict) -> Tensor:
    """What the model says of a batch, as one tensor (B, ...)."""
    y = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    if isinstance(y, Tensor):
        return y
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(y[name] for name in names if y.get(name) is not None)


def loss(model: nn.Module, inputs: Tensor | dict) -> Tensor:
    """Cross-entropy on the class 1."""
    return -output(model, inputs).log_softmax(-1)[..., 1].mean()


def train(model: nn.Module, method: recombine.Method, inputs: Tensor | dict) -> None:
    """Two steps, in the last of which every rewritten layer has a gradient.

    A compressor that leaves the adapting to others trains what it would train in a distillation.
    """
    layers = {name: model.get_submodule(name) for name in model.recombined.targets}
    if not any(p.requires_grad for layer in layers.values() for p in layer.parameters()):
        recombine.train_only(model, method.distillation_parameters(model))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model.train(), inputs).backward()
        optimizer.step()
    model.eval()
    for name, layer in layers.items():
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        assert any(g is not None and g.any() for g in gradients), f"{name} does not train"


def check(plain: nn.Module, inputs: Tensor | dict, method: recombine.Method, budget: str | None) -> None:
    """Raises UsageError where the method refuses the model, and AssertionError where anything else is wrong."""
    model = copy.deepcopy(plain)
    recombine.apply(model, method, budget, lambda: [loss(model, inputs)])
    train(model, method, inputs)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained = output(model, inputs)
        file = recombine.save(model, Path(folder) / "model.safetensors")
        loaded = recombine.load(file, copy.deepcopy(plain)).eval()
        torch.testing.assert_close(output(loaded, inputs), trained, rtol=1e-6, atol=1e-6)
        recombine.merge(loaded)
        torch.testing.assert_close(output(loaded, inputs), trained, rtol=1e-3, atol=1e-4)
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == shapes, "other tensors once merged"
    missing = {name for name, module in plain.named_modules()} ^ {name for name, _ in loaded.named_modules()}
    assert not missing, f"other modules once merged: {missing}"


def row(name: str) -> list[str]:
    """The cells of a model's row: its name, class, roles, and yes or the refusal of each method."""
    tiny: Tiny = MODELS[name]
    plain = tiny.fresh()
    inputs = tiny.inputs()
    said = []
    for method, (plain_method, budget) in METHODS.items():
        chosen = copy.copy(plain_method)
        chosen.targets = tiny.targets or chosen.targets
        try:
            check(plain, inputs, chosen, budget)
            said.append("yes")
        except AssertionError as error:
            raise AssertionError(f"{name}, {method}: {error}") from error
        except recombine.UsageError as refusal:
            assert "\n" not in str(refusal)
            said.append(str(refusal))
    try:
        has = " ".join(roles.role_names(plain))
    except recombine.UsageError:
        has = "none"
    return [name, f"`{type(plain).__name__}`", has, *said]


def line(cells: list[str]) -> str:
    """The row of the table; of several refusals the first."""
    name, cls, has, *said = cells
    refusals = {method: text for method, text in zip(METHODS, said, strict=True) if text != "yes"}
    who = "" if len(refusals) == len(METHODS) else f" by {', '.join(refusals)}"
    outcome = f"refused{who}: {next(iter(refusals.values()))}" if refusals else "yes"
    return f"| {name} | {cls} | {has} | {outcome} |\n"


def main(names: list[str]) -> None:
    """Writes the table, or prints the rows of some models."""
    lines = [line(row(name)) for name in names or MODELS]
    if names:
        print("".join(lines), end="")
        return
    text = PAGE.read_text()
    start, rest = text.split(BEGIN)[0], text.split(END)[1]
    head = "| model | class | roles | " + ", ".join(METHODS) + " |\n|---|---|---|---|\n"
    PAGE.write_text(f"{start}{BEGIN}\n{head}{''.join(lines)}\n{END}{rest}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
