"""Progress of anything that takes more than a few seconds: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 20.0


class Progress:
  """Counts `total` items of `unit`, from `start` on; use as a context manager and call `step` for each."""

  def __init__(self, what: str, total: int, *, unit: str = "", start: int = 0):
    self.what, self.total, self.unit = what, total, unit
    self.start = self.done = start
    self.began = self.said = time.monotonic()
    terminal = sys.stderr.isatty()
    self.bar = tqdm(total=total, initial=start, desc=what, unit=unit or "it", leave=False) if terminal else None

  def step(self, note: str = "") -> None:
    """Counts one more; `note` is shown behind the numbers."""
    self.done += 1
    if self.bar is not None:
      self.bar.update()
      if note:
        self.bar.set_postfix_str(note, refresh=False)
      return
    now = time.monotonic()
    if now - self.said >= SECONDS_BETWEEN_LINES:
      left = (now - self.began) / (self.done - self.start) * (self.total - self.done)
      self.said = now
      print(f"{self.what}: {self.done}/{self.total} {self.unit}, {left:.0f} s left {note}".rstrip(), flush=True)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    if self.bar is not None:
      self.bar.close()


def track(items: Iterable[T], what: str, *, total: int, unit: str = "") -> Iterator[T]:
  """Yields `items` while showing the progress through them."""
  with Progress(what, total, unit=unit) as progress:
    for item in items:
      yield item
      progress.step()
