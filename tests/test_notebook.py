"""The notebook of the documentation, executed, and the stop button of a real kernel where Jupyter is installed.

``jupyter execute --inplace docs/tour.ipynb`` writes its outputs anew.
"""

import ast
import json
import time

import pytest

from tests.test_setup import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def executed(source, names):
    """Run a cell as a notebook does. Returns the value of its last expression, or None."""
    body = ast.parse(source).body
    last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
    return eval(compile(last, str(NOTEBOOK), "eval"), names) if last else None


@pytest.mark.slow
def test_the_tour_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    shown = [executed(source, names) for source in code_cells()]
    accuracy, figure, answers, picture = [value for value in shown if value is not None]
    assert accuracy == names["run"].accuracy > 0.8
    assert len(figure.axes) == 3 and len(answers) == 12 and picture.size == (384, 32)
    output = capsys.readouterr().out
    assert "epoch 5: training loss" in output and "learning rate 0.1: test accuracy" in output
    assert "did you mean schedule.learning_rate?" in output


def test_the_tour_in_the_documentation_has_its_outputs():
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert text.count('"image/png"') == 2 and len(text) < 500_000


@pytest.mark.thorough
def test_the_stop_button_of_a_kernel_ends_a_run_that_can_go_on(tmp_path):
    manager_module = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    manager, client = manager_module.start_new_kernel(kernel_name="python3", cwd=str(tmp_path))

    def say(code, stop_at=None):
        client.execute(code)
        output, until = "", time.monotonic() + 240
        while time.monotonic() < until:
            message = client.get_iopub_msg(timeout=120)
            content = message["content"]
            output += content.get("text", "") + content.get("data", {}).get("text/plain", "")
            if stop_at and stop_at in output:
                stop_at = None
                manager.interrupt_kernel()
            if content.get("execution_state") == "idle":
                break
        return output

    try:
        run = 'rsengine.train("digits", data="digits", out="run", set={"model.width_multiplier": 0.1}'
        output = say(f"import rsengine\nrun = {run})", stop_at="epoch  1/20")
        assert "stopped after step" in output and "step/s" in output  # a bar too
        assert say("run.stopped") == "True"
        output = say(f"import os, signal\nrun = {run}, resume=True)", stop_at="resumed at step")
        assert "resumed at step" in output and "stopped after step" in output
    finally:
        manager.shutdown_kernel(now=True)
