"""Counter-based random numbers: each number is a pure function of (seed, step, stream, index), without generator state.

The bits are those of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), computed with int64 tensor operations, so every device draws the same numbers. The 64-bit key is a hash of the
seed and the stream's name; the 128-bit counter holds an index and the step. Rank, world size, micro-batches and shards
do not matter.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

# Blocks of four numbers per chunk. On a CPU the temporaries of a chunk fit in the cache, and operations below torch's
# grain size of 32768 elements run on the calling thread: a hundred short parallel regions per chunk do not pay off.
_CHUNK = {"cpu": 1 << 14}
_CHUNK_ELSEWHERE = 1 << 22
_CHUNK_COMPILED = {"cpu": 1 << 18}
# From this many normal numbers on, the ten rounds are compiled (seconds, once per process): 20x faster, same bits.
_COMPILED_FROM = 1 << 18

Words = tuple[Tensor, Tensor, Tensor, Tensor]
log = logging.getLogger(__name__)


def philox4x32(
    counter: Words,  # four (*) int64 tensors that hold 32-bit words
    key: tuple[int | Tensor, int | Tensor],  # two 32-bit words, as tensors () int64
) -> Words:  # four (*) int64 tensors that hold 32-bit words
    """Ten rounds of Philox4x32. Products of two 32-bit words wrap in int64 to the same 64 bits as in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@cache
def _key(seed: int, stream: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"sophia/{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _words(index: Tensor, seed: int, step: int, stream: str) -> Words:
    low = torch.full((), step & _MASK, dtype=torch.int64, device=index.device)
    high = torch.full((), (step >> 32) & _MASK, dtype=torch.int64, device=index.device)
    return _words_of(index, low, high, *_key(seed, stream))


def _words_of(index: Tensor, low: Tensor, high: Tensor, k0: int | Tensor, k1: int | Tensor) -> Words:
    return philox4x32((index & _MASK, (index >> 32) & _MASK, low, high), (k0, k1))


@cache
def _compiled_words(device: torch.device) -> Callable[[Tensor, int, int, str], Words] | None:
    """Return `_words` compiled, for any number of indices, or None if no compiler works."""
    compiled = torch.compile(_words_of, dynamic=True, fullgraph=True)

    def words(index: Tensor, seed: int, step: int, stream: str) -> Words:
        scalars = (step & _MASK, (step >> 32) & _MASK, *_key(seed, stream))
        result: Words = compiled(index, *(torch.tensor(scalar, dtype=torch.int64, device="cpu") for scalar in scalars))
        return result

    try:
        with torch.compiler.set_stance("default"):  # the caller may have set force_eager
            words(torch.arange(1 << 10, device=device), 0, 0, "")
    except Exception as error:
        log.debug("random numbers are not compiled: %s", error)
        return None
    return words


def _box_muller(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent N(0, 1) float32 tensors from two words; |z| is at most 6.7."""
    radius = torch.sqrt(-2 * torch.log(radius_bits.float() * 2.0**-32 + 2.0**-33))
    angle = angle_bits.float() * (2 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def uniforms(
    seed: int,
    step: int,
    positions: Tensor,  # (*) integers, global sample positions, not negative
    stream: str = "label",
) -> Tensor:  # (*) float32 in [0, 1), 24 random bits each
    """Return one uniform number per position, a pure function of (seed, step, position, stream)."""
    word, *_ = _words(positions.long(), seed, step, stream)
    return (word >> 8).float() * 2.0**-24


def normals_at(
    seed: int,
    step: int,
    name: str,
    indices: Tensor,  # (*) integers, not negative
) -> Tensor:  # (*) float32
    """Return the elements `indices` of the infinite vector u ~ N(0, I) of (seed, step, name)."""
    indices = indices.long()
    w0, w1, w2, w3 = _words(indices >> 2, seed, step, f"normal/{name}")
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    lane = indices & 3
    return torch.where(lane < 2, torch.where(lane == 0, z0, z1), torch.where(lane == 2, z2, z3))


def normals(
    seed: int,
    step: int,
    name: str,
    start: int,
    stop: int,
    device: torch.device | str = "cpu",
    *,
    compile: bool | None = None,
) -> Tensor:  # (stop - start,) float32
    """Return elements start … stop - 1 of the infinite vector u ~ N(0, I) of (seed, step, name).

    compile: whether to use torch.compile, which changes no bit; None: if the range is long enough to pay off.

    Raises ValueError for an invalid range.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"start = {start} and stop = {stop}, expected 0 <= start <= stop")
    out = torch.empty(stop - start, dtype=torch.float32, device=device)
    stream = f"normal/{name}"
    if compile is None:
        compile = out.device.type in ("cpu", "cuda", "xpu") and out.numel() >= _COMPILED_FROM
    compiled = _compiled_words(out.device) if compile else None
    words = compiled or _words
    chunk = (_CHUNK if compiled is None else _CHUNK_COMPILED).get(out.device.type, _CHUNK_ELSEWHERE)
    for first in range(start >> 2, (stop + 3) >> 2, chunk):
        last = min(first + chunk, (stop + 3) >> 2)
        w0, w1, w2, w3 = words(torch.arange(first, last, device=device), seed, step, stream)
        block = torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), dim=-1).flatten()
        low, high = max(start, 4 * first), min(stop, 4 * last)
        out[low - start : high - start] = block[low - 4 * first : high - 4 * first]
    return out


def normals_like(
    param: Tensor,  # (*) a tensor or a DTensor
    seed: int,
    step: int,
    name: str,
    *,
    compile: bool | None = None,
) -> Tensor:  # like param, float32
    """Return u ~ N(0, I) in the shape of `param`; element i of the flattened *full* tensor is element i of `normals`.

    A shard of a DTensor gets its slice of the full tensor's noise on any mesh, without communication. `compile` as in
    `normals`.
    """
    if not isinstance(param, DTensor):
        return normals(seed, step, name, 0, param.numel(), param.device, compile=compile).view(param.shape)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    device = param.to_local().device
    if tuple(shape[1:]) == tuple(param.shape[1:]):  # whole rows: one contiguous range
        row = math.prod(param.shape[1:])
        start = offset[0] * row if shape else 0
        local = normals(seed, step, name, start, start + math.prod(shape), device, compile=compile).view(shape)
    else:
        index = torch.zeros((), dtype=torch.int64, device=device)
        for size, first, full in zip(shape, offset, param.shape, strict=True):
            index = index.unsqueeze(-1) * full + torch.arange(first, first + size, device=device)
        local = normals_at(seed, step, name, index)
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def generators_kept(devices: Iterable[torch.device]) -> AbstractContextManager[None]:
    """Restore torch's generators, which dropout uses, on exit: those of the CPU and of the devices.

    If a first computation runs inside, a second one after it draws the same dropout masks.
    """
    accelerators = {device for device in devices if device.type not in ("cpu", "meta")}
    return torch.random.fork_rng(accelerators, device_type=next((d.type for d in accelerators), "cuda"))
