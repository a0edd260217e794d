"""The picture of labels that an objective generates while training: how they drift from epoch to epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmjax import pictures

BINS = 31  # with a label of +-3 in the middle of the outermost ones, as wide as MOSI's steps of 0.2
QUANTILES = {0.1: (0, (4, 2)), 0.5: "solid", 0.9: (0, (4, 2))}


def draw(path: Path, epochs: Sequence[int], labels: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
  """Draws `labels` {name: [epochs, N]} to `path`: per name and epoch the distribution, its median and middle 80 %.

  `names` are what the panels are called. What the labels start from is the first panel, which sorts by its name.
  """
  order = sorted(labels, key="MTAV".find)
  start = labels[order[0]]
  limit = max(float(np.max(np.abs(values))) for values in labels.values()) or 1.0
  edges = np.linspace(-limit, limit, BINS + 1) * BINS / (BINS - 1)
  columns = np.append(np.asarray(epochs) - 0.5, epochs[-1] + 0.5)
  shares = {name: np.stack([np.histogram(row, edges)[0] for row in labels[name]]) / start.shape[1] for name in order}
  # One colour scale for all panels; single full cells of the human labels would leave the rest pale.
  brightest = float(np.quantile(np.concatenate([share.ravel() for share in shares.values()]), 0.99)) or 1.0
  with pictures.figure(path, len(order), figsize=(3.1 * len(order), 4), sharey=True) as (figure, axes):
    for panel, name in zip(axes, order, strict=True):
      mesh = panel.pcolormesh(columns, edges, 100 * shares[name].T, cmap="Blues", vmin=0, vmax=100 * brightest)
      for quantile, line in QUANTILES.items():
        values = np.quantile(labels[name], quantile, axis=1)
        label = {0.1: "10 % and 90 %", 0.5: "median"}.get(quantile)
        panel.plot(epochs, values, color=pictures.ORANGE, linewidth=1.4, linestyle=line, label=label)
      moved = np.mean(np.abs(labels[name][-1] - start[-1]))
      fixed = np.array_equal(labels[name][0], labels[name][-1])
      subtitle = "given" if fixed else f"generated, {moved:.2f} from {order[0]}'s on average"
      pictures.title(panel, names.get(name, name), subtitle)
      panel.set(xlabel="epoch", xlim=(columns[0], columns[-1]))
      panel.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel(f"label, {start.shape[1]:,} training examples")
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.colorbar(mesh, ax=list(axes), label="% of the examples", extend="max", pad=0.01)
