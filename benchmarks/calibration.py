"""The machine's matrix-product rate, measured on large square products, and the datasheet's; utilisation is relative to it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

SIZES = {"cpu": (1024, 2048, 3072), "cuda": (4096, 8192, 12288)}

# Dense bf16 TFLOP/s from NVIDIA's datasheets, by a part of the device's name; the first match counts.
DATASHEET = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def matrix_product_rate(
    dtype: torch.dtype, device: torch.device, seconds: float = 1.0, sizes: Sequence[int] | None = None
) -> float:
    """FLOP/s of the fastest of a few square products, each repeated for about `seconds`; a multiply-add counts as two."""
    best = 0.0
    for size in sizes or SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            best = max(best, 2 * size**3 / _timed_product(a, b, out))
    return best


def _timed_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    if a.device.type != "cuda":
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def datasheet_rate(device: torch.device) -> float | None:
    """The datasheet's dense bf16 FLOP/s of a known GPU; None for others and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * rate for part, rate in DATASHEET.items() if part in name), None)
