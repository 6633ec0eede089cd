"""The check of the step's rules: every recipe passes, and every planted mistake is found at its line.

Registering the fake device lasts for the rest of a process, so all of it happens in one other process.
"""

import gc
import multiprocessing
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rsengine import capture_check
from rsengine.checks.capture import Report, check_recipe, check_step, trace_step, tracing
from rsengine.checks.findings import COPY, Finding
from rsengine.checks.launches import launch_table
from rsengine.config import load_recipe, recipe_names
from rsengine.engine.step import TrainStep
from rsengine.kernels.dispatch import is_triton_assumed
from tests.checks.broken_steps import EXPECTED, Sound

ROOT = Path(__file__).parents[2]
SMALL = ["model.blocks=[1, 1]", "model.width_multiplier=0.125", "model.stem_width=8", "train.batch_size=8"]
OPTIONS = {
    "micro-batches": ["train.micro_batches=2"],
    "clipping": ["optimizer.clip_norm=1.0"],
    "mixup": ["augment.mixup_alpha=0.2"],
    "cutmix": ["augment.cutmix_alpha=1.0"],
    "mixup or cutmix": ["augment.mixup_alpha=0.2", "augment.cutmix_alpha=1.0"],
    "float32": ["train.precision=fp32"],
    "random depth": ["model.drop_path=0.2", "model.dropout=0.3"],
    "no EMA": ["ema.enabled=false"],
    "ResNet": ["model.se_ratio=0", "model.resnet_d=false", "model.drop_path=0.2"],
    "muon": ["optimizer.name=muon"],
    "no momentum": ["optimizer.momentum=0.0", "optimizer.nesterov=false"],
    "frozen": ["train.freeze=stem,stage1", "model.drop_path=0.2"],
    "frozen above": ["train.freeze=stage2"],
    "body rate": ["optimizer.body_rate=0.1"],
    "frozen, body rate and muon": ["train.freeze=stem", "optimizer.body_rate=0.1", "optimizer.name=muon"],
    "frozen and float32": ["train.freeze=stem", "optimizer.body_rate=0.1", "train.precision=fp32"],
    "resized": ["train.start_scale=0.5"],
    "resized resident": ["train.start_scale=0.5", "train.loader=resident"],
    "resident": ["train.loader=resident", "augment.cutout_holes=2"],
    "all at once": [
        *("train.loader=resident", "train.micro_batches=4", "optimizer.clip_norm=1.0", "augment.mixup_alpha=0.2"),
        *("augment.cutmix_alpha=1.0", "model.drop_path=0.2", "model.dropout=0.3", "augment.cutout_holes=1"),
    ],
}


@pytest.fixture(scope="module")
def elsewhere():
    """Runs a function in the process that has the fake device."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()

    def run(function, *arguments):
        here.send((function, arguments))
        assert here.poll(120), "no answer"
        succeeded, answer = here.recv()
        assert succeeded, answer
        return answer

    yield run
    here.send(None)
    process.join(10)


# --- run in the other process ---------------------------------------------------------------------------------------


def serve(connection):
    while (task := connection.recv()) is not None:
        # The check collects garbage after every step; what was there before, most of it PyTorch's, is not searched.
        gc.collect()
        gc.freeze()
        try:
            connection.send((True, task[0](*task[1])))
        except Exception:
            connection.send((False, traceback.format_exc()))


def check(name, settings=()):
    reports = check_recipe(load_recipe(name).with_settings(settings))
    evaluation = reports.pop("evaluation step")
    training = next(iter(reports.values()))  # at the size of the first epoch
    names = [operation.name for operation in training.operations]
    return "\n".join(map(str, reports.values())), names, training.launches, str(evaluation)


def checked_sizes(name, settings=()):
    """The steps that are checked, and how many operations each has."""
    reports = check_recipe(load_recipe(name).with_settings(settings))
    return {name: len(report.operations) for name, report in reports.items()}


def check_class(kind):
    with tracing() as device, mock.patch("rsengine.engine.build.TrainStep", kind):
        step, inputs = trace_step(load_recipe("quickstart").with_settings(SMALL), device, (8, 8))
        return check_step(step, inputs).findings


def effects():
    """What registering the device leaves behind for the rest of the process to notice."""
    with tracing() as device:
        inside = torch.zeros(2, device=device).device.type
    plain = torch.zeros(2)
    with torch.autocast("cpu", torch.bfloat16):
        product = plain[:, None] @ plain[None]
    patched = "__deepcopy__" in vars(FakeTensor), Tensor.register_hook.__module__, torch.cuda.synchronize.__module__
    return inside, type(plain), product.dtype, patched, is_triton_assumed()


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("report-2", "report-4") else ()) for n in recipe_names()]
)
def test_every_recipe_can_be_captured(elsewhere, name):
    text, names, launches, evaluation = elsewhere(check, name)
    assert all(line.startswith("can be captured: the same") for line in text.splitlines()), text
    assert "can be captured: the same" in evaluation, evaluation
    assert 0 < launches < len(names)
    # The fused operators appear as what they are on a GPU, not as the parts of the CPU path.
    blocks = names.count("rsengine.batch_norm_squeeze_excite_residual")
    assert blocks == names.count("rsengine.batch_norm_squeeze_excite_residual_backward") >= 3
    assert not any(name.startswith("rsengine.squeeze_excite") for name in names)
    assert names.count("rsengine.batch_norm") == names.count("rsengine.batch_norm_backward") >= 6
    assert not any("native_batch_norm" in name for name in names)
    once = ("label_smoothed_cross_entropy", "scale_gradient_", "sgd_ema_step", "ema_update")
    ema_updates = 2 if load_recipe(name).optimizer.name == "muon" else 1  # of what Muon updates, and of the buffers
    # SGD of what has bfloat16 copies, and of batch norm's parameters.
    assert [names.count(f"rsengine.{op}") for op in once] == [1, 1, 2, ema_updates]


@pytest.fixture(scope="module")
def plain_operations(elsewhere):
    return elsewhere(check, "quickstart", SMALL)[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_can_be_captured(elsewhere, plain_operations, name):
    text, names, _, evaluation = elsewhere(check, "quickstart", [*SMALL, *OPTIONS[name]])
    assert "can be captured: the same" in text, text
    assert "can be captured: the same" in evaluation, evaluation
    # A check that never saw the option's code would pass as well.
    assert names != plain_operations or name == "no momentum"


def test_a_sound_step_has_no_findings(elsewhere):
    assert elsewhere(check_class, TrainStep) == ()
    assert elsewhere(check_class, Sound) == ()


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_a_planted_mistake_is_found_at_its_line(elsewhere, kind):
    expected, line = EXPECTED[kind]
    findings = elsewhere(check_class, kind)
    assert findings and findings[0].kind == expected, findings
    assert any(line in finding.site.text for finding in findings), findings
    if line == "# planted":  # and at no other: no false alarm beside the true one
        assert all(line in finding.site.text for finding in findings), findings
        assert f"tests/checks/broken_steps.py:{findings[0].site.line}: `" in str(findings[0])
    assert findings[0].operation in str(findings[0])


def test_a_line_of_the_forward_pass_is_named_for_an_operation_of_the_backward_pass(elsewhere):
    (kind,) = (kind for kind in EXPECTED if kind.__name__ == "GradientsOfTheStepBefore")
    forward = [finding.forward.text for finding in elsewhere(check_class, kind) if finding.forward]
    assert any("torch.ops.rsengine.batch_norm_squeeze_excite_residual(" in text for text in forward)


def test_the_step_is_checked_at_every_size_it_trains_at(elsewhere):
    settings = [*SMALL, "train.epochs=4", "train.start_scale=0.5", "train.full_scale_from=0.75"]
    sizes = elsewhere(checked_sizes, "quickstart", settings)
    steps = sorted(name for name in sizes if name.startswith("training step"))
    assert steps[0] == "training step" and steps[1] == "training step at 16x16" and len(steps) >= 3
    assert sizes["training step"] < sizes["training step at 16x16"]  # full-size images are not resized
    assert "evaluation step" in sizes


def test_the_command(elsewhere, capsys, monkeypatch):
    assert elsewhere(capture_check.main, ["--recipe", "quickstart", *(f"--set={s}" for s in SMALL)]) == 0
    assert capture_check.main(["--recipe", "no-such"]) == 2
    assert "expected one of" in capsys.readouterr().err
    bad = Report((Finding(COPY, "aten.x", None, "why"),), ())
    monkeypatch.setattr(
        capture_check, "check_recipe", lambda *_: {"training step": bad, "evaluation step": Report((), ())}
    )
    assert capture_check.main([]) == 1
    assert "cannot be captured: 1 finding\ncopy between host and device: aten.x" in capsys.readouterr().out


def test_the_device_stays_out_of_this_process_and_leaves_the_other_usable(elsewhere):
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    patched = (False, "torch._tensor", "torch.cuda")
    assert elsewhere(effects) == ("fakegpu", Tensor, torch.bfloat16, patched, False)


@pytest.mark.slow
def test_the_launch_table_is_current(elsewhere):
    assert (ROOT / "docs" / "launches.md").read_text() == elsewhere(launch_table)
