"""Compress a timm model to 15 % of its weights, adapt it with LoRA in a loop of your own, save it and merge it.

python examples/compress_and_adapt.py        ten seconds on an idle CPU, no downloads
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import digits

import recombine


def main(pretrain: int = 300, adapt: int = 200) -> dict[str, float]:
    """Prints and returns the test accuracies; pretrain and adapt are numbers of training steps."""
    training, test = digits.load()
    model = digits.vit()
    digits.train(model, training, pretrain)  # stands in for downloading a pretrained model
    found = {"pretrained": digits.accuracy(model, test)}

    recombine.apply(model, recombine.Svd(targets=("qkv", "o", "up", "down")), "retained_15")
    found["compressed"] = digits.accuracy(model, test)

    recombine.apply(model, recombine.Peft(config="LoraConfig", targets=("qkv", "o", "up", "down"), rank=4))
    digits.train(model, training, adapt)
    found["adapted"] = digits.accuracy(model, test)
    account = recombine.count(model)

    with TemporaryDirectory() as folder:
        path = recombine.save(model, Path(folder) / "model.safetensors")
        print(f"checkpoint: {path.stat().st_size / 1e3:.0f} kB")
    recombine.merge(model)  # an ordinary timm model again, with the same outputs
    found["merged"] = digits.accuracy(model, test)

    for name, accuracy in found.items():
        print(f"{name:12} {100 * accuracy:.1f} %")
    print(f"retained {100 * account.retained:.1f} % of the layers, trained {account.trained:,} parameters")
    return found


if __name__ == "__main__":
    main()
