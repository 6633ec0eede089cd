"""Builds the network, the training step and the evaluation of a recipe. Nothing else assembles these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import nn

from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.engine.evaluation import EvaluationStep
from rsengine.engine.step import TrainStep
from rsengine.input.resident import ResidentData
from rsengine.kernels import explain
from rsengine.model import ResNetRS, resnet_rs
from rsengine.model.layers import use_products, use_ranks, use_sync_batch_norm
from rsengine.model.preprocess import Preprocess
from rsengine.parallel.ranks import ALONE, Ranks


def build_model(recipe: Recipe, num_classes: int) -> ResNetRS:
    """The network a recipe describes."""
    options = asdict(recipe.model)
    return resnet_rs(num_classes=num_classes, **(options | {"blocks": options["blocks"] or None}))


def build_step(
    recipe: Recipe,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    execution: Execution,
    steps_per_epoch: int,
    *,
    resident: ResidentData | None = None,
    model: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> TrainStep:
    """The training step of a recipe. On a GPU it trains on copies of the weights in autocast's dtype where it can.

    Args:
        mean, std: of the data set, three numbers each, in units of 0 to 1.
        resident: as :class:`TrainStep` takes it, of as many steps an epoch.
        model: a network to train in place of the recipe's own.
        ranks: the processes that share each batch, as :class:`TrainStep` takes them.

    Raises:
        ValueError: ``resident`` has batches of another number of steps: its table would end before the step's do.
    """
    if resident is not None and resident.steps_per_epoch != steps_per_epoch:
        raise ValueError(
            f"resident: expected data of {steps_per_epoch} steps an epoch; got those of {resident.steps_per_epoch}"
        )
    model = build_model(recipe, num_classes) if model is None else model
    use_products(model, recipe.train.convolutions)
    use_ranks(model, ranks)
    if ranks.size > 1 and recipe.train.batch_norm == "sync":
        use_sync_batch_norm(model, ranks)
    preprocess = Preprocess(mean, std, execution.device)
    copies = execution.device.type != "cpu" and execution.autocast_dtype is not None and recipe.train.micro_batches == 1
    return TrainStep(
        model, recipe, preprocess, execution, steps_per_epoch, resident=resident, weight_copies=copies, ranks=ranks
    )


def build_evaluation(
    step: TrainStep, recipe: Recipe, num_classes: int, mean: Sequence[float], std: Sequence[float]
) -> EvaluationStep:
    """The evaluation of the network that a step trains, ``raw``, and of its EMA, ``ema``, with the training loss."""
    models = {"raw": step.model} | ({} if step.ema_model is None else {"ema": step.ema_model})
    preprocess = Preprocess(mean, std, step.execution.device)
    return EvaluationStep(models, preprocess, step.execution, num_classes, recipe.train.label_smoothing, step.ranks)


def explain_layers(recipe: Recipe, execution: Execution, compiled: bool = False, processes: int = 1) -> list[str]:
    """Which implementations the layers of a run on the CPU have, and why.

    Args:
        compiled: whether ``torch.compile`` compiles the network.
        processes: how many share each batch.
    """
    if compiled:
        return ["bottleneck and batch_norm: eager on cpu, because torch.compile sees only PyTorch's operators"]
    why = ""
    if execution.autocast_dtype != torch.bfloat16:
        why = "the run computes in float32"
    elif recipe.train.convolutions != "auto":
        why = f"train.convolutions is {recipe.train.convolutions}"
    elif processes > 1 and recipe.train.batch_norm == "sync":
        why = "batch norm is that of all processes"
    bottleneck = f"bottleneck: eager on cpu, because {why}" if why else explain("bottleneck", "cpu")
    if bottleneck.startswith("bottleneck: native"):
        return [bottleneck]
    norm = explain("batch_norm", "cpu")
    together = bottleneck.partition(": ")[2] == norm.partition(": ")[2]
    return ["bottleneck and " + norm] if together else [bottleneck, norm]
