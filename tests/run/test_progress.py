"""The time left of a run, as a person watching is told it."""

import contextlib
import sys
import threading
import types

from rsengine.run import progress as display_module
from rsengine.run.progress import Display, in_notebook
from rsengine.run.signals import stop_requests

RECORD = {"train_loss": 1.0, "train_accuracy": 0.5, "images_per_second": 100.0}


def left(step, monkeypatch, **options):
    """What is said after ``step`` steps of 30 in 3 epochs, of 100 images each: a second a step like the last one."""
    said = []
    monkeypatch.setattr(display_module, "QUIET_SECONDS", 0.0)
    with contextlib.closing(Display(30, 0, 3, 100, said.append, **options)) as display:
        display.interval(1, RECORD | {"step": step})
    return said[0].split("about ")[1]


def test_every_step_costs_the_same_unless_said_otherwise(monkeypatch):
    assert left(10, monkeypatch) == "20.0 s of training left"
    assert left(30, monkeypatch) == "0.0 s of training left"


def test_epochs_of_small_images_cost_less(monkeypatch):
    work = [0.25, 0.5, 1.0]
    # In steps like those of the first epoch: 5 of its own, 10 that cost twice as much, 10 that cost four times.
    assert left(5, monkeypatch, work=work) == "1 min 05 s of training left"
    assert left(10, monkeypatch, work=work) == "1 min 00 s of training left"
    assert left(15, monkeypatch, work=work) == "25.0 s of training left"
    assert left(30, monkeypatch, work=work) == "0.0 s of training left"


def test_a_notebook_has_a_bar_on_standard_output_with_the_lines_between(monkeypatch, capsys):
    assert not in_notebook()
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook()
    with contextlib.closing(Display(30, 0, 3, 100, print)) as display:
        display.advance()
        display.line("epoch 1/3: done")
    shown = capsys.readouterr()
    assert "| 1/30 [" in shown.out and "epoch 1/3: done\n" in shown.out and not shown.err
    with contextlib.closing(Display(30, 0, 3, 100, print, bar=False)) as display:
        display.line("epoch 1/3: done")
    assert capsys.readouterr() == ("epoch 1/3: done\n", "")
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()  # imported, and no kernel


def test_lines_go_where_they_are_said_while_there_is_a_bar(capsys):
    said = []
    with contextlib.closing(Display(30, 0, 3, 100, said.append, bar=True)) as display:
        display.line("epoch 1/3: done")
    assert said == ["epoch 1/3: done"] and not capsys.readouterr().out


def test_the_bar_names_the_epoch_under_way(capsys):
    record = RECORD | {"epoch": 1, "test_accuracy": 0.5, "test_accuracy_ema": None, "seconds": 1.0}
    with contextlib.closing(Display(30, 0, 3, 100, lambda _line: None, bar=True)) as display:
        display.epoch(record)
        assert display.bar.desc.startswith("epoch 2/3")
        display.epoch(record | {"epoch": 3})
        assert display.bar.desc.startswith("epoch 2/3")  # none comes after it


def test_signals_stay_as_they_are_in_other_threads():
    found = []

    def ask():
        with stop_requests() as request:
            found.append(request.signal)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [0]
