"""Scenes of the fault matrix around what is read: checkpoints, libraries, the Hub (``tests/fault_place.py``)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.broken_hub import broken_hub
from tests.fault_place import Found, Place, scene
from tests.fault_site import install_distribution, spoil_library

CONFIG = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip
HEADER = json.dumps({"w": {"dtype": "U8", "shape": [4096], "data_offsets": [0, 4096]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(4096)
REAL = ("--quiet", "--set", "fidelity=off", "--model")


def spoilt_checkpoint(files: Mapping[str, bytes | str | None]) -> Callable[[Place], Found]:
    """A scene with a small checkpoint some of whose files are others, or are not there."""

    def play(place: Place) -> Found:
        folder = place.folder / "model"
        folder.mkdir()
        sound: dict[str, bytes | str | None] = {"config.json": json.dumps(CONFIG), "model.safetensors": WEIGHTS}
        for name, content in (sound | dict(files)).items():
            if content is not None:
                data = content.encode() if isinstance(content, str) else content
                (folder / name).write_bytes(data)
        return place.simple("bf16", flags=(*REAL, str(folder)))

    return play


INDEX = json.dumps({"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}})
for _name, _files in {
    "truncated": {"model.safetensors": WEIGHTS[:-100]},
    "empty": {"model.safetensors": b""},
    "corrupt": {"model.safetensors": len(HEADER).to_bytes(8, "little") + b"\x93" * 5000},
    "no weights": {"model.safetensors": None},
    "no configuration": {"config.json": None},
    "configuration is no JSON": {"config.json": json.dumps(CONFIG)[:40]},
    "shard missing": {"model.safetensors.index.json": INDEX},
    "unknown kind of model": {"config.json": json.dumps(CONFIG | {"model_type": "unheard_of"})},
}.items():
    scene(f"checkpoint: {_name}")(spoilt_checkpoint(_files))


def _real_checkpoint(place: Place, change: Callable[[Path], None]) -> Found:
    from tests.checkpoint import make_checkpoint

    folder = make_checkpoint(place.folder / "model")
    change(folder)
    return place.simple("bf16", flags=(*REAL, str(folder)))


@scene("checkpoint: configuration of another model")
def _other_shape(place: Place) -> Found:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 256}))

    return _real_checkpoint(place, change)


@scene("checkpoint: NaN")
def _nan(place: Place) -> Found:
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors: dict[str, Any] = load_file(file)
        tensors[name][3, 5] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})

    found = _real_checkpoint(place, change)
    (record,) = found.records
    assert record["proof"]["weights_finite"] is False
    assert any("model.layers.1.mlp.up_proj" in words for words in record["proof"]["non_finite_weights"])
    assert record["first_failure"]["module"] == "model.layers.1.mlp.up_proj"
    assert record["steps"][0]["losses"] == ["NaN"]
    return found


# ---- library


@scene("library: broken entry point")
def _broken_entry_point(place: Place) -> Found:
    site = place.folder / "site"
    points = "[qlora_bench.backends]\nbroken = leaves_at_once:Backend\n"
    install_distribution(site, "leaves-at-once", "1.0", points)
    (site / "leaves_at_once.py").write_text("raise SystemExit('not today')\n")
    return place.simple("bf16", more={"PYTHONPATH": f"{site}{os.pathsep}{place.command.environment['PYTHONPATH']}"})


@scene("library: wrong version")
def _wrong_version(place: Place) -> Found:
    libraries = place.folder / "libraries"
    spoil_library(libraries, "bitsandbytes", "__version__ = '0.1'\n")
    path = f"{libraries}{os.pathsep}{place.command.environment['PYTHONPATH']}"
    found = place.simple("bnb-nf4", more={"PYTHONPATH": path})
    assert found.records[0]["request"]["versions"]["bitsandbytes"] == "0.1"
    return found


# ---- hub


def asked_of_a_hub(way: str) -> Callable[[Place], Found]:
    """A scene with a Hub that is broken in this way."""

    def play(place: Place) -> Found:
        limits = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HOME": str(place.folder / "hub")}
        with broken_hub(way) as address:
            flags = ("--quiet", "--download", "--model", "someone/model")
            found = place.simple("bf16", flags=flags, more={**limits, "HF_ENDPOINT": address}, timeout=100)
        assert not place.out.exists()
        return found

    return play


for _way in ("refuses", "hangs", "redirects", "redirects_into_nowhere", "fails", "forbids", "is_no_hub",
             "hangs_in_a_file"):  # fmt: skip
    scene(f"hub: {_way.replace('_', ' ')}")(asked_of_a_hub(_way))
