"""Compress with methods that look at data: SVD-LLM needs layer inputs, JACTUS also gradients of the loss.

    python examples/calibrate.py        ten seconds on an idle CPU, no downloads

Such a method takes `losses`: a function that yields one task loss a calibration batch. A loss must come with its graph,
because recombine calls backward() on it where gradients are needed.
"""

import copy

import digits
import torch.nn.functional as F

import recombine


def main(pretrain: int = 300, batches: int = 8) -> dict[str, float]:
    """Prints and returns the test accuracies at a tenth of the weights, before any further training."""
    (images, labels), test = digits.load()
    original = digits.vit()
    digits.train(original, (images, labels), pretrain)  # stands in for downloading a pretrained model
    found = {"original": digits.accuracy(original, test)}

    layers = ("q", "k", "v", "o", "up", "down")
    for method in (recombine.Svd(targets=layers), recombine.SvdLlm(targets=layers), recombine.Jactus(targets=layers)):
        model = copy.deepcopy(original)

        def losses(model=model):
            for batch in range(batches):
                rows = slice(32 * batch, 32 * (batch + 1))
                yield F.cross_entropy(model(images[rows]), labels[rows])

        recombine.apply(model, method, "retained_10", losses)
        found[type(method).__name__] = digits.accuracy(model, test)

    for name, accuracy in found.items():
        print(f"{name:10} {100 * accuracy:.1f} %")
    return found


if __name__ == "__main__":
    main()
