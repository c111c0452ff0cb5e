"""What a training step costs on this machine: `python -m training.benchmark [--height 128] [--rounds 5]`.

Compares, alternating, the CPU forms of the strided depthwise convolutions and of the upsampling with PyTorch's own.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from training.lpn import LPN, DepthwiseConv, GroupedUpsampling
from training.precision import cpu_has_bfloat16, mixed_precision

_FORMS = {"own": (DepthwiseConv.forward, GroupedUpsampling.forward), "plain": (nn.Conv2d.forward, nn.ConvTranspose2d.forward)}


def crops_per_second(height: int, batch: int, steps: int) -> float:
    """Crops a second of forward, backward and optimizer step, in the precision that training takes, channels last."""
    model = LPN(50).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    crops = torch.randn(batch, 3, height, height * 3 // 4).to(memory_format=torch.channels_last)
    started = 0.0
    for step in range(steps + 2):
        if step == 2:  # the first two make oneDNN's kernels
            started = time.perf_counter()
        with mixed_precision(torch.device("cpu")):
            heatmaps = model(crops)
        optimizer.zero_grad()
        heatmaps.float().square().mean().backward()
        optimizer.step()
    return steps * batch / (time.perf_counter() - started)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.benchmark", description="Time LPN-50's training steps.")
    parser.add_argument("--height", type=int, default=128, help="of the crops; they are 3/4 as wide")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {form: [] for form in _FORMS}
    for _ in range(arguments.rounds):
        for form, (convolution, upsampling) in _FORMS.items():
            DepthwiseConv.forward, GroupedUpsampling.forward = convolution, upsampling  # type: ignore[method-assign,assignment]
            rates[form].append(crops_per_second(arguments.height, arguments.batch, arguments.steps))
            print(f"{form:5} {rates[form][-1]:6.1f} crops/s", flush=True)
    ratios = [own / plain for own, plain in zip(rates["own"], rates["plain"], strict=True)]
    spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    print(f"own : plain = {spread}, {torch.get_num_threads()} threads, {'bfloat16' if cpu_has_bfloat16() else 'float32'}")


if __name__ == "__main__":
    main()
