"""Backends that break in every way that the fault matrix lists (``tests/fault_matrix.py``).

``tests/fault_site.py`` installs this file as a third-party distribution. An ``early-`` one breaks as soon as
its worker begins, before torch is imported, which takes no time; a ``late-`` one while it loads or trains.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from bench.load.contract import Backend, Options

EARLY = (
    "fails", "killed", "aborts", "segfaults", "exits", "leaves", "hangs", "deaf", "stops", "floods", "shouts",
    "half-event", "alien-events", "alien-section", "claims-complete", "claims-nonsense", "lies-about-itself",
    "endless-line", "leaves-a-child", "fills-its-parent", "fills-the-disk", "makes-read-only",
    "removes-the-folder", "not-text", "out-of-memory",
)  # fmt: skip
LATE = ("load-memory", "forward-memory", "backward-memory", "optimizer-memory", "sound")
MORE_THAN_ANY_MACHINE_BYTES = 2**46


class Plant:
    """What an early one does in its worker."""

    def __init__(self, pipe: int, folder: str) -> None:
        self.pipe = pipe
        self.folder = folder
        """Of the records, from the environment."""

    def tell(self, event: dict[str, Any]) -> None:
        self.write(json.dumps(event).encode() + b"\n")

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.pipe, data) :]

    def fails(self) -> None:
        time.sleep(float(os.environ.get("QLORA_PLANT_SECONDS", "0")))
        self.tell({"event": "outcome", "status": "error", "message": "planted"})
        os._exit(0)

    def out_of_memory(self) -> None:
        self.tell({"event": "outcome", "status": "out_of_memory", "message": "planted: no memory left"})
        os._exit(0)

    def killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def aborts(self) -> None:
        os.abort()

    def segfaults(self) -> None:
        ctypes.string_at(0)

    def exits(self) -> None:
        os._exit(0)

    def leaves(self) -> None:
        sys.exit(3)

    def hangs(self) -> None:
        time.sleep(600)

    def deaf(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    def stops(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def floods(self) -> None:
        while True:
            self.tell({"event": "progress", "done": 1, "total": 2})

    def shouts(self) -> None:
        sys.stdout.write("x" * 5_000_000)
        sys.stderr.write("the last words")
        sys.stdout.flush()
        os._exit(1)

    def half_event(self) -> None:
        self.tell({"event": "stage", "name": "train"})
        self.write(b'{"event": "step", "step": {"index": 0, "warm')
        self.killed()

    def alien_events(self) -> None:
        for event in (
            {"event": "step"}, {"event": "stage"}, {"event": "stage", "name": ["load"]},
            {"event": "readings", "readings": 3}, {"event": "outcome"}, {"event": "progress", "done": "x"},
            {"event": "section", "name": {"a": 1}, "value": 2}, {"event": "unheard of"},
        ):  # fmt: skip
            self.tell(event)
        self.write(b'\xff\xfe\n[1]\nnull\n{"event": 3}\n' + b"[" * 50_000 + b"\n" + b"9" * 10_000 + b"\n")
        os._exit(0)

    def alien_section(self) -> None:
        self.tell({"event": "stage", "name": "train"})
        self.tell({"event": "section", "name": "load", "value": {"speed": 1}})
        self.tell({"event": "section", "name": "trainable_weights_finite", "value": True})
        self.fails()

    def claims_complete(self) -> None:
        self.tell({"event": "outcome", "status": "completed", "message": None})
        os._exit(0)

    def claims_nonsense(self) -> None:
        self.tell({"event": "stage", "name": "lunch"})
        self.tell({"event": "outcome", "status": "great", "message": {"a": "b"}})
        os._exit(0)

    def lies_about_itself(self) -> None:
        for name, value in {"key": "../elsewhere", "status": "completed", "request": {}, "started_at": 3}.items():
            self.tell({"event": "section", "name": name, "value": value})
        os._exit(0)

    def endless_line(self) -> None:
        for _ in range(200):
            self.write(b"x" * 2**20)
        self.killed()

    def leaves_a_child(self) -> None:
        if os.fork() == 0:
            os.setsid()
            time.sleep(30)  # with the pipe, which it inherits
            os._exit(0)
        os._exit(0)

    def fills_its_parent(self) -> None:
        for number in range(100):
            self.tell({"event": "section", "name": f"part {number}", "value": "x" * 2**25})
        time.sleep(60)

    def fills_the_disk(self) -> None:
        with (Path(self.folder) / "ballast").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(2**12))
                except OSError:
                    break
        self.fails()

    def makes_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)
        self.fails()

    def removes_the_folder(self) -> None:
        shutil.rmtree(self.folder)
        self.fails()

    def not_text(self) -> None:
        self.tell({"event": "outcome", "status": "error", "message": "no such file: \udcff\ud800"})
        os._exit(0)


def _break_early() -> None:
    """In the worker of one that breaks early: break. The worker's arguments are its order and its pipe."""
    if "bench.run.worker" not in sys.orig_argv or not Path(sys.argv[1]).is_file():
        return
    kind, _, name = json.loads(Path(sys.argv[1]).read_text())["request"]["backend"].partition("-")
    if kind != "early":
        return
    if log := os.environ.get("QLORA_PLANT_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
    getattr(Plant(int(sys.argv[2]), os.environ.get("QLORA_PLANT_FOLDER", "")), name.replace("-", "_"))()


_break_early()


class EarlyKind(Options):
    kind: Literal[EARLY]  # type: ignore[valid-type]


class Early(Backend):
    """Breaks when its worker begins."""

    variants = {f"early-{kind}": EarlyKind(kind=kind) for kind in EARLY}

    def linear(self, layer: Any) -> Any:
        raise AssertionError("must not be reached")

    def expected_bits(self, shape: Any) -> float:
        return 16.0


class LateKind(Options):
    kind: Literal[LATE]  # type: ignore[valid-type]


class Late(Backend):
    """Asks the real allocator for more than there is, in one phase."""

    variants = {f"late-{kind}": LateKind(kind=kind) for kind in LATE}
    options: LateKind

    def linear(self, layer: Any) -> Any:
        import torch

        def exhaust(*_: Any) -> None:
            torch.empty(MORE_THAN_ANY_MACHINE_BYTES, dtype=torch.uint8)

        kind = self.options.kind
        if kind == "load-memory":
            exhaust()
        built = torch.nn.Linear(layer.shape.in_features, layer.shape.out_features, bias=layer.bias is not None)
        weight = layer.tensors["weight"].to(layer.dtype)
        built.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            built.bias = torch.nn.Parameter(layer.bias, requires_grad=False)
        if kind == "forward-memory":
            built.register_forward_hook(exhaust)
        if kind == "backward-memory":
            built.register_full_backward_hook(exhaust)
        if kind == "optimizer-memory":
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            register_optimizer_step_pre_hook(exhaust)
        return built

    def expected_bits(self, shape: Any) -> float:
        return 16.0
