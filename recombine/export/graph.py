"""A recombined model as one traced graph, on which the formats torch, onnx and openvino stand.

The layers are traced in plain torch, as an hf folder has them: what inference folds is folded, and a matrix that
several layers share is one tensor of the graph.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from recombine.core.rollback import unchanged
from recombine.errors import UsageError
from recombine.export.hf import preprocessor
from recombine.export.hf_layers import made
from recombine.export.hf_parts import matrix
from recombine.export.plan import Plan, planned_layer, replaced
from recombine.export.plan_packed import say_unpacked
from recombine.models import rebuild, roles

TRACED = {"batch": 2, "sequence": 6}
CHECKED = ({"batch": 1, "sequence": 3}, {"batch": 3, "sequence": 8})  # other sizes than were traced
TOLERANCE = 1e-4


@dataclass
class Traced:
    """inputs: axes by name, a number where the size is fixed. output: its name. cases: inputs and what the model said.

    dtype: of the parameters.
    """

    program: ExportedProgram
    inputs: dict[str, tuple[str | int, ...]]
    output: str
    cases: list[tuple[dict[str, Tensor], Tensor]]
    dtype: torch.dtype


class Pictures(nn.Module):
    """Images (B, C, H, W) -> one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The tensor of the output that is exported."""
        return chosen(self.model(pixel_values))[1]


class Words(nn.Module):
    """Token ids and their mask, both (B, T) -> one tensor; no cache is kept."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The tensor of the output that is exported."""
        return chosen(self.model(input_ids=input_ids, attention_mask=attention_mask))[1]


def chosen(output) -> tuple[str, Tensor | None]:
    """(name, tensor) of what a model says; (its kind, None): nothing that is known here."""
    if isinstance(output, Tensor):
        return "logits", output
    for name in ("logits", "last_hidden_state"):
        if isinstance(tensor := getattr(output, name, None), Tensor):
            return name, tensor
    return type(output).__name__, None


def trace(model: nn.Module) -> Traced:
    """The graph of a recombined model in eval mode, on the CPU, for every batch and every number of tokens.

    The model is not changed.

    Raises:
        UsageError: its inputs are not known here, a layer cannot be written in plain torch, or torch refuses the graph.
    """
    inputs = read(model)
    with unchanged(model), torch.no_grad():
        model.eval().cpu()
        if getattr(getattr(model, "config", None), "use_cache", False):
            model.config.use_cache = False
        output, cases = said(model, inputs)
        put_plain_layers(model)
        caller = Pictures(model) if "pixel_values" in inputs else Words(model)
        axes = {
            name: {i: Dim.DYNAMIC for i, axis in enumerate(shape) if axis in TRACED} for name, shape in inputs.items()
        }
        try:
            program = torch.export.export(caller, (), example(model, inputs, TRACED), dynamic_shapes=axes, strict=False)
        except Exception as error:  # of many kinds, and most are not public
            raise UsageError(f"{refused(model)}: torch.export says {short(error)}; export it as hf or dense") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return Traced(program, inputs, output, cases, next(model.parameters()).dtype)


def said(model: nn.Module, inputs: dict[str, tuple[str | int, ...]]) -> tuple[str, list[tuple[dict, Tensor]]]:
    """(name of the output, inputs and what the model says of them) for other sizes than are traced.

    Raises:
        UsageError: it does not run on these inputs alone, or gives neither a tensor nor logits.
    """
    cases = []
    for sizes in CHECKED:
        try:
            case = example(model, inputs, sizes)
            name, expected = chosen(model(*case.values()) if len(case) == 1 else model(**case))
        except Exception as error:  # a model that wants other inputs fails in every way there is
            why = f"does not run on {' and '.join(inputs)} alone ({short(error)})"
            raise UsageError(f"{refused(model)} {why}; export it as hf or dense") from error
        if expected is None:
            raise UsageError(f"{refused(model)} gives a {name}, neither a tensor nor logits; export it as hf or dense")
        cases.append((case, expected.clone()))
    features = name == "logits" and "pixel_values" in inputs and not roles.classes(model)
    return "features" if features else name, cases


def refused(model: nn.Module) -> str:
    """How a line begins that says why there is no graph."""
    return f"cannot be exported as one graph: this {type(model).__name__}"


def short(error: BaseException) -> str:
    """The first words of an error."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read(model: nn.Module) -> dict[str, tuple[str | int, ...]]:
    """What a model reads: the axes of its inputs, by name.

    Raises:
        UsageError: not images alone, nor tokens and their mask.
    """
    config = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    if kind == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        return {name: ("batch", "sequence") for name in ("input_ids", "attention_mask")}
    size, channels = None, next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    if kind == "pixel_values":
        size = getattr(getattr(config, "vision_config", config), "image_size", None)
    elif kind is None and (known := rebuild.architecture(model)) is not None:
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = size or known.get("image_size") or model.pretrained_cfg["input_size"][-1]
    if size is None:
        raise UsageError(f"{refused(model)} reads neither images of one size alone nor tokens alone; export it as hf")
    return {"pixel_values": ("batch", channels, *(size if isinstance(size, list | tuple) else (size, size)))}


def example(model: nn.Module, inputs: dict[str, tuple[str | int, ...]], sizes: dict[str, int]) -> dict[str, Tensor]:
    """Inputs of these sizes: noise, or random tokens whose last ones are masked in the last row."""
    generator = torch.Generator().manual_seed(sum(sizes.values()))
    shape = [sizes.get(axis, axis) for axis in next(iter(inputs.values()))]
    if "pixel_values" in inputs:
        return {"pixel_values": torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)}
    words = model.get_input_embeddings().num_embeddings
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, -1] = 0
    return {"input_ids": torch.randint(0, words, shape, generator=generator), "attention_mask": mask}


def put_plain_layers(model: nn.Module) -> None:
    """Puts plain torch layers, which hold the same tensors, into the places of the recombined ones.

    Raises:
        UsageError: a layer cannot be written in plain torch.
    """
    plan, parts = Plan(), {}
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    common = {key for key in uses if uses.count(key) > 1}
    for name, layer in replaced(model).items():
        parts[layer] = planned_layer(name, layer, plan, common)
    say_unpacked(model, [*plan.tensors, *(f".{key}" for _, tensors in parts.values() for key in tensors)])
    with torch.device("meta"):
        shared = nn.ModuleDict({key: matrix(*size) for key, size in plan.shared.items()})
        new = {layer: made(spec, innermost(layer), shared) for layer, (spec, _) in parts.items()}
    hold(shared, {name.removeprefix("shared_bases."): tensor for name, tensor in plan.tensors.items()})
    for layer, (_, tensors) in parts.items():
        hold(new[layer], tensors)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = new.get(child, child)
    if shared:
        model.shared_bases = shared  # a layer that is built finds it there, and it is a parameter of the model


def innermost(layer: nn.Module) -> nn.Module:
    """The plain layer inside adapters and scales."""
    return innermost(layer.base_layer) if hasattr(layer, "base_layer") else layer


def hold(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Lets a module hold these very tensors, by their names in it."""
    module.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()}, assign=True)
    module.eval()


def compare(run: Callable[[dict[str, Tensor]], Tensor], traced: Traced, by: str) -> float:
    """The largest difference of what `run` says to what the model says, relative to its largest output, at least 1.

    Args:
        by: what runs it, for the error.

    Raises:
        UsageError: it is more than 1e-4, in half precision than four of its roundings, or it does not run.
    """
    worst = 0.0
    for inputs, expected in traced.cases:
        sizes = " x ".join(map(str, next(iter(inputs.values())).shape))
        try:
            found = run(inputs)
        except Exception as error:  # whatever the other library raises
            raise UsageError(f"cannot be exported: {by} does not run inputs of {sizes} ({short(error)})") from error
        largest = expected.abs().max().clamp(min=1)
        error = float((found - expected).abs().max() / largest) if found.shape == expected.shape else float("inf")
        allowed = max(TOLERANCE, 4 * torch.finfo(expected.dtype).eps)  # half precision rounds more than that
        if not error <= allowed:
            why = f"is {error:.2g} of the largest output away from the model, with inputs of {sizes}"
            fix = f"allowed is {allowed:.2g}; export it as hf or dense"
            raise UsageError(f"cannot be exported: what {by} computes {why}; {fix}")
        worst = max(worst, error)
    return worst


def describe(model: nn.Module, traced: Traced, folder: Path, file: str, error: float) -> None:
    """Writes inputs.json: the names, types and axes of the inputs, the output, and what the comparison found.

    For timm's models it also writes preprocessor_config.json: how images become inputs.
    """
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in traced.cases[0][0].items()}
    told = {
        "file": file,
        "inputs": {name: {"dtype": kinds[name], "shape": shape} for name, shape in traced.inputs.items()},
        "output": traced.output,
        "largest_difference": error,
    }
    (folder / "inputs.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if hasattr(model, "pretrained_cfg"):
        size = dict(zip(("height", "width"), traced.inputs["pixel_values"][2:], strict=True))
        text = json.dumps(preprocessor(model) | {"size": size}, indent=2)
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
