"""Settings, and learning rates against closed forms and torch's schedulers."""

import math
import re

import pytest
import torch

from metalora.meta import TrainConfig, learning_rate


def rates(steps_per_epoch=4, **fields):
    config = TrainConfig(**{"epochs": 5, "lr": 0.1, **fields})
    return [
        learning_rate(config, step // steps_per_epoch, step, steps_per_epoch)
        for step in range(config.epochs * steps_per_epoch)
    ]


def test_constant():
    assert rates() == [0.1] * 20


def test_cosine_over_epochs_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    want = []
    for _ in range(5):
        want += [optimizer.param_groups[0]["lr"]] * 4
        optimizer.step()
        scheduler.step()
    assert rates(schedule="cosine") == pytest.approx(want)


def test_linear_over_steps_with_warmup():
    want = [0.1 * (i + 1) / 4 for i in range(4)] + [0.1 * (1 - i / 16) for i in range(16)]
    assert rates(schedule="linear", schedule_unit="step", warmup=0.2) == pytest.approx(want)


def test_cosine_over_steps_with_warmup():
    want = [0.05, 0.1] + [0.1 * (1 + math.cos(math.pi * i / 18)) / 2 for i in range(18)]
    assert rates(schedule="cosine", schedule_unit="step", warmup=0.1) == pytest.approx(want)


def test_constant_with_warmup_over_epochs():
    want = [0.05] * 4 + [0.1] * 16
    assert rates(warmup=0.4) == pytest.approx(want)


def test_a_longer_schedule_decays_less():
    long = rates(schedule="linear", schedule_unit="step", schedule_scale=6.67, warmup=0.1)
    total, warm = 6.67 * 20, 0.667 * 20
    want = [0.1 * (i + 1) / warm for i in range(14)]
    want += [0.1 * (total - i) / (total - warm) for i in range(14, 20)]
    want[13] = 0.1  # the last step before 13.34, where (13 + 1) / 13.34 is above 1
    assert long == pytest.approx(want)
    assert min(rates(schedule="linear", schedule_scale=6.67)) > 0.08


def test_warmup_only():
    assert rates(warmup=1.0, schedule_unit="step") == pytest.approx(
        [0.1 * (i + 1) / 20 for i in range(20)]
    )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"lr": float("nan")}, ValueError, "TrainConfig: lr must be a finite number > 0, got nan"),
        ({"lr": float("inf")}, ValueError, "lr must be a finite number > 0, got inf"),
        ({"lr": 0}, ValueError, "lr must be a finite number > 0, got 0"),
        ({"lr": "1e-3"}, TypeError, "lr must be a finite number > 0, got str"),
        ({"epochs": 0}, ValueError, "epochs must be an int >= 1"),
        ({"epochs": 2.0}, TypeError, "epochs must be an int >= 1"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be a finite number >= 0"),
        ({"optimizer": "adma"}, ValueError, "did you mean 'adam'"),
        ({"schedule": "cosin"}, ValueError, "did you mean 'cosine'"),
        ({"schedule_unit": "steps"}, ValueError, "did you mean 'step'"),
        ({"warmup": 1.5}, ValueError, "warmup must be a fraction in 0..1, got 1.5"),
        ({"schedule_scale": 0.5}, ValueError, "schedule_scale must be >= 1"),
        ({"grad_clip": 0.0}, ValueError, "grad_clip must be a finite number > 0"),
        ({"precision": "fp8"}, ValueError, "precision must be one of"),
        ({"step_per": "batch"}, ValueError, "step_per must be one of"),
        ({"seed": -1}, ValueError, "seed must be an int >= 0"),
    ],
)
def test_bad_settings_are_refused(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TrainConfig(**{"epochs": 1, "lr": 0.1, **fields})
