"""Progress: units of an earlier run are done, but tell nothing of the pace of this one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from selfsup_ray import progress
from selfsup_ray.cluster.train import Live
from selfsup_ray.progress import clock, short, track
from selfsup_ray.tracking import Tracker
from selfsup_ray.training import TrainConfig, TrainJob


@pytest.fixture(autouse=True)
def every_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    caplog.set_level("INFO")


def test_the_rate_leaves_out_what_an_earlier_run_did(caplog: pytest.LogCaptureFixture):
    with track("work", 1000, "rows") as tracked:
        tracked.skip(900)
        assert caplog.messages[-1] == "work: 900/1,000 rows"
        time.sleep(0.1)
        tracked.advance(10, "half way")
        assert 0 < tracked.rate <= 100
    assert "work: 910/1,000 rows, " in caplog.messages[-2]
    assert caplog.messages[-2].endswith("half way")


def test_a_training_that_goes_on_shows_its_own_pace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    job = TrainJob(lambda: None, TrainConfig(epochs=10, batch_size=100))  # type: ignore[arg-type]
    record = {"loss": 1.0, "lr": 0.1}
    with Live(job, Tracker(tmp_path, None), "train") as live:
        live.take([{"step": s, "epoch": s / 10} | record for s in (10, 20, 50)], earlier=True)
        assert caplog.messages[-1] == "train: 5,000/10,000 images, epoch 5.0, loss 1, lr 0.1"
        time.sleep(0.1)
        live.take([{"step": 51, "epoch": 5.1} | record])
        done, rate, *_ = caplog.messages[-1].split(", ")
        assert done == "train: 5,100/10,000 images"
        assert 0 < float(rate.removesuffix(" images/s").replace(",", "")) <= 1000


def test_predictions_have_a_bar_of_their_own_behind_the_training_s(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    job = TrainJob(lambda: None, TrainConfig(epochs=1, batch_size=100))  # type: ignore[arg-type]
    with Live(job, Tracker(tmp_path, None), "scan") as live:
        live.take([{"step": 10, "epoch": 1.0, "loss": 1.0, "lr": 0.1}])
        time.sleep(0.1)
        live.take([{"done": 600, "of": 1000}])
        assert "scan: 1,000 images in 0s" in caplog.messages, "the training has ended"
        assert caplog.messages[-1] == "scan: predict: 600/1,000 images", "of an earlier run"
        time.sleep(0.1)
        live.take([{"done": 610, "of": 1000}, {"done": 620, "of": 1000}])
        done, rate, *_ = caplog.messages[-1].split(", ")
        assert done == "scan: predict: 620/1,000 images"
        assert 0 < float(rate.removesuffix(" images/s").replace(",", "")) <= 200
    assert caplog.messages[-1].startswith("scan: predict: 620 images in ")


def test_rates_and_times_as_people_write_them():
    assert [short(rate) for rate in (0.1234, 12.34, 1234.5)] == ["0.123", "12.3", "1,234"]
    assert [clock(s) for s in (42, 185, 7620, 442800)] == ["42s", "3m 05s", "2h 07m", "5d 03h"]
