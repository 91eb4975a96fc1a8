"""A loop of your own, with Fabric: handwritten digits, on any device, on several, in any precision.

The same loop without the lines that say `fabric` is plain PyTorch, and has the same numbers. On two CPU ranks:

    python scripts/examples/own_loop.py --devices 2
    python -m lightlite.launch --devices 2 --accelerator cpu scripts/examples/own_loop.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightlite import Fabric

TRAIN = 1440
BATCH = 32


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """1,440 images of 8 x 8 pixels to train on, 357 to be scored."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
    return TensorDataset(images[:TRAIN], labels[:TRAIN]), TensorDataset(images[TRAIN:], labels[TRAIN:])


def train(fabric: Fabric, epochs: int) -> float:
    """Train, save and score; the share of images that was told right."""
    fabric.seed_everything(7)
    training, held_out = datasets()
    # ranks with batch size b see the global batches of one process with ranks x b
    loader = fabric.setup_dataloaders(DataLoader(training, BATCH // fabric.world_size, shuffle=True))
    scoring = fabric.setup_dataloaders(DataLoader(held_out, BATCH), evaluation=True)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=2e-3))
    for epoch in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            fabric.backward(loss)
            optimizer.step()
        fabric.print(f"epoch {epoch}: loss {fabric.all_reduce(loss.detach()):.4f}")
    fabric.save("own_loop.ckpt", {"model": model, "optimizer": optimizer, "epochs": epochs})
    model.eval()
    right = torch.zeros(2)
    with torch.no_grad():
        for images, labels in scoring:
            right += torch.tensor([(model(images).argmax(1) == labels).sum(), len(labels)])
    told, all_images = fabric.all_reduce(right, reduce_op="sum").tolist()
    fabric.print(f"accuracy {told / all_images:.1%} of {all_images:.0f} images, on {fabric.world_size} ranks")
    return told / all_images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, precision=options.precision)
    fabric.launch(train, options.epochs)
