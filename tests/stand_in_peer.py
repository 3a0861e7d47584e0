"""Stands in for a peer's process in tests of what becomes of one: ``python -m tests.stand_in_peer WORK FOLDER HOW``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from tests.peers.work import OBSERVED_FILE, OWN_FILE, end_with_parent, enter, write_json


def main(folder: Path, how: str) -> None:
    """Do as it was told."""
    end_with_parent()
    enter(folder, "load")
    match how:
        case "raise":
            raise ImportError("cannot import name 'Gone' from 'library' (/home/me/site-packages/library/__init__.py)")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "complete":
            write_json(folder / OBSERVED_FILE, {"steps": [], "quantized_layers": 0})
            write_json(folder / OWN_FILE, {"train_runtime": float("inf")})


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3])
