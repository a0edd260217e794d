"""Do batches hold what the files say, whatever the box, the start, the cache and the process?"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import make_data
import numpy as np
import pytest

from mmjax.data import audio
from mmjax.data.pipeline import Audio, Pipeline, Text
from mmjax.errors import UserError
from mmjax.layers import Encoded


class Frames(nn.Module):
  """A frozen encoder for tests: one frame each 320 samples, its mean and its largest sample."""

  hidden_size: int = 2

  @nn.compact
  def __call__(self, batch, *, train):
    wave, mask = (batch[k][:, : batch[k].shape[1] // 320 * 320] for k in ("wave", "mask"))
    frames = wave.reshape(len(wave), -1, 320)
    mask = mask.reshape(frames.shape).all(axis=-1)
    hidden = jnp.stack([frames.mean(axis=-1), frames.max(axis=-1)], axis=-1)
    scale = self.param("scale", nn.initializers.ones, (2,))
    return Encoded(hidden * scale * mask[..., None], mask)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  path = tmp_path_factory.mktemp("data")
  make_data.tokenizer(path / "tokenizer")
  return make_data.raw_folder(path)


def pipeline(place, *, context=0, **options) -> Pipeline:
  sound = {"seconds": 1.0, "context": min(context, 1), **options.pop("audio", {})}
  words = {"tokenizer": str(place / "tokenizer"), "max_tokens": 16, "context": context, **options.pop("text", {})}
  return Pipeline(**{"dataset": "mosi", "batch_size": 4, "text": Text(**words), "audio": Audio(**sound), **options})


def open_data(place, *, streams=None, normalize_wave=False, stored=None, **options):
  made = pipeline(place, **options)
  return made.open(place, place / "cache", streams=streams, normalize_wave=normalize_wave, boxes=stored)


def same(a, b) -> bool:
  return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def test_batches_hold_the_files(place):
  data = open_data(place, context=2)
  train = data.train
  tokens = json.loads((place / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
  sounds = [audio.read_wav(place / "mosi" / "wav" / c.video_id / f"{c.clip_id}.wav") for c in train.clips]
  words = [[tokens[w] for w in text.lower().split()] for text in train.texts]
  seen = []
  plan = data.plan("train", seed=1, epoch=1)
  for (number, rows), batch in zip(plan, data.batches("train", plan), strict=True):
    box = data.boxes[number]
    assert {name: next(iter(batch[name].values())).shape[1] for name in box} == box
    assert batch["index"].tolist() == rows.tolist()
    assert batch["valid"].all()
    for i, row in enumerate(rows):
      first = train.video_ids.index(train.video_ids[row])
      one = {name: batch[name][kind][i][batch[name]["mask"][i]] for name, kind in kinds(batch).items()}
      assert one["text"].tolist() == [2, *words[row], 3]  # none is longer than the limit
      previous = words[max(first, row - 2) : row]
      joined = [2] + [w for part in previous for w in [*part, 3]] if previous else [2, 3]
      joined = joined if len(joined) <= 16 else [2, *joined[-15:]]
      assert one["text_context"].tolist() == joined
      np.testing.assert_array_equal(one["audio"], sounds[row][:16000].astype(np.float32) / 32768)
      before = sounds[row - 1][-16000:] if row > first else sounds[row][:0]
      np.testing.assert_array_equal(one["audio_context"], before.astype(np.float32) / 32768)
      assert batch["labels"]["M"][i] == np.float32(train.clips[row].labels["M"])
      padding = ~batch["audio"]["mask"][i]
      assert (batch["audio"]["wave"][i][padding] == 0).all()
      seen.append(row)
  assert sorted(seen) == list(range(16))


def kinds(batch) -> dict[str, str]:
  return {name: "ids" if name.startswith("text") else "wave" for name in batch if name.startswith(("text", "audio"))}


def test_normalised_after_cutting(place):
  data = open_data(place, normalize_wave=True)
  batch = data.first_batch()
  for wave, mask in zip(batch["audio"]["wave"], batch["audio"]["mask"], strict=True):
    assert wave[mask].mean() == pytest.approx(0, abs=1e-5)
    assert wave[mask].std() == pytest.approx(1, abs=1e-3)
    assert (wave[~mask] == 0).all()
  assert open_data(place, normalize_wave=True, audio={"normalize": False}).normalize is False


def test_start_skips_and_runs_repeat(place):
  data = open_data(place)
  plan = data.plan("train", seed=3, epoch=2)
  whole = list(data.batches("train", plan))
  assert len(whole) == 4
  for start in (1, 3):
    rest = list(data.batches("train", open_data(place).plan("train", seed=3, epoch=2), start=start))
    assert len(rest) == len(whole) - start
    assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_rows_that_do_not_exist(place):
  data = open_data(place)
  plan = data.plan("test", seed=None)
  batches = list(data.batches("test", plan, row_multiple=3))
  assert all(len(batch["valid"]) == 6 for batch in batches)
  assert sum(int(batch["valid"].sum()) for batch in batches) == 6
  for batch in batches:
    gone = ~batch["valid"]
    assert gone.any()
    assert (batch["index"][gone] == 6).all()
    assert not batch["text"]["mask"][gone].any()
    assert (batch["text"]["ids"][gone] == data.pad_id).all()
    assert not batch["audio"]["mask"][gone].any()
    assert (batch["labels"]["M"][gone] == 0).all()


def test_each_process_gets_its_rows(place):
  data = open_data(place)
  plan = data.plan("test", seed=None)
  whole = list(data.batches("test", plan, row_multiple=4))
  parts = [list(data.batches("test", plan, row_multiple=4, process_index=i, process_count=2)) for i in range(2)]
  for batch, *slices in zip(whole, *parts, strict=True):
    assert same(batch, jax.tree.map(lambda *x: np.concatenate(x), *slices))


def test_evaluation_has_room_for_longer_examples(place):
  data = open_data(place)
  assert len(data.boxes) <= 8
  assert data.eval_boxes[-1] == data.full == {"text": 16, "audio": 16000}
  data.splits["test"].lengths["audio"][:] = 16000
  assert {data.eval_boxes[box]["audio"] for box, _ in data.plan("test", seed=None)} == {16000}
  stored = json.loads(json.dumps(data.boxes))
  assert open_data(place, stored=stored).boxes == data.boxes
  with pytest.raises(UserError, match="boxes"):
    open_data(place, context=1, stored=stored)


def test_fixed_lengths(place):
  assert open_data(place, boxes=None).boxes == [{"text": 16, "audio": 16000}]


def test_text_only_needs_no_wav_and_audio_only_no_tokenizer(place, tmp_path):
  make_data.raw_folder(tmp_path, wavs=False)
  made = pipeline(place)
  data = made.open(tmp_path, tmp_path / "cache", streams={"text"})
  (batch, *_) = data.batches("train", data.plan("train", seed=1))
  assert set(batch) == {"text", "labels", "index", "valid"}
  assert not (tmp_path / "cache").exists()
  with pytest.raises(UserError, match=r"no folder .*wav"):
    made.open(tmp_path, tmp_path / "cache", streams={"text", "audio"})
  data = pipeline(place, text={"tokenizer": "nowhere"}).open(place, place / "cache", streams={"audio"})
  assert set(data.first_batch()) == {"audio", "labels", "index", "valid"}


def test_records_are_reused_until_the_source_changes(place, tmp_path, monkeypatch):
  made = pipeline(place)
  make_data.raw_folder(tmp_path)
  cache = tmp_path / "cache" / "records"
  before = made.open(tmp_path, tmp_path / "cache").first_batch()
  with monkeypatch.context() as patch:
    patch.setattr(audio, "read_wav", lambda path: pytest.fail("prepared twice"))
    assert same(made.open(tmp_path, tmp_path / "cache").first_batch(), before)
  # Whatever an interrupted preparation leaves is not taken for records.
  (record,) = cache.iterdir()
  (next(record.rglob("dataset_info.json"))).unlink()
  assert same(made.open(tmp_path, tmp_path / "cache").first_batch(), before)
  table = tmp_path / "mosi" / "label.csv"
  table.write_text(table.read_text().replace("v1,1,", "v1,1,THE "))
  made.open(tmp_path, tmp_path / "cache")
  make_data.write_wav(tmp_path / "mosi" / "wav" / "v1" / "1.wav", np.ones(4321) * 0.1)
  data = made.open(tmp_path, tmp_path / "cache")
  assert data.train.lengths["audio"][0] == 4321
  assert len(list(cache.iterdir())) == 3


def test_damaged_clip_is_fatal_or_counted(place, tmp_path):
  make_data.raw_folder(tmp_path)
  wav = tmp_path / "mosi" / "wav"
  (wav / "v1" / "2.wav").write_bytes((wav / "v1" / "2.wav").read_bytes()[:-100])
  (wav / "v2" / "3.wav").write_bytes(b"")
  with pytest.raises(UserError, match=r"v1/2\.wav: found a file cut short") as error:
    pipeline(place).open(tmp_path, tmp_path / "cache")
  assert "skip" in str(error.value)
  assert not list((tmp_path / "cache").rglob("*.array_record*"))
  (wav / "v4" / "1.wav").unlink()
  for _ in range(2):  # prepared, and read back
    data = pipeline(place, damaged="skip", context=1).open(tmp_path, tmp_path / "cache")
    assert set(data.dropped) == {"v1/2", "v2/3", "v4/1"}
    assert len(data.train) == 14
    assert data.train.previous[1] == [0]
  said = data.describe()
  for part in ("v1/2", "cut short", "v2/3", "empty file", "v4/1", "no wav file", "1284", "-1270", "padding"):
    assert part in said


def test_from_disk_equals_from_memory(place):
  held, read = open_data(place, context=1), open_data(place, context=1, in_memory_gb=0)
  assert held.train.sound.held is not None
  assert read.train.sound.held is None
  plan = held.plan("train", seed=1)
  for a, b in zip(held.batches("train", plan), read.batches("train", plan), strict=True):
    assert same(a, b)


def test_features_of_a_frozen_encoder(place):
  made = pipeline(place, context=1, audio={"encoder": Frames(), "time_pool": 2})
  data = made.open(place, place / "cache")
  assert data.full["audio"] == 25
  assert data.feature_width == 2
  batch = data.first_batch()
  for i, row in enumerate(batch["index"]):
    sound = data.train.sound[row]
    mask = batch["audio"]["mask"][i]
    assert mask.sum() == min(len(sound), 25)
    np.testing.assert_array_equal(batch["audio"]["features"][i][mask], sound)
    previous = data.train.previous[row]
    before = data.train.sound[previous[0]] if previous else sound[:0]
    mask = batch["audio_context"]["mask"][i]
    np.testing.assert_array_equal(batch["audio_context"]["features"][i][mask], before)
  shapes = made.abstract_batch()
  assert shapes["audio_context"]["features"].shape == (4, 25, 2)


def test_abstract_batch_is_a_full_batch(place):
  for streams in (None, {"text"}, {"audio"}):
    data = open_data(place, context=1, boxes=None, streams=streams)
    made = pipeline(place, context=1)
    (_, rows), *_ = data.plan("train", seed=1)
    batch = data.batch("train", rows, data.full, 4)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert shapes == made.abstract_batch(streams=streams)
  assert set(pipeline(place, dataset="sims").abstract_batch()["labels"]) == set("MTAV")


def test_settings_that_cannot_be():
  for make in (
    lambda: Text(tokenizer="x", case="lower"),
    lambda: Text(tokenizer="x", context_truncate="oldest"),
    lambda: Audio(side="left"),
    lambda: Audio(seconds=0),
    lambda: Pipeline(dataset="mosi", batch_size=0),
    lambda: Pipeline(dataset="mosi", damaged="ignore"),
    lambda: Pipeline(dataset="mosi", heads=("T",)),
    lambda: Pipeline(dataset="mosi").abstract_batch(),
    lambda: Pipeline(dataset="mosi", audio=Audio()).abstract_batch(streams={"text"}),
  ):
    with pytest.raises(UserError, match="found|bind"):
      make()
