"""Are feature pickles read as their formats mean them, and is every mistake in them named?"""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mmjax.data import feature_file
from mmjax.data.feature_file import FeatureFile
from mmjax.errors import UserError

REAL = Path(__file__).parents[2] / "shared" / "data" / "mosi" / "unaligned_bc.pkl"
COUNTS = {"train": 7, "valid": 3, "test": 4}
STEPS = {"text": 6, "audio": 9, "vision": 5}
WIDTHS = {"text": 8, "audio": 3, "vision": 2}


def lengths_of(split: str) -> dict[str, np.ndarray]:
  """True lengths of the examples below: from none to all steps."""
  rng = np.random.default_rng(len(split))
  return {name: rng.integers(0 if name != "text" else 2, steps + 1, COUNTS[split]) for name, steps in STEPS.items()}


def filled(lengths: np.ndarray, steps: int, width: int, *, front: bool = False) -> np.ndarray:
  """Features [N, T, D] of those lengths, padded with zeros."""
  values = np.random.default_rng(steps).uniform(0.5, 1, (len(lengths), steps, width)).astype(np.float32)
  real = np.arange(steps) < lengths[:, None]
  return values * (real[:, ::-1] if front else real)[..., None]


def mmsa(heads: str = "M", limit: float = 3.0, **changes) -> dict:
  """A dict as MMSA's unaligned files hold; `changes` {key: function of (values, split)}, None removes the key."""
  tree = {}
  for split, count in COUNTS.items():
    lengths = lengths_of(split)
    mask = np.arange(STEPS["text"]) < lengths["text"][:, None]
    ids = np.arange(5, 5 + mask.size).reshape(mask.shape) * mask
    labels = np.linspace(-limit, limit, count).astype(np.float32)
    values = {
      "raw_text": np.array([f"{split} words of {i}" for i in range(count)]),
      "id": np.array([f"video{i // 2}$_${i}" for i in range(count)]),
      "text_bert": np.stack([ids, mask, 0 * ids], axis=1).astype(np.float32),
      **{name: filled(lengths[name], STEPS[name], WIDTHS[name]) for name in STEPS},
      "audio_lengths": lengths["audio"].tolist(),
      "vision_lengths": lengths["vision"].tolist(),
      "annotations": np.array(["Neutral"] * count),
      "classification_labels": np.full(count, 99.0),
      "regression_labels": labels,
      **{f"regression_labels_{head}": labels / 2 for head in heads[1:]},
    }
    for key, change in changes.items():
      values[key] = change(values.get(key), split) if change else None
    tree[split] = {key: value for key, value in values.items() if value is not None}
  return tree


def mult(steps: dict[str, int] | None = None, lengths: dict[str, np.ndarray] | None = None) -> dict:
  """A dict as MulT and MultiBench pickle: padded in front, labels [N, 1, 1]."""
  tree = {}
  for split, count in COUNTS.items():
    own = lengths or lengths_of(split)
    values = {n: filled(own[n][:count], (steps or STEPS)[n], WIDTHS[n], front=True) for n in STEPS}
    names = np.array([[f"video{i}".encode(), b"1.5", b"2.5"] for i in range(count)], object)
    tree[split] = {**values, "labels": np.linspace(-3, 3, count).reshape(count, 1, 1), "id": names}
  return tree


def write(path: Path, tree) -> Path:
  path.write_bytes(pickle.dumps(tree, 4))
  return path


def read(path: Path, tree, *, dataset: str = "mosi", wanted=feature_file.STREAMS, heads=None) -> FeatureFile:
  return FeatureFile(write(path / "file.pkl", tree), dataset, wanted=wanted, heads=heads)


def test_mmsa(tmp_path):
  tree = mmsa()
  found = read(tmp_path, tree)
  assert (found.format, found.aligned, found.heads, found.widths) == ("MMSA", False, ["M"], WIDTHS)
  for split, source in tree.items():
    lengths = lengths_of(split)
    records = list(found.records(split))
    assert [r.id for r in records] == source["id"].tolist()
    assert [r.video_id for r in records] == [f"video{i // 2}" for i in range(COUNTS[split])]
    assert [r.text for r in records] == source["raw_text"].tolist()
    assert [r.labels["M"] for r in records] == source["regression_labels"].tolist()
    for i, record in enumerate(records):
      assert record.streams["ids"].dtype == np.int32
      np.testing.assert_array_equal(record.streams["ids"], source["text_bert"][i, 0, : lengths["text"][i]])
      for name in STEPS:
        assert record.streams[name].dtype == np.float32
        np.testing.assert_array_equal(record.streams[name], source[name][i, : lengths[name][i]])
      assert not any(record.replaced.values())
  assert 0 in lengths_of("train")["vision"]


def as_float64(x, split):
  return x if x.dtype.kind == "U" else x.astype(np.float64)


def as_list(x, split):
  return x.tolist()


def as_objects(x, split):
  made = np.empty(len(x), object)
  made[:] = list(x)
  return made


def as_full_objects(x, split):
  return x.astype(object)


@pytest.mark.parametrize("kind", [as_float64, as_list, as_objects, as_full_objects])
def test_arrays_of_other_kinds(tmp_path, kind):
  keys = ("text", "audio", "vision", "text_bert", "regression_labels", "raw_text", "id")
  plain, other = read(tmp_path, mmsa()), read(tmp_path, mmsa(**dict.fromkeys(keys, kind)))
  for split in COUNTS:
    for a, b in zip(plain.records(split), other.records(split), strict=True):
      assert (a.id, a.text, a.labels) == (b.id, b.text, b.labels)
      for name, values in a.streams.items():
        assert b.streams[name].dtype == values.dtype
        np.testing.assert_array_equal(b.streams[name], values)


@pytest.mark.parametrize("shape", [(-1, 1), (-1, 1, 1)])
def test_labels_of_other_shapes(tmp_path, shape):
  tree = mmsa(regression_labels=lambda x, split: x.reshape(shape))
  assert [r.labels["M"] for r in read(tmp_path, tree).records("test")] == [-3, -1, 1, 3]


def test_lengths_that_the_file_does_not_give(tmp_path):
  tree = mmsa(audio_lengths=None, vision_lengths=None, text_bert=None)
  found = read(tmp_path, tree)
  assert not found.aligned
  assert found.streams == ["text", "audio", "vision"]
  for i, record in enumerate(found.records("train")):
    assert {name: len(x) for name, x in record.streams.items()} == {n: lengths_of("train")[n][i] for n in STEPS}


def test_a_length_is_never_more_than_the_steps_there_are(tmp_path):
  tree = mmsa(audio_lengths=lambda x, split: [100] * len(x))
  assert {len(r.streams["audio"]) for r in read(tmp_path, tree).records("train")} == {STEPS["audio"]}


def test_aligned_streams_share_their_length(tmp_path):
  def cut(x, split):
    return filled(lengths_of(split)["text"], STEPS["text"], x.shape[2])

  def faceless(x, split):
    return cut(x, split) * (np.arange(STEPS["text"]) < 1)[:, None]

  found = read(tmp_path, mmsa(audio=cut, vision=faceless, audio_lengths=None, vision_lengths=None))
  assert found.aligned
  for i, record in enumerate(found.records("train")):
    assert {len(x) for x in record.streams.values()} == {lengths_of("train")["text"][i]}


def test_values_that_are_not_finite_are_counted(tmp_path):
  def spoil(x, split):
    x = x.astype(np.float64)
    x[:, 0, 0] = [-np.inf, np.nan, np.inf, 1e300, *[1.0] * (len(x) - 4)] if split == "train" else 1.0
    return x

  found = read(tmp_path, mmsa(audio=spoil, audio_lengths=lambda x, split: [9] * len(x)))
  records = list(found.records("train"))
  assert [r.replaced["audio"] for r in records] == [1, 1, 1, 1, 0, 0, 0]
  assert [r.streams["audio"][0, 0] for r in records] == [0, 0, 0, 0, 1, 1, 1]
  assert all(np.isfinite(r.streams["audio"]).all() for r in records)


def test_heads_of_sims(tmp_path):
  tree = mmsa("MTAV", 1.0)
  assert read(tmp_path, tree, dataset="sims").heads == ["M", "T", "A", "V"]
  assert read(tmp_path, tree, dataset="sims", heads=("M", "A")).record("test", 0).labels == {"M": -1, "A": -0.5}
  assert read(tmp_path, tree, dataset="mosi").heads == ["M"]
  assert read(tmp_path, tree, dataset="my_set").heads == ["M", "T", "A", "V"]


def test_names_and_texts_that_are_not_there(tmp_path):
  found = read(tmp_path, mmsa(id=None, raw_text=None))
  assert [r.id for r in found.records("valid")] == ["valid$_$0", "valid$_$1", "valid$_$2"]
  assert {r.text for r in found.records("valid")} == {""}


def test_mult_is_padded_in_front(tmp_path):
  tree = mult()
  found = read(tmp_path, tree, wanted=("text", "audio", "vision"))
  assert (found.format, found.aligned, found.heads) == ("MulT", False, ["M"])
  for i, record in enumerate(found.records("train")):
    assert record.id == f"video{i}$_$1.5_2.5"
    for name, steps in STEPS.items():
      length = lengths_of("train")[name][i]
      np.testing.assert_array_equal(record.streams[name], tree["train"][name][i, steps - length :])
    assert record.labels["M"] == pytest.approx(i - 3)


def test_aligned_mult_streams_start_together(tmp_path):
  text = np.array([4, 6, 0, 2, 5, 3, 1])
  lengths = {"text": text, "audio": np.maximum(text - 1, 0), "vision": np.minimum(text, 1)}
  found = read(tmp_path, mult(dict.fromkeys(STEPS, 6), lengths), wanted=("text", "audio", "vision"))
  assert found.aligned
  for i, record in enumerate(found.records("train")):
    assert {len(x) for x in record.streams.values()} == {text[i]}
    if text[i] > 1:
      assert not record.streams["audio"][0].any()


def drop(key, *splits):
  def change(x, split):
    return None if split in splits else x

  return {key: change}


def shorter(x, split):
  return x[:-1] if split == "valid" else x


def spoilt(value):
  def change(x, split):
    x = np.array(x, np.float64)
    x.reshape(-1)[-1] = value
    return x if split == "test" else x[:]

  return change


@pytest.mark.parametrize(
  ("changes", "split", "key", "found"),
  [
    (drop("regression_labels", "train", "valid", "test"), "train", "regression_labels", "no such key"),
    (drop("regression_labels", "test"), "test", "regression_labels", "no such key"),
    (drop("audio", "train", "valid", "test"), "train", "audio", "no such key"),
    (drop("vision", "valid"), "valid", "vision", "no such key"),
    (drop("text_bert", "valid"), "valid", "text_bert", "no such key"),
    ({"audio": shorter}, "valid", "audio", "2 entries, but 3"),
    ({"annotations": shorter}, "valid", "annotations", "2 entries, but 3"),
    ({"regression_labels": spoilt(3.2)}, "train", "regression_labels", "3.2 for example"),
    ({"regression_labels": spoilt(np.nan)}, "train", "regression_labels", "nan for example"),
    ({"regression_labels": lambda x, split: ["positive"] * len(x)}, "train", "regression_labels", "not numbers"),
    ({"regression_labels": lambda x, split: np.zeros((len(x), 4))}, "train", "regression_labels", r"shape \[7, 4\]"),
    ({"regression_labels": lambda x, split: 1.0}, "train", "regression_labels", "a float"),
    ({"audio": lambda x, split: x[:, 0]}, "train", "audio", r"shape \[3\]"),
    ({"audio": lambda x, split: x[..., :2] if split == "test" else x}, "test", "audio", r"shape \[9, 2\] of example 0"),
    ({"audio": lambda x, split: [["a"]] * len(x)}, "train", "audio", "not numbers"),
    ({"audio_lengths": lambda x, split: [-1] * len(x)}, "train", "audio_lengths", "-1 for example 0"),
    ({"audio_lengths": lambda x, split: ["1"] * len(x)}, "train", "audio_lengths", "'1' for example 0"),
    ({"text_bert": lambda x, split: x[:, 0]}, "train", "text_bert", r"shape \[6\]"),
    ({"text_bert": lambda x, split: x - 0.5}, "train", "text_bert", "no whole numbers"),
  ],
)
def test_mistakes_name_split_and_key(tmp_path, changes, split, key, found):
  def read_all():
    file = read(tmp_path, mmsa(**changes))
    return [list(file.records(name)) for name in COUNTS]

  said = rf"file\.pkl, split '{split}', key '{key}': found .*{found}(?s:.)*Features\.file"
  with pytest.raises(UserError, match=said):
    read_all()


def test_an_empty_split_is_a_mistake(tmp_path):
  tree = mmsa()
  tree["valid"] = {key: values[:0] for key, values in tree["valid"].items()}
  with pytest.raises(UserError, match="split 'valid', key 'regression_labels': found no example"):
    read(tmp_path, tree)


def test_files_of_another_kind(tmp_path):
  tree = mmsa()
  del tree["valid"]
  for other, found in ((tree, "a dict of train, test"), ([1], "a list"), ({"a": 1}, "a dict of a"), ({}, "nothing")):
    with pytest.raises(UserError, match=rf"file\.pkl: found .*{found}(?s:.)*expected a dict of train, valid, test"):
      read(tmp_path, other)
  with pytest.raises(UserError, match="labels of M alone"):
    read(tmp_path, mult(), wanted=("audio",), heads=("M", "T"))


def test_a_set_of_your_own_has_no_range(tmp_path):
  assert read(tmp_path, mmsa(limit=9.0), dataset="my_set").labels["test"]["M"].max() == 9


def test_the_bc_split_of_mosi():
  if not REAL.is_file():
    pytest.skip("needs ../shared/data/mosi/unaligned_bc.pkl")
  found = FeatureFile(REAL, "mosi", wanted=("ids", "audio", "vision"))
  with REAL.open("rb") as file:
    tree = pickle.load(file)
  assert (found.format, found.aligned, found.widths) == ("MMSA", False, {"audio": 73, "vision": 100})
  assert {split: len(labels["M"]) for split, labels in found.labels.items()} == {
    "train": 1242,
    "valid": 205,
    "test": 752,
  }
  for i in (0, 500, 751):
    record = found.record("test", i)
    assert record.streams["ids"].tolist() == tree["test"]["text_bert"][i, 0, : len(record.streams["ids"])].tolist()
    assert len(record.streams["ids"]) == tree["test"]["text_bert"][i, 1].sum()
    np.testing.assert_array_equal(record.streams["vision"], tree["test"]["vision"][i])
