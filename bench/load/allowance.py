"""What a training holds on a CUDA card beside its tensors: the one term of a plan that is not arithmetic.

``allowance(tensor_bytes)`` is that term in bytes. Its numbers are read off torch's out-of-memory messages,
most of them in public threads, which tell the process's memory, how much of it is allocated, and how much is
reserved but not allocated; the highest of each is taken.
"""

from __future__ import annotations

CONTEXT_BYTES = int(0.73 * 2**30)
"""Outside of torch's allocator: the CUDA context with its modules. 0.41 GiB (RTX 4090,
eosphoros-ai/DB-GPT-Hub#248), 0.49 GiB (RTX 4090, 3DTopia/Phidias-Diffusion#8), 0.49 GiB (A100,
TianheWu/CoSeR#10), 0.51 GiB (RTX 4090, huggingface/lora-fast#1), 0.66 GiB (H100, in a message of our own).
0.73 GiB: H100 with driver 580 and CUDA 13, NVML's figure once all kernels were loaded, less what torch had
reserved (results/h100-80gb/proxy)."""
CUBLAS_BYTES = 32 * 2**20
"""torch's cuBLAS workspace on Hopper (``CUBLAS_WORKSPACE_CONFIG`` :4096:8:16:8); 8 MiB on older cards."""
ALLOCATOR_SHARE = 0.011
"""Reserved but of no use, of what is allocated, when a card is full: 0.1 % (Lightning-AI/lit-llama#137),
0.5 % (axolotl-ai-cloud/axolotl#998), 0.6 % (eosphoros-ai/DB-GPT-Hub#248), 0.8 %
(tatsu-lab/stanford_alpaca#76), 1.1 % (huggingface/lora-fast#1). One more, 10 %, is what
`bench.ask.footprint.TIGHT_SHARE` warns of. Before a card is full the allocator keeps more, and gives it back
when it must, so that nvidia-smi shows more than a plan: 12 % above torch's peak for Llama-2-70B in NF4 on an
A100 (foundation-model-stack/fms-acceleration, a100_80gb.csv)."""


def allowance(tensor_bytes: int) -> int:
    """Bytes beside ``tensor_bytes`` of tensors on one card."""
    return CONTEXT_BYTES + CUBLAS_BYTES + round(ALLOCATOR_SHARE * tensor_bytes)
