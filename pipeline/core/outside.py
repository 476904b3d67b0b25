"""Text from outside, files and networks alike: whatever is wrong with it is one `ValueError` of one line.

>>> parse_json("[" * 100_000)
Traceback (most recent call last):
ValueError: not JSON: nested too deeply
"""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, no UTF-8, nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {' '.join(str(error).split())}") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is no YAML, nested too deeply, or has a tag whose text does not fit; with line and column where
            they are known.
    """
    import yaml  # a moment to import, and few need it

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("not YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"not YAML{where}: {' '.join(problem.split())}") from None
    except Exception as error:  # of a tag's constructor: !!int x is a ValueError, !!bool x a KeyError, and so on
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
