"""The precision that networks are trained in: bfloat16 where the processor computes in it, else float32."""

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether to train in bfloat16: not on CPUs that would emulate it, where it is 2.5 times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
