"""A keyed permutation of {0, …, n-1}, computed element by element without a table.

A balanced Feistel network is a bijection of 2h-bit numbers for any round function. Applying it until the result is
below n (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002) gives a permutation of
{0, …, n-1}, in fewer than four applications on average. NumPy's `Generator.permutation` would need memory for every
window, and its stream may change between NumPy versions (NEP 19).
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8


def permute(
    positions: np.ndarray,  # (b,) integers in [0, n)
    n: int,
    seed: int,
    epoch: int,
) -> np.ndarray:  # (b,) int64 in [0, n)
    """The images of `positions` under the permutation of (seed, epoch)."""
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = _round_keys(seed, epoch)
    values = np.asarray(positions).astype(np.uint64)
    outside = np.arange(values.size)
    while outside.size:
        walked = _feistel(values[outside], keys, half_bits, mask)
        values[outside] = walked
        outside = outside[walked >= np.uint64(n)]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: np.uint64, mask: np.uint64) -> np.ndarray:
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    message = b"window order" + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")
    return np.frombuffer(hashlib.blake2b(message, digest_size=8 * _ROUNDS).digest(), dtype="<u8").astype(np.uint64)
