"""What each compressor does to a real model before any training: layer-output error, accuracy, seconds.

    python scripts/compare_compressors.py [--budget retained_50] [--task dsprites_loc] [--out experiments/compressors]

For every method: the relative error |(W - W') X| / |W X| of each layer on the original model's inputs, averaged over
the layers, on the calibration images and on images never seen; the same with outputs weighed by the loss's gradients,
|C_g^1/2 (W - W') X| / |C_g^1/2 W X|, on the latter; and the test accuracy with the head that a linear probe fitted on
the original features, then with a head fitted on its own.
"""

import argparse
import copy
import csv
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import recombine
from recombine import data, models
from recombine.core.calibration import collect
from recombine.core.method import Site
from recombine.evaluation import linear_probe
from recombine.layers import RecombinedLinear
from recombine.models import roles
from recombine.runner.config import resolve
from recombine.stages.context import RunContext
from recombine.training import objectives

ROLES = ["q", "k", "v", "o", "up", "down"]
BLIND = ["method=jactus", "method.sensitivity=none", "method.alpha=1", "method.allocation=lagrangian"]
BLIND += ["method.relative=true"]
RIVALS = {  # label -> overrides
    "svd": ["method=svd"],
    "fwsvd": ["method=fwsvd"],
    "asvd": ["method=asvd"],
    "svd_llm": ["method=svd_llm"],
    "svd_llm, anchored": ["method=svd_llm", "method.refit=anchored"],
    "svd_llm, SAES": ["method=svd_llm", "method.refit=anchored", "method.anchor=[0.25,0.75]"],
    "basis_sharing": ["method=basis_sharing"],
    "dfjr": ["method=dfjr"],
    "balf": ["method=balf"],
    "dobi_svd": ["method=dobi_svd"],
    "balf, pivot": ["method=balf", "method.factor=pivot"],
    "svd_llm, lems": ["method=svd_llm", "method.allocation=lems"],
    "svd_llm, atp": ["method=svd_llm", "method.allocation=atp"],
    "kfac_svd": ["method=kfac_svd", "method.shrink_outputs=0.7"],
    "kfac_svd, shrunk by 0.3": ["method=kfac_svd"],
    "kfac_svd, as released": ["method=kfac_svd", "method.shrink_outputs=0.7", "method.left=chol_as_released"],
    "kfac_svd, share": ["method=kfac_svd", "method.shrink_outputs=0.7", "method.allocation=share"],
    "kfac_svd, error": ["method=kfac_svd", "method.shrink_outputs=0.7", "method.allocation=error"],
    "kfac_svd, lems": ["method=kfac_svd", "method.shrink_outputs=0.7", "method.allocation=lems"],
    "crisp, truncated": ["method=crisp", "method.group_size=1", "method.chunk=128", "method.fit=closed"],
    "crisp, aware": ["method=crisp", "method.group_size=1", "method.chunk=128", "method.fit=aware"],
    "jactus": ["method=jactus"],
    "jactus, lagrangian": ["method=jactus", "method.allocation=lagrangian"],
    "jactus, no gradients": BLIND,
    "jactus, no gradients, deployed": [*BLIND, "method.counted=deployed"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="retained_50")
    parser.add_argument("--task", default="dsprites_loc")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--only", nargs="*", default=list(RIVALS))
    parser.add_argument("--out", type=Path, default=Path("experiments/compressors"))
    args = parser.parse_args()
    original, module, cfg = prepare(args)
    head = linear_probe.fit(original, module)
    head.init_head(roles.output_layer(original))
    roles.split_fused(original, tuple(ROLES))  # the same layers for every method
    sites = [Site(n, r, original.get_submodule(n)) for n, r in roles.find(original, tuple(ROLES)).items()]
    order = torch.randperm(len(module.train), generator=torch.Generator().manual_seed(cfg.seed))[
        : args.samples
    ].tolist()
    moments = [
        collect(original, sites, lambda s=s, i=i: passes(original, module, s, i), {"inputs", "outputs"})
        for s, i in ((module.train, order), (module.val, list(range(len(module.val)))))
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.task}_{args.budget}.csv"
    rows = {r["method"]: r for r in csv.DictReader(path.open())} if path.exists() else {}  # of earlier calls, by --only
    rows["original"] = row("original", original, original, sites, moments, module, 0.0, head.test)
    print(line(rows["original"]), flush=True)
    for label in args.only:
        rows[label] = compress(label, original, module, sites, moments, args)
        print(line(rows[label]), flush=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows["original"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in ("original", *RIVALS) if name in rows)
    print(path)


def prepare(args):
    with initialize_config_dir(str(models.CONF.parent), version_base="1.3"):
        cfg = compose("config", [f"data.task={args.task}", f"calibration.samples={args.samples}"])
    torch.manual_seed(cfg.seed)
    model = models.build(**OmegaConf.to_container(cfg.model))
    module = data.build(**OmegaConf.to_container(cfg.data), seed=cfg.seed)
    module.attach_model(**models.for_data(model.recombine_source))
    module.prepare_data()
    module.setup()
    model.reset_classifier(module.num_classes)
    return model.eval(), module, cfg


def passes(model, module, split, indices):
    """One loss a batch: what the hooks see is what counts."""
    objective = objectives.build(module)
    for start in range(0, len(indices), 32):
        yield objective.loss(model, objectives.fetch(module, split, indices[start : start + 32], torch.device("cpu")))[
            0
        ]


def compress(label, original, module, sites, moments, args) -> dict:
    with initialize_config_dir(str(models.CONF.parent), version_base="1.3"):
        overrides = [*RIVALS[label], f"calibration.samples={args.samples}", "method.targets=[q,k,v,o,up,down]"]
        cfg = compose("config", overrides)
    spec, model = resolve(cfg), copy.deepcopy(original)
    budget, method = recombine.Budget.parse(args.budget), spec.method
    run = RunContext(spec.settings, Path(), Path(), model, method, budget, module)
    start = time.perf_counter()
    recombine.apply(model, method, run.budget, run.losses)
    seconds = time.perf_counter() - start
    return row(label, model, original, sites, moments, module, seconds, linear_probe.fit(model.eval(), module).test)


@torch.no_grad()
def row(label, model, original, sites, moments, module, seconds, refitted) -> dict:
    layers = [(site.module.weight.double(), dense_weight(model.get_submodule(site.name))) for site in sites]
    known = [[m[site.name] for site in sites] for m in moments]
    errors = [
        [layer_error(*pair, one.inputs.xx) for pair, one in zip(layers, known[split], strict=True)] for split in (0, 1)
    ]
    errors.append([layer_error(*pair, one.inputs.xx, one.gg) for pair, one in zip(layers, known[1], strict=True)])
    hits = total = 0
    for start in range(0, len(module.test), 64):
        indices = list(range(start, min(start + 64, len(module.test))))
        batch = objectives.fetch(module, module.test, indices, torch.device("cpu"))
        hits += (objectives.call(model, batch).argmax(1) == batch[1]).sum().item()
        total += len(batch[1])
    account = recombine.count(model)
    return {
        "method": label,
        "retained": round(account.retained, 4),
        "error_calibration": round(sum(errors[0]) / len(sites), 4),
        "error_heldout": round(sum(errors[1]) / len(sites), 4),
        "error_weighted": round(sum(errors[2]) / len(sites), 4),
        "accuracy": round(100 * hits / total, 1),
        "accuracy_new_head": round(100 * refitted, 1),
        "seconds": round(seconds, 1),
    }


def dense_weight(layer) -> torch.Tensor:
    return (layer.dense_weight() if isinstance(layer, RecombinedLinear) else layer.weight).double()


def layer_error(weight, other, inputs: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
    """|(W - W') X| / |W X| from E[x x^T]; with E[g g^T] outputs are weighed by its square root."""

    def energy(w):
        return ((w @ inputs) * (w if outputs is None else outputs @ w)).sum().clamp(min=0)

    return (energy(weight - other) / energy(weight)).sqrt().item()


def line(values: dict) -> str:
    return "  ".join(f"{key} {value}" for key, value in values.items())


if __name__ == "__main__":
    main()
