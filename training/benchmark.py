"""What a training step costs on this machine: `python -m training.benchmark [--height 128] [--rounds 5] [--device cuda]`.

Compares, alternating, our forms of the strided depthwise convolutions and of the upsampling with PyTorch's own.
"""

import argparse
import statistics
import time

import torch

from training import lpn
from training.precision import has_bfloat16
from training.trainer import add_device


def crops_per_second(device: torch.device, height: int, batch: int, steps: int) -> float:
    """Crops a second of forward, backward and optimizer step, in the precision that training takes, channels last."""
    model = lpn.LPN(50).train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    crops = torch.randn(batch, 3, height, height * 3 // 4, device=device).to(memory_format=torch.channels_last)
    started, loss = 0.0, 0.0
    for step in range(steps + 2):
        if step == 2:  # the first two make or choose the kernels
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            heatmaps = model(crops)
        optimizer.zero_grad()
        squared = heatmaps.float().square().mean()
        squared.backward()
        optimizer.step()
        if step in (1, steps + 1):
            loss += float(squared.detach())  # waits for what an accelerator has not done yet
    return steps * batch / (time.perf_counter() - started)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.benchmark", description="Time LPN-50's training steps.")
    parser.add_argument("--height", type=int, default=128, help="of the crops; they are 3/4 as wide")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    arguments = parser.parse_args()
    device = arguments.device
    torch.backends.cudnn.benchmark = True
    rates: dict[str, list[float]] = {"own": [], "plain": []}
    for _ in range(arguments.rounds):
        for form, found in rates.items():
            lpn.takes_own_forms = lambda _, own=form == "own": own  # type: ignore[misc]
            found.append(crops_per_second(device, arguments.height, arguments.batch, arguments.steps))
            print(f"{form:5} {found[-1]:6.1f} crops/s", flush=True)
    ratios = [own / plain for own, plain in zip(rates["own"], rates["plain"], strict=True)]
    spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    precision = "bfloat16" if has_bfloat16(device) else "float32"
    print(f"own : plain = {spread}, {device.type}, {torch.get_num_threads()} threads, {precision}")


if __name__ == "__main__":
    main()
