"""Memory: how many tokens a batch may have, and how much a process has used."""

from __future__ import annotations

import sys
from typing import Any

import torch

#: Tokens of a batch on a CPU, and the most on a GPU.
CPU_TOKENS, GPU_TOKENS_MOST = 2048, 65536


def fitting_tokens(model: Any) -> int:
    """The number of tokens for which a pass with gradients through all blocks probably has room.

    On a GPU it follows from the free memory of the fullest device; if the estimate is too high, batches are halved. On
    a CPU longer batches are no faster.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if not devices:
        return CPU_TOKENS
    config = model.config.get_text_config()
    # What a block keeps for its backward pass: attention and norms in units of the hidden size, the MLP in units of its
    # width.
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    kept = config.num_hidden_layers * (12 * config.hidden_size + 4 * wide) * model.dtype.itemsize / len(devices)
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    return max(CPU_TOKENS, min(int(free / 2 / kept), GPU_TOKENS_MOST))


def peak_memory_bytes() -> int:
    """The GPU's peak allocation if there is a GPU, else the process's peak resident size, in bytes."""
    if torch.cuda.is_available():
        return int(sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())))
    import resource

    # macOS counts in bytes, Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
