"""A third-party distribution whose backends fail on purpose, installed into a folder by `install`."""

from __future__ import annotations

from pathlib import Path

MODULE = '''
"""Backends that fail on purpose."""
import os, signal, sys, time
from typing import Literal
from bench.load.contract import Backend, Layer, Options, Shape

KINDS = ("killed", "raises", "out-of-memory", "hangs", "exits", "aborts", "secretly-dense",
         "cuts-the-graph", "shouts", "lies-on-the-pipe", "dies-afterwards")

class Kind(Options):
    kind: Literal[KINDS]

class Misbehaving(Backend):
    """Fails on purpose."""
    variants = {f"bad-{kind}": Kind(kind=kind) for kind in KINDS}

    def linear(self, layer):
        import torch
        kind = self.options.kind
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "raises":
            raise RuntimeError("planted failure\\nin two lines")
        if kind == "out-of-memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if kind == "hangs":
            time.sleep(600)
        if kind == "exits":
            os._exit(0)
        if kind == "aborts":
            os.abort()
        if kind == "shouts":
            print("x" * 3_000_000)
            raise RuntimeError("after three megabytes of output")
        if kind == "lies-on-the-pipe":
            os.write(int(sys.argv[2]), b'noise\\n{"event": "section", "name": "load", "value": {"speed": 1}}\\n')
        built = torch.nn.Linear(layer.shape.in_features, layer.shape.out_features, bias=layer.bias is not None)
        weight = layer.tensors["weight"].to(layer.dtype)
        built.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            built.bias = torch.nn.Parameter(layer.bias, requires_grad=False)
        if kind == "cuts-the-graph":
            built.register_forward_hook(lambda module, inputs, output: output.detach())
        if kind == "dies-afterwards":
            # In training rows come in batches; only the comparison of weights sends plain rows through.
            def die(module, inputs):
                if inputs[0].dim() == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            built.register_forward_pre_hook(die)
        return built

    def expected_bits(self, shape):
        return 4.5 if self.options.kind == "secretly-dense" else 16.0

class NeedsWhatIsNotThere(Backend):
    """Needs a library that nobody has."""
    variants = {"bad-library": Options()}
    requires = ("surely_not_installed",)

    def linear(self, layer):
        raise AssertionError("must not be reached")

    def expected_bits(self, shape):
        return 4.0
'''


def install(site: Path) -> None:
    """Put the distribution into ``site`` as pip would: a module, and metadata with entry points."""
    (site / "misbehaving_backends.py").write_text(MODULE, encoding="utf-8")
    metadata = site / "misbehaving_backends-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving-backends\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[qlora_bench.backends]\n"
        "misbehaving = misbehaving_backends:Misbehaving\n"
        "missing = misbehaving_backends:NeedsWhatIsNotThere\n"
    )
