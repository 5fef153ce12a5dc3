"""Loss curves in two precisions: trained, kept, compared and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import curves


def test_the_final_loss_is_the_mean_of_the_last_tenth() -> None:
    assert curves.final([9.0] * 18 + [1.0, 3.0]) == 2.0
    assert curves.final([5.0, 4.0]) == 4.0


def test_precisions_are_compared_with_the_spread_of_seeds() -> None:
    ends = {"fp32": (1.0, 3.0), "bf16": (1.5, 3.5)}
    found = [
        {"model": "some", "precision": precision, "seed": seed, "losses": [4.0, end]}
        for precision, values in ends.items()
        for seed, end in enumerate(values)
    ]
    (row,) = curves.summary(found)
    assert row == ["some", "2", "4.0000", "2.0000", "2.5000", "0.5000", "1.4142"]


@pytest.mark.slow
def test_trainings_are_kept_and_not_repeated(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    where = ["--dialogues", str(shared_data / "convai2")]
    where += ["--tokenizer", str(shared_data / "roberta_tokenizer")]
    images = ["--images", str(shared_data / "cifar10")]
    out = ["--write", str(tmp_path), "--figure", str(tmp_path / "curves.png")]
    calls = []
    make = curves.mixer

    def counted(settings: curves.Settings) -> curves.Train:
        train = make(settings)

        def once(precision: str, seed: int) -> list[float]:
            if len(calls) == 2:
                calls.append("stopped")
                raise KeyboardInterrupt
            calls.append((precision, seed))
            return train(precision, seed)

        return once

    monkeypatch.setattr(curves, "mixer", counted)
    arguments = ["--smoke", *where, *images, *out]
    for code in (130, None):
        with pytest.raises(SystemExit) as ended:
            curves.main(arguments)
        assert ended.value.code == code
    assert calls == [("fp32", 0), ("bf16", 0), "stopped", ("fp32", 1), ("bf16", 1)]
    record = json.loads((tmp_path / "curves_cpu.json").read_text())
    assert len(record["rows"]) == 8 and all(len(row["losses"]) == 3 for row in record["rows"])
    fp32, bf16 = (row["losses"] for row in record["rows"][:2])
    assert fp32 != bf16 and fp32 == pytest.approx(bf16, rel=0.02)
    assert not (tmp_path / "curves_cpu.parts").exists()
    assert (tmp_path / "curves.png").stat().st_size > 1000
