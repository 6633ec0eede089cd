"""The comparison of fine-tuning with training from scratch: its commands are those of training, and its table."""

import pytest

from bench import finetune
from rsengine import train
from rsengine.config import load_recipe
from rsengine.data.convert import _parser
from rsengine.run.log import RunLog

START = {"kind": "start", "step": 0, "time_to_first_step": 1.0, "resumed": False, "precision": "bf16", "threads": 2}
START |= {"machine": {"processor": "A processor"}, "versions": {"torch": "2", "ffcv": None}}


def record(folder, epoch, accuracy):
    log = RunLog(folder)
    log.append(START)
    log.append({"kind": "epoch", "step": epoch, "epoch": epoch, "seconds": 30.0, "test_accuracy_ema": accuracy})


def test_each_run_is_a_command_of_training(tmp_path):
    runs = finetune.runs(tmp_path, (0, 1, 2))
    assert len(runs) == 1 + 3 * len(finetune.WAYS) and next(iter(runs)) == tmp_path / "learned"
    begun = 0
    for folder, (epochs, command) in runs.items():
        assert command[1:3] == ["-m", "rsengine.train"]
        arguments = train._parser().parse_args(command[3:])
        recipe = load_recipe(arguments.recipe).with_settings(train._request(arguments).set)
        assert (arguments.out, recipe.train.epochs) == (str(folder), epochs)
        assert not set(finetune.LEARNED) & set(finetune.NEW)
        if arguments.init:
            begun += 1
            assert arguments.init == str(tmp_path / "learned" / "weights.safetensors")
        assert train._parser().parse_args(finetune.resumed(command)[3:]).resume
        assert "--init" not in " ".join(finetune.resumed(command))  # it has the weights already
        data = tmp_path / ("data-learned" if folder.name == "learned" else f"data-new-seed{recipe.train.seed}")
        assert arguments.data == str(data) and data in finetune.conversions(tmp_path, "x", (0, 1, 2))
    assert begun == 3 * (len(finetune.WAYS) - 1)


def test_the_table_has_the_runs_that_are_done(tmp_path):
    assert finetune.table(tmp_path, (0, 1)) == ""
    record(tmp_path / "learned", finetune.FIRST_EPOCHS, 0.9)
    record(tmp_path / "1-seed0", finetune.EPOCHS, 0.5)
    record(tmp_path / "1-seed1", finetune.EPOCHS, 0.6)
    record(tmp_path / "2-seed0", finetune.EPOCHS, 0.7)
    record(tmp_path / "3-seed0", finetune.EPOCHS - 1, 0.1)
    assert [finetune.is_done(tmp_path / name, finetune.EPOCHS) for name in ("1-seed0", "3-seed0", "none")] == [
        *(True, False),
        False,
    ]
    written = finetune.table(tmp_path, (0, 1))
    assert "A processor, bf16, 2 threads; torch 2." in written and "(90.00 % of their test images)" in written
    assert "| from scratch | `schedule.learning_rate=0.2` | 55.00 ± 7.07 | 50.00, 60.00 |" in written
    assert "| fine-tuned | `schedule.learning_rate=0.05` | 70.00 | 70.00 |" in written
    assert "frozen" not in written


def test_what_is_done_is_not_done_again_and_a_fault_ends_it(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(finetune, "called", lambda name, command: called.append((name, command)) or 0)
    monkeypatch.setattr(
        "sys.argv", ["finetune", "--data=x", f"--out={tmp_path}", "--seeds", "0", "--results", str(tmp_path / "t.md")]
    )
    (tmp_path / "data-learned").mkdir()
    record(tmp_path / "learned", finetune.FIRST_EPOCHS, 0.9)
    record(tmp_path / "2-seed0", 1, 0.7)
    (tmp_path / "2-seed0" / "checkpoint.pt").touch()
    record(tmp_path / "3-seed0", finetune.EPOCHS, 0.8)
    assert finetune.main() == 0
    assert [name for name, _ in called] == ["data-new-seed0", "1-seed0", "2-seed0"]
    assert ["--resume" in command for _, command in called] == [False, False, True]
    assert "80.00" in (tmp_path / "t.md").read_text()
    monkeypatch.setattr(finetune, "called", lambda name, command: 2)
    assert finetune.main() == 2


@pytest.mark.parametrize("seed", [0, 4])
def test_the_conversions(tmp_path, seed):
    learned, new = finetune.conversions(tmp_path, "cifar.tar.gz", (seed,)).values()
    assert learned[2:] == [
        *("cifar.tar.gz", "--classes", "airplane,bird,deer,frog,ship"),
        *("--out", str(tmp_path / "data-learned"), "--quiet"),
    ]
    assert _parser().parse_args(new[2:]).subset == 2500 and _parser().parse_args(learned[2:]).quiet
    assert new[3:-3] == ["--classes", "automobile,cat,dog,horse,truck", "--subset", "2500", "--seed", str(seed)]
