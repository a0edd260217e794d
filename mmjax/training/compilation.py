"""How programs are compiled: JAX's persistent cache, what CPUs need, and memory given back afterwards."""

import ctypes
from pathlib import Path

import jax


def use_cache(cache_dir: Path) -> None:
  """Keeps compiled programs in `cache_dir`/xla, so that a second start of the same run compiles nothing."""
  jax.config.update("jax_compilation_cache_dir", str(cache_dir.absolute() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def options() -> dict[str, str]:
  """Returns the compiler options of a train step.

  On CPU, XLA drops the barriers that keep rematerialised work apart before it merges equal work, which undoes
  `layers.run_layer`'s remat; without that pass they stay until the end (MMML at batch 8: 8.6 to 3.3 GB).
  """
  return {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else {}


def free_memory() -> None:
  """Returns to the system what the compiler has freed, which glibc would keep: half a GB for each large program."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:
    trim(0)


def free_memory_after_compiling() -> None:
  """Calls `free_memory` after each program that this process compiles."""

  def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 1:
      free_memory()

  jax.monitoring.register_event_duration_secs_listener(listen)
