"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import Command
from tests.misbehaving import install


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


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for records."""
    return tmp_path / "records"
