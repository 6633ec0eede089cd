"""Training and predicting from Python: :func:`train`, :func:`load`, :class:`Run` and :class:`Model`.

Reached as ``rsengine.train`` and so on; ``docs/api.md`` shows them at work.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from rsengine.cache import keep_compiled_code
from rsengine.config import Recipe
from rsengine.data.errors import UserError
from rsengine.output import counted, speaker
from rsengine.run.files import METRICS_FILE, RECIPE_FILE
from rsengine.run.log import EPOCH, INTERVAL, START, RunLog, accuracy

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import Tensor

    from rsengine.run.weights import Weights

    Picture = str | os.PathLike[str] | Image | np.ndarray | Tensor

BATCH_PIXELS = 256 * 32 * 32  # so that memory does not depend on how many images there are


class InputError(UserError, ValueError):
    """Something that is neither images nor a run. The message is one line with what is expected."""


def train(
    recipe: str | os.PathLike[str] | Recipe | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    set: Mapping[str, Any] | Sequence[str] = (),
    init: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str = "auto",
    graph: bool = True,
    compile: bool = False,
    track: str | Sequence[str] = (),
    quiet: bool = False,
) -> Run:
    """Train as ``rsengine train`` does, with the same lines, progress bar and run folder.

    Ctrl-C, or a notebook's stop button, ends the run after the step under way and saves it; the :class:`Run` that is
    returned then has ``stopped``, and ``resume=True`` with the same ``out`` goes on. A second Ctrl-C interrupts at
    once. SIGTERM ends the process, once everything is saved. PyTorch's global random number generator is seeded.

    Args:
        recipe: a name, the path of a TOML file, or a recipe; None: ``quickstart``, or ``digits`` for the digits.
        data: a converted folder, any source that can be converted, or ``"digits"``; None: found as by the command.
        out: the run folder; None: ``runs/RECIPE-TIME``.
        set: settings that differ from the recipe's: ``{"train.epochs": 5}``, or ``["train.epochs=5"]``.
        init: weights to begin with: a run, or timm's.
        resume: go on with the run in ``out``, or with the recipe's latest.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        graph: on a GPU, capture each step as a CUDA graph.
        compile: compile the network with :func:`torch.compile`.
        track: one or several of ``"tensorboard"``, ``"wandb"`` and ``"mlflow"``.
        quiet: print nothing.

    Raises:
        UserError: what cannot be done, in one line with the remedy; :class:`rsengine.trainer.DivergedError` among them.
    """
    started = time.time()
    keep_compiled_code()
    from rsengine.parallel.launch import status_of_stop
    from rsengine.training import Request, train

    say = speaker(quiet=quiet, json=False)
    request = Request(
        recipe=recipe if isinstance(recipe, Recipe) else _given("recipe", recipe),
        data=_given("data", data),
        set=set,
        out=None if out is None else Path(_given("out", out)),
        resume=resume,
        init=_given("init", init),
        device=device,
        graph=graph,
        compile=compile,
        track=(track,) if isinstance(track, str) else tuple(track),
        bar=False if quiet else None,
        started=started,
    )
    outcome = train(request, say)
    if outcome.stopped == signal.SIGTERM:
        raise SystemExit(status_of_stop(signal.SIGTERM))
    return Run(outcome.folder)


def load(run: str | os.PathLike[str] | Run) -> Model:
    """The network of a run with its preprocessing and classes, on the CPU.

    Args:
        run: a run, its folder, or its ``weights.safetensors``.

    Raises:
        UserError: there are no weights, or they cannot be read.
    """
    keep_compiled_code()
    from rsengine.run.weights import load_weights

    path = run.folder if isinstance(run, Run) else Path(_given("run", run))
    return Model(load_weights(path), path)


class History(dict[str, list[Any]]):
    """A table as a dict of columns of one length, ``history["test_accuracy_ema"]``; numbers that are not there are
    None."""

    def to_pandas(self) -> pandas.DataFrame:
        """The same as a DataFrame. Raises :class:`ImportError` where pandas is not installed."""
        import pandas

        return pandas.DataFrame(self)

    def __repr__(self) -> str:
        rows = len(next(iter(self.values()), []))
        return f"<History of {rows} rows: {', '.join(self)}>"


class Run:
    """A run folder, finished or not.

    Args:
        folder: where the run is.

    Raises:
        InputError: ``folder`` holds no run.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(_given("folder", folder))
        self._log = RunLog(self.folder)
        if not (self.folder / RECIPE_FILE).is_file():
            raise InputError(f"{self.folder}: holds no run, for it has no {RECIPE_FILE}; give a run folder")

    def __repr__(self) -> str:
        epochs = self._log.records(EPOCH)
        done = f"{accuracy(epochs[-1]):.2%} after epoch {epochs[-1]['epoch']}" if epochs else "no epoch evaluated"
        return f"<Run {self.folder}: {done}{', stopped' * self.stopped}>"

    @property
    def stopped(self) -> bool:
        """Whether fewer epochs are done than the recipe has: it was stopped early, or is under way."""
        epochs = self._log.records(EPOCH)  # the last epoch of a recipe is always evaluated
        return not epochs or epochs[-1]["epoch"] < self.recipe.train.epochs

    @property
    def recipe(self) -> Recipe:
        """The whole recipe."""
        path = self.folder / RECIPE_FILE
        return Recipe.from_toml(path.read_text("utf-8"), str(path))

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last evaluated epoch, 0 to 1: that of the EMA, where the run keeps one.

        Raises:
            InputError: no epoch has been evaluated.
        """
        epochs = self._log.records(EPOCH)
        if not epochs:
            raise InputError(f"{self.folder / METRICS_FILE}: no epoch has been evaluated yet; go on with the run")
        return accuracy(epochs[-1])

    @property
    def history(self) -> History:
        """A row for each evaluated epoch; :mod:`rsengine.run.log` says what the columns hold."""
        return _table(self._log.records(EPOCH))

    @property
    def intervals(self) -> History:
        """A row for each ``train.log_interval`` steps of training."""
        return _table(self._log.records(INTERVAL))

    @property
    def machine(self) -> dict[str, Any]:
        """The machine that the run used last."""
        starts = self._log.records(START)
        return starts[-1].get("machine", {}) if starts else {}

    def plot(self) -> Figure:
        """Loss, accuracy and learning rate against epochs, as a matplotlib figure, which notebooks show."""
        from rsengine.run.plots import curves

        epochs, intervals = self._log.records(EPOCH), self._log.records(INTERVAL)
        if not epochs and not intervals:
            raise InputError(f"{self.folder / METRICS_FILE}: holds no records to plot yet; go on with the run")
        figure = curves(epochs, intervals, None, title=f"{self.recipe.name}: {self.folder.name}")
        figure._repr_png_ = functools.partial(_png, figure)  # a notebook shows figures of pyplot alone by itself
        return figure

    def load(self) -> Model:
        """The network of this run, as :func:`load` gives it."""
        return load(self)


@dataclass(frozen=True)
class Predictions:
    """What a network says of N images.

    Attributes:
        probabilities: (N, C) float32, each row summing to 1.
        classes: the C class names.
    """

    probabilities: np.ndarray
    classes: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The likeliest class of each image."""
        return [self.classes[i] for i in self.probabilities.argmax(axis=1)]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its ``k`` likeliest classes with their probabilities, the likeliest first.

        Raises ValueError for ``k`` below 1.
        """
        if k < 1:
            raise ValueError(f"k: expected at least 1; got {k}")
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return [
            [(self.classes[i], float(row[i])) for i in best]
            for row, best in zip(self.probabilities, order, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.probabilities)


class Model:
    """A trained network with its preprocessing and its classes.

    Attributes:
        weights: the network and how to feed it, see :class:`rsengine.run.weights.Weights`.
        path: where it came from.
    """

    def __init__(self, weights: Weights, path: Path) -> None:
        self.weights, self.path = weights, path

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"<Model {self.path}: {counted(len(self.classes), 'class', 'classes')}, {height}x{width} pixels>"

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return self.weights.classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the network learned."""
        return self.weights.image_size

    @property
    def network(self) -> Any:
        """The :class:`torch.nn.Module`, in evaluation mode, from normalised (N, 3, H, W) float32 to (N, C) logits."""
        return self.weights.model

    def to(self, device: str) -> Model:
        """Move the network to a device. Returns this model."""
        import torch

        self.weights.model.to(device, memory_format=torch.channels_last)
        return self

    def predict(self, images: Picture | Iterable[Picture]) -> Predictions:
        """Class probabilities, with the pixels prepared as in training.

        Args:
            images: one or several of: the path of a picture; a Pillow image; a uint8 array, (H, W, 3) or (N, H, W, 3);
                a uint8 tensor with the channels first, as in torchvision, or last. An image of another size than the
                network learned is scaled and cropped as ``rsengine predict`` does.

        Raises:
            UserError: something that is none of these, or a picture that cannot be read.
        """
        from rsengine.predict import predict
        from rsengine.run.pictures import fitted

        size = self.image_size
        pixels = [fitted(np.ascontiguousarray(image), size, name) for name, image in _images(images, "images")]
        if not pixels:
            raise InputError("images: expected at least one, got none")
        most = max(1, BATCH_PIXELS // (size[0] * size[1]))
        parts = [np.stack(pixels[first : first + most]) for first in range(0, len(pixels), most)]
        return Predictions(np.concatenate([predict(self.weights, part).numpy() for part in parts]), self.classes)

    def export(self, format: str, path: str | os.PathLike[str], **options: Any) -> list[Path]:
        """Write the network in a format that other programs read: :func:`rsengine.export.export` of these weights.

        Args:
            format: ``timm``, ``onnx``, ``torch`` or ``safetensors``.
            path: a folder, or the name of the file to write.
            options: of that function, such as ``uint8=True``.

        Returns:
            The files written.

        Raises:
            UserError: no such format, or a package that it needs is missing.
        """
        from rsengine.export import export

        return export(self.weights, format, _given("path", path), **options)


def _given(name: str, path: str | os.PathLike[str] | None) -> str | None:
    """``path`` as text. An empty one names nothing, and would be taken for the current folder."""
    text = None if path is None else os.fspath(path)
    if text is not None and not text.strip():
        raise InputError(f"{name}: got an empty text; give a value, or leave it out")
    return text


def _png(figure: Figure) -> bytes:
    """``figure`` as wide as the cell of a notebook."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=0.6 * figure.dpi)
    return picture.getvalue()


def _table(records: list[dict[str, Any]]) -> History:
    columns = dict.fromkeys(name for record in records for name in record if name != "kind")
    return History({name: [record.get(name) for record in records] for name in columns})


def _images(given: Any, name: str) -> Iterable[tuple[str, np.ndarray]]:
    """Each image in ``given`` as (H, W, 3) uint8 RGB, with a name for messages."""
    from rsengine.data.sources.images import decode_rgb

    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a picture") from error
        yield str(path), decode_rgb(data, str(path))
    elif isinstance(given, np.ndarray) or hasattr(given, "detach"):
        pixels = _channels_last(given, name)
        yield from ((f"{name}[{i}]", image) for i, image in enumerate(pixels)) if pixels.ndim == 4 else [(name, pixels)]
    elif hasattr(given, "getexif"):  # Pillow's; through the decoder of files, which knows modes and rotations
        if given.mode in ("I", "F"):
            raise InputError(f"{name}: pixels of type {given.mode} have no agreed range; give an 8-bit RGB image")
        encoded = io.BytesIO()
        mode = given if given.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else given.convert("RGB")
        mode.save(encoded, format="PNG", exif=given.getexif())
        yield name, decode_rgb(encoded.getvalue(), name)
    elif isinstance(given, Iterable) and not isinstance(given, (bytes, Mapping)):
        for i, each in enumerate(given):
            yield from _images(each, f"{name}[{i}]")
    else:
        raise InputError(f"{name}: expected paths, Pillow images, uint8 arrays or tensors; got {type(given).__name__}")


def _channels_last(given: Any, name: str) -> np.ndarray:
    """An array or tensor as (H, W, 3) or (N, H, W, 3) uint8."""
    shape, kind, tensor = tuple(given.shape), str(given.dtype).removeprefix("torch."), hasattr(given, "detach")
    pixels = given.detach().cpu().numpy() if tensor else given
    if kind == "uint8" and len(shape) in (3, 4) and all(shape[-3:]):
        if tensor and shape[-3] == 3:
            return np.moveaxis(pixels, -3, -1)
        if shape[-1] == 3:
            return pixels
    forms = "(N, H, W, 3) or (H, W, 3)" + ", channels first or last" * tensor
    raise InputError(f"{name}: expected uint8 RGB pixels {forms}, not normalised; got {kind} {shape}")


class _Callable(ModuleType):
    @functools.wraps(train)
    def __call__(self, *arguments: Any, **options: Any) -> Run:
        return train(*arguments, **options)


def callable_as_train(name: str) -> None:
    """Let the module ``name``, that of the command ``train``, be called as :func:`train`.

    ``rsengine.train`` is that module from the moment that anybody imports it, and must be the function all the same.
    """
    module = sys.modules[name]
    module.__class__, module.__signature__ = _Callable, inspect.signature(train)
