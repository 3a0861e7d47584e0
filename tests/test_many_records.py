"""5,000 records of real size are read and compared in under 10 s and 1 GB, each in a fresh process."""

from __future__ import annotations

import os
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bench.judge.comparison import compare
from bench.judge.regression import find_regressions
from bench.judge.regression_limits import load_limits
from bench.judge.regression_runs import condense
from bench.record.schema import Record
from bench.record.store import Store, read_record
from tests.command import ROOT
from tests.committed import committed
from tests.many_records import real_records, templates, write_many

RECORDS = 5000
MOST_SECONDS = 10.0
MOST_BYTES = 10**9
COMPARISON = """
import sys
from pathlib import Path
from bench.judge.comparison import compare
from bench.record.store import Store
found = compare(record for folder in sys.argv[1:] for record in Store(Path(folder)).records())
print(len(found.rows), len(found.groups))
"""


@dataclass(frozen=True)
class Spent:
    """What a process took, as the system counts it."""

    code: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


def spent_by(*arguments: str | Path) -> Spent:
    """Run a process of this Python to its end; what it prints goes nowhere."""
    began = time.perf_counter()
    with Path(os.devnull).open("w") as nowhere:
        pid = os.posix_spawn(
            sys.executable, [sys.executable, *map(str, arguments)], {**os.environ, "PYTHONPATH": str(ROOT)},
            file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)],
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - began
    return Spent(os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Removed at once: half a gigabyte need not be kept."""
    with TemporaryDirectory() as name:
        write_many(Path(name) / "base", Path(name) / "new", RECORDS)
        yield Path(name)


@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "bench", "compare", "{}/base", "{}/new", "--json"),
        ("-m", "bench", "runs", "{}"),
        ("-c", COMPARISON, "{}/base", "{}/new"),
    ],
    ids=["compare", "runs", "comparison of a report"],
)  # fmt: skip
def test_5000_records_are_read_and_compared_in_10_s_and_1_gb(folder, arguments):
    spent = spent_by(*(text.format(folder) if text != COMPARISON else text for text in arguments))
    print(spent)
    assert spent.code in (0, 1)
    assert spent.wall_seconds < MOST_SECONDS
    assert spent.peak_bytes < MOST_BYTES


# ---- the same in proportion, in seconds --------------------------------------------------------------


def records(tmp_path: Path, count: int) -> list[Record]:
    write_many(tmp_path / "base", tmp_path / "new", count, preset="proxy")
    return [one for side in ("base", "new") for one in Store(tmp_path / side).records()]


def seconds(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@pytest.mark.soak
@pytest.mark.alone
def test_four_times_as_many_records_take_about_four_times_as_long(tmp_path):
    """Quadratic would be sixteen."""
    limits = load_limits()
    many = records(tmp_path, 960)
    few = many[:120] + many[480:600]

    def regressions(made: list[Record]) -> float:
        half = len(made) // 2
        return seconds(lambda: find_regressions(condense(made[:half]), condense(made[half:]), limits))

    regressions(few)  # scipy is imported here
    assert regressions(many) < 8 * min(regressions(few) for _ in range(3))
    assert seconds(lambda: compare(many)) < 8 * min(seconds(lambda: compare(few)) for _ in range(3))


def test_5000_condensed_runs_take_a_quarter_of_a_gigabyte_at_most():
    """Of the largest real record, with the probes of every step: all are held at once, beside the libraries."""
    path = max(committed(), key=lambda path: path.stat().st_size)
    size = path.stat().st_size
    assert size > 100_000
    condense([read_record(path)])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = condense(read_record(path) for _ in range(20))
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(kept) == 20
    assert held / 20 * RECORDS < MOST_BYTES / 4


def test_the_many_are_as_large_as_the_real_ones(tmp_path):
    """The plant itself: small ones and such with probes, and no two alike."""
    real = [path.stat().st_size for path in real_records()]
    write_many(tmp_path / "base", tmp_path / "new", 2 * len(real))
    made = [one for side in ("base", "new") for one in Store(tmp_path / side).records()]
    assert len({one.key for one in made}) == 2 * len(real)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.json")]
    assert sum(sizes) / len(sizes) == pytest.approx(sum(real) / len(real), rel=0.02)
    assert len(templates()) == len(real) >= 16
