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


def test_a_longer_schedule_decays_less_and_keeps_the_warmup():
    long = rates(schedule="linear", schedule_unit="step", schedule_scale=6.67, warmup=0.1)
    total, warm = 6.67 * 20, 2
    want = [0.05, 0.1] + [0.1 * (total - i) / (total - warm) for i in range(2, 20)]
    assert long == pytest.approx(want)
    assert min(rates(schedule="linear", schedule_scale=6.67)) > 0.08


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_warmup_in_steps_is_the_same_as_the_part_of_the_training(scale):
    common = {"schedule": "linear", "schedule_unit": "step", "schedule_scale": scale}
    assert rates(warmup_steps=3, **common) == pytest.approx(rates(warmup=3 / 20, **common))


def theirs(lr, warmup, length, steps):
    """The rates of transformers' schedule, read off the optimiser before each step."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, length)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


# The authors' language runs, by their formulas: batches of the tasks, epochs, and from them the
# rate, steps, warm-up and length of each of the three schedules.
BATCHES, EPOCHS = (30, 25, 25, 20, 20, 20, 20, 15, 15, 10), 10  # sum 200 = 6.67 * 30
SCHEDULES = {
    "retraining": (5e-5, sum(BATCHES), 0.1 * BATCHES[0] * EPOCHS, 6.67 * BATCHES[0] * EPOCHS),
    "fine-tuning": (1e-4, BATCHES[3], 0.1 * BATCHES[3] * EPOCHS, 4 * BATCHES[3] * EPOCHS),
    "reptile": (1e-4, len(BATCHES), 0.1 * len(BATCHES) * EPOCHS, 6.67 * len(BATCHES) * EPOCHS),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_authors_linear_schedules_step_by_step(name):
    lr, per_epoch, warmup, length = SCHEDULES[name]
    steps, warmup = per_epoch * EPOCHS, round(warmup)
    common = {"epochs": EPOCHS, "lr": lr, "schedule": "linear", "schedule_unit": "step"}
    common["schedule_scale"] = length / steps
    want = theirs(lr, warmup, length, steps + 1)
    # The rise is one step ahead of theirs, whose first step has rate 0.
    want = want[1 : warmup + 1] + want[warmup:steps]
    for given in ({"warmup_steps": warmup}, {"warmup": warmup / steps}):
        got = rates(per_epoch, **common, **given)
        assert len(got) == steps
        assert got == pytest.approx(want, rel=1e-12)
    if name == "retraining":
        assert got[-1] < lr / 500  # falls to about zero at the end of the training


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
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be an int >= 0, got -1"),
        ({"warmup_steps": 0.1}, TypeError, "warmup_steps must be an int >= 0"),
        (
            {"warmup_steps": 3, "warmup": 0.1, "schedule_unit": "step"},
            ValueError,
            "give warmup or warmup_steps, not both, got warmup=0.1 and warmup_steps=3",
        ),
        ({"warmup_steps": 3}, ValueError, "warmup_steps needs schedule_unit='step', got 'epoch'"),
        ({"schedule_scale": 0.5}, ValueError, "schedule_scale must be >= 1"),
        ({"grad_clip": 0.0}, ValueError, "grad_clip must be a finite number > 0"),
        ({"precision": "fp8"}, ValueError, "precision must be one of"),
        ({"step_per": "batch"}, ValueError, "step_per must be one of"),
        ({"seed": -1}, ValueError, "seed must be an int >= 0"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers in [0, 1), got 0.9"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be in [0, 1), got 1.0"),
        ({"eps": 0.0}, ValueError, "eps must be a finite number > 0"),
        ({"momentum": 0.9}, ValueError, "'adam' takes betas and eps, but no momentum, got 0.9"),
        (
            {"optimizer": "sgd", "betas": (0.5, 0.9)},
            ValueError,
            "optimizer 'sgd' takes momentum, but no betas, got (0.5, 0.9); leave betas out",
        ),
    ],
)
def test_bad_settings_are_refused(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TrainConfig(**{"epochs": 1, "lr": 0.1, **fields})
