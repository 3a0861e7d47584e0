"""Known peers beside this project: the same model, data, adapters and steps under each, in one session.

    make peers [FLAGS="--rounds 5 --preset smollm2-135m ..."]      (``python -m tests.peers --help``)

    work           what is to be done: written once, read by every peer's process (standard library only)
    subject        makes the checkpoint, the batches and the initial adapters that all of them read
    observer       looks on inside a peer's process: losses, times, memory, digests of what was consumed
    trainer_peer, optimum_peer    one run under ``transformers.Trainer``, and under optimum-benchmark
    cases, arms, session    what is run beside what, how, and in which order
    outcome        what is kept of each run
    arithmetic, sameness, table    what it comes to

The peers' processes run in environments of their own (``today.txt``, ``older.txt``), in which only `work`,
`observer`, the peer's own module and ``bench.run.isolation`` are imported.
"""
