"""Known answers: adapters in which something is planted, and whether the benchmark measures or refuses it.

    python -m tests.truth [--json FILE] [--only NAME] [--comparisons N] [--out DIR]        (``make truth``)

``adapters`` holds the planted adapters, ``session`` runs them through the real command and worker, ``verdicts``
compares what was planted with what the records say, and ``__main__`` goes through them all.
"""
