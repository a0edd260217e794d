"""Does an authors' checkpoint become a workdir that gives the authors' numbers, and is a bad file refused?"""

import csv
import json

import golden
import jax
import make_data
import numpy as np
import pytest
from test_torch_file import call, mapping, name, plain, tensor, write_legacy, write_zip

from mmjax import config, evaluate, import_torch, train
from mmjax.errors import UserError
from mmjax.papers import mmml_names

CASE = "mmml_en_cc"
GIN = """
from __gin__ import dynamic_registration

from mmjax.backbones import pretrained
from mmjax.data import pipeline
from mmjax.papers import mmml
from mmjax.training import experiment
from mmjax.training import optimizers

experiment.Experiment:
  network = @mmml.MMML()
  objective = @mmml.MultiLoss()
  data = @pipeline.Pipeline()
  optimizer = @optimizers.AdamW()

mmml.MMML:
  text_encoder = @text/pretrained.encoder()
  audio_encoder = @audio/pretrained.encoder()
  fusion = "cc"

text/pretrained.encoder.name = "{folder}/roberta"
audio/pretrained.encoder.name = "{folder}/data2vec"

pipeline.Pipeline:
  dataset = "mosi"
  text = @pipeline.Text()
  audio = @pipeline.Audio()
  boxes = None
pipeline.Text:
  tokenizer = "{folder}/tokenizer"
  max_tokens = 20
pipeline.Audio.seconds = 0.8
optimizers.AdamW.learning_rate = 1e-5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("import")
  backbones = zip(golden.config(CASE)["backbones"].values(), ("roberta", "data2vec-audio"), strict=True)
  for facts, kind in backbones:
    place = folder / kind.removesuffix("-audio")
    place.mkdir()
    (place / "config.json").write_text(json.dumps({**facts, "model_type": kind}))
  make_data.tokenizer(folder / "tokenizer")
  videos = {"v1": ("train", 2), "v2": ("valid", 2), "v3": ("test", 5)}
  make_data.raw_folder(folder / "data", videos=videos)
  (folder / "mmml.gin").write_text(GIN.format(folder=folder))
  return folder


def flags(folder, file, workdir):
  return [
    f"--gin_file={folder / 'mmml.gin'}",
    f"--torch_checkpoint={file}",
    f"--workdir={folder / workdir}",
    f"--data_dir={folder / 'data'}",
    f"--cache_dir={folder / 'cache'}",
  ]


def write(path, state_dict, kind="FloatStorage", dtype=np.float32):
  """Writes a zip file of torch.save with these arrays."""
  tree, storages = {}, {}
  for i, (key, value) in enumerate(state_dict.items()):
    strides = [int(np.prod(value.shape[d + 1 :])) for d in range(value.ndim)]
    tree[key] = tensor(str(i), kind, value.size, value.shape, tuple(strides))
    storages[str(i)] = value.astype(dtype).tobytes()
  return write_zip(path, mapping(tree), storages)


def test_the_imported_workdir_gives_the_authors_numbers(folder, capsys):
  weights = golden.state_dict(CASE)
  file = write(folder / "parallel.pth", {f"module.{key}": value for key, value in weights.items()})
  assert import_torch.run(flags(folder, file, "imported")) == 0
  workdir = folder / "imported"
  assert evaluate.run([f"--workdir={workdir}"]) == 0
  with (workdir / "predictions_test.csv").open() as lines:
    rows = list(csv.DictReader(lines))

  experiment = config.load(folder / "mmml.gin").experiment
  data = experiment.open_data(folder / "data", folder / "cache")
  batch = data.batch("test", np.arange(5), data.full, 5)
  shapes = jax.eval_shape(lambda: experiment.network.init(jax.random.key(0), batch, train=False))
  variables = mmml_names.from_torch(experiment.network, weights, shapes)
  want = jax.jit(lambda v, b: experiment.network.apply(v, b, train=False))(variables, batch)
  for head in "MTA":
    np.testing.assert_allclose([float(row[head]) for row in rows], want[head], atol=1e-5)
    assert np.ptp(want[head]) > 1e-3

  with pytest.raises(UserError, match="imported from"):
    train.run([f"--gin_file={folder / 'mmml.gin'}", f"--workdir={workdir}"])
  with pytest.raises(UserError, match="expected a new or empty folder"):
    import_torch.run(flags(folder, file, "imported"))


def test_half_precision_is_read(folder):
  experiment = config.load(folder / "mmml.gin").experiment
  weights = golden.state_dict(CASE)
  half = import_torch.read(experiment, write(folder / "half.pth", weights, "HalfStorage", np.float16))
  got = half["params"]["T"]["score"]["kernel"]
  np.testing.assert_array_equal(got[:, 0], weights["T_output_layers.1.weight"][0].astype(np.float16))


def test_one_error_lists_all_that_does_not_fit(folder):
  weights = golden.state_dict(CASE)
  weights["new_layer.weight"] = np.zeros((2, 2), np.float32)
  del weights["T_output_layers.1.weight"]
  weights["A_output_layers.1.weight"] = np.zeros((1, 3), np.float32)
  file = write(folder / "wrong.pth", weights)
  with pytest.raises(UserError) as error:
    import_torch.run(flags(folder, file, "wrong"))
  for part in (
    "not known: new_layer.weight",
    "missing: T/score/kernel",
    "found (3, 1), expected (768, 1)",
    "wrong.pth",
  ):
    assert part in str(error.value)
  assert not (folder / "wrong").exists()


def test_a_file_that_would_run_a_command_is_refused(folder):
  attack = mapping({"weight": call(name("posix", "system"), plain(f"touch {folder / 'ran'}"))})
  for file in (write_zip(folder / "evil.pth", attack, {}), write_legacy(folder / "old.pth", attack, {})):
    with pytest.raises(UserError, match=r"posix\.system"):
      import_torch.run(flags(folder, file, "evil"))
    cut = folder / "cut.pth"
    cut.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut\.pth"):
      import_torch.run(flags(folder, cut, "evil"))
  assert not (folder / "ran").exists()
  assert not (folder / "evil").exists()
  with pytest.raises(UserError, match="found no such file"):
    import_torch.run(flags(folder, folder / "absent.pth", "evil"))
