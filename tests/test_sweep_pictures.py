"""Pictures of a sweep in MLflow: those of a trial's own stages with the trial."""

from pathlib import Path

from mlflow import MlflowClient

from selfsup_ray.artifacts import write_text
from selfsup_ray.cluster.tune import Trial
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.sweep_trial import addresses, in_process
from selfsup_ray.sweeping import prepared, record


def write_sweep(folder: Path) -> Path:
    write_shapes(folder / "photos", 4, size=8)
    write_text(
        folder / "e.yaml",
        f"out: {folder / 'run'}\n"
        f"ingest: {{source: {folder / 'photos'}, image_size: 8}}\n"
        f"whiten: {{patches: 64}}\npatches: {{size: 4, patches_per_entry: 8}}\n",
    )
    write_text(
        folder / "s.yaml",
        f"experiment: {folder / 'e.yaml'}\nout: {folder / 'sweep'}\nuntil: patches\n"
        f"metric: objective\nmode: min\nsearch: grid\n"
        f"tracking: {{uri: 'sqlite:///{folder / 'runs.db'}'}}\n"
        f"space: {{patches.size: {{choice: [2, 4]}}}}\n",
    )
    return folder / "s.yaml"


def test_a_trial_takes_the_pictures_of_its_own_stages_with_it(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, experiment = prepared(write_sweep(tmp_path), {})
    trial = in_process(experiment, made)
    folders = addresses(trial, made.out)
    for stage, name in (("whiten", "covariance.png"), ("patches", "raw.png")):
        folders[stage].mkdir(parents=True)
        (folders[stage] / name).write_bytes(b"a picture")
    changes = {"patches.size": 4}
    done = Trial(changes=changes, metrics={"objective": 1.0}, error=None, seconds=1.0)
    record(done, experiment=trial, made=made)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}")
    [found] = client.search_experiments(filter_string="name = 'selfsup_ray'")
    runs = client.search_runs([found.experiment_id])
    [child] = [run for run in runs if run.info.run_name == f"sweep/{done.id}"]
    assert {file.path for file in client.list_artifacts(child.info.run_id)} == {
        "raw.png",
        "trial.yaml",
    }
