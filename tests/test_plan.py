"""Are the boxes few and tight, and does a plan name every example once?"""

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest

from mmjax.data import plan
from mmjax.data.audio import SAMPLE_RATE
from mmjax.data.pipeline import Audio, Pipeline, Text

MOSI = Path(__file__).parents[2] / "shared" / "data" / "mosi"
COSTS = {"text": 1.0, "audio": 0.005, "text_context": 1.0, "audio_context": 0.005}
FULL = {"text": 96, "audio": 96000, "text_context": 96, "audio_context": 96000}


def random_lengths(seed: int, fields: int) -> tuple[dict, dict]:
  random = np.random.RandomState(seed)
  number = random.choice([1, 3, 8, 50, 333])
  full = dict(list(FULL.items())[:fields])
  return {f: random.randint(0, cap + 1, size=number) for f, cap in full.items()}, full


@pytest.mark.parametrize("seed", range(24))
def test_plan_names_every_example_once_in_a_box_that_holds_it(seed):
  lengths, full = random_lengths(seed, fields=1 + seed % 4)
  size = [1, 5, 8, 16][seed % 3]
  boxes = plan.choose_boxes(lengths, COSTS, full=full, count=8, batch_size=size)
  assert 1 <= len(boxes) <= 8
  assert all(boxes[-1][f] >= lengths[f].max() for f in full)
  number = len(lengths["text"])
  for batches in (plan.plan(lengths, boxes, size, seed=s, epoch=1) for s in (None, seed)):
    assert sorted(np.concatenate([rows for _, rows in batches])) == list(range(number))
    assert sum(len(rows) < size for _, rows in batches) == (number % size > 0)
    assert len(batches) == -(-number // size)
    for box, rows in batches:
      assert all((lengths[f][rows] <= cap).all() for f, cap in boxes[box].items())


def test_plan_is_a_function_of_seed_and_epoch():
  lengths, full = random_lengths(4, fields=2)
  boxes = plan.choose_boxes(lengths, COSTS, full=full)

  def flat(**options):
    return [(box, *rows) for box, rows in plan.plan(lengths, boxes, 4, **options)]

  assert boxes == plan.choose_boxes(lengths, COSTS, full=full)
  assert flat(seed=1, epoch=2) == flat(seed=1, epoch=2)
  assert flat(seed=1, epoch=2) != flat(seed=1, epoch=3)
  assert flat(seed=1, epoch=2) != flat(seed=2, epoch=2)
  assert flat(seed=None, epoch=1) == flat(seed=None, epoch=2)
  assert {rows[1:] for rows in flat(seed=1, epoch=2)} != {rows[1:] for rows in flat(seed=1, epoch=3)}


def test_boxes_split_where_it_saves_most():
  lengths = {"text": np.repeat([10, 60], 40), "audio": np.tile(np.repeat([20000, 90000], 20), 2)}
  boxes = plan.choose_boxes(lengths, COSTS, full={"text": 96, "audio": 96000}, count=2)
  assert boxes == [{"text": 60, "audio": 20800}, {"text": 60, "audio": 91200}]  # on the grid
  assert len(plan.choose_boxes(lengths, COSTS, full={"text": 96, "audio": 96000}, count=8)) == 4


def test_longer_than_every_box_is_an_error():
  with pytest.raises(ValueError, match="fits no box"):
    plan.plan({"text": np.array([3, 9])}, [{"text": 8}], 2, seed=None, epoch=0)


def test_padding_share_counts_missing_rows():
  lengths = {"text": np.array([4, 8, 8])}
  batches = [(0, np.array([0, 1])), (0, np.array([2]))]
  share = plan.padding_share(lengths, [{"text": 8}], batches, batch_size=2, costs={"text": 1.0})
  assert share == pytest.approx(1 - 20 / 32)


@pytest.fixture(scope="module")
def mosi():
  """Lengths of MOSI's training split: tokens of the BERT vocabulary, seconds of the time stamps up to 6."""
  if not MOSI.is_dir():
    pytest.skip("needs ../shared/data/mosi: transcripts and time stamps of CMU-MOSI")
  with (MOSI / "unaligned_bc.pkl").open("rb") as file:
    splits = pickle.load(file).values()
  tokens = {i: int(m) for s in splits for i, m in zip(s["id"], s["text_bert"][:, 1].sum(1), strict=True)}
  with np.load(MOSI / "mosi_utterances.npz") as file:
    seconds = dict(zip(file["id"], file["t1"] - file["t0"], strict=True))
  with (MOSI / "label.csv").open(newline="") as file:
    rows = [(r["video_id"], int(r["clip_id"])) for r in csv.DictReader(file) if r["mode"] == "train"]
  rows.sort()
  text = np.array([tokens[f"{video}$_${clip}"] for video, clip in rows])
  audio = np.array([int(min(seconds[f"{video}_{clip}"], 6.0) * SAMPLE_RATE) for video, clip in rows])
  previous = [[j for j in (i - 2, i - 1) if j >= 0 and rows[j][0] == rows[i][0]] for i in range(len(rows))]
  # Two special tokens around the texts, one between them.
  text_context = [min(2 + sum(text[p] - 2) + max(len(p) - 1, 0), 96) for p in previous]
  audio_context = [audio[p[-1]] if p else 0 for p in previous]
  return {
    "text": text,
    "audio": audio,
    "text_context": np.array(text_context),
    "audio_context": np.array(audio_context),
  }


@pytest.mark.parametrize(
  ("text", "audio", "limit"),
  [
    (Text(tokenizer=""), Audio(), 0.20),
    (Text(tokenizer="", context=2), Audio(context=1), 0.33),
    (Text(tokenizer=""), None, 0.20),
  ],
  ids=["no context", "context 2/1", "text only"],
)
def test_little_is_spent_on_padding_on_mosi(mosi, text, audio, limit):
  pipeline = Pipeline(dataset="mosi", batch_size=8, text=text, audio=audio)
  full = pipeline.full_box(None)
  costs = pipeline.field_costs(full)
  lengths = {name: mosi[name] for name in full}
  boxes = plan.choose_boxes(lengths, costs, full=full, count=8, batch_size=8)
  shares = [
    plan.padding_share(lengths, boxes, plan.plan(lengths, boxes, 8, seed=1, epoch=e), batch_size=8, costs=costs)
    for e in (1, 2, 3)
  ]
  assert len(boxes) <= 8
  assert np.mean(shares) <= limit
