"""Flags and gin: parse, check, build the experiment, keep the operative configuration.

Nothing else knows gin. gin files use dynamic registration, so the library carries no decorators: a gin file
imports the modules it names and binds their classes' fields. Silence is never agreement: a binding that nothing
used (a misspelt scope, an unused macro) and a binding given twice in one file are errors, as are unknown names.
"""

import argparse
import dataclasses
import difflib
import errno
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmjax.errors import UserError

if TYPE_CHECKING:
  from mmjax.training.experiment import Experiment

EXPERIMENT = "experiment.Experiment"
# What may differ when a workdir is used again: none of it changes what the run computes.
MAY_CHANGE = (
  "Experiment.epochs",
  "Experiment.fsdp",
  "Experiment.log_every",
  "Experiment.save_minutes",
  "Features.in_memory_gb",
  "Features.prefetch",
  "Pipeline.in_memory_gb",
  "Pipeline.prefetch",
)


def default_cache_dir() -> Path:
  """Returns the folder for prepared records and compiled programs: $XDG_CACHE_HOME/mmjax or ~/.cache/mmjax."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmjax"


def parser(command: str, description: str) -> argparse.ArgumentParser:
  """Returns the parser of `python -m mmjax.<command>`, with the flags that every command has."""
  made = argparse.ArgumentParser(prog=f"python -m mmjax.{command}", description=description, allow_abbrev=False)
  made.add_argument("--data_dir", type=Path, help="folder of the official files, only read (default: data)")
  made.add_argument(
    "--cache_dir",
    type=Path,
    help="folder of prepared records and compiled programs (default: ~/.cache/mmjax)",
  )
  return made


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
  """Returns the flags; `--gin.X=Y` flags come back in `.gin` as bindings "X=Y"."""
  bindings = [arg.removeprefix("--gin.") for arg in argv if arg.startswith("--gin.")]
  parser.epilog = "Any binding of the gin file can be overridden: --gin.mmml.MMML.tasks='\"T\"'"
  flags = parser.parse_args([arg for arg in argv if not arg.startswith("--gin.")])
  for binding in bindings:
    if "=" not in binding:
      parser.error(f"--gin.{binding}: expected --gin.NAME=VALUE")
  flags.gin = bindings
  return flags


def main(run: Callable[[Sequence[str]], int | None]) -> None:
  """Runs a command and exits: 2 after a user's mistake, with its one message and no traceback."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # only to keep TensorFlow from announcing it
  try:
    status = run(sys.argv[1:])
  except UserError as error:
    if os.environ.get("MMJAX_TRACEBACK"):
      raise
    print(f"error: {error}", file=sys.__stderr__)
    status = 2
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
      raise
    print(f"error: {error}; checkpoints already saved stay usable", file=sys.__stderr__)
    status = 2
  sys.exit(status)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A gin file, built."""

  experiment: "Experiment"
  text: str  # the operative configuration, which reruns the experiment


def load(gin_file: Path, bindings: Sequence[str] = ()) -> Loaded:
  """Returns the experiment of `gin_file` with `bindings` ("X=Y") on top.

  Raises `UserError` for whatever gin accepts in silence and for whatever it or the built classes reject.
  """
  if not gin_file.is_file():
    near = sorted(str(path) for path in gin_file.parent.glob("*.gin"))
    there = ", ".join(near) if near else f"no .gin file in {gin_file.parent}"
    raise UserError(f"--gin_file={gin_file}: no such file\nfound there: {there}")
  import gin

  gin.clear_config()
  for folder in (gin_file.parent, Path.cwd()):
    gin.add_config_file_search_path(str(folder))
  try:
    check_repeats(gin_file)
    # gin logs an error for each search path that lacks an included file, even when the next one has it.
    logging.disable(logging.ERROR)
    gin.parse_config_files_and_bindings([str(gin_file)], list(bindings))
    from mmjax.training.experiment import Experiment

    experiment = gin.get_configurable(Experiment)()
  except UserError as error:
    # gin adds where the object was built; the message itself is enough.
    raise UserError(str(error).split("\n  In call to configurable")[0]) from None
  except (ValueError, TypeError, RuntimeError, SyntaxError, ImportError, AttributeError, OSError) as error:
    if os.environ.get("MMJAX_TRACEBACK"):
      raise
    raise UserError(explain(error, gin_file)) from None
  finally:
    logging.disable(logging.NOTSET)
  unused = unused_bindings()
  if unused:
    raise UserError(
      f"{gin_file}: bound, but used by nothing:\n  "
      + "\n  ".join(unused)
      + "\nexpected: each scope and macro to be one that a reference such as @scope/module.Name() or %MACRO uses"
    )
  return Loaded(experiment, gin.operative_config_str(max_line_length=100))


def check_repeats(gin_file: Path) -> None:
  """Raises `UserError` where one file binds the same parameter twice, of which gin silently takes the last."""
  seen: dict[str, int] = {}
  for statement in statements(gin_file.read_text(encoding="utf-8")):
    name = binding_name(statement)
    if name is None:
      continue
    line = statement.location.line_num
    if name in seen:
      raise UserError(f"{gin_file}: {name} is bound twice, in lines {seen[name]} and {line}: keep one")
    seen[name] = line


def statements(text: str) -> Any:
  """Yields the parsed statements of gin text."""
  from gin import config_parser

  class References(config_parser.ParserDelegate):
    """Keeps references as text."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
      return f"@{scoped_configurable_name}" + "()" * evaluate

    def macro(self, scoped_name: str) -> str:
      return f"%{scoped_name}"

  yield from config_parser.ConfigParser(text, References())


def binding_name(statement: Any) -> str | None:
  """Returns "scope/selector.parameter" of a binding, None for another statement."""
  if type(statement).__name__ != "BindingStatement":
    return None
  name = f"{statement.selector}.{statement.arg_name}" if statement.arg_name else statement.selector
  return f"{statement.scope}/{name}" if statement.scope else name


def bindings_of(text: str) -> dict[str, str]:
  """Returns {name: value as text} of gin text."""
  found = {}
  for statement in statements(text):
    name = binding_name(statement)
    if name is not None:
      found[name] = repr(statement.value)
  return found


def unused_bindings() -> list[str]:
  """Returns the bindings that building the experiment did not read."""
  from gin import config

  def used(scope: str, selector: str, parameter: str) -> bool:
    parts = scope.split("/") if scope else []
    return any(
      selector == other and parameter in values and active.split("/")[: len(parts)] == parts
      for (active, other), values in config._OPERATIVE_CONFIG.items()
    )

  found = []
  for (scope, selector), parameters in config._CONFIG.items():
    for parameter in parameters:
      if not used(scope, selector, parameter):
        name = f"%{scope}" if selector == "gin.macro" else f"{selector}.{parameter}"
        found.append(f"{scope}/{name}" if scope and selector != "gin.macro" else name)
  return sorted(found)


def explain(error: Exception, gin_file: Path) -> str:
  """Returns one message for what gin raised: where, what was found, what was expected."""
  from gin import config

  text = str(error).strip()
  unquoted = re.search(r"Failed to parse token '([^']+)'", text)
  if unquoted:
    word = unquoted.group(1)
    return f"{gin_file}: {text}\nexpected: a string in quotes, '{word}' (in a shell: --gin.NAME='\"{word}\"')"
  macro = re.search(r"No bindings specified for '([\w./]+)/gin\.macro'", text)
  if macro:
    name = macro.group(1)
    return f"{gin_file}: %{name} is used, but {name} is bound nowhere\nexpected: a line {name} = ..., or its right name"
  parameter = re.search(r"'([\w./]+)' doesn't have a parameter named '(\w+)'", text)
  if parameter:
    owner, wrong = parameter.groups()
    target = config._REGISTRY.get_match(owner.split("/")[-1]).wrapped
    names = [name for name in inspect.signature(target).parameters if name not in ("parent", "name")]
    return f"{gin_file}: {text}\n{suggestion(wrong, names)}"
  name = re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", text)
  if name:
    known = [selector for selector, _ in config._REGISTRY.items() if selector.startswith("mmjax.")]
    shortened = [".".join(selector.split(".")[-2:]) for selector in known]
    return f"{gin_file}: {text}\n{suggestion(name.group(1), shortened)}"
  return f"{gin_file}: {text or type(error).__name__}"


def suggestion(wrong: str, names: Sequence[str]) -> str:
  """Returns what was probably meant, else all there is."""
  near = difflib.get_close_matches(wrong, names, n=3, cutoff=0.6)
  return f"did you mean {' or '.join(near)}?" if near else f"expected one of: {', '.join(sorted(names))}"


def check_workdir(workdir: Path, text: str) -> None:
  """Raises `UserError` showing the difference where `workdir` holds a run of another configuration than `text`."""
  path = workdir / "config.gin"
  if not path.exists():
    return
  run_file = workdir / "run.json"
  if run_file.exists() and (source := json.loads(run_file.read_text()).get("imported_from")):
    raise UserError(f"--workdir={workdir} holds a checkpoint imported from {source}: train in another --workdir")
  old, new = bindings_of(path.read_text(encoding="utf-8")), bindings_of(text)
  changed = [
    f"  {name}: {old.get(name, '(not bound)')} there, {new.get(name, '(not bound)')} now"
    for name in sorted({*old, *new})
    if old.get(name) != new.get(name) and not name.endswith(MAY_CHANGE)
  ]
  if changed:
    raise UserError(
      f"--workdir={workdir} holds a run of another configuration:\n"
      + "\n".join(changed)
      + f"\nuse another --workdir, or that configuration: --gin_file={path}"
    )
