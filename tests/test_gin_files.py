"""Every gin file: parses, uses all it binds, builds, and traces its train step at full size, without data."""

from pathlib import Path

import jax
import pytest

from mmjax import config
from mmjax.training import dry_run

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
  assert set(logs) - {"examples"} == set(experiment.network.tasks)
  assert dry_run.size(state.params) > 10_000_000


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
