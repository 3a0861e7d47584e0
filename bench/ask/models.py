"""Which model is meant, and where its weights are: on this disk, to be fetched, or to be drawn.

Torch-free: the command line resolves the model before any worker starts, so that a model that is not
there is one clear line at once and not a failed run after minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs

from bench.ask.documents import parsed
from bench.ask.experiment import Experiment
from bench.ask.plan import ModelRequest
from bench.ask.shapes import size_problem
from bench.ask.shards import safetensors_header, weight_files
from bench.errors import BadValue, BrokenFile, MissingModel

LOCAL_PREFIX = "local/"
"""Names of models that a make target has put into the cache."""
CONFIG_NAME = "config.json"
DOWNLOADED_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")
SYNTHETIC_NOTE = "drawn at random in the model's exact shape"


@dataclass(frozen=True)
class ResolvedModel:
    """A model request, and the folder its weights are in (None for synthetic weights)."""

    request: ModelRequest
    folder: Path | None


def cache_folder() -> Path:
    """Where the project keeps converted and packed checkpoints: QLORA_BENCH_CACHE or the user's cache."""
    configured = os.environ.get("QLORA_BENCH_CACHE")
    return Path(configured) if configured else platformdirs.user_cache_path("qlora-bench")


def resolve_model(experiment: Experiment, *, preset_model: str | None, download: bool) -> ResolvedModel:
    """Find the weights that ``experiment`` asks for.

    ``preset_model``: the preset's own model name, whose architecture the preset knows. ``download``: the
    person has agreed to fetch from the Hub. Raises MissingModel, BrokenFile or BadValue.
    """
    name = experiment.model or preset_model
    if name is None:
        raise BadValue(f"preset '{experiment.preset}' names no model", "give one with --model")
    folder = find_on_disk(name)
    if download and experiment.weights != "synthetic" and _lacks_files(name, folder):
        folder = _download(name)
    known_shape = experiment.architecture if name == preset_model else None
    if folder is not None and experiment.weights != "synthetic":
        architecture = read_config(folder)
        request = ModelRequest(
            name=name,
            weights="real",
            fingerprint=fingerprint_folder(folder),
            architecture=_truncated(architecture, experiment.layers),
            layers=experiment.layers,
        )
        return ResolvedModel(request, folder)
    if experiment.weights == "real" or (folder is None and known_shape is None):
        raise _missing(name, shape_known=known_shape is not None)
    architecture = dict(known_shape) if known_shape is not None else read_config(_given(folder))
    if "quantization_config" in architecture:
        raise BadValue(
            f"'{name}' is a quantized checkpoint", "synthetic weights need the dense model's shape"
        )
    architecture = _truncated(architecture, experiment.layers)
    note = (
        SYNTHETIC_NOTE
        if experiment.weights == "synthetic"
        else f"'{name}' is not on this disk: weights are {SYNTHETIC_NOTE}"
    )
    return ResolvedModel(
        ModelRequest(
            name=name,
            weights="synthetic",
            architecture=architecture,
            layers=experiment.layers,
            note=note,
            fingerprint=_digest(architecture),
        ),
        None,
    )


def find_on_disk(name: str) -> Path | None:
    """The folder of a model: a local folder, one of the cache, or a snapshot of the Hub cache."""
    try:
        if Path(name).is_dir():
            return Path(name)
        if name.startswith(LOCAL_PREFIX):
            folder = cache_folder() / "models" / name.removeprefix(LOCAL_PREFIX)
            return folder if (folder / CONFIG_NAME).is_file() else None
    except (OSError, ValueError) as error:  # too long for a path, or with a NUL in it
        raise MissingModel(f"model '{name}' is neither a folder here nor a Hub id ({error})") from None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise MissingModel(f"model '{name}' is neither a folder here nor a Hub id (owner/name)") from None
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / CONFIG_NAME).is_file() and any(folder.glob("*.safetensors")) else None


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises BrokenFile naming what is wrong."""
    path = folder / CONFIG_NAME
    try:
        config = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenFile(
            f"'{folder}' holds no {CONFIG_NAME}", "a model folder needs config.json and *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise BrokenFile(f"'{path}' is not readable JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BrokenFile(f"'{path}' names no model_type")
    if problem := size_problem(config):
        raise BrokenFile(f"'{path}': {problem}")
    return config


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 over config.json and, of each weight file, its size, header and last mebibyte.

    Not over every byte: 145 GB would take minutes. The header holds every name, shape and offset.
    """
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
    for file in sorted(set(weight_files(folder).values())):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        digest.update(json.dumps(safetensors_header(file), sort_keys=True).encode())
        with file.open("rb") as stream:
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read())
    return digest.hexdigest()


def _truncated(architecture: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    config = dict(architecture)
    if layers is None:
        return config
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int) or layers > depth:
        raise BadValue(f"--layers {layers}: the model has {depth} decoder layers")
    config["num_hidden_layers"] = layers
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:layers]
    return config


def _lacks_files(name: str, folder: Path | None) -> bool:
    """Whether a model is to be fetched: it is not here, or a download that was interrupted left a snapshot
    without some of its shards."""
    if folder is None or Path(name).is_dir() or name.startswith(LOCAL_PREFIX):
        return folder is None
    try:
        return not weight_files(folder)
    except BrokenFile:
        return True


def _download(name: str) -> Path:
    """Fetch a model with consent given. The network is tried once, briefly, so that there is no long wait;
    and a Hub that takes a request and says nothing is not waited for without end."""
    from huggingface_hub import constants, get_session, snapshot_download

    if not _reachable(constants.ENDPOINT):
        raise MissingModel(
            f"model '{name}' is not on this disk and the Hub cannot be reached from here",
            _ways_on(shape_known=False),
        )
    get_session().event_hooks["request"].append(_limited)
    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED_PATTERNS)))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingModel(f"model '{name}' could not be fetched: {reason}") from error


def _reachable(endpoint: str) -> bool:
    """Whether a connection to the Hub can be opened; with a proxy in between only the download can tell."""
    from urllib.request import getproxies, proxy_bypass

    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
        if parts.scheme in getproxies() and not proxy_bypass(host):
            return True
        socket.create_connection((host, port), timeout=5).close()
    except (OSError, ValueError):  # ValueError: a port that is no number
        return False
    return True


def _limited(request: Any) -> None:
    """Give a request of the Hub's client (httpx) a limit for each wait that has none: the one that asks which
    files there are is sent without."""
    from huggingface_hub import constants

    limits = request.extensions.get("timeout", {})
    unlimited = dict.fromkeys(("connect", "read", "write", "pool"), constants.HF_HUB_DOWNLOAD_TIMEOUT)
    given = {name: seconds for name, seconds in limits.items() if seconds is not None}
    request.extensions = {**request.extensions, "timeout": unlimited | given}


def _missing(name: str, *, shape_known: bool) -> MissingModel:
    if name.startswith(LOCAL_PREFIX):
        return MissingModel(
            f"model '{name}' is not in the cache '{cache_folder()}'",
            f"make it with: make {name.removeprefix(LOCAL_PREFIX).split('-')[0]}",
        )
    return MissingModel(f"model '{name}' is not on this disk", _ways_on(shape_known=shape_known))


def _ways_on(*, shape_known: bool) -> str:
    ways = ["give a folder with --model DIR", "fetch it with --download where there is a network"]
    if shape_known:
        ways.insert(0, "use --weights synthetic for memory and speed in its exact shape")
    return ", or ".join(ways)


def _given(folder: Path | None) -> Path:
    assert folder is not None
    return folder


def _digest(architecture: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()
