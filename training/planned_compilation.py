"""A model whose blocks keep between forward and backward what torch.compile would keep, without compiling anything.

AOTAutograd traces a block's forward and backward, and inductor's partitioner cuts the two: what it saves is what a
compiled block saves. The graphs are then run operation by operation; results of elementwise operations that do not
leave a graph are taken to be fused into kernels, and not counted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
import torch.fx.traceback
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.checkpoint import CheckpointPolicy

import models.gpt2
from models import GPT2
from models.gpt2 import Block
from training.memory_trace import MemoryTrace

_ANEW = "computed anew in the backward pass"

Compiled = Callable[[Sequence[Tensor], Tensor], Tensor]


def as_if_compiled(model: GPT2, trace: MemoryTrace) -> None:
    """Give each block a forward as `block.compile()` would, to be run under the trace on fake tensors."""
    with unset_fake_temporarily(), torch.device("meta"):
        template = Block(model.config, 0)
    names = [name for name, _ in template.named_parameters()]
    compiled: dict[Any, Compiled] = {}  # the blocks share what is compiled for one

    def forward_of(block: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if model.attention == "math":  # to be differentiated twice, and so not compiled
                return type(block).forward(block, x)  # type: ignore[no-any-return]
            parameters = [block.get_parameter(name) for name in names]
            if block.attention.logit_factor is not None:
                parameters.append(block.attention.logit_factor)
            autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            key = (x.shape, x.dtype, x.requires_grad, parameters[0].dtype, autocast, torch.is_grad_enabled())
            if key not in compiled:
                compiled[key] = _compile(template, names, parameters, x, trace)
            return compiled[key](parameters, x)

        return forward

    for block in model.blocks:
        block.forward = forward_of(block)  # type: ignore[method-assign, assignment]


def _compile(
    template: Block, names: list[str], parameters: Sequence[Tensor], x: Tensor, trace: MemoryTrace
) -> Compiled:
    from torch._inductor.decomposition import select_decomp_table

    def block(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        if len(parameters) > len(names):
            template.attention.logit_factor = parameters[-1]
        return torch.func.functional_call(template, dict(zip(names, parameters, strict=False)), (x,))  # type: ignore[no-any-return]

    def run(graph: torch.fx.GraphModule, example: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            with trace.fused():
                results = graph(*arguments)
            trace.count(results)
            return results

        return make_boxed_func(counted)

    compiler: Any = run
    function: Compiled = aot_function(
        block, compiler, compiler, partition_fn=_partition, decompositions=select_decomp_table()
    )
    recomputed = models.gpt2.recomputed
    models.gpt2.recomputed = _marked
    try:
        # Hooks of its own: an activation checkpoint around the block must not take the tracing for its forward.
        own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        # Both losses of one forward may be differentiated, as GPT2.compile sees to.
        kept = torch._functorch.config.patch(donated_buffer=False)
        with trace.paused(), torch.fx.traceback.preserve_node_meta(), own_hooks, kept:
            function(parameters, torch.empty_like(x, requires_grad=x.requires_grad))
    finally:
        models.gpt2.recomputed = recomputed
    return function


def _marked(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """models.gpt2.recomputed in a trace: its operations carry the mark that `_partition` looks for."""
    with torch.fx.traceback.annotate({_ANEW: True}):
        return function(x)


def _partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
    for node in joint.graph.nodes:
        marked = node.op == "call_function" and node.meta.get("custom", {}).get(_ANEW)
        if marked and node.meta.get("partitioner_tag") != "is_backward":
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0
    return min_cut_rematerialization_partition(joint, inputs, **options)
