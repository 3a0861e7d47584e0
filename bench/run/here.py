"""An order on the machine that carries it out: where on this machine the files of a run are.

    order = order_here(request, folder, packing=request, note=None, replay=True, memory_bytes=...)
    order = moved_here(order)          # one that was made on another machine

A model is the right one by its fingerprint, wherever it lies. What is not here is said with the way to put it
here, and nothing else is taken instead.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from bench.ask.conversations import file_digest
from bench.ask.models import (
    LOCAL_PREFIX,
    ResolvedModel,
    cache_folder,
    find_on_disk,
    fingerprint_folder,
)
from bench.ask.packing import packed_folder
from bench.ask.plan import ModelRequest, RunRequest
from bench.ask.reference import reference_dtype, reference_file, reference_request
from bench.errors import MissingModel, UserError
from bench.probe.machine import device_memory_bytes
from bench.run.order import Order


def order_here(
    request: RunRequest,
    folder: Path | None,
    *,
    packing: RunRequest,
    note: str | None,
    replay: bool,
    memory_bytes: int | None,
) -> Order:
    """The order for ``request`` with the weights in ``folder`` (None: synthetic ones).

    ``packing``: the run that makes its packed checkpoint, which may be itself. ``memory_bytes``: of the
    device that runs; None: unknown.
    """
    packed = None
    if request.calibration not in (None, "random"):
        packed = packed_folder(packing, ResolvedModel(packing.model, folder)).resolve()
    return Order(
        request=request,
        model_folder=folder.resolve() if folder else None,
        packed_folder=packed,
        packing_request=packing if packing is not request else None,
        note=note,
        replay=replay,
        **(_reference(request, memory_bytes) if request.fidelity else {}),
    )


def moved_here(order: Order) -> Order:
    """An order of another machine, with this machine's folders.

    Raises UserError naming what is not here: the model with this fingerprint, or the data with this digest.
    """
    request = order.request
    _check_data(request)
    folder = None
    if order.model_folder is not None:
        folder = find_model_here(request.model, order.model_folder)
    return order_here(
        request,
        folder,
        packing=order.packing_request or request,
        note=order.note,
        replay=order.replay,
        memory_bytes=device_memory_bytes(request.device),
    )


def find_model_here(model: ModelRequest, folder_there: Path) -> Path:
    """The folder with the weights of ``model`` on this machine.

    ``folder_there``: where they are on the machine that planned the run, which may share a disk with this
    one. Raises MissingModel with what is here instead, and how to put it here.
    """
    others = []
    known = find_on_disk(model.name)
    for folder in dict.fromkeys([folder_there, *([known] if known else [])]):
        try:
            found = fingerprint_folder(folder)
        except (OSError, UserError):
            continue
        if found == model.fingerprint:
            return folder
        others.append(f"'{folder}' holds another one ({found[:12]})")
    what = f"model '{model.name}' with fingerprint {model.fingerprint[:12]} is not on {socket.gethostname()}"
    raise MissingModel("; ".join([what, *others]), _way_here(model.name, folder_there))


def _way_here(name: str, folder_there: Path) -> str:
    """How to put a model on this machine."""
    copied = f"copy '{folder_there}' of the machine that gave the command to the same path here"
    if Path(name).is_dir() or name.startswith((".", "/", "~")):
        return copied
    if name.startswith(LOCAL_PREFIX):
        make = f"make {name.removeprefix(LOCAL_PREFIX).split('-')[0]}"
        return f"make it here with: {make} (its cache is '{cache_folder()}'), or {copied}"
    return f"fetch it here with: hf download {name}, or {copied}"


def _check_data(request: RunRequest) -> None:
    """Raise UserError where the training text is not here as it was planned."""
    if request.workload.data is None:
        return
    path = Path(request.workload.data).absolute()
    try:
        found = file_digest(path)
    except (OSError, UserError):
        found = None
    if found != request.data_digest:
        state = "is not on" if found is None else f"is another file ({found[:12]}) on"
        wanted = str(request.data_digest)[:12]
        raise UserError(
            f"the data file '{path}' (SHA-256 {wanted}) {state} {socket.gethostname()}",
            "copy it to the same path here",
        )


def _reference(request: RunRequest, memory_bytes: int | None) -> dict[str, Any]:
    """The parts of an order that concern the comparison with an unquantized model."""
    dtype, reason = reference_dtype(request, memory_bytes)
    if dtype is None:
        return {"reference_note": reason}
    return {
        "reference_file": reference_file(request, dtype).resolve(),
        "reference_request": reference_request(request, dtype),
    }
