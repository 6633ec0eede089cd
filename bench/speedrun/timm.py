"""`python -m bench.speedrun.timm --data DATA --out FOLDER`: timm's resnetrs50, trained on the same pixels by the clock.

The baseline of the speedrun, in its fastest form in bench/results/train-step-*.md: bfloat16
autocast, channels_last and torch.compile. The recipe is the usual one of CIFAR-10: SGD with Nesterov momentum at 0.1
for 128 images, weight decay 5e-4, one cycle that ends at 0, crop of 4 padded pixels, flip, label smoothing 0.1, and
timm's EMA of the weights. Images go through torchvision's transforms in two workers.

The folder gets rsengine's ``metrics.jsonl``, so that `python -m bench.speedrun.table` draws both, and after each epoch
a checkpoint: the same command goes on from it. Minutes count compiling, training and evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.baselines import MEAN, SMOOTHING, STD, PlainLoop, normalised
from rsengine.data import DataError, find_dataset
from rsengine.input.resident import read_images
from rsengine.run.files import atomic_path
from rsengine.run.log import EPOCH, RunLog
from rsengine.run.progress import Display

BATCH, EVALUATION_BATCH, WORKERS = 128, 500, 2
PEAK_RATE, WEIGHT_DECAY, WARM_UP = 0.1, 5e-4, 0.1
EMA_DECAY = 0.998  # timm's 0.9999 is for runs a hundred times as long
CHECKPOINT = "timm.pt"


class Pictures(Dataset):
    """(M, H, W, 3) uint8 images through a pipeline of torchvision's, with their labels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.numpy(), labels
        self.pipeline = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1:3], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pipeline(Image.fromarray(self.images[index])), self.labels[index]


class TimmRun:
    """The network, its EMA, its optimiser and schedule.

    Args:
        model: a network of timm's.
        total_steps: of the whole run.
        compile: train through ``torch.compile``.
    """

    def __init__(self, model: nn.Module, total_steps: int, *, compile: bool) -> None:
        self.model = model.to(memory_format=torch.channels_last).train()
        self.ema = ModelEmaV3(self.model, decay=EMA_DECAY, use_warmup=True)
        self.steps = 0
        trained = torch.compile(self.model) if compile else self.model
        self.loop = PlainLoop(trained, lambda: self.ema.update(self.model, self.steps), autocast=True)
        for group in self.loop.optimizer.param_groups:
            group["weight_decay"] = WEIGHT_DECAY
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.loop.optimizer, PEAK_RATE, total_steps=total_steps, pct_start=WARM_UP, cycle_momentum=False
        )

    def step(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """One batch: its mean loss, and how many images were right."""
        self.steps += 1
        loss, logits = self.loop(images.contiguous(memory_format=torch.channels_last), labels)
        self.schedule.step()
        return float(loss), int((logits.argmax(1) == labels).sum())

    def save(self, path: Path, epoch: int, seconds: float) -> None:
        with atomic_path(path) as temporary:
            torch.save(
                {
                    "epoch": epoch,
                    "seconds": seconds,
                    "steps": self.steps,
                    "model": self.model.state_dict(),
                    "ema": self.ema.module.state_dict(),
                    "optimizer": self.loop.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                },
                temporary,
            )

    def restore(self, path: Path) -> tuple[int, float]:
        """Epochs done and seconds used."""
        state = torch.load(path, weights_only=True)
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.loop.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        return state["epoch"], state["seconds"]


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy of a network on (M, H, W, 3) uint8 images."""
    training, loss, correct = model.training, 0.0, 0
    model.eval()
    for pixels, target in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalised(pixels).contiguous(memory_format=torch.channels_last)).float()
        loss += float(nn.functional.cross_entropy(logits, target, label_smoothing=SMOOTHING, reduction="sum"))
        correct += int((logits.argmax(1) == target).sum())
    model.train(training)
    return loss / len(labels), correct / len(labels)


def batches(pictures: Pictures, epoch: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch, its order and augmentation drawn from its number."""
    torch.manual_seed(epoch)
    order = torch.randperm(len(pictures))[: limit * BATCH].tolist()
    yield from DataLoader(pictures, BATCH, sampler=order, num_workers=WORKERS, drop_last=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speedrun.timm", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="as of python -m rsengine.train")
    parser.add_argument("--out", type=Path, required=True, help="folder of metrics and checkpoint; goes on from one")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training set (default 12)")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    parser.add_argument("--limit-train-batches", type=int, metavar="N", help="use only this many batches an epoch")
    arguments = parser.parse_args(argv)
    try:
        dataset = find_dataset(arguments.data, log=print)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = dataset.train_count // BATCH
    if arguments.limit_train_batches:
        steps = min(steps, arguments.limit_train_batches)
    pictures, test = Pictures(*read_images(dataset.train_beton)), read_images(dataset.test_beton)

    torch.manual_seed(0)
    model = timm.create_model("resnetrs50", num_classes=len(dataset.classes))
    run = TimmRun(model, arguments.epochs * steps, compile=not arguments.no_compile)
    log, checkpoint = RunLog(arguments.out), arguments.out / CHECKPOINT
    done, seconds = run.restore(checkpoint) if checkpoint.exists() else (0, 0.0)
    log.truncate_after(run.steps if done else -1)
    display = Display(arguments.epochs * steps, run.steps, arguments.epochs, BATCH, print)
    with contextlib.closing(display):
        for epoch in range(done, arguments.epochs):
            started, loss, correct, rate = time.perf_counter(), 0.0, 0, 0.0
            for images, labels in batches(pictures, epoch, steps):
                rate = run.schedule.get_last_lr()[0]
                batch_loss, batch_correct = run.step(images, labels)
                loss, correct = loss + batch_loss, correct + batch_correct
                display.advance()
            trained = time.perf_counter()
            test_loss, test_accuracy = measure(run.model, *test)
            test_loss_ema, test_accuracy_ema = measure(run.ema.module, *test)
            ended = time.perf_counter()
            seconds += ended - started
            record = {
                "kind": EPOCH,
                "epoch": epoch + 1,
                "step": run.steps,
                "train_loss": loss / steps,
                "train_accuracy": correct / (steps * BATCH),
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "test_loss_ema": test_loss_ema,
                "test_accuracy_ema": test_accuracy_ema,
                "learning_rate": rate,
                "images_per_second": steps * BATCH / (trained - started),
                "seconds": seconds,
                "epoch_seconds": trained - started,
                "eval_seconds": ended - trained,
            }
            log.append(record)
            display.epoch(record)
            run.save(checkpoint, epoch + 1, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
