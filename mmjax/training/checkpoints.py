"""Checkpoints through Orbax: `latest` (everything), `best_loss` and `best_accuracy` (variables only)."""

import io
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from mmjax.errors import UserError

NAMES = ("best_loss", "best_accuracy", "latest")


@contextmanager
def one_message(doing: str, remedy: str) -> Iterator[None]:
  """Turns whatever Orbax raises into one `UserError`, without its log of nested tracebacks."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL + 1)
  try:
    yield
  except (OSError, ValueError, KeyError) as error:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    raise UserError(f"{doing} failed: {reason}\n{remedy}") from error
  finally:
    logger.setLevel(level)


@contextmanager
def without_thread_noise() -> Iterator[None]:
  """Swallows what TensorStore's threads print and asyncio logs after a failed write, until the process ends.

  They report to an event loop that Orbax has closed by then; the one message goes to `sys.__stderr__`.
  """
  kept, sys.stderr = sys.stderr, io.StringIO()
  try:
    yield
  except BaseException:
    logging.disable(logging.CRITICAL)
    raise
  sys.stderr = kept


class Checkpoints:
  """The folder `workdir/checkpoints`: one Orbax manager a name, each keeping its newest checkpoint.

  A new checkpoint is complete before the one it replaces is removed, so a save that fails (a full disk) or is
  killed leaves the previous one usable.
  """

  def __init__(self, workdir: Path, *, read_only: bool = False):
    self.folder = workdir.absolute() / "checkpoints"
    self.read_only = read_only
    self.managers: dict[str, Any] = {}

  def manager(self, name: str) -> Any:
    """Returns the Orbax manager of `name`."""
    import orbax.checkpoint as ocp

    if name not in self.managers:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=1,
        create=not self.read_only,
        cleanup_tmp_directories=not self.read_only,
        # In the background a failed save would be noticed, and would print its tracebacks, at some later step.
        enable_async_checkpointing=False,
      )
      handlers = {"info": ocp.JsonCheckpointHandler()}
      handlers |= {item: ocp.StandardCheckpointHandler() for item in ("variables", "rest")}
      self.managers[name] = ocp.CheckpointManager(self.folder / name, options=options, item_handlers=handlers)
    return self.managers[name]

  def steps(self) -> dict[str, int]:
    """Returns {name: step} of the checkpoints there are."""
    found = {}
    for name in NAMES:
      if (self.folder / name).is_dir():
        step = self.manager(name).latest_step()
        if step is not None:
          found[name] = step
    return found

  def find(self, checkpoint: str) -> str:
    """Returns the name for `checkpoint`, a name or a step number; `UserError` lists what there is."""
    steps = self.steps()
    for name in NAMES:
      if name in steps and checkpoint in (name, str(steps[name])):
        return name
    there = ", ".join(f"{name} (step {step})" for name, step in steps.items()) or "none"
    raise UserError(
      f"--checkpoint={checkpoint}: no such checkpoint in {self.folder}\n"
      f"found: {there}\nexpected: one of {', '.join(NAMES)} or a step listed above"
    )

  def save(self, name: str, step: int, variables: Any, info: Mapping[str, Any], rest: Any = None) -> None:
    """Saves, and returns when all is on disk. `info` is JSON; `rest` is whatever only `latest` holds.

    A step that is already there was saved by a run killed just after: the resumed run made it again.
    """
    import orbax.checkpoint as ocp

    manager = self.manager(name)
    items = {"variables": ocp.args.StandardSave(variables), "info": ocp.args.JsonSave(dict(info))}
    if rest is not None:
      items["rest"] = ocp.args.StandardSave(rest)
    remedy = "The previous checkpoint is kept. Free space on that disk and run the same command to resume from it."
    with one_message(f"saving a checkpoint in {self.folder}", remedy), without_thread_noise():
      if step not in manager.all_steps():
        manager.save(step, args=ocp.args.Composite(**items))

  def info(self, name: str) -> dict[str, Any]:
    """Returns the JSON saved with checkpoint `name`."""
    import orbax.checkpoint as ocp

    manager = self.manager(name)
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(info=ocp.args.JsonRestore()))
    return restored["info"]

  def restore(self, name: str, item: str, like: Any) -> Any:
    """Returns `item` ("variables" or "rest") of checkpoint `name`, placed as `like` (sharded shapes).

    Raises `UserError` listing the arrays that differ in name or shape: a checkpoint of another architecture.
    """
    import orbax.checkpoint as ocp

    manager = self.manager(name)
    step = manager.latest_step()
    with one_message(f"reading checkpoint {name} in {self.folder}", "It may be damaged: try another one."):
      found = manager.item_metadata(step)[item]
    wanted_shapes = shapes(like)
    found_shapes = shapes(getattr(found, "tree", found))
    differences = [
      f"  {path}: found {found_shapes.get(path, 'nothing')}, expected {wanted_shapes.get(path, 'nothing')}"
      for path in sorted({*wanted_shapes, *found_shapes})
      if wanted_shapes.get(path) != found_shapes.get(path)
    ]
    if differences:
      more = [f"  ... and {len(differences) - 20} more"] if len(differences) > 20 else []
      raise UserError(
        f"checkpoint {name} (step {step}) in {self.folder} is of another architecture:\n"
        + "\n".join(differences[:20] + more)
        + "\nexpected: the configuration it was trained with (config.gin in the workdir)"
      )
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with one_message(f"reading checkpoint {name} in {self.folder}", "It may be damaged: try another one."):
      restored = manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)}))
    return restored[item]


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns {path: shape} of the arrays in `tree`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in leaves
    if hasattr(leaf, "shape")
  }
