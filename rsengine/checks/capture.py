"""Prove, on any machine, that a recipe's steps can be captured and replayed.

Three consecutive steps of the real model and recipe, training and evaluation, run on a device that does not exist
(:mod:`rsengine.checks.fake_device`): no GPU, no memory, no arithmetic, but every operator a GPU would be handed, in
order. A replay repeats one step's operators on one step's addresses with one step's numbers, so all of these must be
the same in the steps after the first (which may still set things up), and nothing may need the host. Every violation is
reported with the operation and the line that called it.

The check cannot see inside the fused operators, for which their fake implementations stand in. Nor can it see a value
that is constant by mistake (a mask drawn before the first step), or CUDA's own limits, such as a library that allocates
during capture.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsengine.checks.fake_device import NAME, fake_tensors
from rsengine.checks.findings import ADDRESS, LEAK, NUMBER, SEQUENCE, Finding, innermost_site
from rsengine.checks.trace import Halt, HostReads, Operand, Operation, Trace, contained_hooks, storage_of
from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.engine.build import build_evaluation, build_model, build_step
from rsengine.engine.graph import Step, static_batch
from rsengine.engine.step import TrainStep, image_sizes
from rsengine.engine.update import Update
from rsengine.input.resident import ResidentData
from rsengine.kernels.dispatch import assume_triton
from rsengine.parallel.ranks import ALONE, Ranks

STEPS = 3
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # arbitrary: they do not change a step
SHOWN = 20  # findings printed
TRAIN_IMAGES = 50_000  # CIFAR's: the length of an epoch does not change a step, but a schedule needs one


@dataclass(frozen=True)
class Report:
    """What the check found. ``operations``: those of the last step; none if a step did not complete."""

    findings: tuple[Finding, ...]
    operations: tuple[Operation, ...]

    @property
    def launches(self) -> int:
        """Operations that give the device work: at least one kernel each."""
        return sum(operation.launches for operation in self.operations)

    def __str__(self) -> str:
        if not self.findings:
            return (
                f"can be captured: the same {len(self.operations):,} operations in each step, "
                f"{self.launches:,} of which launch work on the device; no host work in between"
            )
        lines = [str(finding) for finding in self.findings[:SHOWN]]
        if len(self.findings) > SHOWN:
            lines.append(f"and {len(self.findings) - SHOWN} more")
        count = f"{len(self.findings)} finding{'s' if len(self.findings) > 1 else ''}"
        return "\n".join([f"cannot be captured: {count}", *lines])


@contextlib.contextmanager
def tracing() -> Iterator[torch.device]:
    """Build and check a step in this block: tensors are fake, and the fused operators run. Yields the fake device."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # describes at length what becomes a finding
    before, log.disabled = log.disabled, True
    try:
        with fake_tensors() as device, assume_triton(), contained_hooks():
            yield device
    finally:
        log.disabled = before


@contextlib.contextmanager
def fake_group(processes: int) -> Iterator[Ranks]:
    """In this block this process is one of ``processes``, which exchange nothing: the operators are called, no more."""
    if processes == 1:
        yield ALONE
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield Ranks(0, processes, 0, processes, "fake")
    finally:
        dist.destroy_process_group()


def check_recipe(
    recipe: Recipe, image_size: tuple[int, int] = (32, 32), num_classes: int = 10, ranks: Ranks = ALONE
) -> dict[str, Report]:
    """Check the training step of a recipe at each image size it trains at, and the evaluation step.

    Model, options and batch sizes are the recipe's, in bfloat16 unless it asks for float32.

    Args:
        ranks: the processes that share a batch, as :func:`fake_group` gives them.

    Returns:
        A report for each step, by name; the name includes the image size if that is not the data set's.

    Raises:
        ValueError: incompatible settings.
    """
    reports = {}
    for size in dict.fromkeys(image_sizes(recipe, image_size)):
        with tracing() as device:
            step, inputs = trace_step(recipe, device, image_size, num_classes, ranks)
            step.image_size = size
            name = "training step" if size is None else f"training step at {size[0]}x{size[1]}"
            reports[name] = check_step(step, inputs)
            evaluation = build_evaluation(step, recipe, num_classes, MEAN, STD)
            if "evaluation step" not in reports:
                with evaluation.evaluation_mode():
                    batch = static_batch(recipe.train.eval_batch_size, image_size, device)
                    reports["evaluation step"] = check_step(evaluation, batch)
    return reports


def trace_step(
    recipe: Recipe,
    device: torch.device,
    image_size: tuple[int, int] = (32, 32),
    num_classes: int = 10,
    ranks: Ranks = ALONE,
) -> tuple[TrainStep, tuple[Tensor, ...]]:
    """The step of a recipe as it would be captured, and its static inputs; to be called inside :func:`tracing`."""
    train = recipe.train
    # Neither of the two ways to move a module's weights to a device works for fake ones; from "meta" they can move.
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        model = build_model(recipe, num_classes)
    bf16 = train.precision != "fp32"
    execution = Execution(device, torch.bfloat16 if bf16 else None, 1, "as on a GPU with bfloat16 matrix units")
    images = max(TRAIN_IMAGES, train.batch_size)
    steps_per_epoch = images // train.batch_size
    inputs = static_batch(ranks.share_of(train.batch_size, "train.batch_size"), image_size, device)
    resident = None
    if train.loader == "resident":
        data = static_batch(images, image_size, device)
        inputs, resident = (), ResidentData(recipe, *data, MEAN, STD, execution, steps_per_epoch, ranks)
    step = build_step(
        recipe,
        num_classes,
        MEAN,
        STD,
        execution,
        steps_per_epoch,
        resident=resident,
        model=model,
        ranks=ranks,
    )
    step.image_size = image_sizes(recipe, image_size)[0]
    return step, inputs


def check_step(step: Step, inputs: Sequence[Tensor] = ()) -> Report:
    """Run ``step(*inputs)`` three times and look for what a replay would not repeat.

    Call it inside :func:`tracing`, with a step and inputs that were made there, on its device.

    Args:
        step: as :class:`rsengine.engine.graph.CapturedStep` takes one. Parameters and buffers of every module
            among its attributes are watched, and what ``step.state_tensors()`` lists.
    """
    trace, addresses, findings = Trace(NAME), [], []
    for _ in range(STEPS):
        trace.begin()
        if not _ran(step, inputs, trace):
            return Report(_unique(trace.findings), ())
        gc.collect()  # a tensor in a reference cycle is not kept, only not yet freed
        addresses.append(_addresses(step, inputs))
        findings += _outliving(trace, set(addresses[-1].values()))
        findings += _moved(trace, addresses[-2:])
    findings = [*trace.findings, *findings, *compare(trace)]
    return Report(_unique(findings), tuple(trace.steps[-1]))


def compare(trace: Trace) -> list[Finding]:
    """What differs between the operations of the last two steps, up to the first that is not the same operator."""
    findings, (before, after) = [], trace.steps[-2:]
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        if old.name != new.name or len(old.arguments) != len(new.arguments):
            detail = f"operation {index} is {new.name} in step 3 and was {old.name} in step 2"
            return [*findings, Finding(SEQUENCE, new.name, new.site, detail, new.forward)]
        pairs = zip(old.arguments, new.arguments, strict=True)
        findings += [_difference(trace, new, a, b) for a, b in pairs if a != b]
    if len(before) != len(after):
        longer, extra = ("step 2", before) if len(before) > len(after) else ("step 3", after)
        odd = extra[min(len(before), len(after))]
        findings.append(Finding(SEQUENCE, odd.name, odd.site, f"only {longer} has this operation", odd.forward))
    return findings


def _difference(trace: Trace, operation: Operation, a: Operand | str, b: Operand | str) -> Finding:
    """Why an argument of an operation, ``b`` in step 3, differs from ``a`` in step 2."""
    kind = ADDRESS
    if isinstance(a, str) or isinstance(b, str):
        kind, detail = NUMBER, f"an argument is {b} in step 3 and was {a} in step 2"
    elif a._replace(source=()) != b._replace(source=()):
        got, was = (f"{x.dtype} {x.shape} with strides {x.stride} on {x.device}" for x in (b, a))
        kind, detail = SEQUENCE, f"an argument is {got} in step 3 and was {was} in step 2"
    elif b.source[:1] == ("kept",) and b.source[1] in trace.births:  # the mistake is where it was made
        return _about(trace, b.source[1], ADDRESS, f"{operation.name} of step 3 reads it, and another one in step 2")
    else:
        detail = "an argument lies in another storage in step 3 than in step 2"
    return Finding(kind, operation.name, operation.site, detail, operation.forward)


def _ran(step: Step, inputs: Sequence[Tensor], trace: Trace) -> bool:
    """Run one step under the trace. Returns False if it did not complete; the trace's findings say why."""
    try:
        with trace, HostReads(trace), _watched_synchronise(trace):
            step(*inputs)
    except Halt:
        return False
    except Exception as error:  # whatever a step raises is a finding about the step
        trace.note_failure(error)
        return False
    return True


@contextlib.contextmanager
def _watched_synchronise(trace: Trace) -> Iterator[None]:
    """Report the calls that wait for the device without an operator that a trace could see."""

    def caught(*_args: object, **_kwargs: object) -> None:
        trace.note_wait("synchronize", innermost_site(sys._getframe(1)))

    owners = (torch.accelerator, torch.cuda, torch.cuda.Stream, torch.cuda.Event)
    before = [owner.synchronize for owner in owners]
    try:
        for owner in owners:
            owner.synchronize = caught
        yield
    finally:
        for owner, function in zip(owners, before, strict=True):
            owner.synchronize = function


# --- addresses ------------------------------------------------------------------------------------------------------


def _addresses(step: Step, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The storage of each tensor whose address must not change, by a name that identifies the tensor."""
    watched: dict[str, Tensor] = {f"inputs[{i}]": tensor for i, tensor in enumerate(inputs)}
    names: dict[int, str] = {}
    for attribute, value in _attributes(step):
        if isinstance(value, nn.Module):
            for name, tensor in (*value.named_parameters(), *value.named_buffers()):
                watched[f"{attribute}.{name}"] = tensor
        elif isinstance(value, Tensor):
            names[storage_of(value)] = attribute
    names |= {storage_of(tensor): name for name, tensor in watched.items()}
    for i, tensor in enumerate(step.state_tensors()):
        watched.setdefault(names.get(storage_of(tensor), f"state_tensors()[{i}]"), tensor)
    return {name: storage_of(tensor) for name, tensor in watched.items()}


def _attributes(step: Step | Update) -> Iterator[tuple[str, object]]:
    """The attributes of a step, with the members of lists and dictionaries one by one."""
    for name, value in vars(step).items():
        if isinstance(value, list | tuple):
            yield from ((f"{name}[{i}]", member) for i, member in enumerate(value))
        elif isinstance(value, dict):
            yield from ((f"{name}[{key!r}]", member) for key, member in value.items())
        elif isinstance(value, Update):
            yield from ((f"{name}.{inner}", member) for inner, member in _attributes(value))
        else:
            yield name, value


def _moved(trace: Trace, addresses: Sequence[dict[str, int]]) -> list[Finding]:
    """Findings about the watched tensors that moved during the last step."""
    if len(addresses) < 2:
        return []
    before, after = addresses
    number = len(trace.steps)
    findings = []
    for name, storage in after.items():
        if before.get(name, storage) != storage:
            detail = f"{name} lies in another storage after step {number} than after step {number - 1}"
            findings.append(_about(trace, storage, ADDRESS, detail))
    return findings


def _outliving(trace: Trace, kept: set[int]) -> list[Finding]:
    """Findings about storages of the step before last that are still alive and not among those ``kept``."""
    number = len(trace.steps) - 1
    detail = f"it was made in step {number}, is alive after step {number + 1} and is not among state_tensors()"
    return [
        _about(trace, storage, LEAK, detail)
        for storage, birth in trace.births.items()
        if birth.step == number and storage not in kept and not birth.storage.expired()
    ]


def _about(trace: Trace, storage: int, kind: str, detail: str) -> Finding:
    """A finding about a storage, at the operation that made it."""
    birth = trace.births.get(storage)
    if birth is None:
        return Finding(kind, "a tensor made outside the step", None, detail)
    operation = trace.steps[birth.step - 1][birth.operation]
    return Finding(kind, operation.name, operation.site, detail, operation.forward)


def _unique(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The first of each kind at each line: one mistake often shows in every parameter, and in every step."""
    return tuple({(finding.kind, finding.site): finding for finding in reversed(findings)}.values())[::-1]
