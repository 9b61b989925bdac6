"""The compiled kernels become machine code for GPUs of compute capability 8.0 and 9.0, without a GPU.

It needs triton, which the CPU build of torch does not bring: pip install triton==3.6.0. torch.compile's graph compiler
and triton's own ptxas do the work, for sizes known when compiling; nothing is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from models.head import UNCOMPILED
from sophia import kernels
from sophia.adahessian import adahessian_update, squared_hessian_update
from sophia.lion import lion_update
from sophia.random import _words_of
from sophia.sophia import (
    gauss_newton_update,
    hessian_update,
    sophia_power_update,
    sophia_unclipped_update,
    sophia_update,
)
from tests.gpu.fake_cuda import DEVICE, fake_cuda

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels: make test-gpu"),
]

CAPABILITIES = {80: 108, 90: 132}  # multiprocessors of an A100 and an H100
#: A rule, its number of tensors and of hyper-parameters.
RULES = {
    "sophia_update": (sophia_update, 4, 5),
    "sophia_unclipped_update": (sophia_unclipped_update, 4, 5),
    "sophia_power_update": (sophia_power_update, 4, 7),
    "gauss_newton_update": (gauss_newton_update, 2, 2),
    "hessian_update": (hessian_update, 2, 1),
    "lion_update": (lion_update, 3, 4),
    "adahessian_update": (adahessian_update, 4, 6),
    "squared_hessian_update": (squared_hessian_update, 2, 1),
}


@contextmanager
def without_a_gpu(capability: int) -> Iterator[None]:
    """Give inductor and triton the properties of a GPU that is not there."""
    from torch._dynamo import device_interface
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name="fake",
        major=major,
        minor=minor,
        multi_processor_count=CAPABILITIES[capability],
        regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=163 << 10,
    )

    class Interface(device_interface.CudaInterface):
        class Worker:
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        get_device_properties = staticmethod(lambda device=None: properties)
        get_compute_capability = staticmethod(lambda device=None: capability)
        is_available = staticmethod(lambda: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: DEVICE,
    )
    replaced: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "current_stream": lambda *_: None,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (major, minor),
        "get_rng_state": lambda *_: torch.zeros(1),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
    }
    device_interface.get_interface_for_device("cpu")  # registers those of torch
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces))
        for device in ("cuda", "cuda:0"):
            device_interface.register_interface_for_device(device, Interface)
        for name, function in replaced.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", function))
        stack.enter_context(mock.patch("torch._C._cuda_getCurrentRawStream", create=True, return_value=0))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        stack.enter_context(mock.patch.object(driver, "_active", target))
        stack.enter_context(config.patch({"fx_graph_cache": False, "compile_threads": 1}))
        stack.enter_context(config.patch({"use_static_triton_launcher": False}))
        yield


def machine_code(
    function: Callable[..., Any], inputs: list[Tensor], capability: int, **options: Any
) -> dict[str, list[bytes]]:
    """Return the kernels of a function by name, each with the machine code of its configurations."""
    from torch._inductor import compile_fx, config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.decomposition import select_decomp_table
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    sources: dict[str, str] = {}

    def collect(self: AsyncCompile, name: str, source: str, *_: str, **__: str) -> None:
        sources[name] = source

    def results(*arguments: Tensor) -> tuple[Any, ...]:
        returned = function(*arguments)
        return () if returned is None else returned if isinstance(returned, tuple) else (returned,)

    pure = functionalize(results, remove="mutations_and_views")
    graph = make_fx(pure, decomposition_table=select_decomp_table())(*inputs)
    with mock.patch.object(AsyncCompile, "triton", collect), config.patch(options):
        compile_fx.compile_fx_inner(graph, inputs)
    found: dict[str, list[bytes]] = {}
    for name, source in sources.items():
        kernel = getattr(PyCodeCache.load(source), name)
        kernel.precompile(warm_cache_only=True)
        found[name] = [result.kernel.asm["cubin"] for result in kernel.compile_results]
    return found


def check(found: dict[str, list[bytes]]) -> None:
    assert found
    for codes in found.values():
        assert codes
        assert all(code.startswith(b"\x7fELF") for code in codes)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", RULES)
def test_the_rules_of_the_optimizers(name: str, capability: int) -> None:
    """As training calls them, with the scale of a clipped gradient and a flag that skips the step."""
    rule, width, hyper = RULES[name]
    with fake_cuda(), without_a_gpu(capability):
        rows = [torch.empty(100_003 + 1000 * row, device=DEVICE) for row in range(kernels.ROWS) for _ in range(width)]
        scalars = [torch.empty((), dtype=torch.float64) for _ in range(hyper)]
        amp = [torch.empty((), device=DEVICE), torch.empty((), dtype=torch.float64, device=DEVICE)]
        with mock.patch("torch.compile", lambda function, **_: function):
            apply_to_rows = kernels._compile(rule, rows[:width], [*scalars, *amp])

        def flat(*arguments: Tensor) -> Tensor | None:
            return apply_to_rows(list(arguments[: len(rows)]), list(arguments[len(rows) :]))

        check(machine_code(flat, [*rows, *scalars, *amp], capability, realize_opcount_threshold=1))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", UNCOMPILED._fields)
def test_the_passes_of_the_loss_head(name: str, capability: int) -> None:
    with fake_cuda(), without_a_gpu(capability):
        logits = torch.empty(8192, 50304, dtype=torch.bfloat16, device=DEVICE)[:, :50257]
        inputs = [logits]
        if name == "block_masses":
            inputs.append(torch.empty(8192, device=DEVICE))
        elif name == "add_":
            shape = (50304, 768)
            inputs = [torch.empty(shape, device=DEVICE), torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)]
        check(machine_code(getattr(UNCOMPILED, name), inputs, capability))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_random_numbers(capability: int) -> None:
    with fake_cuda(), without_a_gpu(capability):
        index = torch.empty(1 << 20, dtype=torch.int64, device=DEVICE)
        words = [torch.empty((), dtype=torch.int64) for _ in range(4)]
        check(machine_code(_words_of, [index, *words], capability))
