"""Every gin file: parses, uses all it binds, builds, and traces its train step at full size, without data."""

from pathlib import Path

import jax
import pytest
from test_feature_file import COUNTS, mmsa, write

from mmjax import config
from mmjax.training import dry_run
from mmjax.training import mesh as meshes

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "gin").glob("*.gin"))
# The quickstart names folders that its script makes; the same encoders by their published names.
INSTEAD = {
  "quickstart": [
    "TEXT_ENCODER='sentence-transformers/all-MiniLM-L6-v2'",
    "AUDIO_ENCODER='openai/whisper-tiny.en'",
  ]
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_traces_a_full_size_train_step(path):
  experiment = config.load(path, INSTEAD.get(path.stem, [])).experiment
  batch = experiment.abstract_batch()
  state, (new_state, logs) = dry_run.shape_step(experiment, batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  variables = {"params": state.params, **state.model_state}
  outputs = jax.eval_shape(lambda v, b: experiment.network.apply(v, b, train=False), variables, batch)
  heads = jax.eval_shape(experiment.objective.predictions, outputs)
  assert heads
  assert set(logs) >= {"examples", *heads}
  assert dry_run.size(state.params) > 5_000_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_opens_with_the_header(path):
  header = path.read_text().split("\n\n")[0]
  assert f"--gin_file=gin/{path.name}" in header
  for word in ("https://arxiv.org/abs/", "# time:", "# published", "# score here:"):
    assert word in header, word
  assert path.name in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_operative_configuration_reruns_the_experiment(path, tmp_path):
  loaded = config.load(path, INSTEAD.get(path.stem, []))
  copy = tmp_path / "config.gin"
  copy.write_text(loaded.text)
  assert config.load(copy) == loaded


def test_an_unneeded_tower_is_neither_built_nor_fed():
  experiment = config.load(ROOT / "gin" / "mmml_mosi.gin", ["mmml.MMML.tasks='T'"]).experiment
  batch = experiment.abstract_batch()
  assert "audio" not in batch
  state, _ = dry_run.shape_step(experiment, batch)
  assert set(state.params) == {"text_encoder", "T"}


def test_a_dry_run_of_a_feature_file_writes_nothing(tmp_path, capsys):
  write(tmp_path / "own.pkl", mmsa())
  experiment = config.load(ROOT / "gin" / "self_mm_mosi.gin", ["feature_pipeline.Features.file='own.pkl'"]).experiment
  dry_run.describe(experiment, data_dir=tmp_path, cache_dir=tmp_path / "cache")
  printed = capsys.readouterr().out
  for words in ("own.pkl: unknown file", "vision/features", "text_encoder", "loss terms: A, M, T, V"):
    assert words in printed, words
  assert [path.name for path in tmp_path.iterdir()] == ["own.pkl"]


def test_a_dry_run_counts_the_memory_of_all_training_examples(tmp_path):
  write(tmp_path / "own.pkl", mmsa())
  experiment = config.load(ROOT / "gin" / "self_mm_mosi.gin", ["feature_pipeline.Features.file='own.pkl'"]).experiment
  data = experiment.open_data(tmp_path, tmp_path / "cache")
  state, _ = dry_run.shape_step(experiment, data.first_batch(), data.train.labels)
  assert state.memory["features"]["M"].shape == (COUNTS["train"], 128)


def test_the_largest_configuration_lowers_for_eight_devices():
  options = ["COMPUTE_DTYPE='bfloat16'", "experiment.Experiment.fsdp=8"]
  experiment = config.load(ROOT / "gin" / "mmml_mosi_context.gin", options).experiment
  lowered = dry_run.lower(experiment, experiment.abstract_batch(), meshes.make(8))
  assert "stablehlo" in lowered.as_text()[:10_000]
