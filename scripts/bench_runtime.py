"""Inference of compressed models against the dense one, in the runtimes where they will run.

    python scripts/bench_runtime.py [--models vit_s vit_b] [--runtimes eager onnx] [--methods svd crisp] [--threads 1]

Every table is of one model in one runtime. Its rivals live in one process and take turns. Printed are the median of the
paired ratios dense / rival (more than 1: faster), its quartiles, the ideal (FLOPs of the dense model / FLOPs of the
rival, as `recombine.count` measures them), and ratio / ideal. Weights and factors are random, of the true shapes.
On a busy machine use `--threads 1 --clock cpu`: the process's CPU seconds leave out the time that others took.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import recombine
from recombine import Cersa, Crisp, Dgmr, Svd
from recombine.core import account
from recombine.export import graph, to_onnx
from recombine.methods.svd import spectral
from recombine.methods.svd.low_rank import FACTORS
from recombine.stages.profile import turns

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SAMPLE = 0.03  # seconds that one reading of the clock should span
WAYS = {"targets": ("qkv", "o", "up", "down", "gate?")}
METHODS = {  # name -> (method, budget) at a percentage of the weights
    "svd": lambda percent: (Svd(**WAYS, ratio=percent / 100), None),
    "pivot": lambda percent: (Svd(**WAYS, ratio=percent / 100, factor="pivot"), None),  # svd's bytes, at more rank
    "pivot_rank": lambda percent: (SameRank(**WAYS, ratio=percent / 100, factor="pivot"), None),  # svd's rank
    "crisp": lambda percent: (Crisp(group_size=1, chunk=128, fit="random"), f"retained_{percent}"),
    "crisp_64": lambda percent: (Crisp(group_size=1, chunk=64, fit="random"), f"retained_{percent}"),
    "crisp_wide": lambda percent: (Crisp(group_size=1, chunk=384, fit="random"), f"retained_{percent}"),
    "crisp_pair": lambda percent: (Crisp(group_size=2, chunk=128, fit="random"), f"retained_{percent}"),
    "cersa": lambda percent: (Cersa(**WAYS, trained_share=0.5), f"retained_{percent}"),
    "dgmr": lambda percent: (Dgmr(), f"retained_{percent}"),  # of the MLPs alone
}


class SameRank(Svd):
    """A pivot form at the ranks that plain low rank has at this ratio."""

    def whole_rank(self, m: int, n: int, share: float) -> int:
        return max(1, int(FACTORS["plain"].rank(m, n, share * m * n)))


VITS = {"vit_s": "vit_small_patch16_224", "vit_b": "vit_base_patch16_224"}
SMOLLM2 = {  # 135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    for name in args.models:
        for batch in args.batches:
            with tempfile.TemporaryDirectory() as folder:
                compare(name, batch, args, Path(folder))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_s"], choices=[*VITS, "prefill", "decode"])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--methods", nargs="+", default=["svd", "crisp"], choices=list(METHODS))
    parser.add_argument("--percents", nargs="+", type=int, default=[100, 50, 25], help="of the weights that are kept")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--size", type=int, default=224, help="pixels of an image")
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt; of what a cache holds when decoding")
    parser.add_argument("--depth", type=int, default=4, help="blocks; the ratio hardly depends on their number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--rounds", type=int, default=25)
    return parser


def compare(name: str, batch: int, args: argparse.Namespace, folder: Path) -> None:
    """Prints the tables of one model at one batch size; exported files lie in the folder meanwhile."""
    torch.manual_seed(0)
    dense, inputs = subject(name, batch, args)
    rivals = {"dense": dense}
    for method in args.methods:
        for percent in args.percents:
            how, budget = METHODS[method](percent)
            with random_factors():
                rivals[f"{method} {percent}"] = recombine.apply(copy.deepcopy(dense), how, budget).eval()
    flops = {key: account.flops(model, copy.deepcopy(inputs)) for key, model in rivals.items()}
    for runtime in args.runtimes:
        if name == "decode" and runtime not in ("eager", "compile"):
            print(f"\n{name} in {runtime}: left out, the exported graph keeps no cache")
            continue
        works, clock = {}, CLOCKS[args.clock]
        for key, model in rivals.items():
            run = RUNTIMES[runtime](model, inputs, args.threads, folder / f"{key}.onnx")
            run()
            start = time.perf_counter()
            run()
            repeats = max(1, round(SAMPLE / (time.perf_counter() - start)))
            works[key] = seconds_of(run, repeats, clock)
        seconds = turns(works, args.rounds)
        print(f"\n{name}, batch {batch}, {args.depth} blocks, {runtime}, {args.threads} threads, {args.clock} clock")
        print("| method | ms | dense / method | quartiles | ideal | of ideal |\n|---|---|---|---|---|---|")
        for key, found in seconds.items():
            ratios = [a / b for a, b in zip(seconds["dense"], found, strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            ideal = flops["dense"] / flops[key]
            row = (f"{1000 * statistics.median(found):.2f}", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}")
            print(f"| {key} | {' | '.join(row)} | {ideal:.2f} | {ratio / ideal:.2f} |", flush=True)


def seconds_of(run: Callable, repeats: int, clock: Callable[[], float]) -> Callable[[], float]:
    """A function that calls `run` so many times and returns the seconds that one call took.

    One call before that is not counted: a runtime's threads wait for work without sleeping, and after a run of another
    rival they take a core away for some 30 milliseconds.
    """

    def work() -> float:
        run()
        start = clock()
        for _ in range(repeats):
            run()
        return (clock() - start) / repeats

    return work


@contextmanager
def random_factors() -> Iterator[None]:
    """Methods take random factors of the true shapes for a layer's SVD, which takes minutes."""

    def factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (m, n), k = weight.shape, min(weight.shape)
        return torch.randn(m, k) / m**0.5, torch.ones(k), torch.randn(k, n) / n**0.5

    with mock.patch.object(spectral, "svd", factors):
        yield


def subject(name: str, batch: int, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """The dense model in eval mode and its inputs by name."""
    if name in VITS:
        import timm  # after recombine

        model = timm.create_model(VITS[name], depth=args.depth, img_size=args.size)
        return model.eval(), {"x": torch.randn(batch, 3, args.size, args.size)}
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2, num_hidden_layers=args.depth)).eval()
    prompt = torch.randint(SMOLLM2["vocab_size"], (batch, args.tokens))
    if name == "prefill":
        return model, {"input_ids": prompt, "use_cache": False, "logits_to_keep": 1}
    cache = model(prompt, use_cache=True).past_key_values
    return model, {"input_ids": prompt[:, :1], "past_key_values": cache, "logits_to_keep": 1}


def eager(model: nn.Module, inputs: dict, threads: int, file: Path) -> Callable:
    if (cache := inputs.get("past_key_values")) is None:
        return lambda: model(**inputs)
    return lambda: (model(**inputs), cache.crop(-1))


def compiled(model: nn.Module, inputs: dict, threads: int, file: Path) -> Callable:
    torch.compiler.reset()
    return eager(torch.compile(model), inputs, threads, file)


def onnx(model: nn.Module, inputs: dict, threads: int, file: Path) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    write_onnx(model, inputs, file)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = named([entry.name for entry in session.get_inputs()], inputs)
    return lambda: session.run(None, feed)


def openvino(model: nn.Module, inputs: dict, threads: int, file: Path) -> Callable:
    import openvino

    write_onnx(model, inputs, file)
    core, options = openvino.Core(), {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    known = core.read_model(file)
    request = core.compile_model(known, "CPU", options).create_infer_request()
    feed = named([entry.any_name for entry in known.inputs], inputs)
    return lambda: request.infer(feed, share_inputs=True)


def named(names: list[str], inputs: dict) -> dict:
    """The inputs as arrays, by the names in a file; the pictures of a model have another one there."""
    return {name: inputs.get(name, inputs.get("x")).numpy() for name in names}


def write_onnx(model: nn.Module, inputs: dict, file: Path) -> None:
    """Exports the model, for any batch, unless the file is there: a compressed one of pictures as recombine does."""
    if not file.exists() and "x" in inputs and hasattr(model, "recombined"):
        to_onnx.convert(graph.trace(model), file)
    elif not file.exists():
        batch = {key: torch.cat([v, v]) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        any_batch = {0: torch.export.Dim("batch", min=1, max=1024)}
        shapes = {key: any_batch if isinstance(v, Tensor) else None for key, v in batch.items()}
        torch.onnx.export(model, (), file, kwargs=batch, dynamic_shapes=shapes, dynamo=True, verbose=False)


RUNTIMES = {"eager": eager, "compile": compiled, "onnx": onnx, "openvino": openvino}

if __name__ == "__main__":
    main()
