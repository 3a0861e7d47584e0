"""A model on several devices: where its parts are, and that it computes what one device computes.

A CPU has one device, so two places share it here. What only a second device would notice, an operation on
tensors of two places, is looked for with a dispatch mode that knows where each storage belongs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.ask.shapes import decoder_of
from bench.load import layout as layouts
from bench.load.fit import work_of
from bench.load.footprint import Plan
from bench.load.layout import Layout, Place, misplaced
from bench.load.sized import SizedModel
from bench.probe.memory import bytes_by_kind
from bench.record.schema import Record
from bench.run import training
from tests.command import Command
from tests.rig import BACKENDS, TINY, Rig, ask, quiet, settled

__all__ = ["settled"]

CPU = torch.device("cpu")
SPLIT = {"placement": "split", "device_count": 2}


def split(backend: str = "bf16", **changes: Any) -> Rig:
    return Rig(ask(backend, layers=4, **SPLIT, **changes))


def test_layers_stay_in_order_and_the_ends_are_where_they_compute() -> None:
    places = tuple(Place(f"cpu:{index}", CPU) for index in range(3))
    layout = Layout(places, (2, 1, 3))
    found = [
        layout.place_of(f"base_model.model.model.layers.{index}.mlp.up_proj").label for index in range(6)
    ]
    assert found == ["cpu:0", "cpu:0", "cpu:1", "cpu:2", "cpu:2", "cpu:2"]
    assert layout.place_of("model.embed_tokens.weight").label == "cpu:0"
    assert layout.place_of("model.rotary_emb.inv_freq").label == "cpu:0"
    assert layout.place_of("model.norm.weight").label == "cpu:2"
    assert layout.place_of("lm_head.weight").label == "cpu:2"
    assert layout.place_of("model.layers.5").label == "cpu:2"
    assert Layout.on(CPU).place_of("lm_head").label == "cpu"


def test_what_is_elsewhere_is_named() -> None:
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2, device="meta", bias=False)}
    )
    assert misplaced(model, Layout.on(CPU)) == ["b.weight is on meta instead of cpu"]


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_model_trains_as_one_on_one_device(backend: str) -> None:
    """To the bit: nothing but the place of its parts is another."""
    one, two = Rig(ask(backend, layers=4)).train().record, split(backend).train().record
    assert one.steps
    assert [(s.losses, s.gradient_norm) for s in one.steps] == [
        (s.losses, s.gradient_norm) for s in two.steps
    ]


@quiet
@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant", "none"])
@pytest.mark.parametrize("padding", ["packed", "right"])
def test_no_operation_mixes_two_places(
    monkeypatch: pytest.MonkeyPatch, checkpointing: str, padding: str
) -> None:
    rig = split("bnb-nf4", checkpointing=checkpointing, work={"padding": padding}, attention="eager")
    found = watched(rig, monkeypatch)
    rig.train()
    assert found.crossings > 0
    assert found.operations > 1000
    assert found.mixed == []


@quiet
def test_the_watching_notices_a_move_that_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load.model.carry", lambda model, layout: None)
    rig = split()
    found = watched(rig, monkeypatch)
    rig.train()
    assert found.mixed != []


@quiet
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backend", ["bf16", "bnb-nf4-dq", "gptq"])
def test_the_bytes_of_each_place_are_those_that_plan_computes(backend: str, tied: bool) -> None:
    rig = split(backend, architecture={**TINY, "tie_word_embeddings": tied})
    rig.train()
    model = SizedModel.of(decoder_of(rig.request.model.architecture), rig.backend)
    work = work_of(rig.request, rig.backend, model.width, rig.request.workload.sequence_length)
    planned = Plan(model, work).split(2).cards
    assert rig.built.layout.layers == tuple(card.layers for card in planned)
    assert rig.trainer
    counted = bytes_by_kind(rig.built, rig.backend, rig.adapters.tensors, rig.trainer.optimizer, {})
    assert [kinds.device for kinds in counted] == ["cpu:0", "cpu:1"]
    for kinds, card in zip(counted, planned, strict=True):
        terms = card.phases[0].terms
        assert kinds.quantized_weights + kinds.quantization_metadata == terms["quantized_weights"]
        assert kinds.unquantized_weights == terms["unquantized_weights"]
        assert kinds.lora == card.phases[-1].terms["lora"]
        assert kinds.optimizer_state is not None


def preset(folder: Path) -> Path:
    path = folder / "four.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**TINY, "num_hidden_layers": 4}.items()]
    text = ['description = "four layers"', 'model = "local/four"', "[architecture]", *lines, "[workload]",
            "sequence_length = 64", "steps = 3"]  # fmt: skip
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def test_a_split_run_records_every_place(tmp_path: Path) -> None:
    command = Command(tmp_path / "cache")
    flags = ("run", "--preset", preset(tmp_path), "--backend", "bnb-nf4", "--set", "cpu_threads=1")
    (found,) = command.json(*flags, "--placement", "split", "--device-count", "3", "--out", tmp_path / "out")
    record = Record.model_validate(found)
    assert record.status == "completed", record.message
    assert record.placement is not None
    assert [place.device for place in record.placement.places] == ["cpu:0", "cpu:1", "cpu:2"]
    assert sum(place.decoder_layers for place in record.placement.places) == 4
    assert record.proof.placed is True
    assert [kinds.device for kinds in record.memory.bytes_by_kind] == ["cpu:0", "cpu:1", "cpu:2"]
    assert "--set placement=split --set device_count=3" in record.command
    # As many places as that leave one without a layer: a row that says so, and not an abort.
    done = command.run(*flags, "--placement", "split", "--device-count", "5", "--out", tmp_path / "five")
    assert done.returncode == 1
    assert "4 decoder layers cannot be spread over 5 devices" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--placement", "single", "--device-count", "2"), "a single placement has one device"),
        (("--placement", "split", "--device-count", "1"), "needs two devices or more"),
        (("--placement", "spilt"), "did you mean 'split'?"),
        (("--placement", "fsdp", "--backend", "awq"), "--placement fsdp is not possible with awq"),
    ],
)
def test_a_placement_that_cannot_be_is_one_line(tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    done = Command(tmp_path).run("run", "--preset", "tiny", *flags, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


class Watched(TorchDispatchMode):
    """Knows the place of each storage that has one, and hands it on from what goes in to what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, str] = {}
        self.kept: list[torch.Tensor] = []
        self.mixed: list[str] = []
        self.operations = self.crossings = 0

    def tag(self, tensor: torch.Tensor, label: str) -> torch.Tensor:
        self.places[tensor.untyped_storage().data_ptr()] = label
        # An address must not be used again while its place is remembered.
        self.kept.append(tensor.detach())
        return tensor

    def place(self, tensor: torch.Tensor) -> str | None:
        return self.places.get(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        labels = {label for t in given if (label := self.place(t))}
        self.operations += 1
        if len(labels) > 1:
            self.mixed.append(f"{func} on {sorted(labels)}")
        out = func(*args, **(kwargs or {}))
        if len(labels) == 1:
            for made in tree_leaves(out):
                if isinstance(made, torch.Tensor) and made.device.type == "cpu":
                    self.tag(made, next(iter(labels)))
        return out


def watched(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Every micro-batch of ``rig`` is watched from now on, and what moves between places is copied."""
    watching, layout = Watched(), rig.built.layout

    class Cross(torch.autograd.Function):
        """There in the forward, and its gradient back in the backward, as copies between devices are."""

        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor, place: Place) -> torch.Tensor:
            ctx.origin = watching.place(tensor)
            watching.crossings += 1
            return watching.tag(_copied(tensor), place.label)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            return watching.tag(_copied(gradients[0]), ctx.origin), None

    def moved(tensor: torch.Tensor, place: Place) -> torch.Tensor:
        if watching.place(tensor) in (None, place.label):
            return tensor
        crossed: torch.Tensor = Cross.apply(tensor, place)  # type: ignore[no-untyped-call]
        return crossed

    whole = training.micro_batch

    def micro_batch(trainer: training.Trainer, *arguments: Any) -> torch.Tensor:
        model = trainer.adapters.model
        watching.places.clear()
        watching.kept.clear()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            watching.tag(tensor, layout.place_of(name).label)
        with watching:
            return whole(trainer, *arguments)

    monkeypatch.setattr(layouts, "moved", moved)
    monkeypatch.setattr(training, "micro_batch", micro_batch)
    return watching


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that no operation has made, so that it belongs nowhere yet."""
    with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        return tensor.detach().clone()
