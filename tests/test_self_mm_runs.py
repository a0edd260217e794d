"""Self-MM through the train step and the loop: one program, no NaN, devices, resuming, dropped leftovers."""

import dataclasses
import json
import os
import signal
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_self_mm import batch_of, finite, network_of

from mmjax.papers.self_mm import LabelGeneration
from mmjax.training import checkpoints, fit, step, traces
from mmjax.training import mesh as meshes
from mmjax.training.experiment import Experiment
from mmjax.training.optimizers import Adam, AdamW, Group
from mmjax.training.signals import Interrupted


def run(batches, *, optimizer=None, epochs: int = 3, devices: int = 1, size: int = 12, network=None):
  """Trains on `batches` for some epochs; returns the losses, the first and last states and the compiled step."""
  network = network or network_of()
  optimizer = optimizer or AdamW(learning_rate=3e-3)
  objective, mesh = LabelGeneration(), meshes.make(devices=jax.devices()[:devices])
  shapes = step.abstract(network, batches[0])["params"]
  frozen = optimizer.frozen_mask(shapes)
  transformation = optimizer.build(shapes, total_steps=10)
  labels = np.linspace(-3, 3, size).astype(np.float32)
  state, shardings = step.create_state(
    network,
    objective,
    transformation,
    frozen=frozen,
    accumulate=optimizer.accumulate,
    labels={"M": labels},
    batch=batches[0],
    key=jax.random.key(1),
    mesh=mesh,
  )
  before = jax.device_get(state)
  train_step = jax.jit(
    step.make_train_step(network, objective, transformation, frozen=frozen),
    donate_argnums=0,
    out_shardings=(shardings, meshes.replicated(mesh)),
  )
  losses = []
  for epoch in range(1, epochs + 1):
    state = state.replace(epoch=jax.device_put(np.int32(epoch), shardings.epoch))
    for batch in batches:
      batch["labels"] = {"M": labels[batch["index"] % size]}
      state, logs = train_step(state, meshes.put_batch(batch, mesh), np.bool_(True), jax.random.key(2))
      losses.append({name: float(value) for name, value in logs.items()})
  return losses, before, jax.device_get(state), train_step


def test_one_program_whatever_the_epoch_and_every_trained_leaf_moves():
  batches = [batch_of(), batch_of(first=6, seed=1)]
  losses, before, after, train_step = run(batches, epochs=60)
  assert train_step._cache_size() == 1
  assert finite((losses, after))
  assert losses[0]["T"] == losses[3]["T"] == 0 < losses[-1]["T"]
  fused = [loss["M"] for loss in losses]
  assert sum(fused[-2:]) < 0.7 * sum(fused[:2])
  still = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, same in jax.tree_util.tree_leaves_with_path(
      jax.tree.map(lambda a, b: bool(np.all(a == b)), before.params, after.params)
    )
    if same
  ]
  assert still == []
  assert np.any(after.memory["labels"]["A"] != before.memory["labels"]["A"])
  np.testing.assert_array_equal(after.memory["labels"]["M"], before.memory["labels"]["M"])


def test_one_row_a_batch_gives_no_nan():
  losses, _, after, train_step = run([batch_of(1), batch_of(1, first=1, seed=1)])
  assert finite((losses, after))
  assert train_step._cache_size() == 1


def test_devices_do_not_change_what_is_learnt():
  batches = [batch_of(8), batch_of(8, first=8, seed=1)]
  batches[1]["valid"][4:] = False  # a last batch of 4
  one, _, state, _ = run(batches)
  many, _, states, _ = run(batches, devices=8)
  for ours, theirs in zip(many, one, strict=True):
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4, atol=1e-5)
  for a, b in zip(jax.tree.leaves(states.memory), jax.tree.leaves(state.memory), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


TRACED = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(LabelGeneration):
  """Notes each time that Python runs it in training, which compiled steps do not."""

  def __call__(self, *args: Any, train: bool, **kwargs: Any) -> Any:
    if train:
      TRACED.append(train)
    return super().__call__(*args, train=train, **kwargs)


class InMemory:
  """Data of one box: 10 training examples in 5 batches, the last of them of one row."""

  name, boxes, audio = "mosi", [{"text": 12}], None

  def __init__(self, stop_at: int | None = None):
    self.stop_at, self.served = stop_at, 0
    self.rows = {"train": batch_of(9), "valid": batch_of(4, seed=1), "test": batch_of(4, seed=2)}
    self.splits = {
      name: types.SimpleNamespace(ids=[f"{name}_{i}" for i in rows["index"]], labels=rows["labels"])
      for name, rows in self.rows.items()
    }

  def open(self, *args: Any, **kwargs: Any) -> "InMemory":
    return self

  def describe(self) -> str:
    return "made up"

  def plan(self, split: str, *, seed: int | None, epoch: int) -> list:
    size = len(self.splits[split].ids)
    order = np.arange(size) if seed is None else np.random.default_rng((seed, epoch)).permutation(size)
    return [(0, order[i : i + 2]) for i in range(0, size, 2)]

  def batch(self, split: str, indices: np.ndarray, row_multiple: int) -> dict:
    size = max(2, row_multiple)
    batch = jax.tree.map(lambda x: np.resize(x[indices], (size, *x.shape[1:])), self.rows[split])
    batch["valid"][len(indices) :] = False
    batch["index"][len(indices) :] = -1
    return batch

  def first_batch(self, *, row_multiple: int) -> dict:
    return self.batch("train", np.arange(2), row_multiple)

  def batches(self, split: str, plan: list, *, start: int = 0, row_multiple: int) -> Any:
    for _, indices in plan[start:]:
      self.served += split == "train"
      if self.served == self.stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      yield self.batch(split, indices, row_multiple)


def train(workdir: Path, *, stop_at: int | None = None, drop: bool = False) -> dict:
  experiment = Experiment(
    network=network_of(),
    objective=Counted(),
    data=InMemory(stop_at),
    optimizer=Adam(groups=(Group(".*", 1e-2, 1e-3),), accumulate=4, drop_leftovers=drop, accumulation="sum"),
    epochs=3,
    log_every=1,
  )
  return fit.fit(experiment, workdir=workdir, data_dir=workdir, cache_dir=workdir, records={})


@pytest.fixture
def one_device(monkeypatch):
  mesh = meshes.make(devices=jax.devices()[:1])
  monkeypatch.setattr(meshes, "make", lambda fsdp: mesh)


def losses_of(workdir: Path) -> list:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_resumed_run_has_the_memory_of_an_uninterrupted_one(one_device, tmp_path):
  """Stopped within the third epoch, whose labels depend on all that the memory holds; one program for all epochs."""
  TRACED.clear()
  train(tmp_path / "straight")
  assert len(TRACED) == 1
  with pytest.raises(Interrupted):
    train(tmp_path / "stopped", stop_at=12)
  assert traces.read(tmp_path / "stopped")[0] == [1, 2]
  train(tmp_path / "stopped")
  assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
  epochs, labels = traces.read(tmp_path / "straight")
  assert epochs == [1, 2, 3]
  _, again = traces.read(tmp_path / "stopped")
  for head in "MTAV":
    assert labels[head].shape == (3, 9)
    np.testing.assert_array_equal(again[head], labels[head])
  assert np.any(labels["A"][2] != labels["A"][1])
  np.testing.assert_array_equal(labels["A"][0], labels["M"][0])


def test_dropped_leftovers_never_reach_the_next_epoch(one_device, tmp_path):
  """SM1: after one micro-batch of the second epoch only that one is accumulated; the fifth of the first is gone."""
  for drop, steps in ((True, 1), (False, 2)):
    workdir = tmp_path / str(drop)
    with pytest.raises(Interrupted):
      train(workdir, stop_at=6, drop=drop)
    rest = latest(workdir)
    assert (int(rest["step"]), float(rest["examples"])) == (6, 1)
    counts = [int(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(rest["opt_state"]) if leaf.ndim == 0]
    assert set(counts) == {steps}


def latest(workdir: Path) -> dict:
  import orbax.checkpoint as ocp

  manager = checkpoints.Checkpoints(workdir).manager("latest")
  args = ocp.args.Composite(rest=ocp.args.StandardRestore())
  return manager.restore(manager.latest_step(), args=args)["rest"]
