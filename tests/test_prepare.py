"""Does prepare make a wav of every clip that has sound, name every other, and do nothing the second time?"""

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_data
import make_media
import numpy as np
import pytest

from mmjax import prepare
from mmjax.data import audio, inventory, known_files, raw_folder, video, wav_files
from mmjax.errors import UserError

HEADER = ["video_id", "clip_id", "text", "label", "annotation", "mode"]


def labels(folder: Path, clips: list[str], text: str = "a good movie") -> None:
  """Writes label.csv with these "video/clip" names in train and one clip each in valid and test."""
  folder.mkdir(parents=True, exist_ok=True)
  names = [*((name, "train") for name in clips), ("other/1", "valid"), ("other/2", "test")]
  with (folder / "label.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(HEADER)
    writer.writerows([*name.split("/"), text, "1.2", "Positive", mode] for name, mode in names)


def media(folder: Path, clips: list[str], **options) -> None:
  """Writes a video of each clip, and those of valid and test."""
  for name in (*clips, "other/1", "other/2"):
    make_media.clip(folder / "raw" / f"{name}.mp4", **options)


def run(data_dir: Path, *flags: str, dataset: str = "mosi") -> int:
  return prepare.run([f"--dataset={dataset}", f"--data_dir={data_dir}", f"--cache_dir={data_dir / 'cache'}", *flags])


def files(folder: Path) -> dict[str, int]:
  return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


def damage(path: Path, *, cut: bool) -> None:
  """Takes away the last third of a file, or overwrites it."""
  content = path.read_bytes()
  keep = 2 * len(content) // 3
  noise = b"" if cut else np.random.RandomState(0).bytes(len(content) - keep)
  path.write_bytes(content[:keep] + noise)


def frequency(wave: np.ndarray) -> float:
  spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
  return float(np.argmax(spectrum)) * audio.SAMPLE_RATE / len(wave)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("a.mp4", {}),
    ("variable frame rate.mp4", {"variable": True}),
    ("ångström 说话 (1).MP4", {}),
    ("a.mp4", {"options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("a.mp4", {"channels": 1, "rate": 16000, "options": {}}),
    ("a.mkv", {"rate": 48000}),
    ("a.avi", {"codec": "mp2"}),
    ("a.webm", {"codec": "libopus", "rate": 48000, "pictures": False}),
    ("a.mov", {"codec": "pcm_s16le"}),
    ("a.mp4", {"picture_seconds": 3.0}),
  ],
)
def test_sound_becomes_16_khz_mono(tmp_path, name, options):
  sound = video.read_sound(make_media.clip(tmp_path / name, seconds=2.0, **options))
  assert sound.wave.dtype == np.int16
  fragmented = "frag" in str(options.get("options"))  # has no place to say that the codec's first frame is silence
  assert sound.seconds == pytest.approx(2.0, abs=0.05 if fragmented else 0.03)
  assert frequency(sound.wave) == pytest.approx(make_media.TONE, abs=1)
  middle = sound.wave[8000:16000].astype(float)
  expected = 0.5 if options.get("channels") == 1 else 0.375  # the mean of both channels
  assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(expected * 32768, rel=0.05)
  assert (sound.seconds_lost, sound.reason) == (0.0, "")


def test_a_video_and_a_wav_give_the_same_samples(tmp_path):
  path = make_media.clip(tmp_path / "a.mov", codec="pcm_s16le", pictures=False)
  make_data.write_wav(tmp_path / "a.wav", make_media.tone(1.0, 44100, 2).T, 44100)
  from_video, from_wav = video.read_sound(path).wave, audio.read_wav(tmp_path / "a.wav")
  assert len(from_video) == len(from_wav) == 16000
  np.testing.assert_allclose(from_video, from_wav, atol=1)


def test_reading_may_stop_early(tmp_path):
  path = make_media.clip(tmp_path / "a.mp4", seconds=3.0)
  whole, begin = video.read_sound(path), video.read_sound(path, max_seconds=0.5)
  assert len(begin.wave) == 8000
  assert begin.seconds_lost == 0
  np.testing.assert_array_equal(begin.wave, whole.wave[:8000])


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_a_damaged_tail_is_cut_and_counted(tmp_path, name, cut):
  path = make_media.clip(tmp_path / name, seconds=3.0)
  whole = video.read_sound(path).wave
  damage(path, cut=cut)
  sound = video.read_sound(path)
  assert 1.5 < sound.seconds < 2.3
  assert sound.seconds + sound.seconds_lost == pytest.approx(3.0, abs=0.05)
  assert f"{sound.seconds:.1f}" in sound.reason
  kept = len(sound.wave) - 1000  # the resampler's last samples know nothing of what would have followed
  np.testing.assert_array_equal(sound.wave[:kept], whole[:kept])


def test_files_that_are_no_clip(tmp_path):
  text = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
  make_media.clip(tmp_path / "good.mp4")
  make_media.clip(tmp_path / "header at the end.mp4", options={})
  damage(tmp_path / "header at the end.mp4", cut=True)
  make_media.clip(tmp_path / "no sound.mp4", codec=None)
  (tmp_path / "empty.mp4").touch()
  (tmp_path / "text.mp4").write_text("this is not a film\n" * 50)
  (tmp_path / "playlist.mp4").write_text(text.format(tmp_path / "good.mp4"))
  (tmp_path / "script.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'good.mp4'}\n")
  (tmp_path / "folder.mp4").mkdir()
  everything = make_media.clip(tmp_path / "all damaged.mp4")
  content = everything.read_bytes()
  begin = content.index(b"mdat") + 4
  everything.write_bytes(content[:begin] + bytes(len(content) - begin))
  reasons = {
    "missing.mp4": "no readable file",
    "empty.mp4": "an empty file",
    "no sound.mp4": "no sound track",
    "text.mp4": "no media file",
    "playlist.mp4": "no media file",
    "script.mp4": "no media file",
    "header at the end.mp4": "lost its header",
    "all damaged.mp4": "nothing can be decoded",
    "folder.mp4": "no ",
  }
  for name, reason in reasons.items():
    with pytest.raises(UserError, match=reason) as error:
      video.read_sound(tmp_path / name)
    assert name in str(error.value)


def test_bad_clips_are_named_after_all_good_ones_are_prepared(tmp_path, capsys):
  folder = tmp_path / "MOSI"
  clips = [f"a b/{number}" for number in range(1, 5)] + ["日本/1", "日本/2", "日本/3"]
  labels(folder, clips)
  media(folder, clips, seconds=0.5)
  raw = folder / "raw"
  (raw / "a b" / "1.mp4").write_text("text")
  (raw / "a b" / "2.mp4").write_bytes(b"")
  (raw / "a b" / "3.mp4").unlink()
  make_media.clip(raw / "日本" / "1.mp4", codec=None)
  make_media.clip(raw / "日本" / "2.mp4", seconds=3.0)
  damage(raw / "日本" / "2.mp4", cut=False)
  raw.rename(folder / "Raw")
  with pytest.raises(UserError, match="named above: 4"):
    run(tmp_path)
  out = capsys.readouterr().out
  assert "wavs: 5 written, 0 were there already, 4 cannot be made" in out
  for line in ("a b/1: ", "a b/2: ", "a b/3: no video", "日本/1: "):
    assert line in out
  assert "no media file" in out
  assert "an empty file" in out
  assert "no sound track" in out
  cut = next(line for line in out.splitlines() if "日本/2" in line)
  assert "s lost" in cut
  wavs = sorted(path.relative_to(folder / "wav").as_posix() for path in folder.rglob("*.wav"))
  assert wavs == ["a b/4.wav", "other/1.wav", "other/2.wav", "日本/2.wav", "日本/3.wav"]
  for name in wavs:
    assert len(audio.read_wav(folder / "wav" / name)) > 7000

  before = files(folder)
  assert run(tmp_path, "--damaged=skip") == 0
  again = capsys.readouterr().out
  assert "wavs: 0 written, 5 were there already, 4 cannot be made" in again
  assert cut in again
  assert files(folder) == before


def test_second_run_does_nothing_and_keeps_the_users_wavs(tmp_path, capsys):
  folder = tmp_path / "mosi"
  labels(folder, ["v/1", "v/2", "V/1"])
  media(folder, ["v/1", "v/2", "V/1"], seconds=0.3)
  make_data.write_wav(folder / "WAV" / "v" / "01.WAV", np.zeros(100))  # an other spelling, in an other case
  mine = (folder / "WAV" / "v" / "01.WAV").read_bytes()
  assert run(tmp_path, "--jobs=1") == 0
  assert "wavs: 4 written, 1 were there already" in capsys.readouterr().out
  assert (folder / "WAV" / "v" / "01.WAV").read_bytes() == mine
  assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.wav")) == [
    "WAV/V/1.wav",
    "WAV/other/1.wav",
    "WAV/other/2.wav",
    "WAV/v/2.wav",
  ]
  before = files(folder)
  assert run(tmp_path) == 0
  assert "wavs: 0 written, 5 were there already, 0 cannot be made" in capsys.readouterr().out
  assert files(folder) == before
  shown = folder / "raw"
  shown.rename(tmp_path / "away")  # the videos are not needed any more
  (folder / "WAV" / "other" / "2.wav").unlink()
  assert run(tmp_path, "--damaged=skip") == 0
  assert "other/2: no video" in capsys.readouterr().out


def test_nothing_to_prepare(tmp_path):
  labels(tmp_path / "mosi", ["v/1"])
  with pytest.raises(UserError, match=r"found neither .*raw nor a wav"):
    run(tmp_path)
  (tmp_path / "mosi" / "wav").mkdir()
  (tmp_path / "mosi" / "wav").rmdir()
  with pytest.raises(UserError, match=r"python -m mmjax\.prepare --dataset=mosi --data_dir="):
    raw_folder.Wavs(tmp_path / "mosi", "mosi", {"v"})


def test_a_wav_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  folder = tmp_path / "mosi"
  labels(folder, ["v/1"])
  media(folder, ["v/1"], seconds=0.3)

  def full(self, target):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Path, "replace", full)
  with pytest.raises(UserError, match="No space left on device") as error:
    run(tmp_path)
  assert "run the same command again" in str(error.value)
  assert not [path for path in (folder / "wav").rglob("*") if path.is_file()]


def test_interrupted_run_leaves_whole_wavs_and_continues(tmp_path, capsys):
  folder = tmp_path / "mosi"
  clips = [f"v/{number}" for number in range(60)]
  labels(folder, clips)
  media(folder, [], seconds=0.3)
  source = make_media.clip(tmp_path / "long.mp4", seconds=20.0, pictures=False, rate=16000)
  (folder / "raw" / "v").mkdir()
  for name in clips:
    os.link(source, folder / "raw" / f"{name}.mp4")
  code = "import sys; from mmjax import config, prepare; config.main(prepare.run)"
  command = [sys.executable, "-c", code, "--dataset=mosi", f"--data_dir={tmp_path}", "--jobs=2"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  until = time.monotonic() + 60
  while not list(folder.rglob("*.wav")) and time.monotonic() < until:
    time.sleep(0.005)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 143
  assert "run the same command to continue" in out
  made = [path for path in (folder / "wav").rglob("*") if path.is_file()]
  assert 0 < len(made) < 62
  assert {path.suffix for path in made} == {".wav"}
  for path in made:
    if path.parent.name == "v":
      assert len(audio.read_wav(path)) / audio.SAMPLE_RATE == pytest.approx(20.0, abs=0.03)
  before = files(folder / "wav" / "v")
  assert run(tmp_path) == 0
  assert f"wavs: {62 - len(made)} written, {len(made)} were there already" in capsys.readouterr().out
  after = files(folder / "wav" / "v")
  assert {name: after[name] for name in before} == before
  assert len(after) == 60


def test_sims_names_labels_and_characters(tmp_path, capsys):
  make_data.raw_folder(tmp_path, "SIMS", wavs=False)
  folder = tmp_path / "SIMS"
  table = list(csv.DictReader((folder / "label.csv").open()))
  for row in table:
    row.update(text="这部电影 很好看", label="-0.8", label_T="0", label_A="0.2", label_V="1")
    make_media.clip(folder / "Raw" / row["video_id"] / f"{row['clip_id'].zfill(4)}.mp4", seconds=0.2)
  make_data.write_labels(folder / "label.csv", table)
  assert run(tmp_path, dataset="sims") == 0
  out = capsys.readouterr().out
  assert (folder / "wav" / "v1" / "0003.wav").is_file()
  assert len(list(folder.rglob("*.wav"))) == 27
  clips = [clip for rows in raw_folder.read_labels(folder, "sims")[0].values() for clip in rows]
  assert len(raw_folder.find_wavs(folder, "sims", clips)[0]) == 27
  lines = [line.split() for line in out.splitlines()]
  assert ["characters,", "train", "16", *["7"] * 6] in lines
  assert [out.count(f"label {head}") for head in "MTAV"] == [1] * 4
  # The classes of Mult_acc_5; -0.8, 0, 0.2 and 1 are one in each head.
  for name in ("[-1,", "(-0.1,", "(0.1,", "(0.7,"):
    assert [cells[2:6] for cells in lines if cells[:1] == [name]].count(["16", "5", "6", "27"]) == 1


def test_known_damaged_mosei_clips_are_named_and_left_alone(tmp_path, capsys):
  folder = tmp_path / "mosei"
  labels(folder, ["v/1", *sorted(raw_folder.MOSEI_INVALID)])
  media(folder, ["v/1"], seconds=0.3)
  assert run(tmp_path, dataset="mosei") == 0
  out = capsys.readouterr().out
  line = next(line for line in out.splitlines() if "MM12" in line)
  assert all(name in line for name in raw_folder.MOSEI_INVALID)
  assert "wavs: 3 written, 0 were there already, 0 cannot be made" in out
  assert ["train", "7", "16326", "-16319", "6", "1", "0"] in [line.split() for line in out.splitlines()]


def test_describe_writes_nothing(tmp_path, capsys):
  make_data.raw_folder(tmp_path)
  folder = tmp_path / "mosi"
  (folder / "wav" / "v1" / "3.wav").unlink()
  (folder / "wav" / "v1" / "4.wav").write_text("text")
  (folder / "raw").mkdir()
  (folder / "unaligned_50.pkl").write_bytes(b"mine")
  records = tmp_path / "cache" / "records" / f"mosi-{'0' * 16}" / "raw_folder" / "1.0.0"
  records.mkdir(parents=True)
  (records / "metadata.json").write_text('{"samples": {"train": [1, 2], "test": [3]}, "skipped": {"v1/9": "gone"}}')
  (records / "dataset_info.json").write_text("{}")
  (tmp_path / "cache" / "records" / f"mosi-{'1' * 16}").mkdir()
  (tmp_path / "cache" / "records" / f"mosi-new-{'1' * 16}").mkdir()
  store = tmp_path / "cache" / "features" / f"mosi-{'0' * 16}-train-first-{'2' * 16}"
  store.mkdir(parents=True)
  np.save(store / "index.npy", np.array([[0, 5], [5, 6]]))
  (store / "provenance.json").write_text(
    '{"clips": 2, "encoder": {"class": "Whisper"}, "seconds": 6.0, "time_pool": 8, "weights": {"name": "x/whisper"}}'
  )
  before = files(tmp_path)
  assert run(tmp_path, "--describe") == 0
  assert files(tmp_path) == before
  out = capsys.readouterr().out
  assert ["train", "16", "1284", "-1268", "0", "14", "2"] in [line.split() for line in out.splitlines()]
  assert "v1/4: " in out
  assert f"unaligned_50.pkl: unknown file (SHA-1 {hashlib.sha1(b'mine').hexdigest()})" in out
  assert f"mosi-{'0' * 16}: records, train 2, test 1, 1 skipped" in out
  assert f"mosi-{'1' * 16}: not complete" in out
  assert "mosi-new" not in out
  assert "features of 2 clips, 11 frames, by Whisper (x/whisper), seconds=6.0, time_pool=8" in out


def test_known_feature_files(tmp_path, monkeypatch):
  path = tmp_path / "unaligned_50.pkl"
  path.write_bytes(b"abc")
  assert known_files.sha1(path) == "a9993e364706816aba3e25717850c26c9cd0d89d"
  monkeypatch.setitem(known_files.KNOWN, known_files.sha1(path), "MOSI unaligned")
  assert inventory.pickles(tmp_path) == [f"{path}: known file: MOSI unaligned"]


def test_histogram_bins():
  names, chosen = inventory.bins("mosi", np.array([-3.0, -0.6, 0.4, 2.6, 3.0]))
  assert [names[number] for number in chosen] == ["-3", "-1", "0", "3", "3"]
  names, chosen = inventory.bins("sims", np.array([-1.0, -0.7, -0.1, 0.1, 0.7, 0.8]))
  assert [names[i] for i in chosen] == ["[-1, -0.7]"] * 2 + ["(-0.7, -0.1]", "(-0.1, 0.1]", "(0.1, 0.7]", "(0.7, 1]"]
  names, chosen = inventory.bins("mine", np.array([0.0, 50.0, 70.0]))
  assert chosen.tolist() == [0, 5, 6]


def test_several_videos_of_one_clip(tmp_path):
  for name in ("1.avi", "1.mp4", "1-edited.mp4", "2-edited.mp4", "3.txt"):
    (tmp_path / name).touch()
  assert {stem: path.name for stem, path in wav_files.listing(tmp_path).items()} == {"1": "1.mp4", "2": "2-edited.mp4"}


def test_help_and_mistakes_answer_at_once(tmp_path):
  labels(tmp_path / "mosi", ["v/1"])
  media(tmp_path / "mosi", ["v/1"], seconds=0.3)
  code = (
    "import sys; from mmjax import prepare\n"
    "early = {'numpy', 'av', 'soxr', 'soundfile', 'jax', 'tensorflow'} & sys.modules.keys()\n"
    f"prepare.run(['--dataset=mosi', '--data_dir={tmp_path}', '--cache_dir={tmp_path / 'cache'}'])\n"
    "late = {'jax', 'tensorflow', 'transformers'} & sys.modules.keys()\n"
    "assert not early and not late, (early, late)"
  )
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""
  for flags in (["--dataset=mosi", "--jobs=0"], ["--dataset=mosi", "--gin.X=1"], []):
    with pytest.raises(SystemExit) as stop:
      prepare.run(flags)
    assert stop.value.code == 2
