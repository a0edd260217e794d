"""Whole runs on a tiny data set: what a run leaves, resuming, seeds, evaluation, interruptions, mistakes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import make_data
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mmjax import evaluate, train
from mmjax.errors import UserError

ROOT = Path(__file__).parents[1]
# Compiling is most of what these runs do; this makes it two to three times as fast.
FAST_COMPILE = "--xla_backend_optimization_level=0"
GIN = """
from __gin__ import dynamic_registration

import tiny
from mmjax.data import pipeline
from mmjax.papers import mmml
from mmjax.training import experiment
from mmjax.training import optimizers

experiment.Experiment:
  network = @tiny.mmml()
  objective = @mmml.MultiLoss()
  data = @pipeline.Pipeline()
  optimizer = @optimizers.AdamW()
  epochs = 3
  log_every = 1

tiny.mmml.context = True

pipeline.Pipeline:
  dataset = "mosi"
  batch_size = 4
  boxes = 2
  text = @pipeline.Text()
  audio = @pipeline.Audio()

pipeline.Text:
  tokenizer = "{tokenizer}"
  context = 2

pipeline.Audio.context = 1

optimizers.AdamW:
  learning_rate = 1e-3
  accumulate = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("fit")
  make_data.raw_folder(folder / "data", dataset="mosi")
  make_data.tokenizer(folder / "tokenizer")
  (folder / "tiny.gin").write_text(GIN.format(tokenizer=folder / "tokenizer"))
  return folder


def flags(folder: Path, workdir: str, *more: str) -> list[str]:
  return [
    f"--gin_file={folder / 'tiny.gin'}",
    f"--data_dir={folder / 'data'}",
    f"--cache_dir={folder / 'cache'}",
    f"--workdir={folder / workdir}",
    *more,
  ]


def losses(workdir: Path) -> dict[int, float]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def start(folder: Path, workdir: str, *more: str) -> subprocess.Popen:
  """Starts training in a process of its own, on one device."""
  env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "XLA_FLAGS": FAST_COMPILE}
  return subprocess.Popen(
    [sys.executable, "-m", "mmjax.train", *flags(folder, workdir, *more)],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for_steps(workdir: Path, count: int, process: subprocess.Popen) -> None:
  path = workdir / "metrics.jsonl"
  for _ in range(1200):
    if path.exists() and len(path.read_text().splitlines()) >= count:
      return
    if process.poll() is not None:
      break
    time.sleep(0.1)
  pytest.fail(f"no {count} steps: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def straight(folder):
  """An uninterrupted run in a process of its own."""
  process = start(folder, "straight")
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  return folder / "straight", output


def test_a_run_leaves_what_it_promises(straight):
  workdir, output = straight
  assert {path.name for path in workdir.iterdir()} >= {
    "config.gin",
    "metrics.jsonl",
    "results.json",
    "predictions_valid.csv",
    "predictions_test.csv",
    "checkpoints",
    "tensorboard",
    "boxes.json",
  }
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"latest", "best_loss", "best_accuracy"}
  results = json.loads((workdir / "results.json").read_text())
  assert set(results["checkpoints"]) == {"best_loss", "best_accuracy"}
  assert {"loss", "M", "T", "A"} == set(results["checkpoints"]["best_loss"]["test"])
  with (workdir / "predictions_test.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == results["counts"]["test"]
  assert set(rows[0]) == {"id", "label_M", "M", "T", "A"}
  assert list((workdir / "tensorboard").glob("events*"))
  assert "1284" in output  # the published count stands beside the one found


def test_the_same_seed_gives_identical_losses(folder, straight):
  process = start(folder, "again")
  process.communicate(timeout=300)
  assert losses(folder / "again") == losses(straight[0])
  assert (folder / "again" / "results.json").exists()


def test_kill_in_mid_epoch_then_restart_gives_the_uninterrupted_losses(folder, straight):
  slow = ("--gin.experiment.Experiment.save_minutes=0.0",)
  process = start(folder, "killed", *slow)
  wait_for_steps(folder / "killed", 5, process)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  resumed = start(folder, "killed", *slow)
  output, _ = resumed.communicate(timeout=300)
  assert resumed.returncode == 0, output
  assert "resuming after step" in output
  assert losses(folder / "killed") == losses(straight[0])
  ours = json.loads((folder / "killed" / "results.json").read_text())
  theirs = json.loads((straight[0] / "results.json").read_text())
  assert ours["checkpoints"] == theirs["checkpoints"]


def test_sigterm_saves_and_says_how_to_resume(folder, straight):
  process = start(folder, "stopped")
  wait_for_steps(folder / "stopped", 3, process)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 143, output
  assert "to resume, run the same command" in output
  assert f"--workdir={folder / 'stopped'}" in output
  resumed = start(folder, "stopped")
  output, _ = resumed.communicate(timeout=300)
  assert resumed.returncode == 0, output
  assert losses(folder / "stopped") == losses(straight[0])


def test_evaluate_gives_the_numbers_of_training(folder, straight, capsys):
  workdir, _ = straight
  before = json.loads((workdir / "results.json").read_text())
  predictions = (workdir / "predictions_test.csv").read_text()
  for checkpoint in ("best_loss", "best_accuracy"):
    assert evaluate.run([f"--workdir={workdir}", f"--checkpoint={checkpoint}", "--split=test"]) == 0
  after = json.loads((workdir / "results.json").read_text())
  for checkpoint in ("best_loss", "best_accuracy"):
    for head in "MTA":
      assert after["checkpoints"][checkpoint]["test"][head] == pytest.approx(
        before["checkpoints"][checkpoint]["test"][head], abs=1e-5
      )
  assert "best_accuracy M" in capsys.readouterr().out
  rows = zip(predictions.splitlines(), (workdir / "predictions_test.csv").read_text().splitlines(), strict=True)
  for ours, theirs in list(rows)[1:]:
    assert [float(x) for x in ours.split(",")[1:]] == pytest.approx([float(x) for x in theirs.split(",")[1:]], abs=1e-5)
  step = before["checkpoints"]["best_loss"]["step"]
  assert evaluate.run([f"--workdir={workdir}", f"--checkpoint={step}", "--split=train"]) == 0
  with pytest.raises(UserError, match="found: best_loss"):
    evaluate.run([f"--workdir={workdir}", "--checkpoint=77777"])


def test_a_finished_run_is_not_trained_again_but_may_be_prolonged(folder, straight, capsys):
  process = start(folder, "straight", "--gin.experiment.Experiment.epochs=4")
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert "epoch 4:" in output
  assert "epoch 3:" not in output


def test_the_optimiser_may_forget_each_epoch(folder, straight):
  """MM1: as the authors' loop does; the first epoch and the step into the second are the same, then they part."""
  process = start(
    folder, "forgets", "--gin.optimizers.AdamW.reset_each_epoch=True", "--gin.experiment.Experiment.epochs=2"
  )
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  theirs, ours = losses(straight[0]), losses(folder / "forgets")
  same = [step for step in ours if ours[step] == theirs[step]]
  assert same == list(range(1, len(ours) // 2 + 3))  # two micro-batches make a step


def test_seeds_give_mean_and_deviation(folder, straight):
  process = start(folder, "seeds", "--seeds=1,2", "--gin.experiment.Experiment.epochs=1")
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  results = json.loads((folder / "seeds" / "results.json").read_text())
  runs = [json.loads((folder / "seeds" / f"seed_{n}" / "results.json").read_text()) for n in (1, 2)]
  maes = [run["checkpoints"]["best_loss"]["test"]["M"]["MAE"] for run in runs]
  assert maes[0] != maes[1]
  assert results["mean"]["checkpoints"]["best_loss"]["test"]["M"]["MAE"] == pytest.approx(sum(maes) / 2)
  assert results["std"]["checkpoints"]["best_loss"]["test"]["M"]["MAE"] == pytest.approx(abs(maes[0] - maes[1]) / 2)


@pytest.fixture
def without_compilation_cache():
  """Commands that earlier tests ran in this process have turned it on; a command of its own starts without."""
  kept = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_compilation_cache_dir", kept)
  compilation_cache.reset_cache()


def test_dry_run_describes_and_writes_nothing(folder, without_compilation_cache, capsys):
  before = sorted(folder.rglob("*"))
  assert train.run(flags(folder, "dry", "--dry_run")) == 0
  output = capsys.readouterr().out
  for word in ("text_encoder", "optimiser state", "wave", "box ", "1284"):
    assert word in output
  assert sorted(folder.rglob("*")) == before
  fresh = [flag for flag in flags(folder, "dry", "--dry_run") if not flag.startswith("--cache_dir")]
  assert train.run([*fresh, f"--cache_dir={folder / 'no-cache'}"]) == 0
  assert sorted(folder.rglob("*")) == before


def test_another_configuration_or_architecture_is_refused(folder, straight):
  workdir, _ = straight
  with pytest.raises(UserError, match=r"AdamW.learning_rate: 0.001 there, 0.5 now"):
    train.run(flags(folder, workdir.name, "--gin.optimizers.AdamW.learning_rate=0.5"))
  with pytest.raises(UserError, match="another architecture"):
    evaluate.run([f"--workdir={workdir}", "--gin.tiny.mmml.cme_layers=2"])


def test_a_loss_that_is_not_finite_stops_the_run(folder):
  with pytest.raises(UserError, match=r"the loss of step \d+ is nan"):
    train.run(flags(folder, "nan", "--gin.optimizers.AdamW.learning_rate=1e30"))


def test_mistakes_leave_no_workdir(folder):
  nowhere = [flag for flag in flags(folder, "none") if not flag.startswith("--data_dir")]
  with pytest.raises(UserError, match="label.csv"):
    train.run([*nowhere, f"--data_dir={folder / 'nowhere'}"])
  assert not (folder / "none").exists()


def test_a_full_disk_keeps_the_previous_checkpoint(folder, straight, tmp_path):
  """A limit on file sizes stands in for the full disk: writes fail half-way, as they do there."""
  script = tmp_path / "limited.py"
  script.write_text(
    "import resource, signal, sys\n"
    "from mmjax import config, train\n"
    "from mmjax.training import checkpoints\n"
    "save = checkpoints.Checkpoints.save\n"
    "def limited(self, name, step, *rest):\n"
    "  if step > 8:\n"
    "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
    "  save(self, name, step, *rest)\n"
    "checkpoints.Checkpoints.save = limited\n"
    "config.main(train.run)\n"
  )
  env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "XLA_FLAGS": FAST_COMPILE}
  done = subprocess.run(
    [sys.executable, str(script), *flags(folder, "full")],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2, done.stdout + done.stderr
  assert "The previous checkpoint is kept" in done.stderr
  assert "Traceback" not in done.stderr
  resumed = start(folder, "full")
  output, _ = resumed.communicate(timeout=300)
  assert resumed.returncode == 0, output
  assert "resuming after step" in output
  # Another test may have prolonged the straight run.
  assert losses(folder / "full") == {step: loss for step, loss in losses(straight[0]).items() if step <= 12}


def test_a_second_start_compiles_nothing(folder, capsys):
  """By JAX's own events: every program comes from the persistent cache."""
  import jax

  events = []
  jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
  counts = []
  for workdir in ("first_start", "second_start"):
    jax.clear_caches()
    events.clear()
    assert (
      train.run(flags(folder, workdir, "--gin.experiment.Experiment.epochs=1", "--gin.tiny.mmml.dropout=0.25")) == 0
    )
    counts.append({name: events.count(name) for name in ("cache_hits", "cache_misses")})
  assert counts[0]["cache_misses"] > 3
  assert counts[1]["cache_misses"] == 0
  assert counts[1]["cache_hits"] > 3
