"""What every test may use: the real data, and one thread per process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours

# The whole of a family of long tests, of which `make test` runs some: make test-all sets it.
thorough = pytest.mark.skipif("HETURUN_THOROUGH" not in os.environ, reason="long; HETURUN_THOROUGH=1 runs it")

ROOT = Path(__file__).resolve().parent.parent


def data_directory() -> Path:
    """Where the real data lies: $HETURUN_TEST_DATA, or shared/data beside the checkout."""
    return Path(os.environ.get("HETURUN_TEST_DATA", ROOT.parent / "shared" / "data"))


def shared_data(name: str) -> Path:
    """The folder of a real data set; skips the test, saying so, where it is absent."""
    path = data_directory() / name
    if not path.exists():
        pytest.skip(f"no real data at {path}; set HETURUN_TEST_DATA")
    return path
