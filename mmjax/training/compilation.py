"""JAX's persistent compilation cache."""

from pathlib import Path

import jax


def use_cache(cache_dir: Path) -> None:
  """Keeps compiled programs in `cache_dir`/xla, so that a second start of the same run compiles nothing."""
  jax.config.update("jax_compilation_cache_dir", str(cache_dir.absolute() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
