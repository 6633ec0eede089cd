"""A run goes on with the data it began with, and is measured on images of the size it learned."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from rsengine import evaluate as evaluate_module
from rsengine import train as train_module
from rsengine.data import convert, identity_of, load_dataset
from rsengine.data.beton.reader import BetonReader
from rsengine.data.identity import images_in_common
from rsengine.data.sources.archives import file_digest
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.log import START, RunLog
from tests.conftest import draw_classes

RECIPE = """
name = "toy"
[model]
blocks = [1, 1]
width_multiplier = 0.25
stem_width = 8
[ema]
decay = 0.9
[train]
epochs = 2
batch_size = 8
eval_batch_size = 10
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "pets"
    draw_classes(folder, 12, seed=0)
    return folder


@pytest.fixture(scope="module")
def begun(source, tmp_path_factory):
    """A run of one epoch of two, stopped there, with the data set it is on."""
    root = tmp_path_factory.mktemp("begun")
    dataset = convert(source, root / "data", test_fraction=0.25, log=lambda line: None)
    (root / "toy.toml").write_text(RECIPE)
    options = ["--recipe", str(root / "toy.toml"), "--device", "cpu", "--epochs", "1"]
    assert train_module.main([*options, "--out", str(root / "run"), "--data", str(dataset.folder)]) == 0
    return root / "run", dataset


def resume(run, data):
    return train_module.main(["--resume", "--device", "cpu", "--out", str(run), "--data", str(data)])


OTHERS = {
    "another seed": {"seed": 1},
    "another share": {"test_fraction": 0.5},
    "a validation set": {"validation": 0.25},
    "another size": {"size": 31},
    "images stored otherwise": {"image_format": "jpg"},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_a_run_does_not_go_on_with_another_split_of_its_source(begun, source, tmp_path, capsys, options):
    run, dataset = begun
    other = convert(source, tmp_path / "pets", **{"test_fraction": 0.25} | options, log=lambda line: None)
    assert identity_of(other) != identity_of(dataset)
    before = (run / "checkpoint.pt").read_bytes()
    assert resume(run, other.folder) == 2
    error = capsys.readouterr().err.strip()
    assert re.match(r"error: .*checkpoint.pt: the run was on other data \(", error) and "\n" not in error
    assert "name its data with --data, or convert their source again with the same options" in error
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_run_goes_on_with_the_same_data_made_again(begun, source, tmp_path, capsys):
    run, dataset = begun
    again = convert(source, tmp_path / "again", test_fraction=0.25, verify=False, log=lambda line: None)
    assert again.identity == dataset.identity == load_dataset(again.folder).identity != ""
    assert resume(run, again.folder) == 0
    assert "resumed at step" in capsys.readouterr().out


def resume_without_data(run, monkeypatch, capsys):
    """The status of a resume that names no data, and its lines on standard output and error."""
    monkeypatch.setenv("RSENGINE_DATA", "")
    status = train_module.main(["--resume", "--device", "cpu", "--out", str(run)])
    return status, *(text.splitlines() for text in capsys.readouterr())


def test_a_run_finds_the_data_that_it_began_with(begun, tmp_path, monkeypatch, capsys):
    run, dataset = begun
    monkeypatch.chdir(tmp_path)  # the folder is found from anywhere
    (start, *_) = RunLog(run).records(START)
    assert start["data"]["folder"] == str(dataset.folder)
    assert start["data"]["checksum"] == dataset.checksum and start["data"]["sha256"] == dataset.sha256
    status, out, _ = resume_without_data(run, monkeypatch, capsys)
    assert status == 0 and out[0] == f"data: pets in {dataset.folder}, which the run began with"
    assert any(line.startswith("resumed at step") for line in out)


def test_the_environment_names_other_data(begun, source, tmp_path, monkeypatch, capsys):
    run, dataset = begun
    other = convert(source, tmp_path / "other", test_fraction=0.5, log=lambda line: None)
    monkeypatch.setenv("RSENGINE_DATA", str(other.folder))
    assert train_module.main(["--resume", "--device", "cpu", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert "the run was on other data (pets, " in error and f"in {dataset.folder}, identity " in error
    assert "than those that RSENGINE_DATA names (pets, " in error
    monkeypatch.setenv("RSENGINE_DATA", str(dataset.folder))
    assert resume(run, other.folder) == 2 and "RSENGINE_DATA" not in capsys.readouterr().err


def evaluate_without_data(run, capsys):
    status = evaluate_module.main([str(run), "--device", "cpu"])
    return status, *(text.splitlines() for text in capsys.readouterr())


def test_a_run_is_evaluated_on_the_data_that_it_began_with(begun, source, tmp_path, monkeypatch, capsys):
    run, dataset = begun
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSENGINE_DATA", "")
    status, out, _ = evaluate_without_data(run, capsys)
    assert status == 0 and out[1] == f"data: pets in {dataset.folder}, which the run began with"
    assert out[2] == f"measuring {OWN}: the data that the run was trained and tested on"

    other = convert(source, tmp_path / "other", test_fraction=0.5, log=lambda line: None)
    monkeypatch.setenv("RSENGINE_DATA", str(other.folder))
    status, out, _ = evaluate_without_data(run, capsys)
    assert status == 0 and out[1] == f"data: RSENGINE_DATA names {other.folder}"

    draw_classes(tmp_path / "new" / "others", 4, seed=5)
    (tmp_path / "new" / "others" / "circle").rename(tmp_path / "new" / "others" / "ring")
    others = convert(tmp_path / "new" / "others", tmp_path / "else", test_fraction=0.25, log=lambda line: None)
    monkeypatch.setenv("RSENGINE_DATA", str(others.folder))
    status, _, errors = evaluate_without_data(run, capsys)
    assert status == 2 and "than others, which RSENGINE_DATA names, has;" in errors[0]


def test_a_run_whose_data_are_gone_is_not_evaluated_on_others(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSENGINE_DATA", "")
    run = tmp_path / "run"
    shutil.copytree(begun[0], run)
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(log.replace(json.dumps(str(begun[1].folder)), json.dumps("/gone")))
    status, _, errors = evaluate_without_data(run, capsys)
    assert status == 2 and errors == [
        f"error: {run}/metrics.jsonl: the run was on the data in /gone, which cannot be read (no such folder); "
        "name the run's data with --data"
    ]


@pytest.mark.parametrize("left", ["gone", "others"])
def test_data_that_are_not_where_they_were_are_an_error_with_their_path(
    begun, source, tmp_path, monkeypatch, capsys, left
):
    run, moved = tmp_path / "run", tmp_path / "it's moved"
    shutil.copytree(begun[1].folder, moved)
    options = ["--recipe", str(begun[0].parent / "toy.toml"), "--device", "cpu", "--epochs", "1"]
    assert train_module.main([*options, "--out", str(run), "--data", str(moved)]) == 0
    shutil.rmtree(moved)
    if left == "others":
        convert(source, moved, test_fraction=0.5, log=lambda line: None)
    capsys.readouterr()
    before = (run / "checkpoint.pt").read_bytes()
    status, _, errors = resume_without_data(run, monkeypatch, capsys)
    (error,) = errors
    why = {"gone": "which cannot be read (no such folder); name", "others": "where there are others now; name"}
    assert status == 2 and f"the run was on the data in {moved}, {why[left]}" in error
    assert error.endswith("name the run's data with --data") and (run / "checkpoint.pt").read_bytes() == before
    assert resume(run, begun[1].folder) == 0


def test_an_older_run_without_the_place_of_its_data_looks_for_them(older_run, tmp_path, monkeypatch, capsys, begun):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(begun[1].folder, tmp_path / "data" / "pets")
    status, out, _ = resume_without_data(older_run, monkeypatch, capsys)
    assert status == 0 and out[0] == "data: found data/pets"


def test_the_identity_is_that_of_content_and_order(source, tmp_path):
    def made(name):
        return convert(source, tmp_path / name, test_fraction=0.25, log=lambda line: None).identity

    first = made("first")
    assert made("second") == first
    a, b = (source / "circle" / f"{number:03d}.png" for number in (0, 1))
    contents = a.read_bytes(), b.read_bytes()
    try:
        a.write_bytes(contents[1]), b.write_bytes(contents[0])
        assert made("swapped") != first
    finally:
        a.write_bytes(contents[0]), b.write_bytes(contents[1])


def without_identity(dataset, folder):
    """The data set as an older version wrote it."""
    for path in dataset.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "dataset.json").read_text())
    del content["identity"]
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_an_older_data_set_has_its_identity_read_from_its_files(begun, tmp_path):
    run, dataset = begun
    old = load_dataset(without_identity(dataset, tmp_path))
    assert old.identity == "" and identity_of(old) == dataset.identity
    assert resume(run, tmp_path) == 0


@pytest.fixture
def older_run(begun, tmp_path):
    """The run with a checkpoint that an older version wrote."""
    run = tmp_path / "older"
    run.mkdir()
    for path in begun[0].iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["dataset"] = {key: state["dataset"][key] for key in ("name", "checksum", "image_size")}
    torch.save(state, run / "checkpoint.pt")
    assert "identity" not in load_checkpoint(run / "checkpoint.pt")["dataset"]
    return run


def test_an_older_checkpoint_goes_on_where_nothing_contradicts(older_run, begun):
    assert resume(older_run, begun[1].folder) == 0
    (older_run / "weights.safetensors").unlink()
    assert resume(older_run, begun[1].folder) == 0


@pytest.mark.parametrize(
    ("options", "weights"),
    [({"seed": 1}, True), ({"test_fraction": 0.5}, False)],
    ids=["mean of the weights", "steps in an epoch"],
)
def test_an_older_checkpoint_is_refused_where_something_contradicts(
    older_run, source, tmp_path, capsys, options, weights
):
    other = convert(source, tmp_path / "data", **{"test_fraction": 0.25} | options, log=lambda line: None)
    if not weights:
        (older_run / "weights.safetensors").unlink()
    assert resume(older_run, other.folder) == 2
    assert "the run was on other data (pets, checksum" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch, capsys):
    """Evaluates a run on a data set: what the command says of the data, and the object that it prints."""

    def evaluate(run, folder):
        assert evaluate_module.main([str(run), "--device", "cpu", "--data", str(folder), "--json"]) == 0
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith(("measuring ", "warning: "))]
        found = json.loads(captured.out)
        return lines, found["run_data"], found["trained_on"]

    return evaluate


OWN = "pets, 9 test images"


def test_it_is_said_whether_a_run_knows_the_data_it_is_measured_on(begun, source, tmp_path, measured):
    run, dataset = begun

    def converted(name, given=source, **options):
        return convert(given, tmp_path / name, log=lambda line: None, **options)

    lines, *rest = measured(run, dataset.folder)
    assert lines == [f"measuring {OWN}: the data that the run was trained and tested on"] and rest == ["same", None]

    other = converted("other", test_fraction=0.5)
    lines, *rest = measured(run, other.folder)
    seen = images_in_common(dataset.train_beton, other.test_beton)
    assert 0 < seen < 18 and rest == ["same source", seen]
    assert lines == [
        f"measuring pets, 18 test images: another split or conversion of the run's source, not what it was tested on "
        f"({OWN})",
        f"warning: the run was trained on {seen} of these 18 test images; the accuracy is not that on new images",
    ]

    draw_classes(tmp_path / "new" / "pets", 4, seed=5)
    lines, *rest = measured(run, converted("else", tmp_path / "new" / "pets", test_fraction=0.25).folder)
    assert lines == [f"measuring pets, 3 test images: other data than the run's ({OWN})"] and rest == ["other", 0]


def split_again(dataset, folder, **files):
    """The data set with other files for its splits."""
    folder.mkdir()
    content = json.loads((dataset.folder / "dataset.json").read_text())
    for split, beton in files.items():
        shutil.copy(beton, folder / f"{split}.beton")
        counts = np.bincount(BetonReader(beton).labels).tolist()
        content["counts"][split], content["class_counts"][split] = sum(counts), counts
    del content["identity"]
    content["sha256"] = {split: file_digest(folder / f"{split}.beton", "sha256") for split in files}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_the_same_test_set_and_the_training_images_are_known(begun, tmp_path, measured):
    run, dataset = begun
    train, test = dataset.train_beton, dataset.test_beton
    lines, *rest = measured(run, split_again(dataset, tmp_path / "a", train=test, test=test))
    assert lines == [f"measuring {OWN}: the test set that the run was tested on, beside other training images"]
    assert rest == ["same test set", None]
    lines, *rest = measured(run, split_again(dataset, tmp_path / "b", train=test, test=train))
    assert lines[0] == f"measuring pets, 27 test images: the training images of the run, which was tested on {OWN}"
    assert lines[1].startswith("warning: the run was trained on 27 of these 27 test images;")
    assert rest == ["same source", 27]


@pytest.mark.parametrize(
    ("change", "relation", "words"),
    [
        (lambda data: data.update(folder="/nowhere"), "same source", "; its training images are not there"),
        (
            lambda data: [data.pop(key) for key in ("folder", "checksum", "sha256")],
            "other",
            "not the data that the run",
        ),
        (lambda data: data.clear(), "unknown", "nothing says which data the network was trained and tested on"),
        (lambda data: data.update(folder=5), "unknown", "is lost ("),
    ],
    ids=["gone", "an older log", "no word", "damaged"],
)
def test_what_a_log_does_not_say_is_not_claimed(begun, source, tmp_path, measured, change, relation, words):
    run = tmp_path / "run"
    shutil.copytree(begun[0], run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "data" in line:
            change(line["data"])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = convert(source, tmp_path / "other", test_fraction=0.5, log=lambda line: None)
    (said,), kind, seen = measured(run, other.folder)
    assert words in said and (kind, seen) == (relation, None)


@pytest.mark.parametrize("size", [16, 64])
def test_images_of_another_size_are_not_evaluated(begun, source, tmp_path, capsys, size):
    other = convert(source, tmp_path / "other", size=size, log=lambda line: None)
    assert evaluate_module.main([str(begun[0]), "--device", "cpu", "--data", str(other.folder)]) == 2
    captured = capsys.readouterr()
    assert "accuracy" not in captured.out and captured.err.count("\n") == 1
    assert f"its images are {size}x{size}; the network learned 32x32; convert them again" in captured.err
    assert "--size 32" in captured.err


def test_images_of_mixed_size_are_not_evaluated(begun, source, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "cache"))
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        target = tmp_path / "mixed" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((20 + number, 30)).save(target)
    assert evaluate_module.main([str(begun[0]), "--device", "cpu", "--data", str(tmp_path / "mixed")]) == 2
    error = capsys.readouterr().err.strip()
    assert "its images differ in size; the network learned 32x32" in error and "\n" not in error


def test_images_of_the_size_it_learned_are_evaluated(begun, capsys):
    assert evaluate_module.main([str(begun[0]), "--device", "cpu", "--data", str(begun[1].folder)]) == 0
    assert "accuracy" in capsys.readouterr().out
