"""What a benchmark found: one JSON line, and the same in docs/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parents[1] / "docs" / "results"


def write_result(result: dict[str, Any]) -> None:
    """Print `result` and write it to the file that its "name" names."""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    (_FOLDER / f"{result['name']}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
