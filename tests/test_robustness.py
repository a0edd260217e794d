"""Missing modalities and lost steps: what a batch lacks, finite predictions of every paper, command and report."""

import json

import jax
import make_data
import numpy as np
import pytest
import test_fit
import test_report
import tiny
import tiny_self_mm
from tiny_self_mm import stream

from mmjax import evaluate, report, robustness, robustness_report, train
from mmjax.errors import UserError
from mmjax.masking import ModalityMask
from mmjax.papers.m3 import M3
from mmjax.papers.self_mm import LabelGeneration
from mmjax.papers.sse_ft import SSEFT
from mmjax.robustness import Lossy

ALL = frozenset(robustness.MODALITIES)


class Data:
  """Opened data of one batch."""

  pad_id, name = 1, "mosi"

  def __init__(self, *batches):
    self.made = batches

  def batches(self, split, *args, **options):
    yield from self.made


def big_batch(rows: int = 200, steps: int = 50) -> dict:
  made = tiny.batch(rows, tokens=steps, samples=6400)
  lengths = np.random.default_rng(0).integers(0, steps + 1, rows)
  return {**made, "audio": stream(rows, steps, 3, lengths), "vision": made["audio"]}


def test_lost_steps_are_a_function_of_the_example_alone():
  """Neither its place in the batch nor the box; what is lost at 30% is lost at 60%, too; true shares."""
  batch = big_batch()
  (few,), (many,) = (list(Lossy(Data(batch), percent=p).batches("test")) for p in (30, 60))
  order = np.random.default_rng(1).permutation(200)[:50]
  other = jax.tree.map(lambda x: x[order], batch)
  for name, key in (("text", "ids"), ("audio", "features"), ("vision", "wave")):
    pad = [(0, 0), (0, 7), *[(0, 0)] * (other[name][key].ndim - 2)]
    other[name] = {key: np.pad(other[name][key], pad), "mask": np.pad(other[name]["mask"], [(0, 0), (0, 7)])}
  again = Lossy(None, percent=30).lose(other, "test")
  for name, key in (("text", "mask"), ("audio", "features"), ("vision", "wave")):
    np.testing.assert_array_equal(again[name][key][:, :-7], few[name][key][order])
    kept = {p: lossy[name][key] != 0 for p, lossy in ((30, few), (60, many))}
    assert not np.any(kept[60] & ~kept[30])
    real = batch[name]["mask"].sum() * (3 if key == "features" else 1)
    if key != "mask":
      np.testing.assert_array_equal(few[name]["mask"], batch[name]["mask"])
      for percent in kept:
        assert kept[percent].sum() / real == pytest.approx(1 - percent / 100, abs=0.02)
  # Tokens: the first and the last stay, the lost ones are padding.
  mask, lossy = batch["text"]["mask"], many["text"]
  last = mask.sum(axis=1) - 1
  assert lossy["mask"][:, 0].all()
  assert lossy["mask"][np.arange(200), last].all()
  inner = mask.sum() - 400
  assert (lossy["mask"].sum() - 400) / inner == pytest.approx(0.4, abs=0.02)
  np.testing.assert_array_equal(lossy["ids"], np.where(mask & ~lossy["mask"], 1, batch["text"]["ids"]))
  # A waveform goes in spans of 20 ms.
  lost = (many["vision"]["wave"] == 0) & batch["vision"]["mask"]
  edges = np.flatnonzero(np.diff(lost[0].astype(int))) + 1
  assert len(edges) > 3
  assert set(edges % 320) == {0}
  # Another split, stream or seed: other draws. The batch itself stays.
  elsewhere = [Lossy(None, percent=30).lose(batch, "valid"), Lossy(None, percent=30, seed=1).lose(batch, "test")]
  for lossy in elsewhere:
    assert np.any(lossy["audio"]["features"] != few["audio"]["features"])
  assert (batch["audio"]["features"] != 0).sum() == batch["audio"]["mask"].sum() * 3


def test_a_missing_modality_is_padding_and_so_is_its_context():
  batch = tiny.batch(3, context=True)
  (lossy,) = Lossy(Data(batch), missing=frozenset({"text"}), percent=50).batches("test")
  for name in ("text", "text_context"):
    assert (lossy[name]["ids"] == 1).all()
    assert not lossy[name]["mask"].any()
  assert (lossy["audio"]["wave"] == 0).sum() > (batch["audio"]["wave"] == 0).sum()
  assert lossy["labels"] is batch["labels"]
  assert robustness.subsets({"vision", "text"}) == [(), ("text",), ("vision",), ("text", "vision")]
  assert len(robustness.subsets(ALL)) == 8
  assert robustness.parse("vision, audio") == ("audio", "vision")
  for wrong in ("video", "", "text,text"):
    with pytest.raises(UserError, match=rf"--drop={wrong}: expected names of text"):
      robustness.parse(wrong)


def feature_batch(rows: int = 4, steps: int = 6) -> dict:
  made = {
    **tiny.batch(rows),
    **{n: stream(rows, steps, w, (6, 1, 3)) for n, w in zip(robustness.MODALITIES, (8, 4, 4), strict=True)},
  }
  return {k: v for k, v in made.items() if k in ("labels", "index", "valid", *robustness.MODALITIES)}


NETWORKS = {
  "mmml_cc": lambda: (tiny.mmml(fusion="cc"), tiny.batch(4)),
  "mmml_cme": lambda: (tiny.mmml(cme_version="v3"), tiny.batch(4)),
  "self_mm": lambda: (tiny_self_mm.network_of(text_encoder=tiny.bert(pooler=False)), tiny_self_mm.batch_of(4)),
  "m3": lambda: (M3(hidden=4), feature_batch()),
  "sse_ft": lambda: (
    SSEFT(layers=1, cross_layers=1, heads=2, ffn_size=8, max_audio=20, max_vision=20),
    feature_batch(),
  ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_gives_nan(name):
  network, batch = NETWORKS[name]()
  params = tiny.init(network, batch)
  run = jax.jit(lambda b: network.apply({"params": params}, b, train=False))
  whole = run(batch)["M"]
  read = [stream for stream in robustness.MODALITIES if stream in batch]
  for missing in robustness.subsets(read)[1:]:
    outputs = run(Lossy(Data(), missing=frozenset(missing)).lose(batch, "test"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outputs)), missing
    assert np.any(np.abs(outputs["M"] - whole) > 1e-7), missing
  outputs = run(Lossy(Data(), percent=90).lose(batch, "test"))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(outputs))
  if not name.startswith("mmml"):
    # Nothing left: every example gets the same score.
    gone = run(Lossy(Data(), missing=ALL).lose(batch, "test"))["M"]
    np.testing.assert_allclose(gone, np.broadcast_to(gone[0], gone.shape), atol=1e-6)
  if name == "self_mm":  # whatever the box
    batch["text"] = {key: np.pad(x, ((0, 0), (0, 9))) for key, x in batch["text"].items()}
    np.testing.assert_allclose(run(Lossy(Data(), missing=ALL).lose(batch, "test"))["M"], gone, atol=1e-6)


def test_networks_without_a_modality_do_not_build_it():
  batch = feature_batch()
  shapes = tiny.shapes(M3(hidden=4, modalities=("audio", "text")), {k: v for k, v in batch.items() if k != "vision"})
  assert set(shapes) == {"text", "audio", "fusion", "reader", "score"}
  assert set(shapes["fusion"]) == {"text_from_audio", "audio_from_text"}
  assert set(tiny.shapes(M3(hidden=4, modalities=("vision",)), {"vision": batch["vision"]})) == {
    "vision",
    "reader",
    "score",
  }
  batch = tiny_self_mm.batch_of(4)
  network = tiny_self_mm.network_of(text_encoder=None, modalities=("audio", "vision"))
  assert network.streams == {"audio", "vision"}
  params = tiny.init(network, batch)
  assert set(params) == {"audio", "vision", "A", "V", "M"}
  objective = LabelGeneration()
  outputs = network.apply({"params": params}, batch, train=False)
  memory = objective.init(batch["labels"], outputs)
  losses, memory = objective(outputs, batch, memory, epoch=np.int32(2), train=True)
  assert set(losses) == set(memory["labels"]) == set(objective.predictions(outputs)) == {"M", "A", "V"}
  for network, match in ((M3, "M3.modalities: found"), (tiny_self_mm.network_of, "SelfMM.modalities: found")):
    with pytest.raises(UserError, match=match):
      network(modalities=("audio", "video"))


def test_a_masking_layer_in_front_of_other_fusions():
  """p = 1 on audio: what M says no longer depends on it, A's own head still does; in evaluation nothing changes."""
  only = {"text": 0.0, "audio": 1.0, "vision": 0.0}
  mask = ModalityMask(p=1.0, p_mod=only, coin="sample", sequential=False)
  small = {"layers": 1, "cross_layers": 1, "heads": 2, "ffn_size": 8, "dropout": 0.0, "max_audio": 20, "max_vision": 20}
  drop = {f"{part}_dropout": 0.0 for part in ("fusion", "audio", "vision")}
  cases = [
    (tiny_self_mm.network_of(modality_mask=mask, **drop), tiny_self_mm.network_of(**drop), tiny_self_mm.batch_of(4)),
    (SSEFT(modality_mask=mask, **small), SSEFT(**small), feature_batch()),
  ]
  for masked, plain, batch in cases:
    params = tiny.init(plain, batch)
    changed = {**batch, "audio": {**batch["audio"], "features": np.roll(batch["audio"]["features"], 1, axis=-1)}}

    def run(network, batch, train, params=params):
      return network.apply({"params": params}, batch, train=train, rngs={"dropout": jax.random.key(0)})

    for train_mode, moves in ((True, False), (False, True)):
      first, second = (run(masked, b, train_mode) for b in (batch, changed))
      assert bool(np.any(np.abs(first["M"] - second["M"]) > 1e-6)) == moves
      if "A" in first:
        assert np.any(first["A"] != second["A"])
    np.testing.assert_array_equal(run(masked, batch, False)["M"], run(plain, batch, False)["M"])


def test_the_command_writes_every_row(tmp_path, capsys):
  make_data.raw_folder(tmp_path / "data", dataset="mosi")
  make_data.tokenizer(tmp_path / "tokenizer")
  text = test_fit.GIN.format(tokenizer=tmp_path / "tokenizer").replace("boxes = 2", "boxes = 1")
  (tmp_path / "tiny.gin").write_text(text.replace("tiny.mmml.context = True", 'tiny.mmml.fusion = "cc"'))
  assert train.run([*test_fit.flags(tmp_path, "run"), "--gin.experiment.Experiment.epochs=1"]) == 0
  workdir = tmp_path / "run"
  before = json.loads((workdir / "results.json").read_text())
  flag = f"--workdir={workdir}"
  assert evaluate.run([flag, "--drop=audio"]) == 0
  assert "| without audio |" in capsys.readouterr().out
  alone = json.loads((workdir / "results.json").read_text())["robustness"]["best_loss"]["test"]
  assert list(alone["missing"]) == ["audio"]
  assert evaluate.run([flag, "--robustness"]) == 0
  results = json.loads((workdir / "results.json").read_text())
  found = results.pop("robustness")["best_loss"]
  assert found["step"] == before["checkpoints"]["best_loss"]["step"]
  part = found["test"]
  assert results == before
  assert set(part["missing"]) == {"none", "text", "audio", "text+audio"}
  assert list(part["lost"]) == [str(rate) for rate in range(0, 100, 10)]
  clean = before["checkpoints"]["best_loss"]["test"]["M"]
  for metric, value in part["missing"]["none"]["M"].items():
    assert value == pytest.approx(clean[metric], abs=1e-5)
  assert part["missing"]["audio"]["M"] == pytest.approx(alone["missing"]["audio"]["M"])
  # A head that does not read what is missing is as good as ever.
  assert part["missing"]["audio"]["T"]["MAE"] == pytest.approx(part["missing"]["none"]["T"]["MAE"], abs=1e-6)
  assert part["missing"]["text"]["T"]["MAE"] != part["missing"]["none"]["T"]["MAE"]
  assert part["lost"]["90"]["M"]["MAE"] != part["lost"]["10"]["M"]["MAE"]
  with pytest.raises(UserError, match="--drop=vision: the network does not read it"):
    evaluate.run([flag, "--drop=vision"])


def made_up(scale: float) -> dict:
  def scores(value):
    return {"loss": value, "M": {"MAE": value * scale, "Corr": 1 - value / 3, "Has0_acc_2": 0.8 - value / 10}}

  return {
    "seed": 0,
    "missing": {name: scores(1.0 + i / 10) for i, name in enumerate(("none", "text", "audio", "text+audio"))},
    "lost": {str(rate): scores(1 + rate / 100) for rate in range(0, 100, 10)},
  }


def test_the_report_shows_it(tmp_path):
  results = test_report.make_run(tmp_path)
  for step in (10, 20):
    assert "Missing" not in report.write(tmp_path)  # none, then one of an earlier checkpoint
    results["robustness"] = {"best_loss": {"step": step, "test": made_up(1.0)}}
    (tmp_path / "results.json").write_text(json.dumps(results))
  text = report.write(tmp_path)
  assert "## Missing modalities and lost steps" in text
  assert "| without text and audio | 1.3000 |" in text
  assert "| 90% of the steps lost | 1.9000 |" in text
  assert text.count("% of the steps lost") == 9
  assert "](robustness.png)" in text
  assert (tmp_path / "robustness.png").stat().st_size > 10_000
  both = dict(robustness_report.rows([made_up(1.0), made_up(3.0)], "M"))
  assert both["without text"]["MAE"] == pytest.approx((2.2, 1.1))
  assert "2.2000 +- 1.1000" in robustness_report.table([made_up(1.0), made_up(3.0)], "M")
