"""Training steps of recombined models against peft's LoRA on the same targets, eager and compiled.

    python scripts/bench_train.py [--size 98] [--batch 16] [--rounds 9] [--only "CRISP exact alone" ...]
                                  [--targets q k v o up down]

All rivals live in one process and take turns. Printed are medians over the rounds of LoRA / rival, each round's own:
more than 1 is faster than LoRA. compiled: both compiled, as trainer.compile=true does it; compiling takes minutes.
"""

import copy
import statistics
from contextlib import ExitStack
from functools import partial

from bench_step import arguments, setting, step
from torch import nn

import recombine
from recombine.stages.profile import turns
from recombine.training import engine

LORA = "LoRA r=8 (peft)"
RIVALS = {  # name -> the method, without its targets
    LORA: partial(recombine.Peft, options={"lora_alpha": 16}),
    "CRISP exact alone": partial(recombine.Crisp, group_size=1),
    "CRISP exact pairs": recombine.Crisp,
    "CRISP half": partial(recombine.Crisp, group_size=1, chunk=64, basis_rank=32),
    "CRISP quarter": partial(recombine.Crisp, group_size=1, chunk=64, basis_rank=16),
    "CERSA": recombine.Cersa,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(size=98, batch=16, rounds=9)
    parser.add_argument("--only", nargs="*", choices=[*RIVALS], default=[*RIVALS], help="rivals beside LoRA")
    parser.add_argument("--targets", nargs="+", default=["q", "k", "v"], help="of all rivals")
    args = parser.parse_args()
    dense, x, y = setting(args)
    rivals: dict[tuple[str, str], nn.Module] = {}
    with ExitStack() as stack:
        for name in dict.fromkeys([LORA, *args.only]):
            for kind in ("eager", "compiled"):
                model = recombine.apply(copy.deepcopy(dense), RIVALS[name](targets=args.targets)).to(x.device).train()
                if kind == "compiled":
                    stack.enter_context(engine.compiled(model, "inductor"))
                    step(model, x, y)
                    print(f"compiled {name}", flush=True)
                rivals[name, kind] = model
        seconds = turns({key: partial(step, model, x, y) for key, model in rivals.items()}, args.rounds)
    print(f"{'':20}{'eager':>10}{'compiled':>10}{'compiled / eager LoRA':>24}")
    for name in dict.fromkeys(name for name, _ in rivals):
        pairs = ((LORA, "eager"), (name, "eager")), ((LORA, "compiled"), (name, "compiled"))
        pairs += (((LORA, "eager"), (name, "compiled")),)
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[one], seconds[two], strict=True)) for one, two in pairs
        ]
        print(f"{name:20}{ratios[0]:>10.2f}{ratios[1]:>10.2f}{ratios[2]:>24.2f}", flush=True)


if __name__ == "__main__":
    main()
