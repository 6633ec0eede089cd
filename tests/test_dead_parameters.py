"""What begins at zero in a block, and the warning about parameters that get no gradient."""

import re

import pytest
import torch
import torch.nn.functional as F

from rsengine import train as train_module
from rsengine.model import resnet_rs
from tests.engine.test_graph import capture, make
from tests.engine.test_step import batches
from tests.test_train import state_of, toy

WARNING = re.compile(r"warning: (\d+) of (\d+) parameter tensors, (.*)% of all parameters, had a gradient of exactly")
__all__ = ["toy"]  # a fixture


@pytest.mark.parametrize(("zero_init", "zeroed"), [("last", "bn3"), ("middle", "bn2"), ("none", None)])
def test_the_batch_norm_that_is_named_begins_at_zero_and_no_other(zero_init, zeroed):
    for name, p in resnet_rs(26, zero_init=zero_init).named_parameters():
        if p.dim() == 1 and name.endswith("weight"):
            is_zeroed = zeroed is not None and name.startswith("stages") and f".{zeroed}." in name
            assert p.eq(0.0 if is_zeroed else 1.0).all(), name


def test_the_middle_one_kills_the_branch_of_every_block_as_in_the_reports_network():
    """20,719,104 parameters, 59.8 % of all, of a network whose squeeze-and-excite and stem the report's code had."""
    torch.manual_seed(0)
    model = resnet_rs(50, num_classes=10, stem_width=128, zero_init="middle").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    dead = [name for name, p in model.named_parameters() if not p.grad.any()]
    parts = ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias", "conv3.weight")
    parts += ("bn3.weight",)
    assert dead == [f"stages.{i}.{j}.{part}" for i, n in enumerate((3, 4, 6, 3)) for j in range(n) for part in parts]
    assert len(dead) == 128
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes[name] for name in dead) == 20_719_104 and sum(sizes.values()) == 34_630_218


@pytest.mark.parametrize("zero_init", ["last", "middle", "none"])
def test_a_run_warns_after_its_second_step_where_a_branch_is_dead(toy, capsys, zero_init):
    assert toy("--epochs", "2", "--set", f"model.zero_init={zero_init}", "--limit-train-batches", "3") == 0
    output = capsys.readouterr().out
    if zero_init != "middle":
        assert "warning" not in output
        return
    assert len(WARNING.findall(output)) == 1
    (warning,) = (line for line in output.splitlines() if line.startswith("warning"))
    tensors, of, share = WARNING.match(warning).groups()
    start = {name: p for name, p in state_of("run")["step"]["model"].items() if re.search("conv|bn|se|fc", name)}
    dead = [name for name in start if re.search(r"stages.*\.(conv\d|bn[123])\.(weight|bias)$", name)]
    dead = [name for name in dead if not name.endswith("bn3.bias")]
    trained = [name for name in start if name.endswith(("weight", "bias"))]
    assert (int(tensors), int(of)) == (len(dead), len(trained))
    sizes = [sum(start[name].numel() for name in names) for names in (dead, trained)]
    assert share == f"{100 * sizes[0] / sizes[1]:.1f}"
    assert f"do not learn: {', '.join(dead[:3])} and {len(dead) - 3} more" in warning


def test_a_resumed_run_does_not_warn_again(toy, capsys):
    arguments = ["--set", "model.zero_init=middle", "--limit-train-batches", "3"]
    assert toy(*arguments, "--epochs", "2") == 0
    assert WARNING.search(capsys.readouterr().out)
    assert toy("--resume", *arguments, "--epochs", "2") == 0
    assert not WARNING.search(capsys.readouterr().out)


@pytest.mark.parametrize("settings", [[], ["train.micro_batches=2"], ["optimizer.name=muon"]], ids=str)
def test_gradients_are_found_after_replays_too(eager_ops, settings):
    def dead(step, call):
        with torch.no_grad():
            step.model.stages[0][0].bn2.weight.zero_()  # as zero_init="middle" has it
            step.model.stages[0][0].bn3.weight.fill_(1.0)
        for images, labels in batches(2):
            call(images, labels)
        return step.update.without_gradient()

    captured, plain = make(type(make()), *settings), make(type(make()), *settings)
    expected = dead(plain, plain)
    assert expected == dead(captured, capture(captured)) and len(expected) == 8
    assert all(name.startswith("stages.0.0.") for name in expected)


def test_a_wrong_choice_is_one_line(capsys):
    assert train_module.main(["--data", "digits", "--set", "model.zero_init=midle"]) == 2
    words = "model.zero_init: expected one of last, middle, none; got 'midle'; did you mean middle?"
    assert words in capsys.readouterr().err
