"""Is a raw folder read as it is, and is each mistake in it said once, with its place and remedy? No TensorFlow."""

import struct

import make_data
import numpy as np
import pytest

from mmjax.data import audio, raw_folder, text
from mmjax.errors import UserError

HEADER = "video_id,clip_id,text,label,annotation,mode"
ROWS = ["v1,1,good,1.5,P,train", "v2,1,bad,-1,N,valid", "v3,1,ok,0,N,test"]


def folder(tmp_path, *rows: str, header: str = HEADER):
  (tmp_path / "label.csv").write_text("\n".join([header, *rows]) + "\n")
  return tmp_path


def test_order_ids_and_columns(tmp_path):
  rows = [
    "train,good,0012,10,3,1.5",
    "train,fine,0012,2,3,1",
    'train,"a, ""b""",0012,1,3,-1',
    "valid,x,v,1,3,0",
    "test,,v,2,3,0",
  ]
  path = folder(tmp_path, *rows, header="\ufeffmode,text,video_id,clip_id,extra,label")
  splits, dropped = raw_folder.read_labels(path, "mosi")
  assert [clip.id for clip in splits["train"]] == ["0012$_$1", "0012$_$2", "0012$_$10"]  # MM10
  assert splits["train"][0].text == 'a, "b"'
  assert splits["train"][0].labels == {"M": -1.0}
  assert splits["test"][0].text == ""
  assert dropped == {}


def test_sims_has_a_label_for_each_modality(tmp_path):
  make_data.raw_folder(tmp_path, "sims")
  path = raw_folder.find(tmp_path, "sims")
  splits, _ = raw_folder.read_labels(path, "sims")
  assert set(splits["train"][0].labels) == set("MTAV")
  paths, _ = raw_folder.find_wavs(path, "sims", splits["train"])
  assert paths["v1/1"].name == "0001.wav"
  assert set(raw_folder.read_labels(path, "mine")[0]["train"][0].labels) == set("MTAV")
  assert set(raw_folder.read_labels(path, "mine", heads=("M", "T"))[0]["train"][0].labels) == set("MT")


def test_invalid_mosei_clips_are_left_out_and_named(tmp_path):
  path = folder(tmp_path, *ROWS, "94ULum9MYX0,2,x,1,P,train")
  splits, dropped = raw_folder.read_labels(path, "mosei")
  assert len(splits["train"]) == 1
  assert list(dropped) == ["94ULum9MYX0/2"]
  assert "MM12" in dropped["94ULum9MYX0/2"]
  assert len(raw_folder.read_labels(path, "mosei", drop_invalid=False)[0]["train"]) == 2
  assert len(raw_folder.MOSEI_INVALID) == 6


@pytest.mark.parametrize(
  ("rows", "header", "expected"),
  [
    (ROWS, HEADER.replace("label,", ""), ["columns", "also label", "add the column"]),
    ([*ROWS, "v1,2,x,abc,P,train"], HEADER, ["'abc' in row 5", "number in -3..3"]),
    ([*ROWS, "v1,2,x,nan,P,train"], HEADER, ["'nan' in row 5"]),
    ([*ROWS, "v1,2,x,-inf,P,train"], HEADER, ["'-inf' in row 5"]),
    ([*ROWS, "v1,2,x,,P,train"], HEADER, ["'' in row 5"]),
    ([*ROWS, "v1,2,x,4,P,train"], HEADER, ["'4' in row 5"]),
    ([*ROWS, "v1,1,x,1,P,test"], HEADER, ["v1/1 in rows 2 and 5", "once"]),
    ([*ROWS, "v1,2,x,1,P,dev"], HEADER, ["'dev' in row 5", "train, valid, test"]),
    ([*ROWS, "v1,2,x,1"], HEADER, ["no annotation in row 5"]),
    ([*ROWS, "v1,2,a, b,1,P,train"], HEADER, ["row 5", "quotes"]),
    ([*ROWS, "../v1,2,x,1,P,train"], HEADER, ["'../v1' in row 5"]),
    (ROWS[:2], HEADER, ["no clip with mode test", "train 1, valid 1, test 0"]),
    ([], "", ["empty file"]),
  ],
)
def test_mistakes_in_label_csv(tmp_path, rows, header, expected):
  with pytest.raises(UserError) as error:
    raw_folder.read_labels(folder(tmp_path, *rows, header=header), "mosi")
  for part in ["label.csv", "expected", *expected]:
    assert part in str(error.value)


def test_label_csv_in_another_encoding(tmp_path):
  (tmp_path / "label.csv").write_bytes("\n".join([HEADER, "v1,1,caf\xe9,1,P,train"]).encode("latin-1"))
  with pytest.raises(UserError, match="not UTF-8"):
    raw_folder.read_labels(tmp_path, "mosi")


def test_missing_data_says_where_they_come_from(tmp_path):
  for data_dir in (tmp_path, tmp_path / "nowhere"):
    with pytest.raises(UserError) as error:
      raw_folder.find(data_dir, "mosi")
    for part in ("label.csv", "wav/<video_id>", "https://", "--data_dir", "tools/quickstart.sh"):
      assert part in str(error.value)


def test_folder_is_found_in_any_case_but_not_as_another_set(tmp_path):
  make_data.raw_folder(tmp_path, "MOSI", wavs=False)
  assert raw_folder.find(tmp_path, "mosi") == tmp_path / "MOSI"
  assert raw_folder.find(tmp_path / "MOSI", "mosi") == tmp_path / "MOSI"
  with pytest.raises(UserError, match="no sims data"):
    raw_folder.find(tmp_path / "MOSI", "sims")


def test_wavs_of_other_case_and_of_neighbours(tmp_path):
  videos = {"AbC": ("train", 1), "aBc": ("train", 1), "Xy": ("valid", 1), "v": ("test", 2)}
  make_data.raw_folder(tmp_path, videos=videos)
  root = tmp_path / "mosi"
  (root / "wav").rename(root / "WAV")
  (root / "WAV" / "Xy").rename(root / "WAV" / "xy")
  (root / "WAV" / "v" / "2.wav").rename(root / "WAV" / "v" / "02.WAV")
  clips = [clip for split in raw_folder.read_labels(root, "mosi")[0].values() for clip in split]
  paths, _ = raw_folder.find_wavs(root, "mosi", clips)
  found = {name: path.relative_to(root).as_posix() for name, path in paths.items()}
  assert found["AbC/1"] == "WAV/AbC/1.wav"
  assert found["aBc/1"] == "WAV/aBc/1.wav"
  assert found["Xy/1"] == "WAV/xy/1.wav"
  assert found["v/2"] == "WAV/v/02.WAV"
  # Without its own folder a video must not get one that differs by case and belongs to another.
  (root / "WAV" / "aBc").rename(tmp_path / "away")
  with pytest.raises(UserError, match="1 of 5 clips"):
    raw_folder.find_wavs(root, "mosi", clips)


def test_missing_wavs_are_counted(tmp_path):
  make_data.raw_folder(tmp_path)
  root = tmp_path / "mosi"
  clips = raw_folder.read_labels(root, "mosi")[0]["train"]
  for number in range(1, 6):
    (root / "wav" / "v1" / f"{number}.wav").unlink()
  with pytest.raises(UserError, match="5 of 16 clips") as error:
    raw_folder.find_wavs(root, "mosi", clips)
  assert "v1/1, v1/2, v1/3, ..." in str(error.value)
  paths, skipped = raw_folder.find_wavs(root, "mosi", clips, damaged="skip")
  assert len(paths) == 11
  assert len(skipped) == 5
  (root / "wav").rename(root / "sound")
  (root / "raw").mkdir()
  with pytest.raises(UserError, match=r"mmjax\.prepare --dataset=mosi"):
    raw_folder.find_wavs(root, "mosi", clips)


def test_16_khz_mono_is_read_bit_for_bit(tmp_path):
  wave = np.random.RandomState(0).randint(-32768, 32768, size=1000).astype(np.int16)
  make_data.write_wav(tmp_path / "a.wav", wave)
  np.testing.assert_array_equal(audio.read_wav(tmp_path / "a.wav"), wave)


@pytest.mark.parametrize("subtype", ["PCM_24", "PCM_U8", "FLOAT", "DOUBLE", "ULAW"])
def test_44_khz_stereo_is_resampled(tmp_path, subtype):
  time = np.arange(44100) / 44100
  tone = 0.5 * np.sin(2 * np.pi * 440 * time)
  make_data.write_wav(tmp_path / "a.wav", np.stack([tone, 0.5 * tone], axis=1), 44100, subtype)
  wave = audio.read_wav(tmp_path / "a.wav")
  assert wave.dtype == np.int16
  assert abs(len(wave) - 16000) <= 1
  spectrum = np.abs(np.fft.rfft(wave))
  assert np.argmax(spectrum) == 440
  assert np.abs(wave).max() == pytest.approx(0.375 * 32768, rel=0.05)  # the mean of both channels


def test_tones_above_the_new_range_do_not_come_back(tmp_path):
  time = np.arange(44100) / 44100
  make_data.write_wav(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 12000 * time), 44100)
  wave = audio.read_wav(tmp_path / "a.wav")[1000:-1000]
  assert np.abs(wave).max() < 0.001 * 32768


def test_loud_samples_are_clipped_not_wrapped(tmp_path):
  make_data.write_wav(tmp_path / "a.wav", np.array([2.0, -2.0]), subtype="FLOAT")
  assert audio.read_wav(tmp_path / "a.wav").tolist() == [32767, -32768]


def test_damaged_wavs(tmp_path):
  path = tmp_path / "a.wav"
  make_data.write_wav(path, np.zeros(1000))
  whole = path.read_bytes()
  make_data.write_wav(path, np.zeros(0))
  no_samples = path.read_bytes()
  make_data.write_wav(path, np.array([0.0, np.nan]), subtype="FLOAT")
  contents = {
    "empty file": b"",
    "cut short": whole[:-500],
    "0 samples": no_samples,
    "no readable sound": b"not a sound file at all, whatever its name says",
    "not finite": path.read_bytes(),
  }
  for reason, content in contents.items():
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
      audio.read_wav(path)
    assert "a.wav" in str(error.value)
  path.write_bytes(whole[:20])
  with pytest.raises(UserError, match=r"a\.wav"):
    audio.read_wav(path)
  with pytest.raises(UserError, match="no readable file"):
    audio.read_wav(tmp_path / "b.wav")


def test_streamed_wav_of_unknown_size_is_read(tmp_path):
  path = tmp_path / "a.wav"
  make_data.write_wav(path, np.ones(1000) * 0.5)
  content = bytearray(path.read_bytes())
  at = content.index(b"data") + 4
  content[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
  path.write_bytes(content)
  assert len(audio.read_wav(path)) == 1000


def test_cut_and_normalise():
  wave = np.arange(-500, 1500).astype(np.int16)
  assert audio.cut(wave, 3, "first").tolist() == [-500, -499, -498]
  assert audio.cut(wave, 3, "last").tolist() == [1497, 1498, 1499]
  assert audio.cut(wave[:2], 3, "last").tolist() == [-500, -499]
  assert audio.as_float(wave, normalize=False)[0] == -500 / 32768
  scaled = wave / 32768
  expected = (scaled - scaled.mean()) / np.sqrt(scaled.var() + 1e-7)
  np.testing.assert_allclose(audio.as_float(wave, normalize=True), expected, atol=1e-6)
  assert np.isfinite(audio.as_float(np.zeros(5, np.int16), normalize=True)).all()


def clips(*names: str) -> list[raw_folder.Clip]:
  return [raw_folder.Clip(*name.split("/"), text=name, labels={}, split="train", row=0) for name in names]


def test_context_rows_stop_at_the_video_and_at_gaps():
  rows = clips("a/1", "a/2", "a/5", "a/6", "b/1", "b/2")
  assert text.previous_rows(rows, 2) == [[], [0], [0, 1], [1, 2], [], [4]]
  assert text.previous_rows(rows, 2, gap_aware=True) == [[], [0], [], [2], [], [4]]
  assert text.previous_rows(rows, 0) == [[]] * 6


def test_case_rule():
  assert text.apply_case("ANYHOW IT WAS", "first_upper") == "Anyhow it was"
  assert text.apply_case("", "first_upper") == ""
  assert text.apply_case("As Is", "as_is") == "As Is"


def test_tokens_and_truncation(tmp_path):
  tokenizer = text.load_tokenizer(str(make_data.tokenizer(tmp_path / "tokenizer", ["a", "b", "c", "d"])))
  joined = text.join_context(["a b", "c", "d"], [[], [0], [0, 1]], tokenizer.sep_token)
  assert joined == ["", "a b", "a b[SEP]c"]
  a, b, c, cls, sep = 4, 5, 6, 2, 3

  def ids(truncate: str, limit: int) -> list[list[int]]:
    return [row.tolist() for row in text.tokenize(tokenizer, joined, max_tokens=limit, truncate=truncate)]

  assert ids("left", 96) == ids("right", 96) == [[cls, sep], [cls, a, b, sep], [cls, a, b, sep, c, sep]]
  assert ids("left", 4)[2] == [cls, sep, c, sep]
  assert ids("right", 4)[2] == [cls, a, b, sep]


def test_folder_without_tokenizer(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError, match=r"tokenizer\.json"):
    text.load_tokenizer(str(tmp_path))


def test_unknown_tokenizer_without_network(monkeypatch):
  from mmjax.backbones import pretrained

  monkeypatch.setattr(pretrained, "_online", lambda: False)
  with pytest.raises(UserError, match="no network"):
    text.load_tokenizer("nobody/nothing")
