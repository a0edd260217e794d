"""Mistakes in flags and gin files: one message that says what to type, exit status 2, soon."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmjax import config
from mmjax.errors import UserError

ROOT = Path(__file__).parents[1]
MOSI = ROOT / "gin" / "mmml_mosi.gin"


def command(*args: str) -> tuple[subprocess.CompletedProcess, set[str]]:
  """Returns a finished command and the packages it imported."""
  done = subprocess.run(
    [sys.executable, "-X", "importtime", "-m", *args], cwd=ROOT, capture_output=True, text=True, check=False
  )
  lines = done.stderr.splitlines()
  imports = {line.split("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
  done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
  return done, imports


@pytest.mark.parametrize(
  ("binding", "message"),
  [
    ("mmml.MMML.tsks='T'", "did you mean tasks?"),
    ("mmml.MML.tasks='T'", "did you mean mmml.MMML"),
    ("mmml.MMML.tasks=T", "expected: a string in quotes, 'T'"),
    ("txt/pretrained.encoder.name='roberta-large'", "txt/mmjax.backbones.pretrained.encoder.name"),
    ("BATCH=7", "%BATCH"),
    ("mmml.MMML.tasks=%TASKS", "%TASKS is used, but TASKS is bound nowhere"),
    ("mmml.MMML.fusion='sum'", "expected one of ('cc', 'cme')"),
    ("mmml.MMML.tasks='MX'", "expected a subset of 'MTA'"),
    ("optimizers.AdamW.decay='slow'", "expected 'constant'"),
    ("TEXT_ENCODER='no/such-encoder'", "no/such-encoder"),
  ],
)
def test_mistakes_in_bindings(binding, message):
  with pytest.raises(UserError) as caught:
    config.load(MOSI, [binding])
  assert message in str(caught.value)
  assert "Traceback" not in str(caught.value)
  assert len(str(caught.value).splitlines()) < 12


def test_the_same_parameter_twice_in_one_file(tmp_path):
  path = tmp_path / "twice.gin"
  path.write_text(MOSI.read_text() + 'pipeline.Pipeline.dataset = "mosei"\n')
  with pytest.raises(UserError, match=r"Pipeline.dataset is bound twice, in lines \d+ and \d+"):
    config.load(path)


def test_a_missing_include_is_named(tmp_path):
  path = tmp_path / "lost.gin"
  path.write_text('include "base/nothing.gin"\n')
  with pytest.raises(UserError, match=r"base/nothing\.gin"):
    config.load(path)


def test_a_workdir_of_another_configuration_shows_the_difference(tmp_path):
  text = config.load(MOSI).text
  (tmp_path / "config.gin").write_text(text)
  config.check_workdir(tmp_path, text)
  config.check_workdir(tmp_path, config.load(MOSI, ["experiment.Experiment.epochs=3"]).text)
  with pytest.raises(UserError, match=r"AdamW.learning_rate: 1e-05 there, 0.1 now"):
    config.check_workdir(tmp_path, config.load(MOSI, ["optimizers.AdamW.learning_rate=0.1"]).text)


@pytest.mark.parametrize(
  ("args", "status", "text"),
  [
    (("mmjax.train", "--help"), 0, "--gin_file"),
    (("mmjax.evaluate", "--help"), 0, "--checkpoint"),
    (("mmjax.train", "--gin_file=gin/mmml_mosi.gin", "--batch=8"), 2, "--batch=8"),
    (("mmjax.train",), 2, "--gin_file"),
    (("mmjax.train", "--gin_file=gin/nothing.gin"), 2, "gin/mmml_mosi.gin"),
    (("mmjax.train", "--gin_file=gin/mmml_mosi.gin", "--seeds=1,x"), 2, "--seeds=1,11,111"),
    (("mmjax.evaluate", "--workdir=/nothing/here"), 2, "mmjax.train"),
  ],
)
def test_flags_answer_before_anything_heavy_is_imported(args, status, text):
  done, imports = command(*args)
  assert done.returncode == status
  assert text in done.stdout + done.stderr
  assert "Traceback" not in done.stderr
  assert not imports & {"jax", "flax", "tensorflow", "transformers"}


def test_gin_mistakes_answer_before_tensorflow_is_imported():
  done, imports = command("mmjax.train", "--gin_file=gin/mmml_mosi.gin", "--gin.mmml.MMML.tsks='T'")
  assert done.returncode == 2
  assert "did you mean tasks?" in done.stderr
  assert "Traceback" not in done.stderr
  assert not imports & {"tensorflow", "tensorflow_datasets", "clu", "transformers"}
