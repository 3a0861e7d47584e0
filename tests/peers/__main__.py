"""``make peers``: run a session, or write the page of one that was run.

    python -m tests.peers [--preset NAME] [--rounds N] [--steps N] [--case NAME]... [--out DIR]
    python -m tests.peers --page DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from bench.cli.endings import EXIT_BAD_INPUT, EXIT_FAILED_RUNS, EXIT_INTERRUPTED
from bench.errors import BadValue, BrokenFile, UserError
from bench.record.store import read_document
from bench.record.writing import write_atomically
from tests.command import ROOT
from tests.peers.cases import CASES, OURS, Environment, choose
from tests.peers.outcome import Session
from tests.peers.preparing import SessionAsked
from tests.peers.session import SESSION_FILE, run_session
from tests.peers.table import markdown

PAGE_FILE = "peers.md"
ENVIRONMENTS = ROOT / ".venv-peers"


@click.command()
@click.option("--preset", default="smollm2-135m", show_default=True, metavar="NAME|FILE")
@click.option("--layers", type=int, metavar="N", help="Keep only the first N decoder layers.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--steps", type=click.IntRange(2, 100_000), default=10, show_default=True)
@click.option("--warmup-steps", type=click.IntRange(1, 1000), default=2, show_default=True)
@click.option("--case", "cases", multiple=True, metavar="NAME", help=f"Of {', '.join(CASES)}. [default: all]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As qlora-bench run takes it.")
@click.option("--timeout-seconds", type=float, default=1800.0, show_default=True, help="Of each run.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("results/local/peers"),
    show_default=True,
)  # fmt: skip
@click.option(
    "--environments", type=click.Path(file_okay=False, path_type=Path), default=ENVIRONMENTS,
    help="Folder of the peers' environments.  [default: .venv-peers]",
)  # fmt: skip
@click.option("--page", is_flag=True, help="Run nothing: write the page of the session in --out again.")
def main(out: Path, page: bool, **flags: Any) -> None:
    """The same work under this project, transformers.Trainer and optimum-benchmark, interleaved."""
    try:
        session = read_session(out) if page else run_session(_asked(out, **flags), click.echo)
    except UserError as error:
        click.echo(f"peers: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        click.echo(f"interrupted: what was finished is in {out / SESSION_FILE}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    path = write_atomically(out / PAGE_FILE, markdown(session))
    click.echo(f"the session took {session.wall_seconds / 60:.1f} min; its page: {path}")
    if any(outcome.arm == OURS and outcome.status != "completed" for outcome in session.outcomes):
        sys.exit(EXIT_FAILED_RUNS)


def _asked(out: Path, cases: tuple[str, ...], environments: Path, **flags: Any) -> SessionAsked:
    steps, warmup_steps = flags["steps"], flags["warmup_steps"]
    if warmup_steps >= steps:
        raise BadValue(f"--warmup-steps ({warmup_steps}) must be below --steps ({steps})")
    pythons: dict[Environment, Path] = {
        name: environments.resolve() / name / "bin" / "python" for name in ("today", "older")
    }
    return SessionAsked(out=out, cases=tuple(choose(cases)), pythons=pythons, **flags)


def read_session(out: Path) -> Session:
    """The session of a folder. Raises BrokenFile where there is none."""
    session = read_document(out / SESSION_FILE, Session, "a session of peers")
    if session is None:
        raise BrokenFile(f"there is no '{out / SESSION_FILE}'")
    return session


if __name__ == "__main__":
    main()
