"""The options of ``qlora-bench run`` that say where its runs are done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from bench.run.executors import Executor

Function = TypeVar("Function", bound=Callable[..., Any])

OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--executor",
        default="local",
        show_default=True,
        metavar="NAME",
        help="local: one run after another here; ray: as tasks of a Ray cluster.",
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="The cluster, or 'auto' for this machine's.  [default: one is started here]",
    ),
    click.option(
        "--gpus-per-run", type=int, metavar="N", help="Cards kept for each run.  [default: those it uses]"
    ),
    click.option(
        "--cpus-per-run",
        type=int,
        metavar="N",
        help="Processors kept for each run.  [default: its threads; on cards one a process]",
    ),
    click.option(
        "--memory-per-run", metavar="SIZE", help="Memory of the machine kept for each run, as in 64GB."
    ),
)


def executor_options(function: Function) -> Function:
    """Give a command the options, in the order in which they stand above."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def executor_of(flags: dict[str, Any], *, preflight: bool) -> Executor:
    """The executor that the options ask for, not entered yet. What only it needs is taken out of ``flags``.

    Raises UserError for options that cannot be.
    """
    from bench.run.executors import choose_executor

    return choose_executor(
        flags["executor"],
        address=flags.pop("ray_address"),
        gpus=flags["gpus_per_run"],
        cpus=flags.pop("cpus_per_run"),
        memory=flags.pop("memory_per_run"),
        preflight=preflight,
    )
