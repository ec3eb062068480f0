"""The environment of workers: what may shape an output and is in no key does not reach them."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase

KEPT = (
    # Where programs and files are.
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "XDG_CACHE_HOME"),
    # The languages of messages.
    *("LANG", "LANGUAGE", "LC_*"),
    # How many threads compute.
    *("OMP_*", "GOMP_*", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    # The C++ compiler, whose version is in the keys, and the cache of one.
    *("CXX", "CCACHE_*"),
    # The hub's cache and whether it may be asked.
    "HF_*",
    "FURIOSA_BUILD_FAULT",
)
"""Names or shell patterns. What a step reads beyond these belongs into its key first.

Not among them, for instance: CPATH and CXXFLAGS, which the compiler obeys, and what begins with TORCHINDUCTOR_ or
TORCH_, where torch finds defaults of its settings.
"""

HASH_SEED = ("PYTHONHASHSEED", "0")
"""What a worker is started with. Libraries walk over sets of names (transformers over the types of a model's layers) in
the order of their hashes, which Python draws anew for each process otherwise; and graphs have that order."""


def clean_environment() -> None:
    """Removes from this process's environment all that is not `KEPT`: before anything is imported that reads it."""
    for name in list(os.environ):
        if not any(fnmatchcase(name, kept) for kept in KEPT):
            del os.environ[name]
