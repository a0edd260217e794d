"""Which examples share a batch, and to what each batch is padded: pure functions of lengths and seed.

A box is one cap per length field, such as {"text": 24, "audio": 56000}; each box becomes one XLA program. A plan
is a list of (box number, rows): what an epoch will read, known before it starts, so that a run can resume at any
batch.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Lengths = Mapping[str, np.ndarray]  # field -> int [N]; tokens, samples or frames
Box = dict[str, int]
Batches = list[tuple[int, np.ndarray]]
# Caps lie on a grid of this many steps, so that boxes do not hang on single samples.
GRID = 60


def box_cost(box: Mapping[str, int], costs: Mapping[str, float]) -> float:
  """Returns the cost of one row of `box`; fields without a cost are free."""
  return sum(costs.get(field, 0.0) * cap for field, cap in box.items())


def choose_boxes(
  lengths: Lengths, costs: Mapping[str, float], *, full: Box, count: int = 8, batch_size: int = 8
) -> list[Box]:
  """Returns at most `count` boxes for these examples, cheapest first; the last holds every example.

  Greedy: of all ways to split one group of examples at one field's length, the one that saves the most padded
  cost, again and again. A group's box is its largest length in every field, on the grid, at most `full`. No
  group is smaller than a batch, since its examples would be padded to another box anyway.
  """
  fields = list(full)
  limits = np.array([full[f] for f in fields])
  grid = np.maximum(limits // GRID, 1)
  sizes = np.stack([np.asarray(lengths[f], np.int64) for f in fields], axis=1)  # [N, fields]
  # At least one step: encoders cannot run on nothing, even where no example of a box has the stream.
  sizes = np.minimum(np.maximum(-(-sizes // grid), 1) * grid, limits)
  weights = np.array([costs.get(f, 0.0) for f in fields])
  if not len(sizes):
    return [dict(full)]

  groups = [np.arange(len(sizes))]
  splits = [_best_split(sizes[groups[0]], weights, batch_size)]
  chosen = [_covering([sizes.max(axis=0)], sizes, weights)]
  while len(groups) < count:
    best = max(range(len(groups)), key=lambda g: splits[g][0])
    saved, field, bound = splits[best]
    if saved <= 0:
      break
    members = groups[best]
    low = sizes[members, field] <= bound
    groups[best : best + 1] = [members[low], members[~low]]
    splits[best : best + 1] = [_best_split(sizes[g], weights, batch_size) for g in groups[best : best + 2]]
    candidates = _covering([sizes[g].max(axis=0) for g in groups], sizes, weights)
    if len(candidates) <= count:  # the groups' boxes and, unless one of them is, the largest
      chosen.append(candidates)
  caps = min(chosen, key=lambda boxes: _total(boxes, sizes, weights))
  boxes = [{f: int(cap) for f, cap in zip(fields, box, strict=True)} for box in caps]
  return sorted(boxes, key=lambda box: (box_cost(box, costs), *box.values()))


def _best_split(sizes: np.ndarray, weights: np.ndarray, smallest: int) -> tuple[float, int, int]:
  """Returns (cost saved, field, bound) of the best split of one group [n, fields] at `length <= bound`."""
  best = (0.0, 0, 0)
  total = len(sizes) * float(sizes.max(axis=0) @ weights)
  for field in range(sizes.shape[1]):
    ordered = sizes[np.argsort(sizes[:, field], kind="stable")]
    below = np.maximum.accumulate(ordered, axis=0)[:-1] @ weights
    above = np.maximum.accumulate(ordered[::-1], axis=0)[::-1][1:] @ weights
    number = np.arange(1, len(ordered))
    saved = total - number * below - (len(ordered) - number) * above
    possible = (ordered[1:, field] > ordered[:-1, field]) & (number >= smallest) & (number[::-1] >= smallest)
    if possible.any():
      at = int(np.argmax(np.where(possible, saved, -np.inf)))
      if saved[at] > best[0]:
        best = (float(saved[at]), field, int(ordered[at, field]))
  return best


def _covering(boxes: list[np.ndarray], sizes: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns the boxes [k, fields] without doubles, and with one that holds every example."""
  unique = np.unique(np.array(boxes), axis=0)
  largest = sizes.max(axis=0)
  if (unique >= largest).all(axis=1).any():
    return unique
  return np.concatenate([unique, largest[None]])


def _total(boxes: np.ndarray, sizes: np.ndarray, weights: np.ndarray) -> float:
  """Returns the padded cost when each example goes to the cheapest of `boxes` [k, fields] that holds it."""
  cheapest = np.full(len(sizes), np.inf)
  for box in boxes:
    cheapest = np.where((sizes <= box).all(axis=1), np.minimum(cheapest, box @ weights), cheapest)
  return float(cheapest.sum())


def assign(lengths: Lengths, boxes: Sequence[Box]) -> list[np.ndarray]:
  """Returns for each box which examples fit, bool [N]; raises `ValueError` if one fits none."""
  fits = [np.all([np.asarray(lengths[f]) <= cap for f, cap in box.items()], axis=0) for box in boxes]
  if not np.any(fits, axis=0).all():
    row = int(np.argmin(np.any(fits, axis=0)))
    raise ValueError(f"example {row} of lengths { {f: int(v[row]) for f, v in lengths.items()} } fits no box")
  return fits


def plan(lengths: Lengths, boxes: Sequence[Box], batch_size: int, *, seed: int | None, epoch: int) -> Batches:
  """Returns the batches of an epoch, `[(box number, rows int [<= batch_size])]`; every example is in one.

  `boxes` come cheapest first, as from `choose_boxes`. Each example goes to the first that holds it; what does
  not fill a batch moves up to the next that does, so that only one batch of the epoch can be partial. With a
  `seed`, batches and their rows are shuffled by (seed, epoch); None gives one fixed order.
  """
  fits = assign(lengths, boxes)
  random = None if seed is None else np.random.default_rng([seed, epoch])
  waiting = np.ones(len(fits[0]), bool)  # not yet in a batch
  number = np.argmax(fits, axis=0)  # the first box that holds each
  batches: Batches = []
  for box in range(len(boxes)):
    rows = np.flatnonzero(waiting & (number == box))
    if random is not None:
      rows = random.permutation(rows)
    whole = len(rows) // batch_size * batch_size
    batches += [(box, rows[i : i + batch_size]) for i in range(0, whole, batch_size)]
    waiting[rows[:whole]] = False
    for row in rows[whole:]:
      larger = next((b for b in range(box + 1, len(boxes)) if fits[b][row]), None)
      if larger is not None:
        number[row] = larger
  left = np.flatnonzero(waiting)
  if len(left):
    batches.append((next(b for b in range(len(boxes)) if fits[b][left].all()), left))
  if random is not None:
    batches = [batches[i] for i in random.permutation(len(batches))]
  return batches


def padding_share(
  lengths: Lengths, boxes: Sequence[Box], batches: Batches, *, batch_size: int, costs: Mapping[str, float]
) -> float:
  """Returns the share of the cost of `batches` that is spent on padding, rows that do not exist included."""
  real = sum(costs.get(f, 0.0) * float(np.sum(np.minimum(lengths[f], max(b[f] for b in boxes)))) for f in boxes[0])
  spent = sum(batch_size * box_cost(boxes[box], costs) for box, _ in batches)
  return 1 - real / spent if spent else 0.0
