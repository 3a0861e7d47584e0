"""The front door: arguments in, calls out, and the only place that prints errors.

Every command imports what it needs when it runs, so that help and listings answer at once; nothing on
this side of the worker process imports torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from bench.errors import BadValue, UserError, unknown

if TYPE_CHECKING:
    from bench.ask.experiment import Experiment
    from bench.load.registry import Entry
    from bench.record.schema import Record
    from bench.run.sweep import Sweep

EXIT_FAILED_RUNS = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
DEFAULT_OUT = Path("results/local")


class _Group(click.Group):
    """A command group that names the nearest command when one does not exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, with a suggestion."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qlora-bench", prog_name="qlora-bench")
def cli() -> None:
    """Which quantization backend should I fine-tune this model on, and will the gradients survive?

    Runs identical short QLoRA trainings on every backend and shows memory, throughput and gradients.
    """


@cli.command()
@click.option("--preset", default="auto", show_default=True, metavar="NAME|FILE", help="What to run on.")
@click.option("--backend", "backends", multiple=True, metavar="ID", help="A backend (repeatable), or 'all'.")
@click.option("--dtype", metavar="DTYPE", help="Compute dtype: bfloat16, float16 or float32.")
@click.option("--device", metavar="DEVICE", help="auto, cpu or cuda.")
@click.option("--model", metavar="SRC", help="A Hub id or a folder, instead of the preset's model.")
@click.option("--weights", metavar="KIND", help="auto (real where on this disk), real or synthetic.")
@click.option("--layers", type=int, metavar="N", help="Keep only the first N decoder layers.")
@click.option("--steps", type=int, metavar="N", help="Optimizer steps of each run.")
@click.option("--repeats", type=int, metavar="N", help="Runs of each backend, with paired seeds.")
@click.option("--seed", type=int, metavar="N", help="Seed of the first repeat.")
@click.option("--data", type=click.Path(dir_okay=False), metavar="FILE", help="JSONL training text.")
@click.option(
    "--calibration",
    default="auto",
    show_default=True,
    metavar="HOW",
    help="How GPTQ and AWQ checkpoints are made: auto, rtn or calibrated.",
)
@click.option("--timeout-seconds", type=float, metavar="N", help="Limit of each run.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting, such as lora.rank=16 or hqq.group_size=128 (repeatable).",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help=f"Folder of records and report.  [default: {DEFAULT_OUT}/PRESET]",
)
@click.option("--download", is_flag=True, help="Agree to fetch the model from the Hub if it is not here.")
@click.option("--force", is_flag=True, help="Repeat runs that are recorded already.")
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors and the report's path.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON instead of the table.")
def run(**options: Any) -> None:
    """Benchmark backends: load, prove, train a few identical steps, record, report."""
    from rich.console import Console

    from bench.run.sweep import run_sweep
    from bench.show.progress import Display

    quiet = options["quiet"] or options["as_json"]
    console = Console(stderr=options["as_json"], quiet=quiet)
    sweep, headline = _prepare_sweep(options)
    console.print(headline, markup=False, highlight=False, soft_wrap=True)
    if options["dry_run"]:
        _print_plan(sweep, as_json=options["as_json"])
        return
    sweep.store.open_for_writing()
    try:
        with Display(console) as display:
            for _ in run_sweep(sweep, display):
                pass
    except KeyboardInterrupt:
        click.echo("interrupted: finished records are kept, the same command goes on from here", err=True)
        sys.exit(EXIT_INTERRUPTED)
    records = [
        record
        for record in sweep.store.records()
        if record.key in {request.key for request in sweep.requests}
    ]
    _show(records, sweep.store.folder, as_json=options["as_json"], quiet=options["quiet"])
    if any(record.status != "completed" for record in records):
        sys.exit(EXIT_FAILED_RUNS)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def backends(as_json: bool) -> None:
    """List the backends, what they are, and whether their libraries are installed."""
    from bench.load.registry import find_backends

    entries = find_backends().values()
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "id": e.id,
                        "description": e.description,
                        "requires": e.backend.requires,
                        "missing": e.missing,
                        "options": e.defaults.model_dump(mode="json"),
                    }
                    for e in entries
                ],
                indent=1,
            )
        )
        return
    width = max(len(entry.id) for entry in entries)
    for entry in entries:
        click.echo(f"{entry.id:<{width}}  {entry.description}")
        if entry.missing:
            click.echo(f"{'':<{width}}  needs {', '.join(entry.missing)}: {entry.install_line}")


@cli.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def check(name: str, as_json: bool) -> None:
    """Check that backend NAME keeps the contract, on a small model that is drawn at random."""
    import tempfile

    from bench.load.registry import get_backend
    from bench.run.conformance import findings, flags
    from bench.run.sweep import run_sweep
    from bench.show.progress import Silent

    entry = get_backend(name)
    with tempfile.TemporaryDirectory(prefix="qlora-bench-check-") as scratch:
        sweep, _ = _prepare_sweep({**flags(name), "out": Path(scratch)})
        records = {record.request.backend: record for record in run_sweep(sweep, Silent())}
    found = findings(records[entry.id], next(iter(records.values())))
    if as_json:
        click.echo(
            json.dumps([{"check": f.name, "passed": f.passed, "detail": f.detail} for f in found], indent=1)
        )
    else:
        click.echo(f"{entry.id}: {entry.description}")
        for finding in found:
            click.echo(f"  {'ok  ' if finding.passed else 'FAIL'}  {finding.name}: {finding.detail}")
    if not all(finding.passed for finding in found):
        sys.exit(EXIT_FAILED_RUNS)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report's paths as JSON.")
def report(folder: Path, as_json: bool) -> None:
    """Write the report (HTML, Markdown, CSV, plots) of the records in FOLDER."""
    from bench.record.store import Store

    records = list(Store(folder).records())
    if not records:
        raise UserError(
            f"'{folder}' holds no records", "make some with: qlora-bench run --out " + str(folder)
        )
    _show(records, folder, as_json=False, quiet=True, paths_as_json=as_json)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print all records as one JSON array.")
def runs(folder: Path, as_json: bool) -> None:
    """List the records in FOLDER."""
    from bench.record.store import Store
    from bench.show.progress import describe_end

    records = list(Store(folder).records())
    if as_json:
        _print_records(records)
        return
    for record in records:
        click.echo(f"{record.key}  {describe_end(record)}")


def main() -> NoReturn:
    """Entry point of the command. Prints a person's errors as one line and exits with 2."""
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        click.echo(f"qlora-bench: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)
    except click.ClickException as error:
        click.echo(f"qlora-bench: {' '.join(error.format_message().split())}", err=True)
        sys.exit(EXIT_BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing to say, and nobody to say it to.
        sys.stderr.close()
        sys.exit(EXIT_FAILED_RUNS)
    sys.exit(0)


def _prepare_sweep(options: dict[str, Any]) -> tuple[Sweep, str]:
    """Everything of ``run`` that can fail because of what was asked, before anything is written."""
    from bench.ask.conversations import file_digest, read_conversations
    from bench.ask.models import resolve_model
    from bench.ask.packing import CALIBRATIONS, decide_calibration
    from bench.ask.plan import plan
    from bench.load.contract import PackedBackend
    from bench.load.registry import find_backends
    from bench.probe.machine import cuda_devices, usable_cores
    from bench.record.store import Store
    from bench.run.sweep import Sweep

    if options["calibration"] not in CALIBRATIONS:
        raise unknown("calibration", options["calibration"], CALIBRATIONS)
    entries = find_backends()
    experiment, preset_model, why = _experiment(options, entries)
    backend_options = {
        name: entries[name].options(experiment.options.get(name, {})).model_dump(mode="json")
        for name in experiment.backends
    }
    digest = None
    if experiment.workload.data is not None:
        read_conversations(Path(experiment.workload.data))
        digest = file_digest(Path(experiment.workload.data))
    model = resolve_model(experiment, preset_model=preset_model, download=options["download"])
    device = _device(experiment.device, has_cuda=bool(cuda_devices()))
    method, calibration_note = decide_calibration(model.request, options["calibration"])
    packed = {name for name in experiment.backends if issubclass(entries[name].backend, PackedBackend)}
    requests = plan(
        experiment,
        model.request,
        device=device,
        cpu_threads=experiment.cpu_threads or usable_cores(),
        options=backend_options,
        data_digest=digest,
        calibrations={name: method if name in packed else None for name in experiment.backends},
        libraries={name: entries[name].backend.requires for name in experiment.backends},
    )
    out = options["out"] or DEFAULT_OUT / Path(experiment.preset).stem
    note = f" ({model.request.note})" if model.request.note else ""
    headline = (
        f"preset {experiment.preset}{why}: {model.request.name}, {model.request.weights} weights{note}, "
        f"on {device}; {len(requests)} runs of {experiment.workload.steps} steps"
    )
    return Sweep(requests, model, entries, Store(out), calibration_note, options["force"]), headline


def _experiment(options: dict[str, Any], entries: dict[str, Entry]) -> tuple[Experiment, str | None, str]:
    """The validated experiment, the preset's own model name, and why the preset was chosen."""
    from bench.ask.experiment import build_experiment, parse_setting
    from bench.ask.preset import AUTOMATIC, choose_preset, load_preset
    from bench.probe.machine import cuda_devices

    name, why = options["preset"], ""
    if name == AUTOMATIC:
        memory = max((card.total_memory_bytes or 0 for card in cuda_devices()), default=None)
        name, reason = choose_preset(memory)
        why = f" (chosen: {reason})"
    preset = load_preset(name)
    values: dict[str, Any] = {
        **preset.experiment_values,
        "preset": name,
        "architecture": preset.architecture,
        "backends": _backend_ids(options["backends"], entries),
    }
    for flag in ("dtype", "device", "model", "weights", "layers", "repeats", "seed", "timeout_seconds"):
        if options[flag] is not None:
            values[flag] = options[flag]
    for flag, key in (("steps", "steps"), ("data", "data")):
        if options[flag] is not None:
            _put(values, ("workload", key), options[flag])
    for text in options["settings"]:
        path, value = parse_setting(text, entries)
        _put(values, path, value)
    return build_experiment(values), preset.model, why


def _backend_ids(asked: Sequence[str], entries: dict[str, Entry]) -> list[str]:
    names = [name for text in asked for name in text.split(",") if name] or ["all"]
    chosen: list[str] = []
    for name in names:
        if name != "all" and name not in entries:
            raise unknown("backend", name, [*entries, "all"])
        chosen += [n for n in (entries if name == "all" else [name]) if n not in chosen]
    return chosen


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a nested value without changing dictionaries that belong to somebody else."""
    *groups, last = path
    for group in groups:
        inner = values.get(group) or {}
        if not isinstance(inner, dict):
            raise BadValue(f"'{group}' is not a table")
        values[group] = dict(inner)
        values = values[group]
    values[last] = value


def _device(asked: str, *, has_cuda: bool) -> Literal["cpu", "cuda"]:
    if asked == "cuda" and not has_cuda:
        raise BadValue("--device cuda: no CUDA device was found", "use --device cpu")
    return "cuda" if has_cuda and asked != "cpu" else "cpu"


def _print_plan(sweep: Sweep, *, as_json: bool) -> None:
    waiting = {request.key for request in sweep.waiting()}
    if as_json:
        click.echo(json.dumps([request.model_dump(mode="json") for request in sweep.requests], indent=1))
        return
    for request in sweep.requests:
        entry = sweep.entries[request.backend]
        state = (
            "recorded already"
            if request.key not in waiting
            else f"unavailable: {entry.install_line}"
            if entry.missing
            else "to run"
        )
        click.echo(f"{request.key}  seed {request.seed}  {state}")
        click.echo(f"  {request.command}")


def _show(
    records: Sequence[Record], folder: Path, *, as_json: bool, quiet: bool, paths_as_json: bool = False
) -> None:
    from rich.console import Console

    from bench.judge.comparison import compare
    from bench.show.report import write_report
    from bench.show.tables import terminal_table

    comparison = compare(records)
    files = write_report(comparison, folder)
    if as_json:
        _print_records(records)
    elif paths_as_json:
        click.echo(
            json.dumps(
                {
                    "page": str(files.html),
                    "markdown": str(files.markdown),
                    "csv": str(files.csv),
                    "plots": [str(path) for path in files.plots],
                }
            )
        )
    else:
        if not quiet:
            Console().print(terminal_table(comparison))
        click.echo(f"report: {files.html}")


def _print_records(records: Sequence[Record]) -> None:
    click.echo(json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1))
