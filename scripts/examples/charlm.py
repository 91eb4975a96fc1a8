"""A small GPT on characters, trained on the Python standard library's own sources as this machine has them.

Nothing is downloaded. It prints bits per character as they fall (6.6 is chance, 98 characters being known;
four spaces count as one), then lets the trained model write a few lines of what it takes to be Python:

    python scripts/examples/charlm.py
    python scripts/examples/charlm.py --devices 2
    python -m lightlite.launch --gpus 4 scripts/examples/charlm.py --batch-size 256 --precision bf16-mixed
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint
from lightlite.loggers import CSVLogger

INDENT = "    "
ALPHABET = "\n\t" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(ALPHABET)
PROMPTS = ["import ", "def read_", "class "]


def encode(text: str) -> Tensor:
    """Character numbers of a text, one-dimensional int64. `INDENT` is one character, what is not known is `UNKNOWN`."""
    number = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([number.get(character, UNKNOWN) for character in text.replace(INDENT, "\t")])


def decode(numbers: Tensor) -> str:
    """The text that `encode` has read."""
    return "".join((ALPHABET + "?")[i] for i in numbers.tolist()).replace("\t", INDENT)


def standard_library(limit: int) -> str:
    """The first `limit` characters of the standard library's top-level modules, in order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(folder.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= limit:
            break
    if len(text) < 100_000:
        raise SystemExit(f"found {len(text)} characters of Python sources in {folder}; at least 100,000 are needed")
    return text[:limit]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of a text, each with the same stretch one character later: two (length,) int64 tensors."""

    def __init__(self, numbers: Tensor, length: int) -> None:
        self.numbers, self.length = numbers, length

    def __len__(self) -> int:
        return (len(self.numbers) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.length
        window = self.numbers[start : start + self.length + 1]
        return window[:-1], window[1:]


class Prompts(Dataset[Tensor]):
    """Beginnings for the model to continue, each (length of its text,) int64."""

    def __len__(self) -> int:
        return len(PROMPTS)

    def __getitem__(self, index: int) -> Tensor:
        return encode(PROMPTS[index])


class Sources(pl.LightningDataModule):
    """The standard library's text: the last twentieth for validation, the rest for training.

    Args:
        batch_size: Global training batch: what all ranks together take in one step.
        context: Characters in a window.
        characters: How much of the library to read.
        seed: Seed of the training order. It has a generator of its own, so that dropout does not change it.
        workers: Loader processes of each rank; 0 loads in the rank itself.
    """

    def __init__(self, batch_size: int, context: int, characters: int, seed: int, workers: int) -> None:
        super().__init__()
        self.batch_size, self.context, self.characters = batch_size, context, characters
        self.seed, self.workers = seed, workers

    def setup(self, stage: str) -> None:
        if stage == "predict":
            return
        numbers = encode(standard_library(self.characters))
        held_out = len(numbers) // 20
        self.train_set = Windows(numbers[:-held_out], self.context)
        self.val_set = Windows(numbers[-held_out:], self.context)

    def train_dataloader(self) -> DataLoader[Any]:
        world_size = self.trainer.world_size
        return DataLoader(
            self.train_set,
            batch_size=max(1, self.batch_size // world_size),
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(self.seed),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=32, num_workers=self.workers)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Prompts(), batch_size=1)


class Block(nn.Module):
    """One transformer layer, normalised before attention and before the two linear layers (GPT-2's order)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self._drop(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CharGPT(pl.LightningModule):
    """A GPT whose tokens are characters.

    Shapes: characters (batch, length) int64, length <= context; logits (batch, length, characters known).

    Args:
        lr: Peak learning rate of AdamW, reached after a twentieth of the steps; a cosine brings it down to a tenth.
        dropout: Probability of dropping a feature in each layer.
        context: Characters that the model sees at once.
        width: Features of a character.
        depth: Layers.
        heads: Attention heads of a layer.
    """

    def __init__(
        self, lr: float, dropout: float, context: int = 64, width: int = 128, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.context = context
        self.characters = nn.Embedding(len(ALPHABET) + 1, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET) + 1, bias=False)
        self.head.weight = self.characters.weight
        for parameter in (self.characters.weight, self.positions.weight):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        places = torch.arange(characters.shape[1], device=self.device)
        x = self.characters(characters) + self.positions(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_bits", loss / math.log(2), on_step=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_bits", self._loss(batch) / math.log(2), prog_bar=True, batch_size=len(batch[0]))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.generate(batch, length=240, seed=batch_idx).cpu()

    def configure_optimizers(self) -> dict[str, Any]:
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, steps // 20)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / max(1, steps - warmup))
            return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], betas=(0.9, 0.99), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def generate(self, characters: Tensor, length: int, seed: int, temperature: float = 0.7) -> Tensor:
        """Continue each row of `characters`, (batch, n) int64, by `length` more: (batch, n + length).

        The draws are made on the CPU, so that every kind of device writes the same text.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(length):
            logits = self(characters[:, -self.context :])[:, -1, :UNKNOWN].float().cpu()
            drawn = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            characters = torch.cat([characters, drawn.to(self.device)], dim=1)
        return characters

    def _loss(self, batch: list[Tensor]) -> Tensor:
        characters, following = batch
        return F.cross_entropy(self(characters).flatten(0, 1), following.flatten())


class Progress(pl.Callback):
    """A line after every validation."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        bits = trainer.callback_metrics["val_bits"].item()
        pl_module.print(f"step {trainer.global_step:5d} of {trainer.max_steps}   {bits:.3f} bits per character")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT on the Python standard library's sources.")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps, … (default: what is there)")
    parser.add_argument("--devices", default="auto", help="how many, or which: 2, 0,3 (default: auto)")
    parser.add_argument("--strategy", default="auto", help="single, ddp, … (default: auto)")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, … (default: 32-true)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: 600)")
    parser.add_argument("--batch-size", type=int, default=64, help="global batch, over all ranks (default: 64)")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-workers", type=int, default=0, help="loader processes of each rank (default: 0)")
    parser.add_argument("--characters", type=int, default=3_000_000, help="how much text (default: 3,000,000)")
    parser.add_argument("--root-dir", default="logs/charlm", help="where logs and checkpoints go")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.monotonic()
    pl.seed_everything(args.seed)
    model = CharGPT(args.lr, args.dropout)
    data = Sources(args.batch_size, model.context, args.characters, args.seed, args.data_workers)
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy,
        precision=args.precision,
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 8),
        check_val_every_n_epoch=None,
        limit_val_batches=20,
        gradient_clip_val=1.0,
        logger=CSVLogger(args.root_dir, name=None),
        callbacks=[ModelCheckpoint(monitor="val_bits", filename="{step}-{val_bits:.3f}"), Progress()],
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=data)
    written = trainer.predict(datamodule=data, ckpt_path="best")
    if trainer.is_global_zero:
        for sample in written:
            print("\n" + "-" * 80 + "\n" + decode(sample[0]))
        bits = trainer.checkpoint_callback.best_model_score
        size = sum(parameter.numel() for parameter in model.parameters())
        device = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
        seconds = time.monotonic() - started
        print("-" * 80)
        print(f"{size:,} parameters, {bits:.3f} bits per character, {seconds:.0f} s on {device}")


if __name__ == "__main__":
    main()
