"""weights.safetensors: what is damaged, forged or at odds with itself is refused in a line that names the field."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsengine import evaluate, predict
from rsengine.config import Recipe
from rsengine.engine.build import build_model
from rsengine.run.weights import WeightsError, holds_weights, load_weights, save_weights

RECIPE = Recipe().with_settings(["model.blocks=[1, 1]", "model.width_multiplier=0.25"])


@pytest.fixture
def path(tmp_path, toy_dataset):
    return save_weights(tmp_path, build_model(RECIPE, 3), RECIPE, toy_dataset)


def metadata_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def rewrite(path, change):
    """Save tensors and metadata as ``change`` leaves them, as an older version did: without a checksum."""
    state, metadata = load_file(path), metadata_of(path)
    del metadata["sha256"]
    change(state, metadata)
    save_file(state, path, metadata)


def put(key, value):
    return lambda state, metadata: metadata.update({key: value})


def tensor(name, change):
    return lambda state, metadata: state.update({name: change(state[name]).contiguous()})


CASES = {
    "a recipe that is none": (put("recipe", "x"), "recipe: not valid TOML"),
    "a recipe with an unknown key": (put("recipe", "[model]\nx = 1"), "recipe: model.x: no such key"),
    "a recipe of another network": (put("recipe", ""), r"tensors\.\S+: (missing|expected float32 .* got float32)"),
    "classes that are no list": (put("classes", "3"), "classes: expected a list; got 3"),
    "classes that are numbers": (put("classes", "[1, 2, 3]"), r"classes\[0\]: expected text; got 1"),
    "no classes": (put("classes", "[]"), r"classes: expected names of classes; got \[\]"),
    "other classes": (
        put("classes", '["a", "b"]'),
        r"tensors.fc.weight: expected float32 \(2, \d+\); got float32 \(3,",
    ),
    "a size of text": (put("image_size", '["32", 32]'), r"image_size\[0\]: expected an integer from 1 to 65,535; got"),
    "a size of one number": (put("image_size", "[32]"), r"image_size: expected a list of 2; got \[32\]"),
    "a size of nothing": (put("image_size", "[0, 32]"), r"image_size\[0\]: expected an integer from 1"),
    "a mean above one": (put("mean", "[0.5, 0.5, 128]"), r"mean\[2\]: expected a number from 0 to 1; got 128"),
    "a mean that is no number": (put("mean", "[0.5, NaN, 0.5]"), r"mean\[1\]: expected a number from 0 to 1; got nan"),
    "a mean of two": (put("mean", "[0.5, 0.5]"), "mean: expected a list of 3"),
    "a negative std": (put("std", "[0.2, -0.2, 0.2]"), r"std\[1\]: expected a number from 1e-09 to 1; got -0.2"),
    "a tiny std": (put("std", "[0.2, 1e-300, 0.2]"), r"std\[1\]: expected a number from 1e-09 to 1"),
    "an infinite std": (put("std", "[0.2, 1e999, 0.2]"), r"std\[1\]: expected a number .* got inf"),
    "a std nested too deep": (put("std", "[" * 100_000), r"std: not valid JSON \(nested too deep\)"),
    "no std": (lambda state, metadata: metadata.pop("std"), "std: missing"),
    "another format": (put("format", "2"), "not written by rsengine"),
    "NaN": (tensor("fc.weight", lambda t: t * float("nan")), "tensors.fc.weight: expected finite numbers; got NaN"),
    "infinity": (tensor("fc.bias", lambda t: t + float("inf")), "tensors.fc.bias: expected finite numbers"),
    "another dtype": (
        tensor("fc.bias", lambda t: t.half()),
        r"tensors.fc.bias: expected float32 \(3,\); got float16 \(3,\)",
    ),
    "another shape": (
        tensor("fc.bias", lambda t: t[:2]),
        r"tensors.fc.bias: expected float32 \(3,\); got float32 \(2,\)",
    ),
    "a negative variance": (
        tensor("stages.0.0.bn1.running_var", lambda t: t - 2),
        r"tensors.stages.0.0.bn1.running_var: expected variances of at least 0; got -1",
    ),
    "a tensor too few": (lambda state, metadata: state.pop("fc.bias"), "tensors.fc.bias: missing"),
    "a tensor too many": (lambda state, metadata: state.update(x=torch.ones(1)), "tensors: expected .*; got x too"),
}


@pytest.mark.parametrize(("change", "words"), CASES.values(), ids=CASES)
def test_weights_at_odds_with_themselves_are_refused(path, change, words):
    rewrite(path, change)
    with pytest.raises(WeightsError, match=rf"weights.safetensors: {words}") as caught:
        load_weights(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and message.count(str(path)) == 1


def test_older_weights_without_a_checksum_are_read(path):
    rewrite(path, lambda state, metadata: metadata.update(std="[0.2, 0, 0.2]"))
    assert load_weights(path).std == (0.2, 0.0, 0.2)


def test_the_checksum_covers_tensors_and_metadata(path, toy_dataset):
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, (start + len(whole)) // 2, len(whole) - 1, whole.index(b'\\"circle') + 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(WeightsError, match="weights.safetensors: damaged .its checksum is not that of its content"):
            load_weights(path)
        assert not holds_weights(path, build_model(RECIPE, 3), RECIPE, toy_dataset)
    path.write_bytes(whole)
    assert holds_weights(path, load_weights(path).model, RECIPE, toy_dataset)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000, -1])
def test_every_cut_is_damage(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="weights.safetensors: damaged or not a safetensors file"):
        load_weights(path)


def overflow(state, metadata):
    """Finite weights that make infinite activations."""
    state.update({name: t * 0 + 3e38 for name, t in state.items() if name.endswith(("bn2.weight", "bn3.weight"))})


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (CASES["NaN"][0], "{path}: tensors.fc.weight: expected finite"),
        (overflow, "the weights are so large that their results are no finite"),
    ],
    ids=["NaN", "overflow"],
)
def test_the_commands_say_it_in_one_line(path, toy_dataset, capsys, command, change, words):
    rewrite(path, change)
    folder = str(toy_dataset.folder)
    if command == "evaluate":
        assert evaluate.main([str(path), "--data", folder, "--device", "cpu"]) == 2
    else:
        picture = next((toy_dataset.folder.parent / "source").rglob("*.png"))
        assert predict.main([str(path), str(picture), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words.format(path=path)}") and error.count("\n") == 1


@pytest.fixture
def as_nobody():
    """Lets the test go on as a user without rights, where it runs as one with all of them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_weights_that_may_not_be_read_are_one_line(tmp_path_factory, path, request):
    folder = tmp_path_factory.mktemp("shut")
    shut = folder / "weights.safetensors"
    shut.write_bytes(path.read_bytes())
    shut.chmod(0)
    request.getfixturevalue("as_nobody")  # now that all is there; what pytest makes is its user's alone
    with pytest.raises(WeightsError, match=r"weights.safetensors: cannot be read \(.*\); check its permissions"):
        load_weights(shut)
