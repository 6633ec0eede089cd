"""Finding a data set: the order of places, the cache, the fallbacks, and that each choice is said."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

import rsengine.data.find as find
from rsengine.data import DataError, convert, find_dataset, load_dataset
from rsengine.data.sources.official import BY_ARCHIVE
from tests.data.data_builders import class_folders, official_binary, official_python, tar


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder, and no network."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(find, "network_problem", lambda: "no network in tests")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    class_folders(tmp_path / "pets")
    return tmp_path / "pets"


@pytest.fixture
def instead_of_converting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources that would be converted; the conversion itself is replaced, since only the choice matters."""
    sources: list[str] = []

    class Chosen(Exception):
        pass

    def stop(source: object, *arguments: object, **options: object) -> None:
        sources.append(str(source))
        raise DataError("stop here")

    monkeypatch.setattr(find, "convert", stop)
    return sources


def test_a_source_is_converted_once(tmp_path, pets, said, monkeypatch):
    first = find_dataset(pets, log=said.append)
    assert first.folder.parent == tmp_path / "cache" / "datasets"
    assert first.folder.name.startswith("pets-") and len(first.folder.name) == len("pets-") + 12
    assert "converting" in said[0]

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("converted again")

    with monkeypatch.context() as patch:
        patch.setattr(find, "convert", never)
        said.clear()
        assert find_dataset(str(pets), log=said.append) == first
        assert len(said) == 1 and "converted earlier" in said[0]
    os.utime(pets / "train" / "cat" / "000.png", ns=(1, 1))
    second = find_dataset(pets, log=said.append)  # the source has changed
    assert second.folder != first.folder


def replace_a_picture(pets: Path, elsewhere: Path) -> None:
    """Another picture of the same size in bytes, with the old one's time of modification, as rsync leaves it."""
    picture = elsewhere / "000.png"
    status, data = picture.stat(), bytearray(picture.read_bytes())
    data[-1] ^= 1
    (elsewhere / "new.tmp").write_bytes(data)
    os.utime(elsewhere / "new.tmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    (elsewhere / "new.tmp").replace(picture)


def add_a_picture(pets: Path, elsewhere: Path) -> None:
    shutil.copy2(elsewhere / "000.png", elsewhere / "new.png")


def lead_a_link_elsewhere(pets: Path, elsewhere: Path) -> None:
    copy = pets.parent / "copy"
    shutil.copytree(elsewhere, copy / "cat")
    link = next(path for path in (pets, *pets.rglob("*")) if path.is_symlink())
    link.unlink()
    link.symlink_to(copy if link.name == "train" else copy / "cat", target_is_directory=True)


@pytest.mark.parametrize("linked", ["train", "train/cat"])
@pytest.mark.parametrize("change", [replace_a_picture, add_a_picture, lead_a_link_elsewhere])
def test_a_change_behind_a_link_is_seen(tmp_path, pets, linked, change):
    elsewhere = tmp_path / "elsewhere"
    (pets / linked).rename(elsewhere)
    (pets / linked).symlink_to(elsewhere, target_is_directory=True)
    before = find.fingerprint(pets)
    assert find.fingerprint(pets) == before
    change(pets, elsewhere / "cat" if linked == "train" else elsewhere)
    assert find.fingerprint(pets) != before


def test_a_picture_behind_a_link_of_its_own_is_seen(tmp_path, pets):
    picture = pets / "test" / "dog" / "003.png"
    picture.rename(tmp_path / "kept.png")
    picture.symlink_to(tmp_path / "kept.png")
    before = find.fingerprint(pets)
    (tmp_path / "kept.png").write_bytes(b"other")
    assert find.fingerprint(pets) != before


def test_what_a_conversion_does_not_read_does_not_count(pets):
    before = find.fingerprint(pets)
    (pets / "train" / "cat" / ".DS_Store").write_bytes(b"junk")
    (pets / ".cache").mkdir()
    assert find.fingerprint(pets) == before


def test_a_circle_of_links_ends_in_one_line(pets, said):
    (pets / "train" / "cat" / "again").symlink_to(pets)
    with pytest.raises(DataError, match="again: a link to a folder that contains it; remove the link"):
        find_dataset(pets, log=said.append)


def test_a_damaged_cache_is_converted_again_and_said(pets, said):
    first = find_dataset(pets, log=said.append)
    first.test_beton.write_bytes(b"")
    said.clear()
    again = find_dataset(pets, log=said.append)
    assert again == first and load_dataset(again.folder) == again
    assert "test.beton" in said[0] and "convert" in said[0]


def test_a_converted_folder_is_taken_as_it_is(tmp_path, pets, said):
    convert(pets, tmp_path / "mine", log=said.append)
    assert find_dataset(tmp_path / "mine", log=said.append).folder == tmp_path / "mine"
    assert not (tmp_path / "cache").exists()
    (tmp_path / "mine" / "train.beton").unlink()
    with pytest.raises(DataError, match="train.beton: missing"):
        find_dataset(tmp_path / "mine", fallback_digits=True, log=said.append)


def test_the_variable_comes_before_the_folder(tmp_path, pets, said, monkeypatch):
    convert(pets, Path("data/pets"), log=said.append)
    convert(pets, tmp_path / "other", log=said.append)
    assert find_dataset(log=said.append).folder == Path("data/pets")
    monkeypatch.setenv("RSENGINE_DATA", str(tmp_path / "other"))
    said.clear()
    assert find_dataset(log=said.append).folder == tmp_path / "other"
    assert "RSENGINE_DATA" in said[0]
    assert find_dataset("data/pets", log=said.append).folder == Path("data/pets")  # --data comes before both
    assert find_dataset("data", log=said.append).folder == Path("data/pets")


def test_a_wrong_variable_is_an_error_and_not_passed_over(said, monkeypatch):
    monkeypatch.setenv("RSENGINE_DATA", "/nonexistent/cifar")
    with pytest.raises(DataError, match="/nonexistent/cifar: no such file.*RSENGINE_DATA"):
        find_dataset(fallback_digits=True, log=said.append)


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["cifar-10-python.tar.gz"], "cifar-10-python.tar.gz"),
        (["cifar-100-python.tar.gz", "cifar-10-binary.tar.gz"], "cifar-10-binary.tar.gz"),
        (["cifar-10-batches-py", "cifar-10-python.tar.gz"], "cifar-10-batches-py"),
        (["cifar-100-python", "cifar-10-batches-bin"], "cifar-10-batches-bin"),
        (["cifar-100-binary.tar.gz", "convert.py"], "cifar-100-binary.tar.gz"),
    ],
)
def test_official_sources_in_the_folder(said, instead_of_converting, present, chosen):
    for name in present:
        path = Path("data") / name
        path.parent.mkdir(exist_ok=True)
        if "." in name:
            path.write_bytes(b"")
        else:
            path.mkdir()
    with pytest.raises(DataError, match="stop here"):
        find_dataset(fallback_digits=True, log=said.append)
    assert instead_of_converting == [f"data/{chosen}"]
    assert f"found data/{chosen}" in said[0]


def test_official_folder_in_data_is_verified(said):
    official_python(Path("data/cifar-10-batches-py"))
    with pytest.raises(DataError, match="data_batch_1: its md5"):
        find_dataset(log=said.append)


def test_several_converted_data_sets_are_ambiguous(pets, said):
    for name in ("a", "b"):
        convert(pets, Path("data") / name, log=said.append)
    with pytest.raises(DataError, match="several data sets.*a, b.*name one"):
        find_dataset(log=said.append)


def test_leftovers_are_not_found(said):
    left = Path("data/.cifar.tmp-123")
    left.mkdir(parents=True)
    (left / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="no data set"):
        find_dataset(log=said.append)


def test_nothing_found_says_what_was_looked_for(said):
    with pytest.raises(DataError) as caught:
        find_dataset(log=said.append)
    for word in ("RSENGINE_DATA", str(Path("data").absolute()), "no network in tests", "--data digits"):
        assert word in str(caught.value)


def test_fallback_to_digits_is_said(said):
    dataset = find_dataset(fallback_digits=True, log=said.append)
    assert dataset.name == "digits"
    assert "Falling back" in said[0] and "no network in tests" in said[0] and "not CIFAR" in said[0]
    again = find_dataset("digits", log=said.append)
    assert again == dataset and "converted earlier" in said[-1]


def test_download_goes_through_torchvision(tmp_path, said, monkeypatch, instead_of_converting):
    archive = tar(tmp_path / "made.tar.gz", official_binary(tmp_path / "cifar-10-batches-bin")).read_bytes()
    layout = BY_ARCHIVE["cifar-10-python.tar.gz"]
    changed = type(layout)(**{**vars(layout), "md5": hashlib.md5(archive).hexdigest()})
    monkeypatch.setitem(BY_ARCHIVE, layout.archive, changed)
    monkeypatch.setattr(find, "network_problem", lambda: None)
    calls: list[str] = []

    def download_url(url: str, root: str, filename: str, md5: str) -> None:
        calls.append(url)
        assert md5 == changed.md5
        Path(root, filename).write_bytes(archive if len(calls) > 1 else archive[:100])
        if len(calls) == 1:
            raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    with pytest.raises(DataError, match="download of CIFAR-10 failed.*corrupted"):
        find_dataset(log=said.append)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    for _ in range(2):
        with pytest.raises(DataError, match="stop here"):
            find_dataset(log=said.append)
    target = tmp_path / "cache" / "downloads" / "cifar-10-python.tar.gz"
    assert target.read_bytes() == archive and instead_of_converting == [str(target)] * 2
    assert calls == [find.URL] * 2  # the third time it was there
    assert any("downloading CIFAR-10" in line for line in said)


def test_probing_a_network_that_is_not_there(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(find, "URL", "http://127.0.0.1:9/cifar")
    assert "127.0.0.1" in (find.network_problem() or "")


def test_two_processes_at_once(tmp_path, pets):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work() -> None:
        results.put(find_dataset(pets, log=lambda line: None).train_count)

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [results.get(), results.get()] == [9, 9]
    folders = list((tmp_path / "cache" / "datasets").iterdir())
    assert len(folders) == 1
    load_dataset(folders[0])


@pytest.mark.parametrize("variable", ["RSENGINE_CACHE", "HOME"])
def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, pets, monkeypatch, variable):
    (tmp_path / "file").touch()
    for name in ("RSENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file" / "folder"))
    with pytest.raises(DataError, match=rf"{tmp_path}/file/\S+: Not a directory; check .*; RSENGINE_CACHE can name"):
        find_dataset(pets, log=lambda line: None)


def test_a_full_disk_of_the_cache_names_the_variable(tmp_path, pets, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("rsengine.data.beton.writer.BetonWriter.finish", fail)
    with pytest.raises(DataError, match=r"no space left on the disk at /.*; RSENGINE_CACHE can name another folder"):
        find_dataset(pets, log=lambda line: None)
    assert not list((tmp_path / "cache").rglob("*.beton"))


def test_the_loser_takes_what_the_winner_made(pets, said, monkeypatch):
    def late(source: object, out: Path, **options: object) -> None:
        convert(source, out, log=lambda line: None)  # the other process
        convert(source, out, log=lambda line: None)  # ours, too late

    monkeypatch.setattr(find, "convert", late)
    assert find_dataset(pets, log=said.append).train_count == 9
    assert "another process" in said[-1]
