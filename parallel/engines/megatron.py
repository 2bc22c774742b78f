"""Megatron-Core's tensor-parallel layers, by the same `sharding` words as `parallel/tensor.py`.

Of a mixer, `column` and `row` matrices are computed by ColumnParallelLinear and RowParallelLinear,
the embedding by VocabParallelEmbedding. This is their form without sequence parallel
(arXiv 1909.08053): every rank has the whole residual stream, a mixer's output is summed over ranks
forward and the gradient of its input backward. Parameters stay the model's own DTensors, under
their own names, so that FSDP2, optimizers and checkpoints know no difference.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from rondo.errors import UserError
from rondo.models import Decoder
from rondo.models.layers import Linear
from rondo.models.mixer import ChannelMixer, Mixer
from rondo.parallel.engines.megatron_problems import model_problems, vocabulary_problems
from rondo.parallel.tensor import (
    compute_locally,
    distribute,
    outermost,
    set_first_heads,
    shard_module,
    sharding_word,
)
from rondo.parallel.vocabulary import Vocabulary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of fused kernels that are not there
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
    )


class WholeVocabulary(Vocabulary):
    """A divided vocabulary where every rank has the whole time."""

    def whole(self, hidden: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(hidden, group=self.group)


def shard_with_megatron(model: Decoder, mesh: DeviceMesh) -> None:
    """Divides `model` (on the meta device) over the one-dimensional `mesh`, in place. Raises
    UserError for a module that Megatron's layers cannot divide."""
    wrong = [*vocabulary_problems(model.config.vocab_size, mesh.size())]
    if wrong := [*wrong, *model_problems(model.config)]:
        raise UserError("\n".join(wrong))
    group = mesh.get_group()
    config = ModelParallelConfig(
        tensor_model_parallel_size=mesh.size(),
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    layer_options: dict[str, Any] = {
        "config": config,
        "init_method": None,
        "bias": False,
        "tp_group": group,
    }
    set_first_heads(model, mesh)
    for module in outermost(model):
        _use_megatron(module, layer_options)
        shard_module(module, mesh)
        module.register_forward_pre_hook(functools.partial(_copy_input, group))
    _share_vocabulary(model, mesh, config)
    # Used inside mixers, by each rank for its heads: gradients are shares of a sum.
    for module in model.shared.modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute(module, name, mesh, Replicate())
    for module in model.modules():
        if any(isinstance(param, DTensor) for param in module.parameters(recurse=False)):
            compute_locally(module)


def _share_vocabulary(model: Decoder, mesh: DeviceMesh, config: ModelParallelConfig) -> None:
    size, dim = model.config.vocab_size, model.config.dim
    model.cross_entropy = WholeVocabulary(size, mesh.get_group()).cross_entropy
    if model.embedding is not None:
        layer = VocabParallelEmbedding(
            size, dim, init_method=None, config=config, tp_group=mesh.get_group()
        )
        model.embedding.operator = _with_weight(layer)
        distribute(model.embedding, "weight", mesh, Shard(0))
    if model.head is not None:
        distribute(model.head, "weight", mesh, Shard(0))


def _use_megatron(module: Mixer | ChannelMixer, options: dict[str, Any]) -> None:
    """Lets the matrices of `module` be computed by Megatron's layers."""
    for name, child in module.named_modules():
        if not isinstance(child, Linear):
            continue
        word = sharding_word(module, f"{name}.weight")
        sizes = child.inputs, child.outputs
        if word == "column":
            # The module's input is copied once, and its gradient summed once.
            layer = ColumnParallelLinear(
                *sizes, gather_output=False, disable_grad_reduce=True, **options
            )
        elif word == "row":
            layer = RowParallelLinear(*sizes, input_is_parallel=True, skip_bias_add=True, **options)
        else:
            continue
        child.__dict__["forward"] = functools.partial(_linear, child, _with_weight(layer))


def _with_weight(layer: nn.Module) -> Callable[[Tensor, Tensor], Any]:
    """`layer` as a function of its input and its weight."""
    del layer.weight

    def call(x: Tensor, weight: Tensor) -> Any:
        layer.__dict__["weight"] = weight
        return layer(x)

    return call


def _linear(linear: Linear, layer: Callable[[Tensor, Tensor], Any], x: Tensor) -> Tensor:
    y, _ = layer(x, linear.weight.to(x.dtype))
    return y if linear.bias is None else y + linear.bias.to(x.dtype)


def _copy_input(group: dist.ProcessGroup, module: nn.Module, args: tuple[Any, ...]) -> Any:
    return (copy_to_tensor_model_parallel_region(args[0], group=group), *args[1:])
