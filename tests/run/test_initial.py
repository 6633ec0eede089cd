"""Weights to begin with: every form of them gives the network that wrote it, and what does not fit is named."""

import argparse
import hashlib
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from rsengine.config import ModelSection, Recipe
from rsengine.engine.build import build_model
from rsengine.model import from_timm
from rsengine.run.checkpoint import CheckpointError
from rsengine.run.foreign import InitialError
from rsengine.run.initial import normalised_as, origin_of, read_initial
from rsengine.run.weights import save_weights

SMALL = ["model.blocks=[1, 1]", "model.width_multiplier=0.25", "model.stem_width=8", "model.drop_path=0.1"]
CLASSES = tuple("abcdefg")


def silent(line):
    pass


@pytest.fixture(scope="module")
def theirs():
    """timm's resnetrs50 for seven classes, with batch-norm averages and a last batch norm as after training."""
    torch.manual_seed(0)
    model = timm.create_model("resnetrs50", num_classes=7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "weight" in name or "var" in name else tensor + 0.1)
    return model.eval()


@pytest.fixture
def ours(tmp_path, toy_dataset):
    """A run folder with weights for the toy data's three classes, and their network."""
    recipe, folder = Recipe().with_settings(SMALL), tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(1)
    model = build_model(recipe, 3)
    for bn in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        bn.running_var.uniform_(0.5, 2)
    save_weights(folder, model, recipe, toy_dataset)
    return folder, model


def fitted(initial, classes, say=silent):
    """The network that a run would begin with."""
    torch.manual_seed(9)
    network = build_model(Recipe(model=initial.model), len(classes))
    network.load_state_dict(initial.fitted(network, classes, say))
    return network.eval()


# --- forms ----------------------------------------------------------------------------------------------------------


def as_hub_folder(model, folder):
    timm.models.save_for_hf(model, folder, safe_serialization=True)


def as_hub_folder_of_pickles(model, folder):
    timm.models.save_for_hf(model, folder, safe_serialization=False)


def as_state_dict(model, folder):
    torch.save(model.state_dict(), folder / "resnetrs50.pth")


def as_old_state_dict(model, folder):
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    torch.save(state, folder / "resnetrs50.pt", _use_new_zipfile_serialization=False)


def as_parallel(model, folder):
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, folder / "a.pth")


def as_compiled(model, folder):
    state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "a.pth")


def as_timm_checkpoint(model, folder):
    """By timm's own hand, with the arguments of its command and an EMA, which is what its users take."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = timm.utils.ModelEmaV3(model)
    saver = timm.utils.CheckpointSaver(
        model, optimizer, argparse.Namespace(model="resnetrs50", lr=0.1), ema, checkpoint_dir=str(folder)
    )
    saver.save_checkpoint(0, 0.5)
    for path in folder.iterdir():
        if path.name != "last.pth.tar":
            path.unlink()


def as_safetensors(model, folder):
    save_file(model.state_dict(), folder / "any-name.safetensors")


def as_our_names(model, folder):
    torch.save(from_timm(model.state_dict()), folder / "ours.pth")


FORMS = [
    *(as_hub_folder, as_hub_folder_of_pickles, as_state_dict, as_old_state_dict, as_parallel, as_compiled),
    *(as_timm_checkpoint, as_safetensors, as_our_names),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_each_form_of_timms_weights_gives_timms_outputs(theirs, tmp_path, form):
    form(theirs, tmp_path)
    hub = form in (as_hub_folder, as_hub_folder_of_pickles)
    initial = read_initial(tmp_path if hub else next(tmp_path.iterdir()))
    assert initial.model == ModelSection(depth=50, dropout=0.0)
    lines = []
    network = fitted(initial, CLASSES, lines.append)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert len(lines) == 1 and "the classifier too" in lines[0] and initial.sha256[:8] in lines[0]
    config = timm.data.resolve_data_config({}, model=theirs)
    assert (initial.mean, initial.std) == ((config["mean"], config["std"]) if hub else (None, None))
    assert ("of these weights" if hub else "of the data, because the file has none") in lines[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_weights_in_other_floating_point_types_are_converted(theirs, tmp_path, dtype):
    torch.save(
        {name: v.to(dtype) if v.is_floating_point() else v for name, v in theirs.state_dict().items()},
        tmp_path / "a.pth",
    )
    network = fitted(read_initial(tmp_path / "a.pth"), CLASSES)
    expected = theirs.fc.weight.detach().to(dtype).float()
    assert network.fc.weight.dtype == torch.float32 and torch.equal(network.fc.weight, expected)


@pytest.mark.parametrize("name", ["", "weights.safetensors"])
def test_a_run_gives_its_network_and_its_normalisation(ours, toy_dataset, name):
    folder, model = ours
    initial, lines = read_initial(folder / name), []
    assert initial.model == Recipe().with_settings(SMALL).model
    assert (initial.classes, initial.mean, initial.std) == (toy_dataset.classes, toy_dataset.mean, toy_dataset.std)
    network = fitted(initial, toy_dataset.classes, lines.append)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert "the classifier too; pixels are normalised by the mean and standard deviation of these weights" in lines[0]


def test_the_network_is_read_off_the_shapes(tmp_path):
    recipe = Recipe().with_settings([*SMALL, "model.se_ratio=0.5"])
    torch.save(build_model(recipe, 3).state_dict(), tmp_path / "a.pth")
    found = read_initial(tmp_path / "a.pth").model
    assert (found.blocks, found.width_multiplier, found.stem_width, found.se_ratio) == ((1, 1), 0.25, 8, 0.5)


def test_strides_may_be_set_for_weights_that_do_not_say_theirs(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    initial = read_initial(tmp_path / "a.pth")
    recipe = Recipe(model=initial.model).with_settings(["model.stem_stride=1"])
    initial.check_architecture(recipe.model)
    network = build_model(recipe, 7)
    network.load_state_dict(initial.fitted(network, CLASSES, silent))
    assert network.stem(torch.randn(1, 3, 32, 32)).shape[2:] == (16, 16)


# --- the classifier -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("circle", "square"), "a new classifier for 2 classes, because that of the weights has 3"),
        (
            ("circle", "stripes", "square"),
            "for 3 classes, because that of the weights was for others (circle, square, ",
        ),
    ],
)
def test_a_classifier_for_other_classes_is_made_anew(ours, classes, words):
    folder, model = ours
    initial, lines = read_initial(folder), []
    network = fitted(initial, classes, lines.append)
    torch.manual_seed(9)
    fresh = build_model(Recipe(model=initial.model), len(classes))
    for name, value in network.state_dict().items():
        expected = (fresh if name.startswith("fc.") else model).state_dict()[name]
        assert torch.equal(value, expected), name
    assert len(lines) == 1 and words in lines[0]


def test_a_classifier_that_is_not_there_is_made_anew(theirs, tmp_path):
    theirs_alone = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    torch.save(theirs_alone, tmp_path / "features.pth")
    lines = []
    network = fitted(read_initial(tmp_path / "features.pth"), CLASSES, lines.append)
    assert network.fc.weight.shape == (7, 2048) and "because the weights have none" in lines[0]


# --- what does not fit ----------------------------------------------------------------------------------------------


def change(**tensors):
    """Replaces tensors of a state dict; None takes one away."""

    def changed(state):
        state = state | {name.replace("__", "."): value for name, value in tensors.items()}
        return {name: value for name, value in state.items() if value is not None}

    return changed


FAULTS = {
    "missing": (change(stages__0__0__bn1__bias=None), "missing: stages.0.0.bn1.bias"),
    "unexpected": (change(stages__0__0__bn9__bias=torch.ones(1)), "unexpected: stages.0.0.bn9.bias"),
    "another shape": (
        change(stem__bn1__weight=torch.ones(9)),
        "of another shape: stem.bn1.weight (9,) against (8,)",
    ),
    "integers": (
        change(stem__bn1__weight=torch.ones(8, dtype=torch.int8)),
        "of another kind of number: stem.bn1.weight",
    ),
    "NaN": (change(stem__bn1__weight=torch.full((8,), torch.nan)), "not finite, or a variance below zero: stem.bn1"),
    "variance": (change(stem__bn1__running_var=-torch.ones(8)), "a variance below zero: stem.bn1.running_var"),
    "half a classifier": (change(fc__weight=None), "missing: fc.weight"),
    "a number for a bias": (change(fc__bias=torch.ones(())), None),
    "no stem": (change(stem__conv1__weight=None), "it lacks stem.conv1.weight; give the weights of a whole ResNet-RS"),
    "a stage too far": (
        change(**{f"stages__{9**30}__0__x": torch.ones(1)}),
        f"unexpected: stages.{9**30}.0.x",
    ),
    "a stage is left out": (change(stages__3__0__x=torch.ones(1)), "it lacks a stage"),
    "sparse": (change(fc__weight=torch.eye(3).to_sparse()), "expected dense tensors by name; found 'fc.weight'"),
    "a word": (change(fc__weight="big"), "expected dense tensors by name; found 'fc.weight': str"),
    "a number": (lambda state: {1: torch.ones(1)}, "expected dense tensors by name; found 1: Tensor"),
    "nothing": (lambda state: {}, "expected a state dict; found dict"),
    "a list": (lambda state: [1], "expected a state dict; found list"),
    "a checkpoint": (
        lambda state: {"format": "rsengine-checkpoint", "version": 1},
        "a checkpoint of rsengine; give its folder, or the weights.safetensors in it",
    ),
    "another family": (
        lambda state: timm.create_model("resnet18").state_dict(),
        "and 1 more are not among the parameters and buffers of timm's resnetrs models; give weights of a ResNet-RS",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named_in_a_line(tmp_path, fault):
    changed, words = FAULTS[fault]
    path = tmp_path / "a.pth"
    torch.save(changed(build_model(Recipe().with_settings(SMALL), 3).state_dict()), path)
    if words is None:  # it has no classes, so a new one takes its place
        assert fitted(read_initial(path), ("a", "b", "c")).fc.bias.shape == (3,)
        return
    with pytest.raises(InitialError) as caught:
        fitted(read_initial(path), ("a", "b", "c"))
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"--init {path}: ") and "\n" not in message and len(message) < 700


def test_many_faults_are_counted(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    network = build_model(Recipe().with_settings(SMALL), 7)
    own, state = network.state_dict(), from_timm(theirs.state_dict())
    unexpected = len(state.keys() - own.keys()) - 3
    shapes = sum(state[name].shape != own[name].shape for name in own) - 3
    with pytest.raises(
        InitialError, match=rf"unexpected: (\S+, ){{2}}\S+ and {unexpected} more; .* and {shapes} more\);"
    ):
        read_initial(tmp_path / "a.pth").fitted(network, CLASSES, silent)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.stem_stride=1", "model.stem_stride: 1 against 2"),
        ("model.blocks=[1, 2]", r"model.blocks: \(1, 2\) against \(1, 1\)"),
        ("model.se_ratio=0.5", "model.se_ratio: 0.5 against 0.25"),
    ],
)
def test_the_network_of_a_run_must_be_the_recipes(ours, setting, words):
    initial, recipe = read_initial(ours[0]), Recipe().with_settings(SMALL)
    initial.check_architecture(
        recipe.with_settings(["model.dropout=0.5", "model.drop_path=0", "model.depth=101"]).model
    )
    with pytest.raises(InitialError, match=f"{words}.*leave out --recipe, and settings of .model., to take theirs"):
        initial.check_architecture(recipe.with_settings([setting]).model)


# --- files ----------------------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self):
        return print, ("code from a file was run",)


def flip_a_bit(path):
    """In a tensor, where PyTorch does not notice it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = ["rubbish", "empty", "cut", "folder", "nowhere", "code"]


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, how) for name in ("a.pth", "a.safetensors") for how in DAMAGE), ("a.bin", "a bit")],  # has checksums
)
def test_files_that_cannot_be_read_are_one_line_and_no_code_is_run(tmp_path, capsys, name, how):
    path = tmp_path / name
    state = build_model(Recipe().with_settings(SMALL), 3).state_dict()
    save_file(state, path) if name.endswith(".safetensors") else torch.save(state, path)
    whole = path.read_bytes()
    if how == "rubbish":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "folder":
        path.unlink(), path.mkdir()
    elif how == "nowhere":
        path.unlink()
    elif how == "code":
        torch.save({"fc.weight": Harmful()}, path)
    else:
        flip_a_bit(path)
    with pytest.raises(InitialError) as caught:
        read_initial(path)
    message = str(caught.value)
    expected = {"folder": "found no weights there; expected weights.safetensors", "nowhere": "no such file or folder"}
    assert expected.get(how, "damaged, or not the weights of a network alone") in message
    assert "\n" not in message and capsys.readouterr().out == ""


def test_weights_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"x")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rsengine.run.initial.read_content", refuse)  # the superuser may read everything
    with pytest.raises(InitialError, match=r"a.pth: cannot be read \(Permission denied\); check its permissions"):
        read_initial(path)


NORMALISATIONS = {
    "rubbish": r"not valid JSON \(Expecting value",
    "[1]": r"expected names with values; got \[1\]",
    '{"mean": [0.5, 0.5, 0.5]}': "std: missing",
    '{"mean": 1, "std": 2}': "mean: expected a list of 3; got 1",
    '{"pretrained_cfg": {"std": "big"}}': "pretrained_cfg.mean: missing",
    '{"mean": [0.5, 0.5], "std": [1, 1]}': "mean: expected a list of 3",
    '{"mean": [0.5, 0.5, NaN], "std": [1, 1, 1]}': r"mean\[2\]: expected a number from 0 to 1; got nan",
    '{"mean": [0, 0, 0], "std": [0, 1, 1]}': r"std\[0\]: expected a number from 1e-06 to 1; got 0",
    '{"mean": [123, 116, 103], "std": [58, 57, 57]}': r"mean\[0\]: expected a number from 0 to 1; got 123",
    '{"mean": [0, 0, 1' + "0" * 400 + '], "std": [1, 1, 1]}': r"mean\[2\]: expected a number from 0 to 1; got 10000",
    "[" * 100_000: r"not valid JSON \(nested too deep\)",
}


@pytest.mark.parametrize(("config", "words"), NORMALISATIONS.items(), ids=lambda text: text[:40])
def test_a_folders_normalisation_is_checked(tmp_path, config, words):
    save_file(build_model(Recipe().with_settings(SMALL), 3).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InitialError, match=f"config.json: {words}.*; mend the file") as caught:
        read_initial(tmp_path)
    assert "\n" not in str(caught.value)


# --- what a run keeps -----------------------------------------------------------------------------------------------


def test_the_origin_comes_back_and_a_forged_one_is_refused(ours, toy_dataset, tmp_path):
    initial = read_initial(ours[0])
    origin = json.loads(json.dumps(initial.origin()))
    assert origin_of({"origin": origin}, tmp_path) == initial.origin()
    assert origin_of({}, tmp_path) is None is origin_of({"origin": None}, tmp_path)
    moved = normalised_as(toy_dataset, origin | {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    assert (moved.mean, moved.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and moved.classes == toy_dataset.classes
    assert normalised_as(toy_dataset, origin | {"mean": None, "std": None}) is toy_dataset
    for forged, words in [
        (3, "origin: expected names with values; got 3"),
        ({}, "origin.path: missing"),
        (origin | {"path": 1}, "origin.path: expected text; got 1"),
        (origin | {"mean": None}, "origin.mean: expected a list of 3; got None"),
        (origin | {"std": [0.0, 1.0, 1.0]}, r"origin.std\[0\]: expected a number from 1e-06 to 1; got 0.0"),
    ]:
        with pytest.raises(CheckpointError, match=f"checkpoint.pt: {words}; "):
            origin_of({"origin": forged}, tmp_path)


def test_the_checksum_is_that_of_the_file(ours):
    path = ours[0] / "weights.safetensors"
    initial = read_initial(ours[0])
    assert (initial.path, initial.sha256) == (path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert initial.state.keys() == load_file(path).keys()
