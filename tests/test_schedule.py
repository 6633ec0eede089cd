"""Tables of learning rates and EMA decays, at their edges and against torch's own schedulers."""

import math

import numpy as np
import pytest
import torch

from rsengine.errors import SettingsError
from rsengine.schedule import SCHEDULES, ema_decay_table, image_size_table, learning_rate_table

PER_EPOCH = 10


def table(name, epochs=150, **options):
    return learning_rate_table(name, learning_rate=0.1, epochs=epochs, steps_per_epoch=PER_EPOCH, **options)


def test_warm_restarts_happen_at_epoch_50_and_not_one_later():
    """The report's code restarted an epoch late and trained one epoch a cycle at a rate of 1e-10."""
    rates = table("cosine_restarts", restart_epochs=50)
    at = {epoch: rates[epoch * PER_EPOCH] for epoch in (0, 49, 50, 51, 99, 100, 149)}
    assert at[0] == at[50] == at[100] == 0.1
    for epoch in (49, 51):
        assert at[epoch] == pytest.approx(0.05 * (1 + math.cos(math.pi * (epoch % 50) / 50)), rel=1e-12)
    assert at[49] == at[99] == at[149]
    assert rates[500] == 0.1 and rates[499] == rates.min() == pytest.approx(0.05 * (1 - math.cos(math.pi / 500)))


def test_warm_restarts_equal_torch():
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2)
    rates = table("cosine_restarts", epochs=70, restart_epochs=10, restart_multiplier=2)
    for step in range(0, len(rates), 7):
        scheduler.step(step / PER_EPOCH)
        assert rates[step] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)


def test_cosine_starts_at_the_peak_and_ends_just_above_its_floor():
    rates = table("cosine", epochs=4, final_fraction=0.1)
    assert rates[0] == pytest.approx(0.1) and rates[20] == pytest.approx(0.055)
    assert 0.01 < rates[-1] < 0.0102
    assert (np.diff(rates) < 0).all()


def test_multistep_falls_with_the_first_step_of_a_milestone():
    rates = table("multistep", epochs=130, milestones=(40, 80, 120), gamma=0.2)
    for milestone, before, after in ((40, 0.1, 0.02), (80, 0.02, 0.004), (120, 0.004, 0.0008)):
        assert rates[milestone * PER_EPOCH - 1] == pytest.approx(before)
        assert rates[milestone * PER_EPOCH] == pytest.approx(after)
    late = table("multistep", epochs=130, milestones=(40,), gamma=0.2, warmup_epochs=5)
    assert late[399] == pytest.approx(0.1) and late[400] == pytest.approx(0.02)  # counted from the start of the run


def test_one_cycle_equals_torch():
    rates = table("one_cycle", epochs=10, start_fraction=1 / 25, peak_fraction=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=100, pct_start=0.3, anneal_strategy="linear", final_div_factor=1e9
    )
    for step, rate in enumerate(rates):
        # torch puts the peak one step earlier, at 0.3 * 100 - 1 of 99 steps: one step of the rise or fall apart.
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.1 / 29)
        optimizer.step()
        if step < 99:
            scheduler.step()
    assert rates[0] == pytest.approx(0.004) and rates.max() == pytest.approx(0.1, rel=0.02) and rates[-1] == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_linearly_to_the_first_value_of_the_schedule(name):
    rates = table(name, epochs=20, warmup_epochs=2.5, milestones=(10,))
    plain = table(name, epochs=20, milestones=(10,))
    assert len(rates) == len(plain) == 200 and np.isfinite(rates).all() and (rates >= 0).all()
    np.testing.assert_allclose(rates[:25], plain[0] * np.arange(1, 26) / 25)
    assert rates[25] == pytest.approx(plain[0])


def test_the_table_is_a_pure_function():
    assert (table("cosine") == table("cosine")).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "linear"}, "name: expected one of cosine"),
        ({"epochs": 0}, "expected at least 1"),
        ({"warmup_epochs": 10}, "warmup_epochs: expected fewer"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        learning_rate_table(
            **({"name": "cosine", "learning_rate": 0.1, "epochs": 10, "steps_per_epoch": 5} | arguments)
        )


def test_image_sizes_grow_in_eights_to_the_full_size():
    sizes = image_size_table((32, 32), 9, start_scale=0.5, full_from=2 / 3)
    assert sizes == [(16, 16)] * 3 + [(24, 24)] * 3 + [(32, 32)] * 3
    assert image_size_table((36, 20), 4, start_scale=0.5, full_from=0.5) == [(16, 8), (24, 8), (36, 20), (36, 20)]
    assert image_size_table((28, 28), 3, start_scale=1.0, full_from=0.6) == [(28, 28)] * 3
    assert image_size_table((32, 32), 3, start_scale=0.5, full_from=0.0) == [(32, 32)] * 3
    assert image_size_table((32, 32), 2, start_scale=0.5, full_from=1.0)[-1] == (24, 24)


def test_ema_decay_warms_up():
    decays = ema_decay_table(0.995, 3000)
    assert decays[0] == 0.1 and decays[1] == pytest.approx(2 / 11) and decays[-1] == 0.995
    assert (np.diff(decays) >= 0).all()
    assert (ema_decay_table(0.9, 5, warmup=False) == 0.9).all()


def test_a_run_of_more_steps_than_a_machine_can_hold_is_refused():
    with pytest.raises(SettingsError, match="train.epochs: 100,000 epochs of 25,000 steps are more than 20,000,000"):
        learning_rate_table("constant", learning_rate=0.1, epochs=100_000, steps_per_epoch=25_000)
