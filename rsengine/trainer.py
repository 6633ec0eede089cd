"""The training loop: epochs of steps, evaluation, records, checkpoints, and stopping cleanly at any moment."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from rsengine.checked import Field, FieldError
from rsengine.config import Recipe
from rsengine.data import Dataset, identity_of
from rsengine.data.errors import UserError
from rsengine.device import Execution
from rsengine.engine.build import build_evaluation, build_step
from rsengine.engine.evaluation import Evaluation
from rsengine.engine.graph import CapturedStep, CudaRecorder, choose_step, static_batch, uses_graph
from rsengine.engine.step import image_sizes
from rsengine.input.batches import open_batches
from rsengine.output import counted
from rsengine.parallel.ranks import ALONE, Ranks
from rsengine.run.checkpoint import damaged, save_checkpoint
from rsengine.run.files import CHECKPOINT_FILE
from rsengine.run.initial import Initial
from rsengine.run.log import EPOCH, INTERVAL, START, RunLog
from rsengine.run.machine import machine, versions
from rsengine.run.progress import Display
from rsengine.run.recovery import copy_best, lost_records, renew, what_changed
from rsengine.run.same_data import describe_data, refuse_other_data
from rsengine.run.signals import StopRequest, stop_requests
from rsengine.run.tensors import check_like
from rsengine.run.weights import save_weights

MOST_NAMED = 3  # parameters in one line
ASK_EVERY = 8  # steps on a GPU, after which several processes ask each other whether to stop


class DivergedError(UserError):
    """The loss or a weight is no longer a finite number."""

    status = 1


@dataclass
class Progress:
    """The position of a run, which with the recipe determines the next batch, and sums since the last evaluation."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done in the current epoch
    seconds: float = 0.0  # of training and evaluation, over all processes that worked on the run
    epoch_seconds: float = 0.0  # of training, since the last evaluation
    loss: float = 0.0  # sum over the images since the last evaluation
    correct: int = 0
    images: int = 0


class Trainer:
    """One run of a recipe on a data set, writing into a run folder.

    Args:
        out: the run folder; it must exist when the run begins, and may be set anew until then.
        origin: of the weights that the run begins with, or began with, as :meth:`rsengine.run.initial.Initial.origin`
            gives it; None for random ones.
        graph: on a GPU, capture the step and the evaluation as CUDA graphs.
        compile: compile the training pass of the network with ``torch.compile``.
        say: prints one line for the user.
        bar: show the progress as a bar; None: on a terminal and in a notebook.
        started: when the run was asked for, in seconds of :func:`time.time`; None: when the process began.
        ranks: the processes that work on the run. The one of rank 0 alone writes to the run folder.

    Attributes:
        watch: called with each record after it is logged, see :mod:`rsengine.run.log`.
        stop: the signal that has asked the run to stop, if there was one.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        execution: Execution,
        out: Path,
        *,
        origin: dict[str, Any] | None = None,
        graph: bool = True,
        compile: bool = False,
        say: Callable[[str], None] = print,
        bar: bool | None = None,
        started: float | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        dataset = replace(dataset, identity=identity_of(dataset))  # found once where an older version wrote none
        self.recipe, self.dataset, self.execution, self.say, self.ranks = recipe, dataset, execution, say, ranks
        self.set_folder(out)
        self.bar, self.started = bar, started or psutil.Process().create_time()
        self.watch: Callable[[dict[str, Any]], None] = lambda _record: None
        self.origin = origin
        self.graph, self.compile = uses_graph(execution, graph), compile
        self.recorder = CudaRecorder(execution.device) if self.graph else None
        torch.manual_seed(recipe.train.seed)
        self.batches = open_batches(recipe, dataset, execution, ranks)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.image_sizes = image_sizes(recipe, dataset.image_size)
        data = len(dataset.classes), dataset.mean, dataset.std
        self.step = build_step(
            recipe,
            *data,
            execution,
            self.steps_per_epoch,
            resident=self.batches.resident,
            ranks=ranks,
        )
        self.step.given_weights = origin is not None
        self.evaluation = build_evaluation(self.step, recipe, *data)
        self.captured_evaluation: CapturedStep | None = None
        self.progress = Progress()
        self.best: dict[str, float | int] = {"accuracy": -1.0, "epoch": 0}
        self.result: dict[str, Evaluation] = {}  # of the last evaluation in this process
        self.resumed = False
        self.stop = StopRequest()
        self._first_step_pending = True
        self._saving = 0.0  # seconds, since the last record

    def set_folder(self, out: Path) -> None:
        """Name the run folder."""
        self.out, self.log = out, RunLog(out)

    def start_from(self, initial: Initial) -> None:
        """Begin with given weights instead of random ones. Raises :class:`InitialError` where they do not fit."""
        self.step.start_from(initial.fitted(self.step.model, self.dataset.classes, self.say))

    @property
    def steps_done(self) -> int:
        return self.progress.epoch * self.steps_per_epoch + self.progress.batch

    @property
    def total_steps(self) -> int:
        return self.recipe.train.epochs * self.steps_per_epoch

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end of the recipe. Returns 0, or the number of the signal that stopped the run early.

        Raises:
            DivergedError: the loss or a weight stopped being finite.
        """
        train = self.recipe.train
        step = None
        height, width = self.dataset.image_size
        work = [size[0] * size[1] / (height * width) if size else 1.0 for size in self.image_sizes]
        display = Display(self.total_steps, self.steps_done, train.epochs, train.batch_size, self.say, work, self.bar)
        ranks = self.ranks
        ranks.copy_from_main_(self.step.state_tensors())
        with contextlib.closing(display), stop_requests() as self.stop:
            while self.progress.epoch < train.epochs:
                size = self.image_sizes[self.progress.epoch]
                if step is None or size != self.step.image_size:
                    self.step.image_size = size
                    first, step = step is None, None  # a graph leaves its memory to the next one
                    step = self._choose_step(first)
                if stopped_by := self._train_epoch(step, display):
                    self.save()
                    return stopped_by
                self._finish_epoch(display)
                (stopped_by,) = ranks.most(self.stop.signal)
                if stopped_by and self.progress.epoch < train.epochs:
                    return stopped_by  # it came during the evaluation, which was completed
        self._renew()
        return 0

    def _choose_step(self, first: bool) -> Callable[..., None]:
        """What the loop calls for each step while images keep their size. It is captured while no loader runs, because
        the loader's thread may use the GPU, which a capture forbids."""
        device, train = self.execution.device, self.recipe.train
        inputs = self.batches.static_inputs(device) if self.graph else ()
        if self.recorder is not None and first:
            batch = static_batch(train.eval_batch_size, self.dataset.image_size, device)
            with self.evaluation.evaluation_mode():
                self.captured_evaluation = CapturedStep(self.evaluation, batch, self.recorder)
        return choose_step(self.step, inputs, recorder=self.recorder, compile=self.compile and first)

    def _train_epoch(self, step: Callable[..., None], display: Display) -> int:
        """Train for the rest of the current epoch. Returns the number of the signal that stopped it early, or 0."""
        progress, interval = self.progress, self.recipe.train.log_interval
        started = saved = time.perf_counter()
        interval_steps, waited = 0, 0.0
        with contextlib.closing(self.batches.train_epoch(progress.epoch, progress.batch)) as batches:
            while progress.batch < self.steps_per_epoch:
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                step(*batch)
                progress.batch += 1
                interval_steps += 1
                display.advance()
                if self._first_step_pending:
                    self._record_start()
                    # Counting the model takes seconds, so the first step comes before it.
                    aside = time.perf_counter()
                    display.line(f"model: {self.step.model.summary(self.dataset.image_size)}")
                    started += time.perf_counter() - aside
                if self.steps_done == 2:  # in the first, the batch norms that begin at zero hold back all before them
                    for line in self._dead_parameters():
                        display.line(line)
                minutes = self.recipe.train.checkpoint_minutes
                checkpoint_due = minutes > 0 and time.perf_counter() - saved > 60 * minutes
                last = progress.batch == self.steps_per_epoch
                # Read once: a signal may come between any two lines.
                stopping, checkpoint_due = self._agreed(self.stop.signal, checkpoint_due, last)
                if interval_steps == interval or last or stopping or checkpoint_due:
                    started = self._record_interval(display, started, waited)
                    interval_steps, waited = 0, 0.0
                if stopping:  # also at the end of an epoch: an evaluation may take long
                    return stopping
                if checkpoint_due and not last:
                    self.save()
                    saved = started = time.perf_counter()
        return 0

    def _dead_parameters(self) -> Iterator[str]:
        """A line about the parameters whose gradient is exactly zero, if there are any. Waits for the device."""
        update = self.step.update
        if names := update.without_gradient():
            sizes = {name: p.numel() for name, p in zip(update.names, update.params, strict=True)}
            dead = sum(sizes[name] for name in names)
            more = f" and {len(names) - MOST_NAMED:,} more" * (len(names) > MOST_NAMED)
            yield (
                f"warning: {len(names):,} of {len(sizes):,} parameter tensors, {dead / sum(sizes.values()):.1%} of all "
                f"parameters, had a gradient of exactly zero in the second step, so they do not learn: "
                f"{', '.join(names[:MOST_NAMED])}{more}"
            )

    def _agreed(self, signal: int, checkpoint_due: bool, last: bool) -> tuple[int, bool]:
        """What all processes do after this step: stop for a signal that any of them got, save if that is due in any.

        On a GPU they ask each other only now and then, because the host runs ahead of the device otherwise.
        """
        if (
            self.execution.device.type == "cuda"
            and self.ranks.size > 1
            and self.progress.batch % ASK_EVERY
            and not last
        ):
            return 0, False
        signal, due = self.ranks.most(signal, checkpoint_due)
        return signal, bool(due)

    def _finish_epoch(self, display: Display) -> None:
        """Evaluate if that is due, record the epoch, and keep the best checkpoint."""
        progress, train = self.progress, self.recipe.train
        if (progress.epoch + 1) % train.evaluate_every and progress.epoch + 1 < train.epochs:
            self.progress = replace(progress, epoch=progress.epoch + 1, batch=0)  # the sums continue
            self.save()
            return
        started = time.perf_counter()
        self.evaluate()
        eval_seconds = time.perf_counter() - started
        train_seconds = progress.epoch_seconds
        raw, ema = self.result["raw"], self.result.get("ema")
        record = {
            "kind": EPOCH,
            "epoch": progress.epoch + 1,
            "step": self.steps_done,
            "train_loss": progress.loss / progress.images,
            "train_accuracy": progress.correct / progress.images,
            "test_images": raw.images,
            "test_loss": raw.loss,
            "test_accuracy": raw.accuracy,
            "test_loss_ema": ema.loss if ema else None,
            "test_accuracy_ema": ema.accuracy if ema else None,
            "learning_rate": float(self.step.update.learning_rates[self.steps_done - 1]),
            "images_per_second": progress.images / train_seconds,
            "seconds": progress.seconds + eval_seconds,
            "epoch_seconds": train_seconds,
            "eval_seconds": eval_seconds,
        }
        self._check_weights()
        self._log(record)
        self.progress = Progress(epoch=progress.epoch + 1, seconds=progress.seconds + eval_seconds)
        display.epoch(record)
        accuracy = (ema or raw).accuracy
        improved = accuracy > self.best["accuracy"]
        if improved:
            self.best = {"accuracy": accuracy, "epoch": self.progress.epoch}
        self.save()
        if improved and self.ranks.is_main:
            copy_best(self.out)

    def evaluate(self) -> dict[str, Evaluation]:
        """Measure the network and, if there is one, its EMA on the test set. The result is kept in :attr:`result`, at
        the end of the run with what they say of each image, which the records show."""
        last = self.progress.epoch + 1 >= self.recipe.train.epochs
        self.result = self.evaluation.measure(self.batches.test_epoch(), self.captured_evaluation, predictions=last)
        return self.result

    # --- records ------------------------------------------------------------------------------------------------------

    def _record_start(self) -> None:
        if self.execution.device.type == "cuda":
            torch.cuda.synchronize()  # once a process: the first step has to be over to be timed
        self._first_step_pending = False
        seconds = time.time() - self.started
        self._log(
            {
                "kind": START,
                "step": self.steps_done - 1,
                "time_to_first_step": seconds,
                "device": self.execution.device.type,
                "precision": self.execution.precision,
                "threads": self.execution.threads,
                "processes": self.ranks.size,
                "graph": self.graph,
                "compiled": self.compile,
                "resumed": self.resumed,
                "origin": self.origin,
                "data": {
                    "name": self.dataset.name,
                    "identity": self.dataset.identity,
                    "train_images": self.dataset.train_count,
                    "test_images": self.dataset.test_count,
                    "folder": str(self.dataset.folder.absolute()),
                    "checksum": self.dataset.checksum,
                    "sha256": self.dataset.sha256,
                },
                "machine": machine(),
                "versions": versions(),
            }
        )

    def _record_interval(self, display: Display, started: float, waited: float) -> float:
        """Read the step's sums, add them to the epoch's and log them. Raises if a loss was bad. Returns the time.

        ``waited``: seconds since ``started`` in which the loop waited for batches.
        """
        totals = self.step.read_totals()
        now = time.perf_counter()
        seconds, progress = now - started, self.progress
        progress.seconds += seconds
        progress.epoch_seconds += seconds
        if totals.first_bad_step >= 0:
            raise self._diverged(totals.first_bad_step, "the loss")
        progress.loss += totals.loss
        progress.correct += totals.correct
        progress.images += totals.images
        record = {
            "kind": INTERVAL,
            "step": self.steps_done,
            "epoch": self.steps_done / self.steps_per_epoch,
            "train_loss": totals.loss / totals.images,
            "train_accuracy": totals.correct / totals.images,
            "learning_rate": float(self.step.update.learning_rates[self.steps_done - 1]),
            "images_per_second": totals.images / seconds,
            "seconds": progress.seconds,
            "loader_seconds": waited,
            "checkpoint_seconds": self._saving,
        }
        self._saving = 0.0
        self._log(record)
        display.interval(progress.epoch + 1, record)
        return now

    def _log(self, record: dict[str, Any]) -> None:
        if not self.ranks.is_main:
            return
        self.log.append(record)
        self.watch(record)

    def _check_weights(self) -> None:
        if not self.step.weights_finite():
            raise self._diverged(self.steps_done - 1, "a weight")

    def _diverged(self, step: int, what: str) -> DivergedError:
        last = self.out / CHECKPOINT_FILE
        good = f"the last good checkpoint is {last}" if last.exists() else "there is no good checkpoint yet"
        rate = self.step.update.learning_rates[step]
        return DivergedError(
            f"{what} is no longer a finite number at step {step} (learning rate {rate:.4g}); {good}. "
            "Try a lower schedule.learning_rate or a longer schedule.warmup_epochs"
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        progress = asdict(self.progress)
        return {
            "recipe": self.recipe.to_toml(),
            "versions": versions(),
            "dataset": describe_data(self.dataset),
            "epoch": progress.pop("epoch"),
            "batch": progress.pop("batch"),
            "seconds": progress.pop("seconds"),
            "totals": progress,
            "best": self.best,
            "origin": self.origin,
            "step": self.step.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if self.execution.device.type == "cuda" else None,
            },
        }

    def save(self) -> None:
        """Write the checkpoint and, once an epoch is done, the weights to use. Refuses weights that are not finite."""
        started = time.perf_counter()
        self._check_weights()
        if not self.ranks.is_main:
            return
        self.log.sync()  # first: a resume counts on the records of what is done
        save_checkpoint(self.out / CHECKPOINT_FILE, self._state())
        if self.progress.batch == 0:
            save_weights(self.out, self._result_model, self.recipe, self.dataset)
        self._saving += time.perf_counter() - started

    def restore(self, state: dict[str, Any], data_named_by: str = "") -> None:
        """Resume from a checkpoint. Raises :class:`CheckpointError` if it is of another data set or network.

        ``data_named_by``: the environment variable that names the data set, where one does.
        """
        saved, path = Field(state), self.out / CHECKPOINT_FILE
        try:
            check_like(saved["step"]["counter"], self.step.counter)
            refuse_other_data(state, self.dataset, self.out, self.steps_per_epoch, data_named_by)
            check_like(saved["step"], self.step.state_dict())
            epoch = saved["epoch"].integer(0, self.recipe.train.epochs)
            last = self.steps_per_epoch if epoch < self.recipe.train.epochs else 0  # all, before the evaluation
            done = epoch * self.steps_per_epoch + saved["batch"].integer(0, last)
            if int(state["step"]["counter"]) != done:
                raise saved["step"]["counter"].error(
                    f"{done}, the steps in {counted(epoch, 'epoch')} and {counted(state['batch'], 'batch', 'batches')}"
                )
        except FieldError as error:
            raise damaged(path, error) from error
        self.step.load_state_dict(state["step"])
        self.progress = Progress(epoch, state["batch"], state["seconds"], **state["totals"])
        self.best = state["best"]
        torch.set_rng_state(state["rng"]["cpu"])
        if self.execution.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])
        self.resumed = True
        if not self.ranks.is_main:
            return
        self.log.path.touch()  # where it was lost, what follows is still a log
        self.log.truncate_after(self.steps_done)
        self.log.check()
        train = self.recipe.train
        evaluated = [n for n in range(1, self.progress.epoch + 1) if n % train.evaluate_every == 0 or n == train.epochs]
        if lost := lost_records(self.log, step=self.steps_done, interval=train.log_interval, evaluated=evaluated):
            self.say(f"{self.log.path}: records are lost ({lost}); the report and the curves leave them out")
        if changed := what_changed(self.log, self.execution, self.ranks.size):
            self.say(f"resumed otherwise than before ({changed}): the run goes on, not bit for bit as without a stop")
        self._renew()

    @property
    def _result_model(self) -> torch.nn.Module:
        return self.step.ema_model or self.step.model

    def _renew(self) -> None:
        """Make what lies beside the checkpoint agree with it."""
        if not self.ranks.is_main:
            return
        renew(
            self.out,
            recipe=self.recipe,
            model=self._result_model,
            dataset=self.dataset,
            epoch=self.progress.epoch,
            batch=self.progress.batch,
            best_epoch=self.best["epoch"],
            say=self.say,
        )
