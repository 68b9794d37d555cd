"""The schema of result.json: for every key its type, its meaning, its unit and who writes it."""

from typing import Annotated, NamedTuple, NotRequired, TypedDict


class Key(NamedTuple):
    """A key beside its type. by: who writes it: stages, the analysis, or else the runner; empty inside a part."""

    meaning: str
    by: tuple[str, ...] = ()
    unit: str = ""


RUNNER, ANALYSIS, TRAINING = ("runner",), ("analysis",), ("adapt", "compress", "joint")
REWRITING, LOADING = ("retrofit", "compress", "joint"), (*TRAINING, "evaluate", "sample")
TESTING = (*LOADING, "retrofit", *RUNNER)
Scores = dict[str, float | None]  # a score's name -> its value
Map = dict[str, dict[str, list[list[float]]]]
Curves = dict[str, list[float | None]]  # a metric's name -> one value an epoch


class ModelPart(TypedDict):
    """The pretrained model: these keys, and further arguments that build it, which differ by family."""

    name: Annotated[str, Key("the word after model=")]
    arch: Annotated[str, Key("the architecture in timm, or the family in transformers")]
    pretrained: Annotated[bool, Key("whether it started from pretrained weights")]
    checkpoint: Annotated[str | None, Key("a local file that the weights came from")]


class MethodPart(TypedDict):
    """A method: these keys, and its fields as they were in the end, after a budget and a calibration set some."""

    name: Annotated[str, Key("the class of the method, by which a checkpoint finds it")]
    label: Annotated[str, Key("what the user typed after method=; several labels may share one class")]
    compresses: Annotated[bool, Key("whether it can hold layers in fewer weights than they had")]


class DataPart(TypedDict):
    """What identifies the data; some keys belong to one kind of data only."""

    name: Annotated[str, Key("the word after data=")]
    task: Annotated[str | None, Key("the task; null where the data is one task")]
    title: Annotated[NotRequired[str], Key("data and task as a table shows them")]
    group: Annotated[str, Key("the group of the suite that the task belongs to")]
    objective: Annotated[NotRequired[str], Key("what is learnt: classification, regression, lm")]
    metric: Annotated[NotRequired[str], Key("the score that the task reports")]
    classes: Annotated[NotRequired[int | list[str] | None], Key("how many, or their names; null: a number is learnt")]
    licence: Annotated[str, Key("the licence of the data")]
    note: Annotated[str, Key("what a reader of the numbers must know")]
    differences: Annotated[NotRequired[list[str]], Key("where the data differs from the published one")]
    sizes: Annotated[dict[str, int], Key("samples of train, val and test as used", unit="samples")]
    sha256: Annotated[dict[str, str], Key("hash of each split, samples and labels")]
    shared_train_test: Annotated[NotRequired[int], Key("samples of train that are in test too", unit="samples")]
    first_shared: Annotated[NotRequired[list[int] | None], Key("the first of them: row of train, row of test")]
    select: Annotated[NotRequired[str], Key("what chooses the epoch: val, test, or last for none")]
    split: Annotated[NotRequired[str], Key("how train and val were cut")]
    normalize: Annotated[NotRequired[str], Key("whose statistics normalise the images")]
    protocol: Annotated[str, Key("how the data was used, in words")]
    hub: Annotated[NotRequired[str], Key("the hub's repository")]
    commit: Annotated[NotRequired[str | None], Key("the commit of that repository")]
    root: Annotated[NotRequired[str], Key("the local folder that was read in place of the hub")]
    harness: Annotated[NotRequired[list[str]], Key("tasks of lm-evaluation-harness that go with the data")]
    image_size: Annotated[NotRequired[int], Key("side of the square images", unit="pixels")]
    resize: Annotated[NotRequired[str], Key("how images were resized")]
    augment: Annotated[NotRequired[str], Key("augmentation of the training batches")]
    mean: Annotated[NotRequired[list[float]], Key("mean that was subtracted, per channel", unit="share of 255")]
    std: Annotated[NotRequired[list[float]], Key("deviation that was divided by, per channel", unit="share of 255")]
    max_length: Annotated[NotRequired[int], Key("longest text", unit="tokens")]
    cut_to_max_length: Annotated[NotRequired[dict[str, int]], Key("texts cut to it, by split", unit="samples")]
    tokenizer: Annotated[NotRequired[str], Key("fingerprint of the tokenizer")]
    loss_on_prompt: Annotated[NotRequired[bool], Key("whether the prompt's tokens count in the loss")]
    seed: Annotated[int, Key("the seed of cuts and orders")]
    limit: Annotated[int | None, Key("the most samples a split may have; null: all", unit="samples")]


class Probe(TypedDict):
    """A linear probe on the pretrained features. Scores are accuracies, or Pearson's r for a regression."""

    val: Annotated[float | None, Key("score on the validation set, which chose the decay", unit="share")]
    test: Annotated[float | None, Key("score on the test set; null: not read", unit="share")]
    decay: Annotated[float, Key("the L2 decay that was chosen")]


class AccountPart(TypedDict):
    """What the model costs after the stage. A parameter that several layers share counts once."""

    stored: Annotated[int, Key("parameters of the whole model", unit="parameters")]
    trained: Annotated[int, Key("parameters that train, in the whole model", unit="parameters")]
    stored_without_head: Annotated[int, Key("parameters without the classification head", unit="parameters")]
    trained_without_head: Annotated[int, Key("parameters that train, without the head", unit="parameters")]
    retained: Annotated[float, Key("weights of the target layers over their dense weights", unit="share")]
    retained_total: Annotated[float, Key("parameters of the model over those it had", unit="share")]
    bytes_weights: Annotated[int, Key("memory of the weights", unit="bytes")]
    bytes_gradients: Annotated[int, Key("memory of the gradients", unit="bytes")]
    bytes_optimizer: Annotated[int, Key("memory of AdamW's two float32 moments", unit="bytes")]
    flops: Annotated[int | None, Key("one forward of one sample; null: not measured", unit="FLOP, 2 a product")]
    memory_mib: Annotated[float, Key("weights, gradients and optimizer together", unit="MiB")]


class Layer(TypedDict):
    """One rewritten layer."""

    name: Annotated[str, Key("the module's name")]
    role: Annotated[str, Key("q, k, v, o, up, down, gate, or qkv")]
    shape: Annotated[list[int], Key("outputs and inputs")]
    kind: Annotated[str, Key("the class of the layer that stands there now")]
    rank: Annotated[NotRequired[int], Key("rank of its factors")]
    core: Annotated[NotRequired[list[int] | bool], Key("shape of the matrix between the factors; or if there is one")]
    tail: Annotated[NotRequired[int], Key("singular values that train beyond the core")]
    basis_rank: Annotated[NotRequired[int], Key("vectors of the shared basis")]
    chunk: Annotated[NotRequired[int], Key("length of a vector of the basis")]
    bits: Annotated[NotRequired[int], Key("of its packed integers")]
    held: Annotated[float, Key("its weights over its dense weights; a shared basis is divided", unit="share")]


class Distil(TypedDict):
    """The distillation from the original model."""

    val_loss: Annotated[float | None, Key("the lowest validation loss; null without validation data")]
    best_epoch: Annotated[int, Key("the epoch of that loss, from 0", unit="epochs")]
    curves: Annotated[Curves, Key("losses by epoch")]


class Speed(TypedDict):
    """Medians over the rounds."""

    train_samples_s: Annotated[float | None, Key("training steps; null where nothing trains", unit="samples/s")]
    infer_samples_s: Annotated[float, Key("forward passes in eval mode", unit="samples/s")]
    latency_ms: Annotated[float, Key("forward of one sample of a batch", unit="ms")]
    peak_mib: Annotated[float | None, Key("most memory of a training step; null on a CPU", unit="MiB")]


class Profile(Speed):
    """Speed of the method beside a reference, measured in turns in one process."""

    ratio: Annotated[Scores, Key("time of the reference over the method's, of train and infer; above 1: it is faster")]
    reference: Annotated[Speed, Key("the reference's own speed")]
    batch_size: Annotated[int, Key("batch of the measurement", unit="samples")]


class MemoryRate(TypedDict):
    """Weights, gradients and AdamW's moments over the pretrained weights (CERSA, arXiv 2605.08174)."""

    targets: Annotated[float, Key("of the target layers", unit="share")]
    model: Annotated[float, Key("of the whole model", unit="share")]


class Subspaces(TypedDict):
    """Overlap of principal subspaces of pretrained and adapted weights (CERSA Eq. 3): 1 where one holds the other."""

    u: Annotated[NotRequired[dict[str, float]], Key("output directions, by role: mean over the layers", unit="share")]
    v: Annotated[NotRequired[dict[str, float]], Key("input directions, by role: mean over the layers", unit="share")]
    map_u: Annotated[NotRequired[Map], Key("u by layer, role, adapted rank and pretrained rank", unit="share")]
    map_v: Annotated[NotRequired[Map], Key("v in the same way", unit="share")]


class Elsewhere(TypedDict):
    """Linear probes on other tasks, before and after the stage; of language models perplexities on other texts."""

    before: Annotated[NotRequired[Scores], Key("score by task on the original features", unit="share")]
    after: Annotated[Scores, Key("score by task on the adapted features, or perplexity by text", unit="share")]
    forgetting: Annotated[NotRequired[float | None], Key("drop of the mean score over the mean before", unit="share")]


class Environment(TypedDict):
    """The machine and the versions that the run ran on."""

    python: Annotated[str, Key("version of Python")]
    platform: Annotated[str, Key("operating system")]
    device: Annotated[str, Key("the GPU, or else the processor")]
    threads: Annotated[int, Key("threads of torch")]
    versions: Annotated[dict[str, str | None], Key("version by package; null: not installed")]
    commit: Annotated[str | None, Key("commit of the checkout, with + where files had changed; null: no checkout")]


class RunPart(TypedDict):
    """What was asked for."""

    command: Annotated[str, Key("the command line that runs it again", RUNNER)]
    stage: Annotated[str, Key("the word after stage=", RUNNER)]
    model: Annotated[ModelPart, Key("the pretrained model", RUNNER)]
    weights: Annotated[NotRequired[dict[str, str | dict[str, str]]], Key("hub, commit, sha256 by file", RUNNER)]
    method: Annotated[MethodPart | None, Key("the method; null: nothing was rewritten", ("profile", *RUNNER))]
    compressor: Annotated[MethodPart | None, Key("the method that compressed before it", RUNNER)]
    base: Annotated[NotRequired[dict[str, str]], Key("the compressed model it started from: path, sha256", RUNNER)]
    budget: Annotated[str, Key("the word after budget=", RUNNER)]
    data: Annotated[DataPart, Key("the data that trained and tested", RUNNER)]
    calibration: Annotated[DataPart | None, Key("other data that calibrated; null: the same", RUNNER)]
    calibration_sha256: Annotated[NotRequired[str], Key("hash of the tokens that calibrated, row by row", RUNNER)]
    seed: Annotated[int, Key("the seed of the run", RUNNER)]
    metric: Annotated[str, Key("the score that chose the epoch, a key of val and test", RUNNER)]


class StagePart(TypedDict):
    """What the stage found."""

    val: Annotated[Scores, Key("scores on the validation set, of the kept epoch; as in test", (*TRAINING, *RUNNER))]
    test: Annotated[Scores, Key("scores on the test set, read once; shares, but for losses", TESTING)]
    test_right: Annotated[NotRequired[str], Key("which test samples it tells right: a bit each, in base64", TESTING)]
    linear_probe: Annotated[Probe | None, Key("a linear probe on the pretrained features; null: none", RUNNER)]
    account: Annotated[AccountPart, Key("what the model costs after the stage", ("profile", *RUNNER))]
    layers: Annotated[list[Layer], Key("one entry a rewritten layer", RUNNER)]
    notes: Annotated[NotRequired[list[str]], Key("fields of the method that were adapted to some layers", RUNNER)]
    quantized: Annotated[NotRequired[dict[str, int | str | None | Scores]], Key("packed weights; mix: layers", RUNNER)]
    curves: Annotated[Curves, Key("losses and scores by epoch of the training, without distillation", RUNNER)]
    best_epoch: Annotated[NotRequired[int], Key("the epoch that was kept, from 0", TRAINING, "epochs")]
    checkpoint: Annotated[NotRequired[str | None], Key("file of the weights; null: none", LOADING)]
    sha256: Annotated[NotRequired[dict[str, str]], Key("hash of each file of weights, by file name", RUNNER)]
    pictures: Annotated[NotRequired[dict[str, list[str]]], Key("files of what was drawn, by prompt", RUNNER)]
    distil: Annotated[NotRequired[Distil], Key("the distillation", ("compress", "joint"))]
    exports: Annotated[NotRequired[dict[str, str]], Key("folders for other libraries, by format", RUNNER)]
    weight_error: Annotated[NotRequired[Scores], Key("|W - W'| / |W| by layer, before training", REWRITING, "share")]
    logit_error: Annotated[NotRequired[float | None], Key("largest change of an output", ("retrofit",))]
    logit_scale: Annotated[NotRequired[float | None], Key("largest output of the original model", ("retrofit",))]
    profile: Annotated[NotRequired[Profile], Key("speed, where stage.rounds is more than 0", ("profile",))]


class AnalysisPart(TypedDict):
    """What was measured of the model after its stage."""

    memory_rate: Annotated[NotRequired[MemoryRate], Key("memory to train over the pretrained weights", ANALYSIS)]
    images_per_second: Annotated[NotRequired[float], Key("speed of training with validation", ANALYSIS, "samples/s")]
    subspaces: Annotated[NotRequired[Subspaces], Key("overlaps that analyse.subspaces or maps asks for", ANALYSIS)]
    elsewhere: Annotated[NotRequired[Elsewhere], Key("probes on other tasks, where analyse.elsewhere asks", ANALYSIS)]


class OriginPart(TypedDict):
    """Where the numbers come from."""

    seconds: Annotated[dict[str, float], Key("time of each part and in total, over all its processes", RUNNER, "s")]
    config: Annotated[dict, Key("the whole configuration, without the experiment around it", RUNNER)]
    environment: Annotated[Environment, Key("versions, machine and commit", RUNNER)]


class Result(RunPart, StagePart, AnalysisPart, OriginPart):
    """result.json, whole. A key that a run has no use for is left out. nan is null, an infinity 1e999 or -1e999."""


class Suite(TypedDict):
    """suite.json: what data.task=all writes beside the results of its tasks."""

    groups: Annotated[dict[str, float | None], Key("mean test score by group", unit="share")]
    tasks: Annotated[dict[str, dict[str, float | None]], Key("test score by group and task", unit="share")]
    mean: Annotated[float | None, Key("mean of the groups' means, as NOAH (arXiv 2206.04673)", unit="share")]
    mean_of_tasks: Annotated[float | None, Key("mean over all tasks, as CRISP Tab. 1", unit="share")]
    complete: Annotated[bool, Key("whether every task is there")]


OPEN = (ModelPart, MethodPart)  # further keys are the arguments of the model, the fields of the method
