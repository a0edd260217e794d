"""Measures training steps of a gin file: `python tools/benchmark.py --gin_file=gin/mmml_mosi.gin`.

Weights are random and, without --data_dir, so are the examples, with lengths like MOSI's (15 tokens and 4.2 s on
average) or those of --lengths. Every box of the plan is compiled and timed; the average step is over the plan of
one epoch. FLOPs are XLA's count for the program before optimisation; their rate is set beside that of a plain
matrix product measured before and after the steps.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config
from mmjax.data import plan
from mmjax.data.audio import SAMPLE_RATE
from mmjax.data.batches import Data, Split, Stream, padded
from mmjax.errors import UserError
from mmjax.training import compilation, dry_run, step
from mmjax.training import mesh as meshes
from mmjax.training.experiment import Experiment

TOKENS, SECONDS, SPREAD = 15.0, 4.2, 0.55  # MOSI's means, and the spread of their logarithms
MATMUL = 2048
EVENTS = {
  "/jax/compilation_cache/compile_requests_use_cache": "programs requested",
  "/jax/compilation_cache/cache_hits": "of these from the cache",
}


class Random:
  """Made-up examples by row."""

  def __init__(self, kind: str, lengths: np.ndarray, width: int | None):
    self.kind, self.lengths, self.width = kind, lengths, width

  def __getitem__(self, row: int) -> np.ndarray:
    random, length = np.random.default_rng(row), int(self.lengths[row])
    if self.kind == "ids":
      return random.integers(5, 1000, length).astype(np.int32)
    if self.kind == "wave":
      return random.integers(-3000, 3000, length).astype(np.int16)
    assert self.width is not None
    return random.standard_normal((length, self.width), np.float32)


def made_lengths(shapes: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
  """Returns lengths [count] of each stream of a full batch; a context is as long as the two examples before."""
  random = np.random.default_rng(0)
  draws = np.exp(random.normal(-(SPREAD**2) / 2, SPREAD, count))  # of mean 1, the same for all streams of an example
  lengths = {}
  for name, stream in shapes.items():
    kind = next(key for key in stream if key != "mask")
    cap = stream["mask"].shape[1]
    mean = {"ids": TOKENS, "wave": SECONDS * SAMPLE_RATE}.get(kind, 0.4 * cap)
    rows = draws * mean
    if name.endswith("_context"):
      rows = np.concatenate([[0], rows[:-1]]) + (np.concatenate([[0, 0], rows[:-2]]) if kind == "ids" else 0)
    lengths[name] = np.clip(np.round(rows), 1, cap).astype(int)
  return lengths


def synthetic(experiment: Experiment, lengths: Mapping[str, np.ndarray] | None, examples: int) -> Data:
  """Returns made-up data of the shapes that the experiment's pipeline gives."""
  batch = experiment.abstract_batch()
  shapes = {name: value for name, value in batch.items() if isinstance(value, dict) and "mask" in value}
  lengths = lengths or made_lengths(shapes, examples)
  missing = sorted(set(shapes) - set(lengths))
  if missing:
    raise UserError(f"--lengths lacks {', '.join(missing)}: found {', '.join(lengths)}")
  count = len(lengths[next(iter(shapes))])
  streams, full = {}, {}
  for name, stream in shapes.items():
    kind = next(key for key in stream if key != "mask")
    width = stream[kind].shape[2] if stream[kind].ndim == 3 else None
    full[name] = stream["mask"].shape[1]
    rows = Random(kind, np.asarray(lengths[name]), width)
    options = {"width": width, "normalize": kind == "wave"}
    streams[name] = Stream(kind=kind, rows=rows, lengths=rows.lengths, cap=full[name], **options)
  labels = np.random.default_rng(1).uniform(-1, 1, count)
  heads = list(batch["labels"])
  clips = [
    SimpleNamespace(id=str(i), video_id="0", text="", labels=dict.fromkeys(heads, label))
    for i, label in enumerate(labels)
  ]
  train = Split("train", clips, streams)
  pipeline: Any = experiment.data
  costs, size = pipeline.field_costs(full), pipeline.batch_size
  boxes = [full]
  if pipeline.boxes is not None:
    boxes = plan.choose_boxes(train.lengths, costs, full=full, count=pipeline.boxes, batch_size=size)
  options = {"batch_size": size, "eval_batch_size": size, "published": {}, "dropped": {}}
  return Data("synthetic", {name: train for name in ("train", "valid", "test")}, boxes, full, costs, **options)


def matmul_rate(dtype: str) -> float:
  """Returns the median rate of a square matrix product in GFLOP/s."""
  x = jnp.ones((MATMUL, MATMUL), dtype)
  product = jax.jit(lambda a, b: a @ b)
  product(x, x).block_until_ready()
  seconds = [timed(lambda: product(x, x).block_until_ready()) for _ in range(9)]
  return 2 * MATMUL**3 / statistics.median(seconds) / 1e9


def timed(call: Callable[[], Any]) -> float:
  """Returns the seconds that `call` takes."""
  began = time.perf_counter()
  call()
  return time.perf_counter() - began


def peak_memory() -> dict[str, float]:
  """Returns the largest memory so far in GB: of this process, and of the first device where it says so."""
  found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    found["device"] = stats["peak_bytes_in_use"] / 1e9
  return found


def program_memory(compiled: Any) -> float:
  """Returns XLA's own account of a program's memory on one device, in GB."""
  account = compiled.memory_analysis()
  parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes", "generated_code_size_in_bytes")
  return (sum(getattr(account, part) for part in parts) - account.alias_size_in_bytes) / 1e9


def measure(experiment: Experiment, data: Data, *, steps: int, trace: Path | None) -> dict[str, Any]:
  """Returns all numbers of the benchmark."""
  compute_dtype = str(jnp.dtype(getattr(experiment.network, "compute_dtype", "float32")))
  rates = {dtype: [matmul_rate(dtype)] for dtype in dict.fromkeys(("float32", compute_dtype))}
  counts = Counter[str]()
  jax.monitoring.register_event_listener(lambda event, **_: counts.update([EVENTS[event]] if event in EVENTS else []))
  mesh = meshes.make(experiment.fsdp)
  described, key = experiment.optimizer, jax.random.key(0)
  batch = data.first_batch(row_multiple=mesh.size)
  shapes = step.abstract(experiment.network, batch)["params"]
  frozen = described.frozen_mask(shapes)
  optimizer = described.build(shapes, total_steps=1000)
  options = {"frozen": frozen, "accumulate": described.accumulate, "labels": data.train.labels}
  options |= {"batch": batch, "key": key, "mesh": mesh}
  state, shardings = step.create_state(experiment.network, experiment.objective, optimizer, **options)
  run = step.make_train_step(
    experiment.network, experiment.objective, optimizer, frozen=frozen, accumulation=described.accumulation
  )
  train_step = jax.jit(
    run,
    donate_argnums=0,
    out_shardings=(shardings, meshes.replicated(mesh)),
    compiler_options=compilation.options(),
  )

  batches = data.plan("train", seed=1, epoch=1)
  boxes = []
  for number, box in enumerate(data.boxes):
    mine = [rows for at, rows in batches if at == number]
    if not mine:
      continue
    arguments = [np.bool_(True), key]
    row_count = padded(data.batch_size, mesh.size)
    made = [meshes.put_batch(data.batch("train", rows, box, row_count), mesh) for rows in mine[: steps + 1]]
    began = time.perf_counter()
    lowered = train_step.lower(state, made[0], *arguments)
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for i in range(steps + 1):
      began = time.perf_counter()
      state, logs = compiled(state, made[i % len(made)], *arguments)
      jax.block_until_ready((state, logs))
      seconds.append(time.perf_counter() - began)
    entry = {"box": box, "batches": len(mine), "compile_s": compile_seconds, "step_s": statistics.median(seconds[1:])}
    flops = (lowered.cost_analysis() or {}).get("flops", float("nan"))
    boxes.append({**entry, "gflop": flops / 1e9, "program_gb": program_memory(compiled)})
    progress = f"  box {box}: compiled in {compile_seconds:.1f} s, step {entry['step_s']:.3f} s"
    print(progress, file=sys.stderr, flush=True)

  # The loop as training runs it: how long does it wait for its batches?
  waited, began = 0.0, time.perf_counter()
  source = data.batches("train", batches[: max(4, 2 * steps)], row_multiple=mesh.size)
  if trace is not None:
    jax.profiler.start_trace(str(trace))
  asked = time.perf_counter()
  for number, batch in enumerate(source):
    if number:  # the first one waits for the pipeline to start
      waited += time.perf_counter() - asked
    else:
      began = time.perf_counter()
    state, logs = train_step(state, meshes.put_batch(batch, mesh), np.bool_(True), key)
    jax.block_until_ready(logs)
    asked = time.perf_counter()
  if trace is not None:
    jax.profiler.stop_trace()
  loop = time.perf_counter() - began

  for dtype in rates:
    rates[dtype].append(matmul_rate(dtype))
  total = sum(entry["batches"] for entry in boxes)
  average = sum(entry["batches"] * entry["step_s"] for entry in boxes) / total
  gflop = sum(entry["batches"] * entry["gflop"] for entry in boxes) / total
  peak = statistics.mean(rates[compute_dtype])
  examples = len(data.train) / total
  padding = {
    name: plan.padding_share(data.train.lengths, data.boxes, batches, batch_size=data.batch_size, costs={name: 1.0})
    for name in data.full
  }
  return {
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "batch_size": data.batch_size,
    "accumulate": described.accumulate,
    "compute_dtype": compute_dtype,
    "matmul_gflops": {dtype: statistics.mean(values) for dtype, values in rates.items()},
    "boxes": boxes,
    "step_s": average,
    "examples_per_s": examples / average,
    "epoch_s": average * total,
    "gflop": gflop,
    "share_of_matmul_peak": gflop / average / peak,
    "padding": padding,
    "host_wait_share": waited / loop,
    "compile_s": sum(entry["compile_s"] for entry in boxes),
    "compilations": dict(counts),
    "peak_gb": peak_memory(),
  }


def table(found: Mapping[str, Any]) -> str:
  """Returns the numbers as text."""
  names = list(found["boxes"][0]["box"])
  lines = ["".join(f"{name:>15}" for name in names) + "  batches  compile s   step s    GFLOP  program GB"]
  for entry in found["boxes"]:
    caps = "".join(f"{entry['box'][name]:>15}" for name in names)
    numbers = f"{entry['batches']:>9}{entry['compile_s']:>11.1f}{entry['step_s']:>9.3f}{entry['gflop']:>9.0f}"
    lines.append(f"{caps}{numbers}{entry['program_gb']:>12.2f}")
  rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in found["matmul_gflops"].items())
  padding = ", ".join(f"{name} {share:.1%}" for name, share in found["padding"].items())
  speed = f"{found['step_s']:.3f} s, {found['examples_per_s']:.2f} examples/s, epoch {found['epoch_s']:.0f} s"
  rows = {
    "device": found["device"],
    "batch": f"{found['batch_size']} examples, accumulation {found['accumulate']}, {found['compute_dtype']}",
    "matmul, GFLOP/s": rates,
    "programs": f"{len(found['boxes'])} train steps, compiled in {found['compile_s']:.1f} s; "
    + ", ".join(f"{name} {count}" for name, count in found["compilations"].items()),
    "average step": speed,
    "share of matmul": f"{found['share_of_matmul_peak']:.0%} of {found['gflop']:.0f} GFLOP a step",
    "padding": padding,
    "waiting for data": f"{found['host_wait_share']:.2%} of the loop's time",
    "peak memory": ", ".join(f"{name} {size:.2f} GB" for name, size in found["peak_gb"].items()),
  }
  return "\n".join([*lines, "", *(f"{name:<18}{value}" for name, value in rows.items())])


def compile_for(experiment: Experiment, topology: str) -> str:
  """Returns XLA's account of the largest step on TPUs that need not be here (the package libtpu must).

  `topology` is one of theirs, "v5e:2x4", or a part of it, "v5:2x2x1/1" for one device.
  """
  from jax.experimental import topologies

  jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU of this machine
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  kind, _, count = topology.partition("/")
  described: Any = topologies.get_topology_desc(platform="tpu", topology_name=kind)
  devices = list(described.devices)[: int(count) if count else None]
  mesh = meshes.make(experiment.fsdp, devices=devices)
  began = time.perf_counter()
  compiled = dry_run.lower(experiment, experiment.abstract_batch(), mesh).compile()
  seconds = time.perf_counter() - began
  account: Any = compiled.memory_analysis()
  return (
    f"{len(devices)} x {devices[0].device_kind}, fsdp {experiment.fsdp}, compiled in {seconds:.0f} s: "
    f"{program_memory(compiled):.2f} GB a device (state and batch {account.argument_size_in_bytes / 1e9:.2f}, "
    f"temporary {account.temp_size_in_bytes / 1e9:.2f})"
  )


def run(argv: Sequence[str]) -> int:
  """Measures as the flags say; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gin_file", type=Path, required=True)
  parser.add_argument("--data_dir", type=Path, help="measure on the experiment's own data")
  parser.add_argument("--cache_dir", type=Path, help="keep compiled programs here; a second start compiles nothing")
  parser.add_argument("--lengths", type=Path, help=".npz with the length of each example in each stream, int [N]")
  parser.add_argument("--examples", type=int, default=1284, help="made-up examples (default: as many as MOSI has)")
  parser.add_argument("--steps", type=int, default=3, help="timed steps of each box")
  parser.add_argument("--trace", type=Path, help="folder for a profile of the loop, for TensorBoard or Perfetto")
  parser.add_argument("--compile_for", help="only compile, for TPUs that need not be here: v5e:2x4, v5:2x2x1/1")
  parser.add_argument("--json", type=Path, help="also write the numbers here")
  flags = config.parse(parser, argv)
  if flags.cache_dir:
    compilation.use_cache(flags.cache_dir)
  compilation.free_memory_after_compiling()
  experiment = config.load(flags.gin_file, flags.gin).experiment
  if flags.compile_for:
    print(compile_for(experiment, flags.compile_for))
    return 0
  if flags.data_dir:
    data = experiment.open_data(flags.data_dir, flags.cache_dir or config.default_cache_dir())
  else:
    lengths = dict(np.load(flags.lengths)) if flags.lengths else None
    data = synthetic(experiment, lengths, flags.examples)
  found = {"gin_file": str(flags.gin_file), **measure(experiment, data, steps=flags.steps, trace=flags.trace)}
  print(table(found))
  if flags.json:
    flags.json.write_text(json.dumps(found, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  config.main(run)
