"""Profiles from files: `parse_profile.py` beside it makes sense of them, this module reads them."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.simulation.parse_profile import parse_profile
from pipeline.simulation.profile import Profile


def read_profile(text: str) -> Profile:
    """The profile that --hetero describes, its files read.

    Raises:
        UserError: a profile that makes no sense, or a file that cannot be read.
    """
    return parse_profile(text, read=_read_file)


def _read_file(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--hetero {name}: {why}; give a file that every host can read") from None
