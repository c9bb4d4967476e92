"""Linear probes and fine-tuning: the published protocols, label budgets, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selfsup_ray.artifacts import ShardedArray, begin, finish, read_done
from selfsup_ray.config import Resources, build
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images, write_shapes
from selfsup_ray.errors import ConfigError, TrainingError
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.encoder import Encoder, evaluation_view, save_encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.models.online_probe import OnlineProbeConfig
from selfsup_ray.optim import SGDConfig, StepSchedule, lr_ratio
from selfsup_ray.planning import plan_experiment
from selfsup_ray.stages.embed import EmbedConfig, Embeddings
from selfsup_ray.stages.finetune import Finetuned, finetune
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.stages.labelled import require_unchanged
from selfsup_ray.stages.labelled_config import (
    BYOLLinear,
    CifarLinear,
    CountOfLabels,
    MoCoLinear,
    ShareOfLabels,
    SimCLRCifarLinear,
    SimCLRFinetune,
)
from selfsup_ray.stages.labelled_data import labelled_ids, within_budget
from selfsup_ray.stages.linear import linear
from selfsup_ray.stages.lowshot_config import HeldOutRows
from selfsup_ray.stages.pretext import PretextConfig, pretrain

HERE = Resources(workers=0)
N, TRAIN = 60, 40
TEST = HeldOutRows(first=TRAIN)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    images, labels = shape_images(N, size=16)
    return corpus_of_arrays(tmp_path_factory.mktemp("c") / "ingest", images, labels, shard_size=25)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    network = build_backbone(ResNetConfig(stem="stl", width=4))
    return save_encoder(
        tmp_path_factory.mktemp("e"), backbone=network, images=ImageInput(image_size=16)
    )


def features(corpus: Corpus, encoder: Encoder) -> torch.Tensor:
    images = corpus.images(np.arange(N))
    with torch.no_grad():
        return encoder.backbone().eval()(evaluation_view(images, encoder.description.images))


@pytest.mark.parametrize(
    ("protocol", "published"),
    [
        (CifarLinear(), (30.0, 256, 100, [1, 1, 0.2, 0.04, 0.008], False)),
        (MoCoLinear(), (30.0, 256, 100, [1, 1, 1, 0.1, 0.01], False)),
        (SimCLRCifarLinear(), (0.1, 512, 100, None, True)),
        (BYOLLinear(), (0.2, 1024, 80, None, True)),
    ],
)
def test_the_protocols_have_the_published_numbers(protocol: Any, published: Any) -> None:
    lr, batch, epochs, ratios, nesterov = published
    optim = protocol.optim
    assert (optim.lr, protocol.batch_size, protocol.epochs) == (lr, batch, epochs)
    assert (optim.weight_decay, optim.momentum, optim.nesterov) == (0, 0.9, nesterov)
    assert optim.linear_scaling == nesterov
    if ratios is not None:
        found = [
            lr_ratio(protocol.schedule, progress=epoch / epochs, epochs=epochs)
            for epoch in (0, 39, 40, 60, 80)
        ]
        assert found == pytest.approx(ratios)
    assert (protocol.crop is None) == (protocol.name == "cifar")


def test_a_probe_without_augmentation_takes_the_steps_of_plain_sgd(
    corpus: Corpus, encoder: Encoder, tmp_path: Path
) -> None:
    config = CifarLinear(
        epochs=6, batch_size=TRAIN, flip_p=0, test=TEST, start="zero", resources=HERE,
        optim=SGDConfig(lr=2.0, weight_decay=0), schedule=StepSchedule(milestones=(3,), rate=0.1),
    )  # fmt: skip
    made = linear(corpus, encoder, config, out=tmp_path / "linear")
    x, y = features(corpus, encoder), torch.from_numpy(corpus.labels())
    head = nn.Linear(x.shape[1], 4)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer, curve = torch.optim.SGD(head.parameters(), lr=2.0, momentum=0.9), []
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = 2.0 if epoch < 3 else 0.2
        optimizer.zero_grad()
        F.cross_entropy(head(x[:TRAIN]), y[:TRAIN]).backward()
        optimizer.step()
        curve.append((head(x[TRAIN:]).argmax(dim=1) == y[TRAIN:]).float().mean().item())
    found = [point["test_accuracy"] for point in made.metrics["curve"]]
    assert found == pytest.approx(curve)
    assert (made.last_accuracy, made.max_accuracy) == pytest.approx((curve[-1], max(curve)))
    assert made.metrics["max_epoch"] == 1 + int(np.argmax(curve))
    right = head(x[TRAIN:]).argmax(dim=1) == y[TRAIN:]
    by_class = [right[y[TRAIN:] == c].float().mean().item() for c in range(4)]
    assert made.metrics["per_class"] == pytest.approx(by_class)


def test_the_encoder_is_kept_and_a_changed_one_is_an_error(
    corpus: Corpus, encoder: Encoder, tmp_path: Path
) -> None:
    config = MoCoLinear(epochs=2, batch_size=20, test=TEST, resources=HERE)
    linear(corpus, encoder, config, out=tmp_path / "linear")
    kept, before = Encoder.open(encoder.path).backbone(), encoder.backbone()
    torch.testing.assert_close(kept.state_dict(), before.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        kept.get_buffer("bn1.running_mean")[0] += 1e-3
    with pytest.raises(TrainingError, match="changed 1 weights of the frozen encoder, bn1"):
        require_unchanged(kept, before)


def test_of_several_rates_validation_images_choose_one(
    corpus: Corpus, encoder: Encoder, tmp_path: Path
) -> None:
    config = CifarLinear(
        epochs=3, batch_size=10, test=TEST, validation_share=0.3, lrs=(1e-6, 1.0), resources=HERE
    )
    made = linear(corpus, encoder, config, out=tmp_path / "linear").metrics
    last = made["curve"][-1]
    best = max(("_lr1e-06", "_lr1"), key=lambda name: last[f"validation_accuracy{name}"])
    assert made["classifier"] == best and set(made["tried"]) == {"1e-06", "1"}
    assert made["last_accuracy"] == last[f"test_accuracy{best}"]
    assert "chosen_accuracy" in made and made["num_validation"] > 0


def test_stored_embeddings_give_the_probe_in_a_moment(
    corpus: Corpus, encoder: Encoder, tmp_path: Path
) -> None:
    rows = F.normalize(features(corpus, encoder), dim=1).numpy()
    begin(tmp_path / "embed", stage="embed", config=EmbedConfig(), inputs={})
    shape = {"row_shape": rows.shape[1:], "dtype": "float32"}
    array = ShardedArray.create(tmp_path / "embed" / "rows", shard_rows=corpus.shard_rows, **shape)
    for i in range(array.num_shards):
        array.write_shard(i, rows[array.offsets[i] : array.offsets[i + 1]])
    finish(tmp_path / "embed", stage="embed", config=EmbedConfig(), inputs={}, seconds=0)
    config = CifarLinear(
        epochs=30, batch_size=TRAIN, test=TEST, features="embeddings", resources=HERE,
        optim=SGDConfig(lr=0.5, weight_decay=0),
    )  # fmt: skip
    stored = Embeddings.open(tmp_path / "embed")
    made = linear(corpus, encoder, config, out=tmp_path / "linear", features=stored)
    assert made.metrics["train_accuracy"] > 0.5
    with pytest.raises(ConfigError, match="needs embeddings"):
        linear(corpus, encoder, config, out=tmp_path / "other")


def test_a_budget_is_balanced_and_a_smaller_one_is_a_part_of_a_larger() -> None:
    ids = np.arange(0, 3000, 3)
    classes = ids % 7
    one, ten = (
        within_budget(ids, classes, ShareOfLabels(share=share), seed=0, stage="x")
        for share in (0.01, 0.1)
    )
    sizes = np.bincount(classes)
    np.testing.assert_array_equal(np.bincount(ten % 7), np.round(sizes * 0.1))
    np.testing.assert_array_equal(np.bincount(one % 7), np.maximum(1, np.round(sizes * 0.01)))
    assert set(one) < set(ten) and (np.diff(ten) > 0).all()
    counted = within_budget(ids, classes, CountOfLabels(count=25), seed=0, stage="x")
    assert np.bincount(counted % 7).tolist() == [4, 4, 4, 4, 3, 3, 3]
    other = within_budget(ids, classes, CountOfLabels(count=25), seed=1, stage="x")
    assert set(other) != set(counted)


def test_an_image_keeps_its_place_in_the_budget_when_others_come() -> None:
    few, many = np.arange(500), np.arange(1000)
    chosen = [
        within_budget(ids, ids * 0, CountOfLabels(count=50), seed=3, stage="x")
        for ids in (few, many)
    ]
    assert set(chosen[1][chosen[1] < 500]) <= set(chosen[0])


def test_too_large_a_budget_or_batch_is_refused_by_name(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match="asks for 25 images of class 0, but only 10"):
        labelled_ids(
            corpus, CifarLinear(test=TEST, labels=CountOfLabels(count=100)), stage="linear"
        )
    with pytest.raises(ConfigError, match=r"linear\.batch_size=256, but only 40 labelled"):
        labelled_ids(corpus, CifarLinear(test=TEST), stage="linear")
    with pytest.raises(ConfigError, match="needs validation images"):
        CifarLinear(lrs=(1.0,))


def tuning(**values: Any) -> SimCLRFinetune:
    standard = {
        "epochs": 4,
        "batch_size": 16,
        "labels": CountOfLabels(count=32),
        "test": TEST,
        "resources": HERE,
        "optim": SGDConfig(lr=0.05, weight_decay=0),
    }
    return SimCLRFinetune(**(standard | values))


def test_fine_tuning_trains_encoder_and_scratch_on_the_same_labels(
    corpus: Corpus, encoder: Encoder, tmp_path: Path
) -> None:
    made = finetune(corpus, encoder, tuning(), out=tmp_path / "finetune")
    assert made.metrics["num_train"] == 32 and made.metrics["num_test"] == N - TRAIN
    start, tuned = encoder.backbone().state_dict(), made.classifier().backbone().state_dict()
    assert not tuned["layer4.1.conv2.weight"].equal(start["layer4.1.conv2.weight"])
    for origin in ("pretrained", "scratch"):
        found = made.classifier(origin).predict(corpus.images(np.arange(TRAIN, N))).clusters
        share = (found == corpus.labels()[TRAIN:]).mean()
        assert made.metrics[origin]["last_accuracy"] == pytest.approx(share)
    assert made.scratch_accuracy == made.metrics["scratch"]["last_accuracy"]
    assert Finetuned.open(made.path).accuracy == made.accuracy


def test_a_stopped_fine_tuning_goes_on_to_the_same_numbers(
    corpus: Corpus, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tuning(epochs=2, checkpoint_every=1)
    whole = finetune(corpus, encoder, config, out=tmp_path / "whole")
    import selfsup_ray.training as training

    save, saved = training.save_state, []

    def stop(path: Path, state: Any) -> None:
        save(path, state)
        saved.append(path.parent.name)
        if saved.count("scratch") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("selfsup_ray.cluster.train.save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(corpus, encoder, config, out=tmp_path / "stopped")
    monkeypatch.undo()
    again = finetune(corpus, encoder, config, out=tmp_path / "stopped")
    for origin in ("pretrained", "scratch"):
        mine, theirs = again.metrics[origin], whole.metrics[origin]
        assert mine["last_accuracy"] == theirs["last_accuracy"]
        assert mine["per_class"] == theirs["per_class"]


def override_of(values: dict[str, Any], stage: str, **changes: Any) -> dict[str, Any]:
    return values | {stage: values[stage] | changes}


def test_an_experiment_plans_probe_and_fine_tuning(tmp_path: Path) -> None:
    here = {"resources": {"workers": 0}}
    values = {
        "out": str(tmp_path),
        "ingest": {"source": "bundled:fashion-mnist", "image_size": 28, **here},
        "pretext": {"epochs": 1, "backbone": {"width": 4, "stem": "stl"}, **here},
        "maps": {},
        "linear": {"name": "moco", "batch_size": 32, **here},
        "finetune": {"name": "simclr", "batch_size": 32, **here},
    }
    experiment = build(Experiment, values)
    assert experiment.stages == ("ingest", "pretext", "maps", "linear", "finetune")
    costs = {step.stage: step.cost for step in plan_experiment(experiment).steps}
    # 800,000 passes through the frozen encoder, against 800 labels 30 times, forward and backward.
    assert costs["linear"].seconds > costs["finetune"].seconds > 0  # type: ignore[operator]
    assert "8,000 images 100 times, 100 tests of 2,000" in costs["linear"].assumes
    assert "800 images 30 times" in costs["finetune"].assumes
    assert "2,000 images placed 6 times" in costs["maps"].assumes
    with pytest.raises(ConfigError, match=r"finetune\.batch_size=20000, but there are only 10,000"):
        plan_experiment(build(Experiment, override_of(values, "finetune", batch_size=20_000)))
    with pytest.raises(ConfigError, match=r"linear\.features=embeddings needs embed"):
        build(
            Experiment,
            {
                "out": str(tmp_path),
                "ingest": {"source": "x"},
                "pretext": {},
                "linear": {"name": "cifar", "features": "embeddings"},
            },
        )


def test_pretext_with_an_online_probe_keeps_the_encoder_of_one_without(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", 20, size=16)
    settings = IngestConfig(image_size=16, resources=HERE)
    corpus = ingest(tmp_path / "shapes", settings, out=tmp_path / "ingest")

    def trained(name: str, **values: Any) -> Encoder:
        config = PretextConfig(
            epochs=1, batch_size=20, backbone=ResNetConfig(stem="stl", width=4),
            precision="float32", log_every=1, resources=HERE, **values,
        )  # fmt: skip
        return pretrain(corpus, config, out=tmp_path / name)

    alone = trained("alone")
    watched = trained("watched", online_probe=OnlineProbeConfig())
    assert alone.fingerprint == watched.fingerprint
    facts = read_done(watched.path).facts
    assert (
        0 <= facts["online_accuracy"] <= 1 and "online_accuracy" not in read_done(alone.path).facts
    )
    unlabelled = corpus_of_arrays(tmp_path / "bare", shape_images(20, size=16)[0])
    with pytest.raises(ConfigError, match="online_probe needs labels"):
        pretrain(
            unlabelled,
            PretextConfig(batch_size=20, online_probe=OnlineProbeConfig(), resources=HERE),
            out=tmp_path / "none",
        )


@pytest.mark.slow
def test_two_ray_workers_fine_tune_as_one_process_does(
    corpus: Corpus, encoder: Encoder, tmp_path: Path, ray_session: None
) -> None:
    both = Resources(workers=2, cpus=1)
    here = finetune(corpus, encoder, tuning(epochs=2, scratch=False), out=tmp_path / "here")
    config = tuning(epochs=2, scratch=False, resources=both)
    there = finetune(corpus, encoder, config, out=tmp_path / "there")
    mine, theirs = here.classifier().backbone(), there.classifier().backbone()
    for (name, a), (_, b) in zip(
        mine.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)
    found, expected = there.metrics["pretrained"], here.metrics["pretrained"]
    assert found["last_accuracy"] == pytest.approx(expected["last_accuracy"], abs=0.06)
    assert found["curve"][0]["loss"] == pytest.approx(expected["curve"][0]["loss"], rel=1e-3)
