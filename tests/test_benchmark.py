"""Does tools/benchmark.py measure a tiny experiment, and does rematerialisation hold on this machine?"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmjax.papers.mmml import MultiLoss
from mmjax.training import compilation, optimizers, step

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

pipeline.Pipeline:
  dataset = "mosi"
  boxes = 2
  text = @pipeline.Text()
  audio = @pipeline.Audio()
pipeline.Text:
  tokenizer = "absent"
  max_tokens = 24
pipeline.Audio.seconds = 1.0
optimizers.AdamW.learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def benchmark():
  path = Path(__file__).parents[1] / "tools" / "benchmark.py"
  spec = importlib.util.spec_from_file_location("benchmark", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_measures_made_up_clips(benchmark, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(benchmark, "MATMUL", 128)
  (tmp_path / "tiny.gin").write_text(GIN)
  lengths = {"text": np.tile([5, 24], 16), "audio": np.tile([3200, 16000], 16)}
  np.savez(tmp_path / "lengths.npz", **lengths)
  flags = [
    f"--gin_file={tmp_path / 'tiny.gin'}",
    f"--lengths={tmp_path / 'lengths.npz'}",
    f"--json={tmp_path / 'b.json'}",
  ]
  assert benchmark.run([*flags, "--steps=1"]) == 0
  found = json.loads((tmp_path / "b.json").read_text())
  assert [entry["batches"] for entry in found["boxes"]] == [2, 2]
  assert all(entry["gflop"] > 0 and entry["step_s"] > 0 and entry["program_gb"] > 0 for entry in found["boxes"])
  assert found["padding"]["text"] == 0.0  # all of one length in each box
  assert found["padding"]["audio"] < 0.02  # but for the grid
  assert found["epoch_s"] == pytest.approx(4 * found["step_s"])
  assert 0 <= found["host_wait_share"] <= 1
  printed = capsys.readouterr().out
  for word in ("average step", "share of matmul", "peak memory", "padding"):
    assert word in printed


def test_made_lengths_resemble_mosi(benchmark):
  shapes = {
    name: stream for name, stream in tiny.batch(context=True).items() if isinstance(stream, dict) and "mask" in stream
  }
  for name, cap in {"text": 96, "text_context": 96, "audio": 96_000, "audio_context": 96_000}.items():
    kind = next(key for key in shapes[name] if key != "mask")
    shapes[name] = {key: jax.ShapeDtypeStruct((8, cap), jnp.float32) for key in (kind, "mask")}
  lengths = benchmark.made_lengths(shapes, 2000)
  assert 13 < lengths["text"].mean() < 17
  assert 55_000 < lengths["audio"].mean() < 68_000
  assert lengths["text_context"].mean() > 1.5 * lengths["text"].mean()


def step_of(remat: bool):
  """A deep tiny network's step, compiled as training does, with its state and batch."""
  text = tiny.bert(num_layers=6, intermediate_size=512, remat=remat)
  network = tiny.mmml(text_encoder=text, tasks="T", remat=remat)
  batch = tiny.batch(rows=16, tokens=96)
  params = tiny.init(network, batch)
  described = optimizers.AdamW(learning_rate=1e-3)
  frozen = described.frozen_mask(params)
  optimizer = described.build(params, total_steps=10)
  state = step.State(
    params=params,
    model_state={},
    opt_state=optimizer.init(params),
    memory={},
    gradient=None,
    examples=None,
    step=jnp.int32(0),
    epoch=jnp.int32(1),
  )
  run = step.make_train_step(network, MultiLoss(), optimizer, frozen=frozen)
  arguments = (state, batch, jnp.bool_(True), jax.random.key(0))
  compiled = jax.jit(run, compiler_options=compilation.options()).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes, compiled(*arguments)


def test_rematerialisation_saves_memory_and_changes_nothing():
  """On CPU XLA would merge the second computation with the first, were it not for `compilation.options`."""
  kept, (state, logs) = step_of(remat=False)
  again, (state_again, logs_again) = step_of(remat=True)
  assert again < 0.6 * kept
  np.testing.assert_allclose(logs_again["T"], logs["T"], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state_again.params, state.params)
