"""Goes through every known answer: a line for each, exit code 1 where one is wrong.

On two cores 40 minutes to two hours: a noisy machine needs more runs until the intervals are narrow enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.record.writing import write_atomically
from tests.truth.plants import PLANTS, Amount
from tests.truth.session import PRESET, Session
from tests.truth.verdicts import Finding


def main() -> int:
    asked = _arguments()
    findings: list[Finding] = []
    began = time.monotonic()
    with ExitStack() as stack:
        folder = asked.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="truth-")))
        session = Session(folder.resolve(), asked.preset)
        amount = Amount(asked.comparisons, asked.repeats)
        for name in asked.only or PLANTS:
            for finding in PLANTS[name](session, amount):
                findings.append(finding)
                print(line(finding), flush=True)
    wrong = sum(not finding.right for finding in findings)
    seconds = time.monotonic() - began
    print(f"{len(findings) - wrong} of {len(findings)} right, in {seconds / 60:.1f} min")
    if asked.json:
        body = {"right": wrong == 0, "wall_seconds": seconds, "findings": [vars(one) for one in findings]}
        write_atomically(asked.json, json.dumps(body, indent=1) + "\n")
        print(f"written: {asked.json}")
    return 1 if wrong else 0


def line(finding: Finding) -> str:
    """One line for a person."""
    verdict = "right" if finding.right else "WRONG"
    return f"{verdict}  {finding.name}: planted {finding.planted}; measured {finding.measured}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.truth", description="known answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the records there (a new folder)")
    parser.add_argument("--only", action="append", choices=PLANTS, help="one of them (repeatable)")
    parser.add_argument("--comparisons", type=int, default=Amount.comparisons, metavar="N")
    parser.add_argument("--repeats", type=int, default=Amount.repeats, metavar="N")
    parser.add_argument("--preset", default=PRESET, metavar="NAME|FILE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
