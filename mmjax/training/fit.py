"""The train loop, read from top to bottom: prepare, resume, train, validate, keep, score."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import metrics
from mmjax.backbones import pretrained
from mmjax.errors import UserError
from mmjax.progress import Progress
from mmjax.training import checkpoints, compilation, evaluation, logs, step, traces
from mmjax.training import mesh as meshes
from mmjax.training.dry_run import parameter_counts
from mmjax.training.experiment import Experiment
from mmjax.training.optimizers import with_plateau_scale
from mmjax.training.signals import Interrupted, Signals


@dataclasses.dataclass
class Position:
  """Where a run is: what `latest` holds beside the arrays."""

  epoch: int = 1
  batch: int = 0  # batches of this epoch already done
  step: int = 0
  loss_sum: float = 0.0  # over the examples of this epoch so far
  examples: float = 0.0
  best_loss: float = math.inf
  best_accuracy: float = -math.inf
  best_epoch: int = 0
  seconds: float = 0.0
  plateau: dict[str, float] = dataclasses.field(default_factory=dict)  # `optimizers.Plateau.after`


def fit(
  experiment: Experiment, *, workdir: Path, data_dir: Path, cache_dir: Path, records: Mapping[str, str]
) -> dict[str, Any]:
  """Trains `experiment` in `workdir`, resuming what is there; returns what results.json holds.

  `records` {file name: text} are written to the workdir once all that can be mistaken has been checked.
  Raises `Interrupted` after saving when asked to stop; `UserError` for a mistake or a non-finite loss.
  """
  began = time.monotonic()
  saved = checkpoints.Checkpoints(workdir)
  resuming = "latest" in saved.steps()
  if not resuming:
    pretrained.check(experiment.network, experiment.streams)
  boxes_file = workdir / "boxes.json"
  boxes = json.loads(boxes_file.read_text()) if boxes_file.exists() else None
  data = experiment.open_data(data_dir, cache_dir, boxes)
  print(data.describe(), flush=True)

  mesh = meshes.make(experiment.fsdp)
  key = jax.random.key(experiment.seed)
  batch = data.first_batch(row_multiple=mesh.size)
  shapes = step.abstract(experiment.network, batch)["params"]
  frozen = experiment.optimizer.frozen_mask(shapes)
  steps_per_epoch = len(data.plan("train", seed=experiment.seed, epoch=1))
  updates = experiment.optimizer.updates(steps_per_epoch)
  optimizer = experiment.optimizer.build(shapes, total_steps=updates * experiment.epochs)
  state, shardings = step.create_state(
    experiment.network,
    experiment.objective,
    optimizer,
    frozen=frozen,
    accumulate=experiment.optimizer.accumulate,
    labels=data.splits["train"].labels,
    batch=batch,
    key=jax.random.fold_in(key, 0),
    mesh=mesh,
    restore=(lambda p: p) if resuming else (lambda p: pretrained.restore(experiment.network, p)),
  )
  print(parameter_counts(state.params, frozen), flush=True)

  dropout_key = jax.random.fold_in(key, 1)
  train_step = jax.jit(
    step.make_train_step(
      experiment.network,
      experiment.objective,
      optimizer,
      frozen=frozen,
      accumulation=experiment.optimizer.accumulation,
    ),
    donate_argnums=0,
    out_shardings=(shardings, meshes.replicated(mesh)),
    compiler_options=compilation.options(),
  )
  evaluator = evaluation.Evaluator(experiment, data, mesh)
  reset = jax.jit(
    lambda s: s.replace(opt_state=optimizer.init(step.split(s.params, frozen)[0])), out_shardings=shardings
  )
  plateau = experiment.optimizer.plateau
  rescale = jax.jit(
    lambda s, scale: s.replace(opt_state=with_plateau_scale(s.opt_state, scale)),
    donate_argnums=0,
    out_shardings=shardings,
  )
  drop = jax.jit(step.without_gradient, donate_argnums=0, out_shardings=shardings)

  position = Position()
  if resuming:
    variables, rest = split_state(state)
    state = join_state(state, saved.restore("latest", "variables", variables), saved.restore("latest", "rest", rest))
    position = Position(**saved.info("latest"))
    print(f"resuming after step {position.step} (epoch {position.epoch}, batch {position.batch})", flush=True)
  earlier_seconds = position.seconds

  def save_latest() -> None:
    position.seconds = earlier_seconds + time.monotonic() - began
    variables, rest = split_state(state)
    saved.save("latest", position.step, variables, dataclasses.asdict(position), rest)

  write_records(workdir, {**records, boxes_file.name: json.dumps(data.boxes) + "\n"})
  writer = logs.Writer(workdir, after_step=position.step)
  pending: list[tuple[int, Any]] = []

  def settle(leave: int = 0) -> None:
    # The numbers of a step are read while the next one runs.
    while len(pending) > leave:
      note_step(*pending.pop(0), position=position, writer=writer, log_every=experiment.log_every)

  def stop_if_asked(what: str) -> None:
    if signals.received:
      writer.close()
      raise Interrupted(f"saved {what} in {workdir}")

  with Signals() as signals:
    while position.epoch <= experiment.epochs and not out_of_patience(position, experiment):
      epoch = position.epoch
      plan = data.plan("train", seed=experiment.seed, epoch=epoch)
      if experiment.optimizer.reset_each_epoch and position.batch == 0 and epoch > 1:
        state = reset(state)
      if experiment.optimizer.drop_leftovers and state.gradient is not None and position.batch == 0:
        state = drop(state)
      if plateau is not None:
        state = rescale(state, np.float32(plateau.scale(position.plateau)))
      state = state.replace(epoch=jax.device_put(jnp.int32(epoch), shardings.epoch))
      saved_at = time.monotonic()
      batches = data.batches("train", plan, start=position.batch, row_multiple=mesh.size)
      with Progress(f"epoch {epoch}", len(plan), unit="steps", start=position.batch) as progress:
        for batch in batches:
          position.batch += 1
          position.step += 1
          update = experiment.optimizer.is_update(position.batch, len(plan))
          state, sums = train_step(state, meshes.put_batch(batch, mesh), np.bool_(update), dropout_key)
          pending.append((position.step, sums))
          settle(leave=1)
          progress.step(f"loss {position.loss_sum / max(position.examples, 1):.4f}")
          due = time.monotonic() - saved_at > 60 * experiment.save_minutes
          if signals.received or due:
            settle()
            save_latest()
            saved_at = time.monotonic()
          stop_if_asked(f"step {position.step} of epoch {epoch}")
        settle()

      variables, _ = split_state(state)
      scores = evaluator.score(variables, state.memory, state.epoch, "valid")
      head = evaluation.primary(scores.predictions)
      accuracy = metrics.selection_accuracy(scores.metrics[head])
      train_loss = position.loss_sum / max(position.examples, 1)
      writer.epoch(position.step, epoch, train_loss, scores)
      if plateau is not None:
        position.plateau = plateau.after(position.plateau, scores.loss)
      info = {"step": position.step, "epoch": epoch, "valid_loss": scores.loss, "valid_accuracy": accuracy}
      if scores.loss < position.best_loss:
        position.best_loss, position.best_epoch = scores.loss, epoch
        saved.save("best_loss", position.step, variables, info)
      if accuracy >= position.best_accuracy:  # a tie goes to the later epoch, as in the authors' code (MM4)
        position.best_accuracy = accuracy
        saved.save("best_accuracy", position.step, variables, info)
      print(
        f"epoch {epoch}: train loss {train_loss:.4f}, valid loss {scores.loss:.4f}, "
        + ", ".join(f"{name} {value:.4f}" for name, value in scores.metrics[head].items())
        + (f", rates x {plateau.scale(position.plateau):g}" if plateau is not None else "")
        + (" *" if position.best_epoch == epoch else ""),
        flush=True,
      )
      traces.write(workdir, epoch, experiment.objective, state.memory)
      # After the best ones: a run killed in between makes them again.
      position.epoch, position.batch, position.loss_sum, position.examples = epoch + 1, 0, 0.0, 0.0
      save_latest()
      stop_if_asked(f"the end of epoch {epoch}")
  writer.close()
  position.seconds = earlier_seconds + time.monotonic() - began
  like, _ = split_state(state)
  for name in ("best_loss", "best_accuracy"):
    results = evaluator.keep(workdir, saved, name, ("valid", "test"), like, state.memory, state.epoch)
  results["seconds"] = position.seconds
  evaluation.write_json(workdir / "results.json", results)
  print(evaluation.table(results, "test"), flush=True)
  return results


def write_records(workdir: Path, records: Mapping[str, str]) -> None:
  """Makes the workdir and writes its small text files, each whole or not at all."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, text in records.items():
      partial = workdir / f"{name}.partial"
      partial.write_text(text, encoding="utf-8")
      partial.replace(workdir / name)
  except OSError as error:
    raise UserError(f"--workdir={workdir} cannot be written: {error}") from error


def out_of_patience(position: Position, experiment: Experiment) -> bool:
  """Returns whether `patience` epochs have passed without a lower validation loss."""
  return position.epoch - 1 - position.best_epoch >= experiment.patience


def note_step(number: int, sums: Any, *, position: Position, writer: logs.Writer, log_every: int) -> None:
  """Adds a finished step to the epoch's loss and to the log; stops the run at a loss that is not finite."""
  values = {name: float(value) for name, value in jax.device_get(sums).items()}
  examples = values.pop("examples")
  loss = sum(values.values())
  if not math.isfinite(loss):
    raise UserError(
      f"the loss of step {number} is {loss}, so training stopped; the last checkpoint is from before it\n"
      f"terms: {values}\nusual remedies: a lower learning rate, clip_norm=1.0, compute_dtype='float32'"
    )
  position.loss_sum += loss
  position.examples += examples
  if number % log_every == 0:
    writer.step(number, position.epoch, {name: value / max(examples, 1) for name, value in values.items()})


def split_state(state: step.State) -> tuple[Any, Any]:
  """Returns (variables, the rest) as checkpoints keep them."""
  rest = {"opt_state": state.opt_state, "step": state.step, "epoch": state.epoch}
  for name in ("memory", "gradient", "examples"):
    if jax.tree.leaves(getattr(state, name)):
      rest[name] = getattr(state, name)
  return {"params": state.params, **state.model_state}, rest


def join_state(state: step.State, variables: Any, rest: Any) -> step.State:
  """Returns `state` with what a checkpoint held."""
  model_state = {name: value for name, value in variables.items() if name != "params"}
  return state.replace(params=variables["params"], model_state=model_state, **rest)
