"""What the examples share: scikit-learn's handwritten digits, a tiny ViT, and the plainest training loop.

scikit-learn is installed with recombine and brings the digits along, so nothing is downloaded.
"""

import recombine  # noqa: F401, I001  before timm: it lets torchvision be imported beside a torch for CPUs
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]


def load() -> tuple[Data, Data]:
    """(training data, test data): images (N, 1, 8, 8) in [0, 1] and labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def vit(seed: int = 0) -> nn.Module:
    """An untrained ViT of timm: 16 patches of 2 x 2 pixels, 2 blocks of width 64."""
    torch.manual_seed(seed)
    sizes = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=2, num_heads=4)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


def train(model: nn.Module, data: Data, steps: int, lr: float = 3e-3) -> None:
    """Trains whatever has requires_grad."""
    images, labels = data
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of right answers."""
    images, labels = data
    return (model.eval()(images).argmax(1) == labels).float().mean().item()
