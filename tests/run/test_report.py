"""The report: it holds the log's numbers, says what they are worth, and links to nothing that is not there."""

import os
import re

import numpy as np
import pytest

from rsengine.run import progress as display
from rsengine.run import report
from rsengine.run.log import RunLog

MACHINE = {
    "processor": "Some CPU @ 2 GHz",
    "physical_cores": 4,
    "logical_cores": 8,
    "ram_gib": 15.6,
    "gpus": [],
    "os": "Debian GNU/Linux 12, x86_64",
    "python": "CPython 3.11.7",
}
VERSIONS = {"torch": "2.9.1", "ffcv": None}
CLASSES = ["airplane", "auto|mobile", "bird"]
MATRIX = np.array([[90, 4, 6], [1, 95, 4], [20, 0, 80]])


def _epoch(number: int, **other) -> dict:
    return {
        "kind": "epoch",
        "step": 100 * number,
        "epoch": number,
        "train_loss": 2.0 / number,
        "train_accuracy": 0.5,
        "test_loss": 1.5 / number,
        "test_accuracy": 0.8 - 0.1 / number,
        "test_loss_ema": 1.4 / number,
        "test_accuracy_ema": 0.85 - 0.1 / number,
        "learning_rate": 0.1,
        "images_per_second": 1000.0 + number,
        "seconds": 60.0 * number,
        "epoch_seconds": 60.0,
        "eval_seconds": 5.0,
        **other,
    }


def _start(**other) -> dict:
    record = {"kind": "start", "step": 0, "time_to_first_step": 4.25, "device": "cpu", "precision": "bfloat16"}
    return {**record, "threads": 2, "resumed": False, "machine": MACHINE, "versions": VERSIONS, **other}


def _write(folder, records, **other) -> str:
    log = RunLog(folder)
    for record in records:
        log.append(record)
    arguments = {
        "recipe_toml": '[model]\ndepth = 26\nname = "quick"\n',
        "title": "quickstart",
        "dataset_line": "CIFAR-10, 50,000 training and 10,000 test images",
        "model_lines": ["ResNet-RS-26", "1,234,567 parameters"],
        "confusion": None,
        "classes": [],
        "notes": ["To repeat it: `python -m rsengine.train --recipe quickstart`"],
        "planned_epochs": sum(record["kind"] == "epoch" for record in records),
        **other,
    }
    report.write_report(folder, **arguments)
    return (folder / "report.md").read_text(encoding="utf-8")


def _row(text: str, name: str) -> list[str]:
    """The cells after the first of the table row whose first cell is ``name``."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.split(" | ")[0][2:].strip("*") == name]
    assert len(rows) == 1, f"{name}: {len(rows)} rows"
    return re.split(r"(?<!\\) \| ", rows[0].removesuffix(" |"))[1:]


def test_the_headline_holds_the_logs_numbers(tmp_path):
    epochs = [_epoch(n) for n in range(1, 11)]
    epochs[6]["test_accuracy_ema"] = 0.9125  # better than the last epoch: named, and called optimistic
    intervals = [{"kind": "interval", "step": 9, "epoch": 0.1, "images_per_second": r} for r in (1, 1500, 9999)]
    text = _write(tmp_path, [_start(), *intervals, *epochs])
    assert _row(text, "Test accuracy, EMA weights") == ["**84.00 %** after epoch 10"]
    assert _row(text, "Best test accuracy, EMA weights") == ["91.25 % after epoch 7 ¹"]
    assert _row(text, "Test accuracy, raw weights") == ["**79.00 %** after epoch 10"]
    assert "chosen by its test accuracy, so that number is optimistic" in text
    assert _row(text, "Training time") == ["10 min 00 s, of which evaluation 50.0 s"]
    assert _row(text, "Images per second") == ["1,500, median of 3 log intervals"]
    assert _row(text, "Time to first step") == ["4.2 s"]
    assert _row(text, "Resumed") == ["no"]
    assert _row(text, "Ran on") == ["cpu, bfloat16, 2 threads"]
    assert _row(text, "Epochs") == ["10 of 10 planned"]
    assert "Unfinished" not in text
    assert "n = 1" in text
    assert "standard error" not in text, "the number of test images is not known without the matrix"
    for part in ("CIFAR-10, 50,000 training", "1,234,567 parameters", "`python -m rsengine.train --recipe quickstart`"):
        assert part in text
    assert '```toml\n[model]\ndepth = 26\nname = "quick"\n```' in text
    assert text.startswith("# quickstart\n")


def test_an_early_stop_is_called_unfinished(tmp_path):
    text = _write(tmp_path, [_start(), *(_epoch(n) for n in range(1, 8))], planned_epochs=10)
    assert "**Unfinished run:** 7 of 10 planned epochs are done." in text
    assert _row(text, "Epochs") == ["7 of 10 planned"]


def test_a_run_stopped_within_its_first_epoch_still_gets_a_report(tmp_path):
    interval = {"kind": "interval", "step": 3, "images_per_second": 12.34}
    text = _write(tmp_path, [_start(), interval], planned_epochs=2)
    assert "**Unfinished run:** 0 of 2" in text
    assert _row(text, "Test accuracy, EMA weights") == ["not evaluated"]
    assert _row(text, "Images per second") == ["12.3, median of 1 log interval"]
    assert "## Training" not in text
    assert "n = 1" not in text


def test_ema_off_and_a_diverged_epoch(tmp_path):
    off = {"test_loss_ema": None, "test_accuracy_ema": None}
    text = _write(tmp_path, [_start(), _epoch(1, **off), _epoch(2, **off, train_loss=float("nan"))])
    assert _row(text, "Test accuracy, EMA weights") == ["not evaluated"]
    assert _row(text, "Test accuracy, raw weights") == ["**75.00 %** after epoch 2"]
    assert _row(text, "2") == ["–", "50.00 %", "0.7500", "75.00 %", "–", "–", "0.1", "1,002", "120.0"]
    assert "nan" not in text.lower().replace("resnet", "")
    assert "None" not in text


def test_resumes_are_told(tmp_path):
    records = [_start(), _epoch(1), _start(step=150, resumed=True, time_to_first_step=2.0), _epoch(2)]
    text = _write(tmp_path, records)
    assert _row(text, "Resumed") == ["once, at step 150"]
    assert _row(text, "Time to first step") == ["4.2 s; on resuming 2.0 s"]
    RunLog(tmp_path).append(_start(step=1250, resumed=True, time_to_first_step=1.0))
    text = _write(tmp_path, [], planned_epochs=2)
    assert _row(text, "Resumed") == ["2 times, at step 150, 1,250"]
    assert _row(text, "Time to first step") == ["4.2 s; on resuming 2.0 s, 1.0 s"]


def test_links_go_only_to_pictures_that_are_there(tmp_path):
    def links(text):
        return re.findall(r"!\[[^\]]+\]\(([^)]*)\)", text)

    records = [_start(), _epoch(1)]
    assert links(_write(tmp_path, records)) == []
    (tmp_path / "curves.png").write_bytes(b"")
    (tmp_path / "augmented.png").write_bytes(b"")
    assert links(_write(tmp_path, [], planned_epochs=1)) == ["curves.png", "augmented.png"]
    (tmp_path / "confusion.png").write_bytes(b"")
    assert links(_write(tmp_path, [], planned_epochs=1)) == ["curves.png", "confusion.png", "augmented.png"]


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (1, [1]),
        (42, list(range(1, 43))),
        (43, [1, *range(4, 41, 4), 43]),
        (200, [1, *range(5, 201, 5)]),
        (350, [1, *range(10, 351, 10)]),
        (1999, [1, *range(50, 1999, 50), 1999]),
    ],
)
def test_the_table_is_thinned_evenly_and_says_so(tmp_path, number, shown):
    text = _write(tmp_path, [_start(), *(_epoch(n) for n in range(1, number + 1))])
    table = [int(match) for match in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)]
    assert table == shown
    assert len(table) <= 42
    said = re.search(r"(\d+) of (\d+) epochs: every (\d+)th, the first and the last\.", text)
    if len(shown) == number:
        assert said is None
    else:
        assert [int(group) for group in said.groups()] == [len(shown), number, shown[2] - shown[1]]


def test_classes_and_confusions_come_from_the_matrix(tmp_path):
    text = _write(tmp_path, [_start(), _epoch(1)], confusion=MATRIX, classes=CLASSES)
    assert "Over all 300 test images: 88.33 %." in text
    assert "| bird | 80.00 % | 100 |" in text
    assert r"| auto\|mobile | 95.00 % | 100 |" in text
    confusions = text[text.index("The most frequent confusions.") :].split("\n\n")[1].splitlines()[2:]
    assert confusions == [
        "| bird | airplane | 20 | 20.00 % |",
        "| airplane | bird | 6 | 6.00 % |",
        r"| airplane | auto\|mobile | 4 | 4.00 % |",
        r"| auto\|mobile | bird | 4 | 4.00 % |",
        r"| auto\|mobile | airplane | 1 | 1.00 % |",
    ]
    # sqrt(.75 * .25 / 300)
    assert "The 300 test images alone leave a standard error of 2.50 percentage points." in text


def test_a_perfect_matrix_and_a_class_without_images(tmp_path):
    text = _write(tmp_path, [_start(), _epoch(1)], confusion=np.diag([5, 0]), classes=["a", "b"])
    assert "No test image was misclassified." in text
    assert "| b | – | 0 |" in text


def test_many_classes_are_folded_away_and_the_weakest_shown(tmp_path):
    right = np.arange(100) + 100
    matrix = np.diag(right)
    matrix[:, 0] += 200 - right  # every class has 200 images, and class 0 gets the errors
    text = _write(tmp_path, [_start(), _epoch(1)], confusion=matrix, classes=[f"c{i}" for i in range(100)])
    weakest = text[text.index("ten classes with the lowest accuracy") : text.index("<details>")]
    assert re.findall(r"^\| (c\d+) \|", weakest, flags=re.MULTILINE) == [f"c{i}" for i in range(1, 11)]
    folded = text[text.index("<details>") : text.index("</details>")]
    assert folded.startswith("<details><summary>All 100 classes</summary>\n\n| Class"), "GitHub needs the empty line"
    assert len(re.findall(r"^\| c\d+ \|", folded, flags=re.MULTILINE)) == 100


def test_machine_and_versions_are_the_runs_own(tmp_path):
    text = _write(tmp_path, [_start(), _epoch(1)])
    assert _row(text, "Processor") == ["Some CPU @ 2 GHz"]
    assert _row(text, "Cores usable") == ["8 logical on 4 physical"]
    assert _row(text, "Memory") == ["15.6 GiB"]
    assert _row(text, "GPU") == ["none"]
    assert _row(text, "torch") == ["2.9.1"]
    assert _row(text, "ffcv") == ["not installed"]


def test_every_table_has_as_many_cells_in_each_row(tmp_path):
    text = _write(tmp_path, [_start(), _epoch(1), _epoch(2)], confusion=MATRIX, classes=CLASSES)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 5
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(cells) == 1, table[0]


def test_a_recipe_cannot_break_out_of_its_block(tmp_path):
    text = _write(tmp_path, [_start(), _epoch(1)], recipe_toml='note = """\n```\n# not a heading\n"""')
    assert '````toml\nnote = """\n```\n# not a heading\n"""\n````' in text


def test_the_report_is_replaced_whole(tmp_path):
    first = _write(tmp_path, [_start(), _epoch(1)], planned_epochs=2)
    second = _write(tmp_path, [_epoch(2)], planned_epochs=2)
    assert "Unfinished" in first
    assert "Unfinished" not in second
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "report.md"]


def test_without_a_log_there_is_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        _write(tmp_path, [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (425.4, "7 min 05 s"), (10809, "3 h 00 min 09 s")],
)
def test_duration(seconds, words):
    assert display.duration(seconds) == words


def test_the_key_to_the_labels_of_pictures(tmp_path):
    classes = ["猫", "auto|mobile", "犬"]
    text = _write(tmp_path, [_epoch(1)], confusion=MATRIX, classes=classes, labels=["#1", "auto|mobile", "#3"])
    assert _row(text, "#1") == ["猫"] and _row(text, "#3") == ["犬"]
    assert text.index("## Classes") < text.index("| #1 |") < text.index("Accuracy of each class")
    assert "| 猫 | 90.00 % | 100 |" in text
    (tmp_path / "b").mkdir()
    plain = _write(tmp_path / "b", [_epoch(1)], confusion=MATRIX, classes=classes, labels=classes)
    assert "In the pictures" in text and "In the pictures" not in plain
    (tmp_path / "c").mkdir()
    unfinished = _write(tmp_path / "c", [_start()], classes=classes, labels=["#1", "auto|mobile", "#3"])
    assert _row(unfinished, "#3") == ["犬"]


def test_names_that_are_no_text_are_escaped(tmp_path):
    classes = ["caf\udce9", "b", "c"]
    text = _write(tmp_path, [_epoch(1)], confusion=MATRIX, classes=classes, title="\udcff on \udce9")
    assert text.startswith("# \\udcff on \\udce9\n") and "| caf\\udce9 | 90.00 % | 100 |" in text


def test_a_start_without_machine_and_versions_is_a_dash(tmp_path):
    """They are optional in the log."""
    start = _start()
    del start["machine"], start["versions"]
    assert _row(_write(tmp_path, [start, _epoch(1)]), "Processor") == ["–"]
