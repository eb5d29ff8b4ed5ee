"""Records the golden values anew: python -m tests.golden.record [CASE ...]. Each case runs twice and must agree."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.golden.runs import CASES, machine, make_data, run

VALUES = Path(__file__).with_name("values")


def main(cases: list[str]) -> None:
    """Writes values/CASE.json."""
    VALUES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        make_data(folder / "data")
        for case in cases or CASES:
            first, second = (run(case, folder / "data", folder / time / case) for time in ("first", "second"))
            assert first == second, f"{case} is not reproducible"
            (VALUES / f"{case}.json").write_text(json.dumps({"machine": machine()} | first, indent=0) + "\n")
            print(case, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
