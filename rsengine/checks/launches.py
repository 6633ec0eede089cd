"""How many operations a training step hands to the device: the engine's step beside the same one in plain PyTorch.

``python -m rsengine.capture_check --launch-table`` prints docs/launches.md.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from rsengine.checks.capture import check_step, trace_step, tracing
from rsengine.checks.costs import H100_BYTES, H100_FLOPS, LAUNCH_SECONDS, kernels_of, predict
from rsengine.checks.trace import Operation
from rsengine.config import Recipe, load_recipe
from rsengine.engine.step import TrainStep
from rsengine.model import Bottleneck
from rsengine.model.layers import BatchNorm

RECIPES = ("report-1", "quickstart")
# Parts of a step, in the table's order.
IMAGES, PRODUCTS, NORM = "images: normalise, resize, mix", "convolutions, linear layers", "batch norm and its counters"
OTHER, CASTS = "ReLU, pooling, dropout, sums of branches", "other casts between float32 and bfloat16"
EPILOGUE, LOSS = "block epilogue and its casts", "loss and accuracy"
GRADIENTS, UPDATE, COUNTERS = "gradients: clear, accumulate", "SGD and EMA", "tables, counters, sums"
PARTS = (IMAGES, PRODUCTS, NORM, OTHER, CASTS, EPILOGUE, LOSS, GRADIENTS, UPDATE, COUNTERS)
# The part that an operation under a label belongs to; the network's are told apart by name.
STAGES = {
    "images": IMAGES,
    "network": OTHER,
    "block epilogue": EPILOGUE,
    "loss": LOSS,
    "gradients": GRADIENTS,
    "backward": GRADIENTS,  # what no forward operation is known for
    "update": UPDATE,
    "counters": COUNTERS,
}

COUNTING = ("aten.add_.Tensor", "aten._foreach_add_.Scalar")  # of batches, in torch.nn's layers and in ours

INTRODUCTION = """\
# Operations a step hands to the device

Written by `python -m rsengine.capture_check --launch-table > docs/launches.md`; a test keeps it current.

**Counted on a traced fake device, not measured on a GPU.** One training step of each recipe, bfloat16 autocast, at its
own batch size on 32x32 pixels and 10 classes. Counted is every operator call that gives the device work; views and
allocations are not.

- *plain*: squeeze-and-excite from single operators as timm has it, `F.cross_entropy`, `torch.optim.SGD(foreach=True)`,
  EMA by `torch._foreach_lerp_`, weights cast by autocast.
- *engine*: the step of `rsengine.engine.step` as it is captured: the fused operators of `rsengine.kernels`, bfloat16
  copies of the weights that the update writes, schedules and sums on the device.

Both set gradients to `None`, so that the backward pass writes each one once.

"""
NOTES = """
The *kernels* are those that the operators are known to launch (`rsengine/checks/costs.py`); `make gpu-check` compares
them with what a profiler sees. Replaying a captured step launches its kernels without the host. Whether a convolution's
weight gradient comes in the layout of its weight depends on the device: here those of the 3x3 convolutions do not, and
a copy is counted for each under *gradients*.

## On an H100: predicted, not measured

For each operator the largest of three times, added up: {launch} µs a kernel inside a CUDA graph, which is assumed (2 to
2.5 are usual); the bytes of its operands and results, as if none were in a cache, at {bandwidth} TB/s; its FLOPs in
bfloat16 at {flops} TFLOP/s. The last two are the data sheet's, and no kernel reaches them: so each figure is more than
a card will do. *Bytes alone* is what the memory would allow if launches and arithmetic cost nothing. All recipes have
their data resident. The last row is the *plain* step, captured as it is.

*Measured* are milliseconds on one NVIDIA H200, which has the same units and 4.8 TB/s (PyTorch 2.11.0, Triton 3.6.0,
[2026-11-26](../bench/results/gpu-nvidia-h200-2026-11-26.md)): `report-1` with its batch on the card, `quickstart` as
the mean of its last epoch. They are 2.5 and 2.8 times the predicted: the number of kernels was right (446 in the
profile), but a small kernel took 4 to 9 µs and not {launch}. [performance.md](performance.md#on-an-h200-measured) says
why.

"""


class PlainBottleneck(Bottleneck):
    """The block as timm writes it: squeeze-and-excite, stochastic depth, sum and ReLU from plain operators."""

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        branch, shortcut = self.bn3(self.conv3(branch)), self.shortcut(x)
        with record_function("block epilogue"):
            return self._epilogue(branch, shortcut)

    def _epilogue(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        reduce, expand = self.se.reduce, self.se.expand  # timm's are 1x1 convolutions
        gate = F.relu(F.conv2d(branch.mean((2, 3), keepdim=True), reduce.weight[:, :, None, None], reduce.bias))
        branch = branch * torch.sigmoid(F.conv2d(gate, expand.weight[:, :, None, None], expand.bias))
        if self.training and self.drop_path > 0:
            keep = 1 - self.drop_path
            branch = branch * branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)
        return F.relu(branch + shortcut)


class PlainBatchNorm(BatchNorm):
    """The layer of ``torch.nn``, which counts its batches itself."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        y = nn.BatchNorm2d.forward(self, x)
        return F.relu(y) if relu else y


class PlainStep:
    """The step of a recipe without :mod:`rsengine.kernels`: with the loss, optimiser and EMA that PyTorch offers."""

    def __init__(self, step: TrainStep, recipe: Recipe) -> None:
        # `step` is used up: the plain one takes its network and changes it.
        self.model, self.preprocess, self.execution = step.model, step.preprocess, step.execution
        for module in self.model.modules():
            for kind in (PlainBottleneck, PlainBatchNorm):
                if type(module) is kind.__base__:
                    module.__class__ = kind
        self.model._batch_norms = []
        self.ema_model = copy.deepcopy(self.model).requires_grad_(False)
        self.smoothing, self.decay = recipe.train.label_smoothing, recipe.ema.decay
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        exempt = [p for p in self.model.parameters() if p.dim() == 1]
        options = {"lr": 0.1, "momentum": recipe.optimizer.momentum, "nesterov": recipe.optimizer.nesterov}
        groups = [{"params": decayed, "weight_decay": recipe.optimizer.weight_decay}, {"params": exempt}]
        self.optimizer = torch.optim.SGD(groups, **options, foreach=True)
        self.loss_sum = torch.zeros((), device=step.counter.device)
        self.correct_sum = torch.zeros((), dtype=torch.int64, device=step.counter.device)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        with record_function("gradients"):
            self.optimizer.zero_grad(set_to_none=True)
        with record_function("images"):
            images = self.preprocess(images)
        with self.execution.autocast():
            with record_function("network"):
                logits = self.model(images)
            with record_function("loss"):
                loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
                correct = (logits.argmax(1) == labels).sum()
        with record_function("backward"):
            loss.backward()
        with record_function("update"):
            self.optimizer.step()
            self._update_ema()
        with record_function("counters"):
            self.loss_sum += loss.detach()
            self.correct_sum += correct

    def _update_ema(self) -> None:
        ours, averaged = ([*m.parameters(), *m.buffers()] for m in (self.model, self.ema_model))
        pairs = [(a, b) for a, b in zip(averaged, ours, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [b.detach() for _, b in pairs], 1 - self.decay)

    def state_tensors(self) -> list[Tensor]:
        return [self.loss_sum, self.correct_sum]


# (recipe, batch, pixels a side)
PREDICTED = (
    *(("report-1", batch, 32) for batch in (128, 512, 1024)),
    ("report-4", 128, 32),
    ("quickstart", 256, 32),
    *(("speedrun", 512, side) for side in (16, 24, 32)),
)

# Milliseconds of a step on an NVIDIA H200, from bench/results/gpu-nvidia-h200-2026-11-26.json.
MEASURED = {("report-1", 128, 32): 3.15, ("quickstart", 256, 32): 1.97}


def launch_table() -> str:
    """The text of docs/launches.md."""
    columns: dict[str, Counter[str]] = {}
    for name in RECIPES:
        plain, engine = step_operations(load_recipe(name))
        for label, operations in (("plain", plain), ("engine", engine)):
            columns[f"{name}, {label}"] = _by_part(operations, lambda operation: operation.launches)
            columns[f"{name}, {label}: kernels"] = _by_part(operations, kernels_of)
    rows = [["part of the step", *columns]]
    rows += [[part, *(f"{column[part]:,}" for column in columns.values())] for part in PARTS]
    rows.append(["**all**", *(f"**{column.total():,}**" for column in columns.values())])
    notes = NOTES.format(launch=LAUNCH_SECONDS * 1e6, bandwidth=H100_BYTES / 1e12, flops=round(H100_FLOPS / 1e12))
    return INTRODUCTION + _table(rows) + notes + _table(_predictions())


def _predictions() -> list[list[str]]:
    columns = "recipe", "batch", "pixels", "operators", "kernels", "GB", "TFLOP", "ms", "measured"
    rows = [[*columns, "images/s", "bytes alone"]]
    for name, batch, side in PREDICTED:
        recipe = load_recipe(name).with_settings([f"train.batch_size={batch}", "train.loader=resident"])
        with tracing() as device:
            step, inputs = trace_step(recipe, device)
            step.image_size = None if side == 32 else (side, side)
            engine = check_step(step, inputs)
        rows.append([name, *_prediction(batch, side, engine.operations, MEASURED.get((name, batch, side)))])
    recipe = load_recipe("report-1")
    plain, _ = step_operations(recipe)
    rows.append(["report-1, plain, captured", *_prediction(recipe.train.batch_size, 32, plain)])
    return rows


def _prediction(batch: int, side: int, operations: Sequence[Operation], measured: float | None = None) -> list[str]:
    found = predict(operations)
    counts = f"{found.operators:,}", f"{found.kernels:,}", f"{found.bytes / 1e9:.2f}", f"{found.flops / 1e12:.3f}"
    # Three digits: the time of a launch is known to a tenth.
    rates = (f"{float(f'{batch / seconds:.3g}'):,.0f}" for seconds in (found.seconds, found.memory_seconds))
    milliseconds = f"{found.seconds * 1e3:.2f}", "" if measured is None else f"{measured:.2f}"
    return [f"{batch:,}", str(side), *counts, *milliseconds, *rates]


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def step_operations(recipe: Recipe) -> tuple[Sequence[Operation], Sequence[Operation]]:
    """The operations of the plain step, and of the engine's.

    Raises:
        ValueError: the engine's step of this recipe cannot be captured.
    """
    with tracing() as device:
        step, inputs = trace_step(recipe, device)
        engine = check_step(step, inputs)
        if engine.findings:
            raise ValueError(f"recipe {recipe.name}: {engine}")
        plain = check_step(PlainStep(step, recipe), inputs)  # no graph is made of it: its findings do not matter
    return plain.operations, engine.operations


def _by_part(operations: Sequence[Operation], count: Callable[[Operation], int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for operation in operations:
        if operation.launches:
            found[part_of(operation)] += count(operation)
    return found


def part_of(operation: Operation) -> str:
    """Which of :data:`PARTS` an operation belongs to: by its innermost known label, and within the network by its name.

    Raises:
        ValueError: an operation outside every labelled stage of a step.
    """
    stage = next((label for label in reversed(operation.labels) if label in STAGES), None)
    if stage is None:
        raise ValueError(f"{operation.name} at {operation.site}: expected a label of {', '.join(STAGES)}")
    name = operation.name
    if stage != "network":
        return STAGES[stage]
    if "squeeze_excite" in name:
        return EPILOGUE
    if name == "aten._to_copy":
        return CASTS
    if "convolution" in name or "mm" in name:
        return PRODUCTS
    return NORM if "batch_norm" in name or name in COUNTING else OTHER
