"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.run import one_by_one
from tests.browser import find_browser, launched
from tests.command import Command
from tests.fake_worker import FakeWorker, Outcome
from tests.front import front  # noqa: F401
from tests.misbehaving import install

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def _keep_to_one_core() -> None:
    """Under ``pytest -n``, each of its processes and all that it starts stay on a core of their own: torch
    takes as many threads as there are cores, and two processes that share cores wait for each other's."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if worker.startswith("gw") and len(cores) > 1:
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


_keep_to_one_core()


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The real command, with a cache that the whole test session shares."""
    return Command(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def command_with_strangers(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The same, where a third party has installed backends that fail on purpose."""
    site = tmp_path_factory.mktemp("site")
    install(site)
    return Command(command.cache, site)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real Chromium; tests that need one are skipped where there is none."""
    if find_browser() is None:
        pytest.skip("no Chromium on this machine")
    pytest.importorskip("playwright.sync_api")
    with launched() as chromium:
        yield chromium


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for records."""
    return tmp_path / "records"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[Outcome], FakeWorker]:
    """Puts a stand-in for the worker process where margin and triage run theirs."""

    def install(outcome: Outcome) -> FakeWorker:
        fake = FakeWorker(outcome)
        monkeypatch.setattr(one_by_one, "run_sweep", fake)
        return fake

    return install
