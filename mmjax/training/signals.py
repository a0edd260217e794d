"""Stopping a run politely."""

import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):
  """The run was asked to stop and has saved its state."""


class Signals:
  """Notes SIGTERM and Ctrl-C, so that the loop can stop between two steps; a second one quits at once."""

  def __init__(self) -> None:
    self.received = False
    self.previous: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    for number in (signal.SIGTERM, signal.SIGINT):
      self.previous[number] = signal.signal(number, self.handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self.previous.items():
      signal.signal(number, handler)

  def handle(self, number: int, frame: FrameType | None) -> None:
    """Sets the flag that the loop reads."""
    if self.received:
      raise SystemExit(143)
    self.received = True
    print("\nstopping after this step; once more to quit without saving", flush=True)
