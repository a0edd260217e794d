"""How the pictures of a report look."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY, INK = "#2f5d8a", "#d9822b", "#5c626b", "#22262b"
STYLE: Any = {
  "font.size": 10,
  "axes.edgecolor": GREY,
  "axes.labelcolor": INK,
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
  "axes.spines.top": False,
  "axes.spines.right": False,
}


@contextmanager
def figure(path: Path, columns: int, **options: Any) -> Iterator[tuple[Any, Any]]:
  """Yields (figure, axes) of one row of `columns`; saves it as `path` once the block has drawn on it."""
  import matplotlib as mpl

  mpl.use("Agg")
  import matplotlib.pyplot as plt

  with plt.rc_context(STYLE):
    drawn, axes = plt.subplots(1, columns, layout="constrained", squeeze=False, **options)
    try:
      yield drawn, axes[0]
      drawn.savefig(path, dpi=200, facecolor="white")
    finally:
      plt.close(drawn)


def title(axes: Any, text: str, subtitle: str) -> None:
  """Writes a title with a line below it, left, and lays a light grid under the drawing."""
  axes.set_title(text, loc="left", fontsize=12, fontweight="bold", pad=24)
  axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=9.5, color=GREY)
  axes.grid(color="#e8eaed", linewidth=0.7)
  axes.set_axisbelow(True)
