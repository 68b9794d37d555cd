"""What a checkpoint says of its model, as a schema: everything is checked before any of it reaches a library.

Values are plain and finite, names are names of modules, and numbers stay within what a model can have.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from recombine.errors import UsageError

FORMAT = 2
DEEPEST, LONGEST, LARGEST = 8, 1000, 2**53  # of nested values, words and whole numbers


def plain(value: Any, depth: int = 0) -> Any:
    """The value, where it is a number, a word, true, false, null, or a list or group of these.

    Raises:
        ValueError: it is too deep, too long or too large.
    """
    if depth > DEEPEST:
        raise ValueError("is nested too deeply")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError("is too large")
    if isinstance(value, str) and len(value) > LONGEST:
        raise ValueError("is too long")
    if isinstance(value, dict | list):
        for part in [*value.values(), *value] if isinstance(value, dict) else value:
            plain(part, depth + 1)
    return value


Plain = Annotated[Any, AfterValidator(plain)]
Word = Annotated[str, StringConstraints(pattern=r"^[\w.+-]*$", max_length=200)]
ModelLabel = Annotated[str, StringConstraints(pattern=r"^[\w./+-]*$", max_length=200)]  # may be owner/name
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$", max_length=200)]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[\w-]+(\.[\w-]+)*$", max_length=LONGEST)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Classes = Annotated[int, Field(ge=0, le=2**20)]
Step = Annotated[tuple[Identifier, dict[Identifier, Plain], dict[str, dict[str, Plain]]], Field(strict=False)]
Repository = Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$", max_length=200)]


class Strict(BaseModel):
    """A group of keys without conversions: a number is not a word. Keys that it does not name are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Source(Strict):
    """The arguments of `models.build`. What is not named here are sizes, which `models.allowed` looks at."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Plain]

    name: ModelLabel
    arch: Word
    library: Literal["timm", "transformers", "diffusers"] = "timm"
    pooling: Word | None = None
    id: Repository | None = None
    revision: Word | None = None
    tag: Word | None = None
    pretrained: bool = True
    checkpoint: str | None = None
    image_size: Pixels | None = None
    num_classes: Classes | None = None
    mean: list[Number] | None = None
    std: list[Number] | None = None
    drop_path: Number | None = None
    attn_drop: Number | None = None
    dtype: Word | None = None
    gradient_checkpointing: bool | None = None


class TimmArchitecture(Strict):
    """The arguments of `models.timm_model`, of which no weights are taken."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Plain]

    library: Literal["timm"]
    name: ModelLabel
    arch: Word
    tag: Word | None = None
    image_size: Pixels | None = None
    mean: list[Number] | None = None
    std: list[Number] | None = None
    drop_path: Number | None = None
    attn_drop: Number | None = None


class TransformersArchitecture(Strict):
    """The class of a transformers model and the values of its configuration that differ from the class's own."""

    library: Literal["transformers"]
    class_: Annotated[Identifier, Field(alias="class")]
    attention: Word | None = None
    config: dict[Identifier, Plain]


class PackedSpec(Strict):
    """What `layers.packed.Packed` says of itself."""

    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**40)]], Field(min_length=2, max_length=3)]
    bits: Literal[4, 8]
    group: Annotated[int, Field(ge=8, le=2**16, multiple_of=8)]
    dtype: Literal["float32", "float16", "bfloat16", "float64"]


class DiffusersArchitecture(Strict):
    """The arguments of `diffusion.build`, of which no weights are taken."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Plain]

    library: Literal["diffusers"]
    name: ModelLabel
    arch: Word
    text: Word
    fold: Count
    image_size: Pixels
    schedule: dict[Identifier, Word | Count]


Architecture = TimmArchitecture | TransformersArchitecture | DiffusersArchitecture


class Metadata(Strict):
    """All that a checkpoint of recombine says beside its tensors.

    source: the arguments that build the pretrained model; None: it was the user's own.
    architecture: how the model is built without its weights; None: the file holds only what differs from them.
    steps: name of the method's class, its fields, and its layers, of every method in order.
    own: four entries of every pretrained tensor that the file leaves to the backbone.
    packed: what is packed, by the names of the tensors that it stands for.
    The rest: see `recombine.core.rewrite.Record`.
    """

    format: Literal[2]
    model: Identifier
    source: Source | None = None
    architecture: Annotated[Architecture, Field(discriminator="library")] | None = None
    steps: Annotated[list[Step], Field(max_length=100)]
    classes: Classes | None
    targets: dict[ModuleName, Word]
    dense: Count
    total: Count
    trains: list[ModuleName]
    blocks: list[Annotated[int, Field(ge=0, le=4096)]] | None = None
    shared: dict[ModuleName, ModuleName]
    own: dict[ModuleName, Annotated[list[Number], Field(min_length=4, max_length=4)]]
    packed: dict[ModuleName, PackedSpec] = {}
    bits: dict[ModuleName, Literal[4, 8] | None] = {}
    checksum: Literal["sha256"] | None = None


def validated(path: Path, meta: object) -> dict[str, Any]:
    """The metadata of a file, once they are known to follow the schema.

    Raises:
        UsageError: names the first key that does not, and why.
    """
    if isinstance(meta, dict) and "adapter" in meta:
        raise UsageError(f"{path}: holds an adapter; load its base, then recombine.load_adapter(model, {str(path)!r})")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UsageError(f"{path}: not a checkpoint of recombine; model.checkpoint=FILE loads a plain model's weights")
    try:
        Metadata.model_validate(meta)
    except (ValidationError, RecursionError) as error:
        raise UsageError(f"{path}: its metadata are malformed ({first(error)}); use another checkpoint") from error
    return {"architecture": None, "blocks": None, "source": None, "packed": {}, "bits": {}} | meta


def first(error: Exception) -> str:
    """The first complaint of pydantic as words: "steps.0: Field required"."""
    if not isinstance(error, ValidationError):
        return type(error).__name__
    what = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, what['loc']))[:200]}: {what['msg'][:200]}"
