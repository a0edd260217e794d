"""Do batches of a feature pickle hold what the file says, whatever the start, the cache and the box?"""

import os
import pickle
from pathlib import Path

import jax
import make_data
import numpy as np
import pytest
from test_feature_file import COUNTS, REAL, STEPS, WIDTHS, lengths_of, mmsa, mult, write

from mmjax.data import feature_builder, feature_file, raw_folder
from mmjax.data.feature_pipeline import Features, find
from mmjax.errors import UserError


def open_data(place: Path, tree=None, *, stored=None, streams=None, **options):
  if tree is not None:
    write(place / "own.pkl", tree)
  made = Features(**{"dataset": "mosi", "file": "own.pkl", "batch_size": 3, **options})
  return made.open(place, place / "cache", streams=streams, boxes=stored)


def all_batches(data, split="train", seed=1):
  plan = data.plan(split, seed=seed, epoch=1)
  return list(data.batches(split, plan))


def same(a, b) -> bool:
  return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def assert_holds(batch, source, split, names=("ids", "audio", "vision")) -> None:
  """Every row of `batch` is what the file says of the example, and nothing where its padding is."""
  count, lengths = COUNTS[split], lengths_of(split)
  for i, row in enumerate(batch["index"]):
    assert batch["valid"][i] == (row < count)
    for name in names:
      stream, kind = ("text", "ids") if name == "ids" else (name, "features")
      values, mask = batch[stream][kind][i], batch[stream]["mask"][i]
      length = lengths[stream][row] if row < count else 0
      assert mask.tolist() == [step < length for step in range(len(mask))]
      assert not values[length:].any()
      if row < count:
        expected = source["text_bert"][row, 0] if name == "ids" else source[name][row]
        np.testing.assert_array_equal(values[:length], expected[:length])
    if row < count:
      assert batch["labels"]["M"][i] == source["regression_labels"][row]


def test_batches_hold_the_file(tmp_path):
  tree = mmsa()
  data = open_data(tmp_path, tree)
  for split, seed in (("train", 1), ("valid", None), ("test", None)):
    batches = all_batches(data, split, seed)
    rows = np.concatenate([b["index"][b["valid"]] for b in batches])
    assert sorted(rows) == list(range(COUNTS[split]))
    for batch in batches:
      assert_holds(batch, tree[split], split)
  assert data.train.ids == tree["train"]["id"].tolist()
  assert data.test.texts == tree["test"]["raw_text"].tolist()
  assert {name: x.tolist() for name, x in data.train.lengths.items()} == {
    name: lengths_of("train")[name].tolist() for name in ("text", "audio", "vision")
  }


def test_text_features(tmp_path):
  tree = mmsa()
  data = open_data(tmp_path, tree, text="features")
  for batch in all_batches(data):
    assert_holds(batch, tree["train"], "train", ("text", "audio", "vision"))
  assert data.costs == {"text": 1.0, "audio": 1.0, "vision": 1.0}


def test_transcripts_are_tokenised_where_there_are_no_ids(tmp_path):
  tokenizer = str(make_data.tokenizer(tmp_path / "tokenizer"))
  expected = open_data(tmp_path, mmsa(), text="raw", tokenizer=tokenizer, max_text=5)
  assert {len(expected.train.streams["text"][i]) for i in range(COUNTS["train"])} == {5}
  without = open_data(tmp_path, mmsa(text_bert=None), tokenizer=tokenizer, max_text=5)
  for a, b in zip(all_batches(expected), all_batches(without), strict=True):
    assert same(a, b)
  with pytest.raises(UserError, match=r"no key 'text_bert'(?s:.)*Features\.tokenizer"):
    open_data(tmp_path)
  with pytest.raises(UserError, match="neither the key 'text_bert' nor 'raw_text'"):
    open_data(tmp_path, mmsa(text_bert=None, raw_text=None), tokenizer=tokenizer)


def test_mult(tmp_path):
  text = np.array([4, 6, 0, 2, 5, 3, 1])
  tree = mult(dict.fromkeys(STEPS, 6), dict.fromkeys(STEPS, text))
  data = open_data(tmp_path, tree, text="features")
  (batch,) = all_batches(open_data(tmp_path, text="features", batch_size=7, boxes=None))
  for name in STEPS:
    assert batch[name]["features"].shape == (7, 6, WIDTHS[name])
    assert batch[name]["mask"].sum(axis=1).tolist() == text[batch["index"]].tolist()
    for i, row in enumerate(batch["index"]):
      np.testing.assert_array_equal(batch[name]["features"][i, : text[row]], tree["train"][name][row, 6 - text[row] :])
  assert "MulT format, aligned" in data.describe()
  assert "examples of length 0" in data.describe()


def test_longer_sequences_are_cut(tmp_path):
  tree = mmsa()
  for side in ("first", "last"):
    data = open_data(tmp_path, max_audio=2, max_text=3, side=side, tree=tree)
    assert data.full["audio"] == 2
    for batch in all_batches(data):
      for i, row in enumerate(batch["index"][batch["valid"]]):
        whole = tree["train"]["audio"][row, : lengths_of("train")["audio"][row]]
        kept = whole[:2] if side == "first" else whole[-2:]
        np.testing.assert_array_equal(batch["audio"]["features"][i][batch["audio"]["mask"][i]], kept)
        assert batch["text"]["mask"][i].sum() == min(lengths_of("train")["text"][row], 3)


def test_one_step_and_no_step(tmp_path):
  def one(x, split):
    return np.ones_like(x[:, :1]) * (np.arange(len(x)) > 0)[:, None, None]

  changes = {"audio": one, "vision": lambda x, split: 0 * x[:, :1], "audio_lengths": None, "vision_lengths": None}
  data = open_data(tmp_path, mmsa(**changes))
  assert (data.full["audio"], data.full["vision"]) == (1, 1)
  for batch in all_batches(data):
    assert batch["audio"]["mask"][:, 0].tolist() == [0 < row < COUNTS["train"] for row in batch["index"]]
    assert batch["vision"]["features"].shape[1:] == (1, WIDTHS["vision"])
    assert not batch["vision"]["mask"].any()


def test_from_disk_equals_from_memory(tmp_path):
  held, read = open_data(tmp_path, mmsa()), open_data(tmp_path, in_memory_gb=0)
  assert held.train.streams["audio"].rows.records.held is not None
  assert read.train.streams["audio"].rows.records.held is None
  for a, b in zip(all_batches(held), all_batches(read), strict=True):
    assert same(a, b)


def test_only_what_a_network_reads(tmp_path):
  data = open_data(tmp_path, mmsa(audio=None, vision=None), streams={"text"})
  assert set(data.first_batch()) == {"text", "labels", "index", "valid"}
  with pytest.raises(UserError, match="key 'audio': found no such key"):
    open_data(tmp_path)


def test_records_are_reused_until_the_file_or_what_is_read_changes(tmp_path, monkeypatch):
  before = open_data(tmp_path, mmsa()).first_batch()
  records = tmp_path / "cache" / "records"
  with monkeypatch.context() as patch:
    patch.setattr(feature_builder, "FeatureFile", lambda *a, **k: pytest.fail("prepared twice"))
    assert same(open_data(tmp_path).first_batch(), before)
    patch.setattr(feature_file.safe_pickle, "load", lambda path: pytest.fail("unpickled again"))
    assert same(open_data(tmp_path, batch_size=3, prefetch=1).first_batch(), before)
  assert len(list(records.iterdir())) == 1
  (next(records.rglob("dataset_info.json"))).unlink()  # as an interrupted preparation leaves it
  assert same(open_data(tmp_path).first_batch(), before)
  open_data(tmp_path, vision=False)
  assert len(list(records.iterdir())) == 2
  changed = open_data(tmp_path, mmsa(audio=lambda x, split: x * 2)).first_batch()
  assert len(list(records.iterdir())) == 3
  np.testing.assert_array_equal(changed["audio"]["features"], before["audio"]["features"] * 2)


def test_a_mistake_in_an_example_leaves_no_records(tmp_path):
  bad = mmsa(text_bert=lambda x, split: x - 0.5 if split == "test" else x)
  with pytest.raises(UserError, match="split 'test', key 'text_bert'"):
    open_data(tmp_path, bad)
  assert not list((tmp_path / "cache").rglob("*.array_record*"))
  assert len(open_data(tmp_path, mmsa()).test) == COUNTS["test"]


class Bait:
  def __init__(self, flag):
    self.flag = flag

  def __reduce__(self):
    return os.system, (f"touch {self.flag}",)


def test_a_command_in_a_pickle_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"own\.pkl asks for \w+\.system"):
    open_data(tmp_path, {**mmsa(), "more": Bait(tmp_path / "ran")})
  assert not (tmp_path / "ran").exists()
  assert not list((tmp_path / "cache").rglob("*.array_record*"))


def test_what_a_run_says(tmp_path):
  def spoil(x, split):
    x[0, 0, :2] = -np.inf
    return x

  said = open_data(tmp_path, mmsa(audio=spoil, audio_lengths=lambda x, split: [0, *[9] * (len(x) - 1)])).describe()
  for part in ("1284", "-1277", "own.pkl: unknown file (SHA-1 ", "MMSA format, not aligned"):
    assert part in said
  assert "valid audio: 2 values that were infinite or no number are 0" in said
  assert "valid audio: 1 examples of length 0" in said


def test_metadata_says_where_records_come_from(tmp_path):
  path = write(tmp_path / "own.pkl", mmsa())
  found = feature_builder.prepare(path, "mosi", wanted=("ids", "audio"), heads=None, cache_dir=tmp_path).metadata
  assert found["file"] == "own.pkl"
  assert len(found["sha1"]) == 40
  assert (found["source"], found["format"], found["aligned"]) == ("unknown file", "MMSA", False)
  assert found["widths"] == {"audio": WIDTHS["audio"]}
  assert found["replaced"]["test"] == {"audio": 0}
  assert found["examples"]["test"]["lengths"]["audio"] == lengths_of("test")["audio"].tolist()


def test_boxes_of_an_earlier_start(tmp_path):
  data = open_data(tmp_path, mmsa())
  assert open_data(tmp_path, stored=data.boxes).boxes == data.boxes
  assert open_data(tmp_path, boxes=None).boxes == [data.full]
  with pytest.raises(UserError, match="boxes: found"):
    open_data(tmp_path, stored=[{"text": 5}])


def test_files_are_found_where_they_usually_lie(tmp_path):
  for place, dataset, file in (
    ("MOSI/unaligned_50.pkl", "mosi", None),
    ("mosei/Processed/Unaligned_50.pkl", "mosei", None),
    ("SIMSv2/unaligned.pkl", "simsv2", None),
    ("SIMS/Processed/unaligned_39.pkl", "sims", None),
    ("mine/a.pkl", "mine", "a.pkl"),
    ("b.pkl", "mosi", "b.pkl"),
    ("other/c.pkl", "mosi", str(tmp_path / "other/c.pkl")),
    ("other/d.pkl", "mosi", "other/d.pkl"),
  ):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).touch()
    assert find(tmp_path, dataset, file) == tmp_path / place
  assert find(tmp_path / "MOSI", "MOSI", None).name == "unaligned_50.pkl"
  for folder in ("mosei", "mosei/Processed"):
    with pytest.raises(UserError, match="no feature file of mosi"):
      find(tmp_path / folder, "mosi", None)


def test_a_missing_file_names_layout_and_source(tmp_path):
  with pytest.raises(
    UserError, match=r"does not exist(?s:.)*none/MOSI/unaligned_50\.pkl(?s:.)*thuiar(?s:.)*quickstart"
  ):
    find(tmp_path / "none", "mosi", None)
  write(tmp_path / "x.pkl", 1)
  with pytest.raises(UserError, match=r"holds x\.pkl(?s:.)*my_set/<name>\.pkl"):
    find(tmp_path, "my_set", None)


def test_abstract_batch(tmp_path):
  data = open_data(tmp_path, mmsa(), boxes=None)
  (_, rows), *_ = data.plan("train", seed=1)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data.batch("train", rows, data.full, 3))
  own = {f"max_{name}": steps for name, steps in data.full.items()}
  assert Features(dataset="mine", batch_size=3, widths=WIDTHS, **own).abstract_batch() == batch
  shapes = Features(dataset="sims").abstract_batch()
  assert shapes["vision"]["features"].shape == (32, 55, 709)
  assert shapes["text"]["ids"].shape == (32, 39)
  assert set(shapes["labels"]) == set("MTAV")
  made = Features(dataset="mosei", text="features", widths={"text": 300}, max_audio=50, vision=False)
  assert made.abstract_batch(streams={"text", "audio"})["text"]["features"].shape == (32, 50, 300)
  assert made.abstract_batch()["audio"]["features"].shape == (32, 50, 74)


def test_settings_that_cannot_be():
  for make in (
    lambda: Features(dataset="mosi", text="glove"),
    lambda: Features(dataset="mosi", text="raw"),
    lambda: Features(dataset="mosi", side="left"),
    lambda: Features(dataset="mosi", max_audio=0),
    lambda: Features(dataset="mosi", heads=("T",)),
    lambda: Features(dataset="mosi", text=None, audio=False, vision=False).abstract_batch(),
    lambda: Features(dataset="mosi", vision=False).abstract_batch(streams={"text", "vision"}),
    lambda: Features(dataset="mine").abstract_batch(),
    lambda: Features(dataset="mine", max_text=5, max_audio=5, max_vision=5).abstract_batch(),
  ):
    with pytest.raises(UserError, match="found|bind"):
      make()


def test_counts_of_simsv2():
  assert sum(raw_folder.known("SIMSv2").counts.values()) == 4403


def test_the_bc_split_of_mosi(tmp_path):
  if not REAL.is_file():
    pytest.skip("needs ../shared/data/mosi/unaligned_bc.pkl")
  made = Features(dataset="mosi", file=REAL.name)
  data = made.open(REAL.parents[1], tmp_path)
  with REAL.open("rb") as file:
    train = pickle.load(file)["train"]
  plan = data.plan("train", seed=1, epoch=1)
  assert len(plan) == 39
  assert len(data.boxes) <= 8
  assert "-42" in data.describe()
  batch = next(data.batches("train", plan))
  rows = batch["index"]
  np.testing.assert_array_equal(batch["audio"]["features"], train["audio"][rows])
  assert batch["text"]["mask"].sum(axis=1).tolist() == train["text_bert"][rows, 1].sum(axis=1).tolist()
  np.testing.assert_array_equal(batch["labels"]["M"], train["regression_labels"][rows])
