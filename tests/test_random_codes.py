"""Packed formats of synthetic models too large to be drawn and rounded: codes and scales drawn at random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends._gptqmodel import PackedOptions
from bench.load.contract import PackedBackend, Shape
from bench.load.registry import get_backend
from bench.load.weights import RandomCodes, SyntheticWeights
from bench.record.schema import Record
from tests.checkpoint import make_checkpoint
from tests.command import Command

CPU = torch.device("cpu")
SHAPE = Shape(96, 256)
DEVIATION = 0.02


def backend(identifier: str) -> PackedBackend:
    entry = get_backend(identifier)
    made = entry.backend(PackedOptions(), "cpu", "bfloat16")
    made.fit([SHAPE])
    assert isinstance(made, PackedBackend)
    return made


def draw(identifier: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return backend(identifier).draw(SHAPE, DEVIATION, torch.Generator().manual_seed(seed), CPU)


@pytest.mark.parametrize("identifier", ["gptq", "awq"])
def test_drawn_tensors_are_laid_out_as_packed_ones(identifier: str) -> None:
    drawn, packed = draw(identifier), backend(identifier).pack(torch.randn(96, 256))
    assert {n: (t.shape, t.dtype) for n, t in drawn.items()} == {
        n: (t.shape, t.dtype) for n, t in packed.items()
    }
    again, other = draw(identifier), draw(identifier, seed=1)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(drawn["qweight"], other["qweight"])


@pytest.mark.parametrize("identifier", ["gptq", "awq"])
def test_every_code_occurs_and_zero_points_are_in_the_middle(identifier: str) -> None:
    drawn = draw(identifier)

    def nibbles(name: str) -> torch.Tensor:
        return torch.stack([(drawn[name] >> (4 * place)) & 15 for place in range(8)]).flatten()

    counts = torch.bincount(nibbles("qweight"), minlength=16) / nibbles("qweight").numel()
    assert float((counts - 1 / 16).abs().max()) < 0.01
    # AutoGPTQ's first format stores a zero point less one.
    assert set(nibbles("qzeros").tolist()) == ({7} if identifier == "gptq" else {7, 8})
    scales = drawn["scales"].float()
    assert bool((scales > 0).all())
    # Codes that are all as likely have a standard deviation of 4.61 scales.
    assert float(scales.mean() * 4.61) == pytest.approx(DEVIATION, rel=0.02)


def test_a_layer_is_drawn_by_its_name_and_the_rest_as_ever() -> None:
    shapes = {"a.weight": torch.Size([96, 256]), "a.bias": torch.Size([96]), "norm.weight": torch.Size([8])}
    plain = SyntheticWeights(shapes, DEVIATION)

    def source() -> RandomCodes:
        return RandomCodes(plain, backend("gptq"), {"a": SHAPE, "b": SHAPE}, DEVIATION)

    one, other = source(), source()
    codes = one.tensor("a.qweight")
    one.tensor("a.scales")
    assert not torch.equal(codes, one.tensor("b.qweight"))
    other.tensor("b.qweight")
    assert torch.equal(codes, other.tensor("a.qweight"))
    assert torch.equal(one.tensor("a.bias"), plain.tensor("a.bias"))
    assert torch.equal(one.tensor("norm.weight"), torch.ones(8, dtype=torch.bfloat16))
    assert "a.qweight" in one
    assert "a.weight" not in one
    assert "a.bias" in one


def test_random_codes_train_and_say_what_they_are(tmp_path: Path) -> None:
    command = Command(tmp_path / "cache")
    flags = ("--backend", "gptq,awq", "--calibration", "random", "--set", "cpu_threads=1", "--steps", "2")
    found = command.json("run", "--preset", "tiny", *flags, "--out", tmp_path / "out")
    records = [Record.model_validate(body) for body in found]
    assert [record.status for record in records] == ["completed", "completed"], [r.message for r in records]
    for record in records:
        assert record.quantization is not None
        assert record.quantization.calibration == "random"
        assert any("drawn at random" in note for note in record.quantization.notes)
        assert record.proof.quantized is True
        # Weights as wide as the others': an untrained model's loss is that of guessing.
        assert record.steps[0].losses[0] == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.5)
    assert not (tmp_path / "cache" / "packed").exists()


def test_large_presets_draw_codes_and_small_ones_round(tmp_path: Path) -> None:
    command = Command(tmp_path / "cache")
    for preset, expected in (("qwen2-72b", "random"), ("qwen2-7b", "random"), ("proxy", "rtn")):
        flags = ("--preset", preset, "--weights", "synthetic", "--backend", "awq", "--dry-run")
        (request,) = command.json("run", *flags)
        assert request["calibration"] == expected
    (request,) = command.json(
        "run", "--preset", "qwen2-72b", "--backend", "awq", "--calibration", "rtn", "--dry-run"
    )
    assert request["calibration"] == "rtn"


def test_random_codes_never_take_the_place_of_real_weights(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    flags = ("--preset", "tiny", "--model", folder, "--backend", "gptq", "--calibration", "random")
    done = Command(tmp_path / "cache").run("run", *flags, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "random codes would take the place of real weights" in done.stderr
    assert len(done.stderr.splitlines()) == 1
