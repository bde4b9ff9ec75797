"""Experiments tracked by MLflow, by MONAI's own option of the command line."""

from pathlib import Path

from mlflow import MlflowClient

import command

STAGES = ["stage_classification", "stage_segmentation", "stage_detection", "stage_joint"]


def run(*arguments, **options) -> None:
    done = command.run(*command.bundle(*arguments, tracking="mlflow", **options))
    assert done.returncode == 0, done.stderr[-3000:]


def tracked(store: Path) -> dict:
    """Run name -> (metrics, names of the artifacts) of every finished run in a store."""
    client = MlflowClient(f"sqlite:///{store}")
    runs = [run for experiment in client.search_experiments() for run in client.search_runs(experiment.experiment_id)]
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = [{artifact.path for artifact in client.list_artifacts(run.info.run_id)} for run in runs]
    return {run.info.run_name: (run.data.metrics, files) for run, files in zip(runs, names)}


def test_losses_metrics_config_and_figures_of_every_stage_are_tracked_in_one_store(tmp_path, phantom_dir):
    out = tmp_path / "run"
    places = {"dataset_dir": phantom_dir, "output_dir": out}
    run("training", **places)
    runs = tracked(out / "mlruns.db")
    assert runs.keys() == set(STAGES)
    losses = {"train_loss", "loss", "loss_classification", "loss_segmentation", "loss_reconstruction", "loss_detection"}
    metrics, files = runs["stage_joint"]
    assert losses | {"learning_rate", "score", "segmentation_dice", "detection_ap50"} <= metrics.keys()
    assert all({"config.json", "curves.png"} <= files for _, files in runs.values())
    assert "loss_segmentation" not in runs["stage_classification"][0]
    assert [path.name for path in out.glob("events.out.*")] == [] and list((out / "stage_joint").glob("events.out.*"))

    run("training", **places)  # finished: nothing is refused or tracked again
    assert tracked(out / "mlruns.db") == runs

    evaluation = {"tracking_uri": f"sqlite:///{tmp_path}/evaluation.db", "run_name": "test", "bootstrap": 0}
    run(configs=("train", "preset_smoke", "evaluate"), **places, **evaluation)
    ((name, (metrics, files)),) = tracked(tmp_path / "evaluation.db").items()
    assert name == "test" and {"score", "classification_auroc"} <= metrics.keys()
    assert {"metrics.json", "classification.png", "segmentation.png"} <= files
