"""``python -m bench``: the same as the ``qlora-bench`` command."""

from bench.cli import main

main()
