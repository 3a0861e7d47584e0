"""The last step of the gate: is the proxy comparison complete, alike, and does its page open?

    python tests/gate.py FOLDER

Prints one line a check and a closing count; exits with 1 if any failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.ask.versions import CURRENT
from bench.load.registry import find_backends
from bench.record.store import Store
from tests.browser import browser_problems, find_browser


def main(folder: Path) -> int:
    records = list(Store(folder).records())
    # Those of other environments have proofs of their own (tests/test_older_stack.py).
    here = {name for name, entry in find_backends().items() if CURRENT in entry.backend.environments}
    checks = {
        "a record of every backend": {r.request.backend for r in records} == here,
        "every run completed": all(r.status == "completed" for r in records),
        "equal data": len({r.workload.digest if r.workload else r.key for r in records}) == 1,
        "equal initial adapters": len({r.lora.initial_digest if r.lora else r.key for r in records}) == 1,
        "equal unquantized weights": len({r.load.weights_digest if r.load else r.key for r in records}) == 1,
        "every step was recorded": all(len(r.steps) == r.request.workload.steps for r in records),
    }
    if find_browser() is None:
        print("skipped  the page opens: no browser is installed")
    else:
        problems = browser_problems(folder / "report.html")
        checks["the page opens without errors or requests"] = not problems
        print("\n".join(problems))
    for name, passed in checks.items():
        print("ok      " if passed else "FAILED  ", name)
    for record in records:
        if record.status != "completed":
            print(f"{record.key}: {record.status} in {record.stage}: {record.message}\n{record.stderr_tail}")
    failed = sum(not passed for passed in checks.values())
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
