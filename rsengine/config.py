"""A run is one complete, frozen :class:`Recipe`: read from TOML, changed by ``section.key=value``, written back whole.

A recipe file may begin with ``extends = "NAME"``; it then states only what differs from that shipped recipe. Every
field carries its own check, so that a wrong key or value is refused with its name, what is allowed and the nearest
match, before anything else happens.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from rsengine.augment.fills import FILLS
from rsengine.augment.policies import CROP_MODES, INTERPOLATIONS, POLICIES, policy_of
from rsengine.checked import shown
from rsengine.data.errors import UserError
from rsengine.model import DEPTHS, DROP_PATH_RULES, ZERO_INITS, body_parts
from rsengine.model.layers import PRODUCTS
from rsengine.schedule import SCHEDULES
from rsengine.text import decode, parse_toml

PRECISIONS = ("auto", "bf16", "fp32")
OPTIMIZERS = ("sgd", "muon")
LOADERS = ("auto", "ffcv", "stream", "resident")
MOST_EPOCHS = 100_000
MOST_BLOCKS, MOST_WEIGHTS = 1000, 10**9  # seven and five times those of the largest ResNet-RS


class RecipeError(UserError, ValueError):
    """A recipe that cannot be run. The message is one line: the key, what is allowed, what was given."""


# --- one constructor for each kind of field -------------------------------------------------------------------------


def _setting(default: Any, expected: str, allowed: Callable[[Any], bool], help: str, **metadata: Any) -> Any:
    """A field whose values are ``allowed``, which ``expected`` says in words."""

    def check(value: Any) -> Any:
        if not allowed(value):
            raise RecipeError(expected)
        return type(default)(value)

    return field(default=default, metadata={"check": check, "help": help, **metadata})


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(
    default: float,
    low: float,
    high: float | None = None,
    *,
    most: float = 1_000_000,
    integer: bool = False,
    help: str,
) -> Any:
    """A number from ``low`` to ``high``; or, without that, to ``most``, which no run needs and a machine can bear."""
    kind, form = ("an integer", ",") if integer else ("a number", "g")
    expected = f"{kind} >= {low:{form}}" if high is None else f"{kind} from {low:{form}} to {high:{form}}"

    def allowed(value: Any) -> bool:
        if not (_is_integer(value) or (isinstance(value, float) and not integer)):
            return False
        if high is None and value > most:
            raise RecipeError(f"{kind} from {low:{form}} to {most:,}")
        return low <= value and (high is None or value <= high)  # false for NaN

    return _setting(default, expected, allowed, f"{help} ({expected})")


def _choice(default: str, choices: tuple[str, ...], *, help: str) -> Any:
    expected = f"one of {', '.join(choices)}"
    return _setting(default, expected, lambda value: value in choices, f"{help} ({expected})", choices=choices)


def _flag(default: bool, *, help: str) -> Any:
    return _setting(default, "true or false", lambda value: isinstance(value, bool), f"{help} (true or false)")


def _integers(default: tuple[int, ...], low: int, most: int, *, longest: int = 100, help: str) -> Any:
    expected = f"a list of integers >= {low}"

    def allowed(value: Any) -> bool:
        if not isinstance(value, list | tuple) or not all(_is_integer(v) and v >= low for v in value):
            return False
        if len(value) > longest or any(v > most for v in value):
            raise RecipeError(f"a list of at most {longest} integers from {low} to {most:,}")
        return True

    return _setting(default, expected, allowed, f"{help} ({expected})")


def _text(default: str, *, help: str) -> Any:
    def allowed(value: Any) -> bool:
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)

    return _setting(default, "text in UTF-8", allowed, help)


# --- the sections ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSection:
    """Arguments of :func:`rsengine.model.resnet_rs`, which documents them."""

    depth: int = _number(50, 0, integer=True, help="ResNet-RS depth")
    blocks: tuple[int, ...] = _integers((), 1, 1000, help="blocks a stage; empty: those of `depth`")
    stem_width: int = _number(32, 1, most=4096, integer=True, help="channels of the first stem convolutions")
    stem_stride: int = _number(2, 1, 2, integer=True, help="stride of the first stem convolution")
    stem_pool_stride: int = _number(2, 1, 2, integer=True, help="stride of the convolution in place of the max-pool")
    width_multiplier: float = _number(1.0, 0.01, most=16, help="scales the widths of the stages")
    se_ratio: float = _number(0.25, 0.0, 1.0, help="squeeze-and-excite hidden channels over output channels; 0: none")
    drop_path: float = _number(0.0, 0.0, 0.99, help="rate of stochastic depth")
    drop_path_rule: str = _choice("tf", DROP_PATH_RULES, help="how the rate is spread over the blocks")
    dropout: float = _number(0.25, 0.0, 0.99, help="rate of dropout before the classifier")
    zero_init: str = _choice(
        "last",
        tuple(ZERO_INITS),
        help="batch norm of each block that begins at zero; middle, as the report's code had it, kills the branch",
    )
    resnet_d: bool = _flag(True, help="stem and shortcuts of ResNet-D; false: those of ResNet, with a max-pool")


@dataclass(frozen=True)
class OptimizerSection:
    """SGD for all, or for all but the convolutions (:mod:`rsengine.engine.muon`). Weight decay is SGD's, the coupled
    kind, added to the gradient."""

    name: str = _choice("sgd", OPTIMIZERS, help="sgd, or muon for the convolutions and sgd for all else")
    momentum: float = _number(0.9, 0.0, 0.9999, help="momentum")
    nesterov: bool = _flag(True, help="Nesterov momentum")
    muon_learning_rate: float = _number(
        0.1, 0.0, 10.0, help="muon: length of a step over that of the weight, at the peak of schedule.learning_rate"
    )
    muon_momentum: float = _number(0.9, 0.0, 0.9999, help="muon: momentum of the convolutions")
    weight_decay: float = _number(4e-5, 0.0, 1.0, help="weight decay")
    decay_bn_and_bias: bool = _flag(False, help="apply weight decay to batch-norm parameters and biases too")
    clip_norm: float = _number(0.0, 0.0, help="largest norm of the gradient over all parameters; 0: no clipping")
    body_rate: float = _number(1.0, 0.0, 1.0, help="factor on the learning rate of all but the classifier")


@dataclass(frozen=True)
class ScheduleSection:
    """Arguments of :func:`rsengine.schedule.learning_rate_table`, which documents them."""

    name: str = _choice("cosine", SCHEDULES, help="shape of the learning rate")
    learning_rate: float = _number(0.1, 0.0, 100.0, help="peak learning rate")
    warmup_epochs: float = _number(0.0, 0.0, most=MOST_EPOCHS, help="linear warm-up")
    final_fraction: float = _number(0.0, 0.0, 1.0, help="cosine, one_cycle: last learning rate over the peak")
    restart_epochs: float = _number(
        50.0, 0.001, most=MOST_EPOCHS, help="cosine_restarts: epochs in the first cycle (T0)"
    )
    restart_multiplier: float = _number(1.0, 1.0, most=1000, help="cosine_restarts: growth of each cycle over the last")
    milestones: tuple[int, ...] = _integers(
        (40, 80, 120), 1, MOST_EPOCHS, help="multistep: epochs at which the rate falls"
    )
    gamma: float = _number(0.2, 0.0, 1.0, help="multistep: factor at each milestone")
    start_fraction: float = _number(0.04, 0.0, 1.0, help="one_cycle: first learning rate over the peak")
    peak_fraction: float = _number(0.3, 0.01, 0.99, help="one_cycle: where the peak lies, as a fraction of the run")


@dataclass(frozen=True)
class EmaSection:
    """Exponential moving average of the weights and batch-norm buffers."""

    enabled: bool = _flag(True, help="keep, evaluate and save an EMA")
    decay: float = _number(0.9999, 0.0, 1.0, help="decay a step")
    warmup: bool = _flag(True, help="use min(decay, (1 + n) / (10 + n)) at step n")


@dataclass(frozen=True)
class AugmentSection:
    """What happens to training images, in this order: to each image in the data pipeline, on uint8 pixels; then to each
    batch in the step (:mod:`rsengine.augment.mixup`). With mixup and cutmix both on, each batch gets one of them at
    random."""

    crop_padding: int = _number(4, 0, most=1000, integer=True, help="pad by this many pixels and crop back; 0: no crop")
    crop_mode: str = _choice("zero", CROP_MODES, help="pad with black, or with the image mirrored at its border")
    flip: bool = _flag(True, help="mirror left to right with probability one half")
    alternating_flip: bool = _flag(False, help="with flip: mirror each image in every other epoch, not at random")
    policy: str = _choice("none", POLICIES, help="learned or random operations on colour and geometry")
    policy_interpolation: str = _choice(
        "nearest", INTERPOLATIONS, help="of the policy's shears, translations and rotations"
    )
    policy_fill: str = _choice("zero", FILLS, help="fill colour of the policy's geometric operations")
    randaugment_ops: int = _number(2, 1, most=100, integer=True, help="randaugment: N, operations an image")
    randaugment_magnitude: float = _number(9.0, 0.0, 30.0, help="randaugment: M, a bin of 31; if increasing, of 10")
    randaugment_std: float = _number(0.0, 0.0, most=1000, help="randaugment: standard deviation of the magnitude")
    randaugment_increasing: bool = _flag(False, help="randaugment: timm's inc1 operations and ranges")
    augmix_severity: int = _number(3, 1, 10, integer=True, help="augmix: largest magnitude, of 10")
    cutout_holes: int = _number(0, 0, most=1000, integer=True, help="squares blanked; 0: no Cutout")
    cutout_size: int = _number(8, 1, most=10_000, integer=True, help="side of the Cutout squares in pixels")
    cutout_fill: str = _choice("mean", FILLS, help="colour of the Cutout squares")
    mixup_alpha: float = _number(0.0, 0.0, most=1000, help="mixup with shares from Beta(alpha, alpha); 0: no mixup")
    cutmix_alpha: float = _number(0.0, 0.0, most=1000, help="cutmix with shares from Beta(alpha, alpha); 0: no cutmix")

    @property
    def mixes(self) -> bool:
        """Whether the step mixes images of a batch."""
        return bool(self.mixup_alpha or self.cutmix_alpha)


@dataclass(frozen=True)
class TrainSection:
    """The loop."""

    epochs: int = _number(10, 1, most=MOST_EPOCHS, integer=True, help="passes over the training set")
    batch_size: int = _number(128, 2, most=100_000, integer=True, help="images a step")
    micro_batches: int = _number(
        1, 1, integer=True, help="parts of a batch that go through the network in turn; batch norm sees one part"
    )
    eval_batch_size: int = _number(500, 1, most=100_000, integer=True, help="images a batch in evaluation")
    evaluate_every: int = _number(1, 1, integer=True, help="epochs between evaluations; the last epoch has one")
    start_scale: float = _number(1.0, 0.1, 1.0, help="side of training images in the first epoch over their full side")
    full_scale_from: float = _number(0.6, 0.0, 1.0, help="fraction of the run after which images have their full size")
    label_smoothing: float = _number(0.1, 0.0, 1.0, help="label smoothing")
    seed: int = _number(0, 0, 2**31 - 1, integer=True, help="seed of weights, order, augmentation and dropout")
    loader: str = _choice(
        "auto",
        LOADERS,
        help="batches from FFCV, from rsengine's own stream, or from the whole set on the device; "
        "auto: FFCV where it can be imported, else stream",
    )
    convolutions: str = _choice(
        "auto",
        tuple(PRODUCTS),
        help="products: 1x1 ones, and 3x3 ones of small maps, as matrix products; library: none of them; auto: on the "
        "CPU whole bottlenecks in C where these run, else products",
    )
    batch_norm: str = _choice(
        "local",
        ("local", "sync"),
        help="with several processes: statistics of each one's part of the batch, or of the whole batch",
    )
    all_reduce: str = _choice(
        "auto",
        ("auto", "fp32", "bf16"),
        help="with several processes: the precision in which gradients are summed; auto: that of the gradients",
    )
    precision: str = _choice("auto", PRECISIONS, help="bf16 autocast or fp32; auto: bf16 where it is native")
    log_interval: int = _number(50, 1, integer=True, help="steps between interval records")
    checkpoint_minutes: float = _number(10.0, 0.0, help="minutes between checkpoints inside an epoch; 0: epochs only")
    limit_train_batches: int = _number(0, 0, integer=True, help="use only this many batches an epoch; 0: all")
    freeze: str = _text("", help="parts that keep their weights: stem, stage1, …, joined by commas")

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """The names in :attr:`freeze`."""
        return tuple(dict.fromkeys(name.strip() for name in self.freeze.split(","))) if self.freeze.strip() else ()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, apart from the data and the machine."""

    name: str = _text("custom", help="name of the run")
    comment: str = _text("", help="where its numbers come from")
    model: ModelSection = field(default_factory=ModelSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    ema: EmaSection = field(default_factory=EmaSection)
    augment: AugmentSection = field(default_factory=AugmentSection)
    train: TrainSection = field(default_factory=TrainSection)

    def __post_init__(self) -> None:
        for key, spec, value in _leaves(self):
            _checked(key, spec, value)
        if not self.model.blocks and self.model.depth not in DEPTHS:
            raise RecipeError(f"model.depth: expected one of {', '.join(map(str, DEPTHS))}; got {self.model.depth}")
        if len(_widths(self.model)) > MOST_BLOCKS or _weights(self.model) > MOST_WEIGHTS:
            raise RecipeError(
                f"model: expected at most {MOST_BLOCKS:,} blocks and {MOST_WEIGHTS:,} weights; got "
                f"{len(_widths(self.model)):,} blocks and about {_weights(self.model):.3g} weights"
            )
        if self.augment.alternating_flip and not self.augment.flip:
            raise RecipeError("augment.alternating_flip: needs augment.flip=true; got false")
        try:
            policy_of(self.augment, (32, 32))
        except ValueError as error:
            raise RecipeError(f"augment.policy: {error}") from error
        known = body_parts(len(self.model.blocks or DEPTHS[self.model.depth]))
        for name in self.train.frozen_parts:
            if name not in known:
                expected = f"train.freeze: expected some of {', '.join(known)}, joined by commas"
                raise RecipeError(f"{expected}; got {shown(name)}{nearest_match(name, known)}")
        train = self.train
        if train.batch_size % train.micro_batches or train.batch_size < 2 * train.micro_batches:
            raise RecipeError(
                f"train.micro_batches: expected a divisor of train.batch_size ({train.batch_size}) that leaves at "
                f"least 2 images to each, as batch norm needs; got {train.micro_batches}"
            )

    def to_toml(self) -> str:
        """The whole recipe, every field written out. :meth:`from_toml` of it gives an equal recipe."""
        import tomli_w

        return tomli_w.dumps(_lists(asdict(self)))

    @staticmethod
    def from_toml(text: str, origin: str = "recipe") -> Recipe:
        """Parse a recipe. Fields that it leaves out take the values of the recipe it extends, or their defaults.

        Raises:
            RecipeError: the text is not TOML, a key or a value is not allowed, or ``extends`` names no shipped recipe.
        """
        return _read(text, origin, ())

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """Replace the fields that ``values``, laid out as in a recipe file, has. Raises :class:`RecipeError`."""
        return _replaced(self, values, "")

    @property
    def batches_are_normalised(self) -> bool:
        """Whether a step receives normalised images, rather than pixels that it normalises itself.

        Resident data are normalised in the same pass as they are augmented, unless the step mixes pixels first.
        """
        return self.train.loader == "resident" and not self.augment.mixes

    def with_settings(self, settings: Iterable[str]) -> Recipe:
        """Apply ``section.key=value`` settings, the value in TOML syntax (quotes around text may be left out)."""
        specs = {path: spec for path, spec, _ in _leaves(self)}
        changes: dict[str, dict[str, Any]] = {}  # applied at once: fields that must agree may come in any order
        for setting in settings:
            key, separator, text = setting.partition("=")
            key = key.strip()
            if not separator or not key:
                raise RecipeError(f"--set {setting}: expected section.key=value")
            if key not in specs:
                raise RecipeError(unknown_key(key, specs))
            section, _, name = key.rpartition(".")
            changes.setdefault(section, {})[name] = _checked(key, specs[key], _parsed(text.strip()))
        top = changes.pop("", {})
        return replace(self, **top, **{name: replace(getattr(self, name), **new) for name, new in changes.items()})

    def flat(self) -> dict[str, bool | int | float | str | list[int]]:
        """Every setting by ``section.key``."""
        return {key: _lists(value) for key, _, value in _leaves(self)}

    def differences(self, other: Recipe) -> list[str]:
        """``key: this value, other value`` for every field in which two recipes differ."""
        theirs = {key: value for key, _, value in _leaves(other)}
        return [f"{key}: {value!r} against {theirs[key]!r}" for key, _, value in _leaves(self) if value != theirs[key]]


def with_short(settings: Sequence[str], short: Mapping[str, tuple[str, Any]]) -> list[str]:
    """``settings``, ``key=value`` texts of ``--set``, with those that options of their own stand for.

    Args:
        short: for an option such as ``--epochs``, the key that it sets and its value, None where it was not given.

    Raises:
        RecipeError: an option says one thing and a setting of its key another.
    """
    found = list(settings)
    for option, (key, value) in short.items():
        if value is None:
            continue
        for setting in settings:
            name, _, text = setting.partition("=")
            if name.strip() == key and _parsed(text.strip()) != value:
                raise RecipeError(f"{option} {value}: --set {setting} says otherwise; give one of them")
        found.append(f"{key}={value}")
    return found


def recipe_names() -> list[str]:
    """The recipes that come with rsengine."""
    return sorted(entry.name.removesuffix(".toml") for entry in _shipped().iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str, argument: str = "--recipe") -> Recipe:
    """A shipped recipe by name, or any other by the path of its TOML file. Raises :class:`RecipeError`, which says of
    a wrong name for which ``argument`` it was given."""
    if name_or_path.lower().endswith(".toml"):
        return Recipe.from_toml(read_text(name_or_path, f"{argument} "), name_or_path)
    names = recipe_names()
    if name_or_path not in names:
        nearest = nearest_match(name_or_path, names)
        raise RecipeError(f"{argument} {name_or_path}: expected one of {', '.join(names)}, or a .toml file{nearest}")
    return Recipe.from_toml((_shipped() / f"{name_or_path}.toml").read_text("utf-8"), name_or_path)


def read_text(path: str, option: str = "") -> str:
    """The text of a TOML file, which ``option`` named. Raises :class:`RecipeError` where there is none."""
    try:
        if not Path(path).is_file():
            raise RecipeError(f"{option}{path}: no such file")
        return decode(Path(path).read_bytes())
    except RecipeError:
        raise
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}; save the file as UTF-8") from error


def describe() -> str:
    """Every key with its default and what it takes: the help of ``--set``."""
    lines = [f"{key} = {_lists(value)!r}: {spec.metadata['help']}" for key, spec, value in _leaves(Recipe())]
    return "\n".join(lines)


# --- helpers --------------------------------------------------------------------------------------------------------


def _leaves(section: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, dataclass field, value) of every field below ``section``."""
    found = []
    for spec in fields(section):
        value = getattr(section, spec.name)
        key = prefix + spec.name
        found += _leaves(value, key + ".") if is_dataclass(value) else [(key, spec, value)]
    return found


def _widths(model: ModelSection) -> list[float]:
    """The width of each block, as :class:`rsengine.model.ResNetRS` has them."""
    counts = enumerate(model.blocks or DEPTHS[model.depth])
    return [64 * 2.0**stage * model.width_multiplier for stage, count in counts for _ in range(count)]


def _weights(model: ModelSection) -> float:
    """About how many weights the network has: those of the blocks, with four times their width at either end, and of
    the stem."""
    return sum((17 + 32 * model.se_ratio) * width**2 for width in _widths(model)) + 30 * model.stem_width**2


def _shipped() -> Traversable:
    return resources.files("rsengine") / "recipes"


def _read(text: str, origin: str, extended_by: tuple[str, ...]) -> Recipe:
    """Parse a recipe that the recipes ``extended_by``, outermost first, extend."""
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise RecipeError(f"{origin}: not valid TOML: {error}") from error
    if "extends" not in values:
        return _applied(Recipe(), values, origin)
    name, chain, names = values.pop("extends"), (*extended_by, origin), recipe_names()
    if name not in names:
        expected = f"extends: expected one of {', '.join(names)}"
        raise RecipeError(f"{origin}: {expected}; got {shown(name)}{nearest_match(name, names)}")
    if name in chain:
        raise RecipeError(f"{origin}: extends: expected no cycle; got {' -> '.join((*chain, name))}")
    base = _read((_shipped() / f"{name}.toml").read_text("utf-8"), name, chain)
    # A name and a comment belong to one file: those of the base describe another recipe.
    return _applied(replace(base, name=Recipe.name, comment=Recipe.comment), values, origin)


def _applied(recipe: Recipe, values: Mapping[str, Any], origin: str) -> Recipe:
    try:
        return recipe.with_values(values)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from error


def _replaced(section: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """``section``, a recipe or a part of one, with ``values`` in place of its own."""
    specs = {spec.name: spec for spec in fields(section)}
    changes = {}
    for name, value in values.items():
        if name not in specs:
            first = [] if prefix else ["extends"]  # a key of files, not of recipes
            here, everywhere = first + [prefix + known for known in specs], [key for key, _, _ in _leaves(Recipe())]
            raise RecipeError(unknown_key(prefix + name, here, everywhere))
        if "check" in specs[name].metadata:
            changes[name] = _checked(prefix + name, specs[name], value)
        elif isinstance(value, Mapping):
            changes[name] = _replaced(getattr(section, name), value, f"{prefix}{name}.")
        else:
            raise RecipeError(f"{prefix}{name}: expected a section [{name}]; got {shown(value)}")
    return replace(section, **changes)


def _parsed(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text  # bare words are text: schedule.name=cosine


def _checked(key: str, spec: Any, value: Any) -> Any:
    check: Callable[[Any], Any] = spec.metadata["check"]
    try:
        return check(value)
    except RecipeError as error:
        nearest = nearest_match(value, spec.metadata.get("choices", ()))
        raise RecipeError(f"{key}: expected {error}; got {shown(value)}{nearest}") from None


def unknown_key(key: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """What is wrong with a ``key`` that is none of ``known``: a phrase with the nearest of them.

    Args:
        elsewhere: keys of other sections, one of which may be meant where its name is the same.
    """
    known, key = list(known), key[:200]
    same_name = [k for k in (*known, *elsewhere) if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = nearest_match(key, same_name, cutoff=0.0) or nearest_match(key, known)
    return f"{key if key.strip() else shown(key)}: no such key" + (near or f"; expected one of {', '.join(known)}")


def nearest_match(value: Any, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean X?`` for the one of ``choices`` that is most like ``value``; nothing where none is."""
    given = value if isinstance(value, str) else shown(value)
    matches = difflib.get_close_matches(given[:200], list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]}?" if matches else ""


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
