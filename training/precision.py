"""The precision that networks are trained in: bfloat16 where the processor computes in it, else float32."""

import torch


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16, switched off on CPUs that would emulate it: there it is 2.5 times slower than float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu_has_bfloat16())


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 (x86: AVX-512 or AMX; Arm: BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
