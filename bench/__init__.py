"""The harness of qlora-bench: identical short QLoRA runs on every quantization backend.

The rooms, in the order in which the work flows: ``ask`` (what is asked for), ``load`` (what is
loaded), ``run`` (what happens), ``probe`` (what is observed), ``record`` (what is kept), ``judge``
(what it means), ``show`` (what a person sees). ``cli`` is the front door.
"""
