"""A network as a graph from images to logits, rewritten for inference: the same results, less to compute."""

from __future__ import annotations

import copy
import operator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bcmfnet.inference.layers import ContextOp, ConvAddReLU, Normalization, Stem
from bcmfnet.models.ddrnet import DualResolutionNet
from bcmfnet.nn.context import ConvUnit, PyramidContext
from bcmfnet.ops import _cpu
from bcmfnet.ops._checks import HALF_AND_SINGLE
from bcmfnet.ops._library import OPS
from bcmfnet.ops._lmfm import beats_modules
from bcmfnet.ops.backends import has_kernel

Kind = TypeVar("Kind", bound=nn.Module)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def folded(model: DualResolutionNet, dtype: torch.dtype, memory_format: torch.memory_format) -> fx.GraphModule:
    """Images [N, 3, H, W] to logits at 1/8 in evaluation mode, computed in `dtype`; the model is left as it is.

    A batch norm whose input is a convolution, or the sum before the head, goes into the weights, in float64 and before
    they are rounded to `dtype`. Those before a ReLU and a convolution, in the context module, stay, in float32.
    """
    root = _Logits(_bare_copy(model).double().eval(), dtype, memory_format)
    _fold_head_entry(root.model)
    network = fx.GraphModule(root, _Tracer().trace(root), type(model).__name__)
    for node in list(network.graph.nodes):
        if _called(network, node, nn.Identity) is not None:
            _replace(node, _node(node.args[0]))
        elif (norm := _called(network, node, NORMS)) is not None:
            _fold_norm(network, node, norm)
    return _cast(_finished(network), dtype, memory_format).requires_grad_(False)


def with_context_op(network: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """The network of `folded`, its context module as one op where a kernel serves it that is faster than the
    modules; it is changed in place.
    """
    device = _device(network)
    if has_kernel("lmfm", device) and beats_modules(device, dtype, _cpu.features()):
        for node in network.graph.nodes:
            context = _called(network, node, PyramidContext)
            if context is not None and _is_what_the_op_computes(context):
                network.set_submodule(str(node.target), ContextOp(context, dtype))
    return network


def _is_what_the_op_computes(context: PyramidContext) -> bool:
    """Whether its modules are those that it was made of, in pre-activation units."""
    kinds = (*NORMS, nn.Conv2d, nn.ReLU, ConvUnit, nn.Sequential, nn.ModuleDict)
    plain = all(type(module) in kinds for module in context.modules() if module is not context)
    return context.norm_order == "pre" and plain


def fused(network: fx.GraphModule, normalization: Normalization | None = None) -> fx.GraphModule:
    """The network of `folded`, its convolutions and upsamplings with the sums and ReLUs after them; it is changed in
    place.

    What cannot be part of one of them works in place where nothing else reads its input. With mean and std it takes
    uint8 images, and normalises them.
    """
    for node in list(network.graph.nodes):
        if node.target is F.interpolate and has_kernel("upsample_add_relu", _device(network)):
            _join_upsampling(network, node)
    for node in list(network.graph.nodes):
        if (conv := _called(network, node, nn.Conv2d)) is not None:
            _take_sum(node)
            _take_bias(network, node, conv)
            network.set_submodule(str(node.target), ConvAddReLU(conv, relu=_take_relus(network, node)))
    for node in list(network.graph.nodes):
        _work_in_place(network, node)
    _join_stem(network, normalization)
    return _finished(network)


class _Logits(nn.Module):
    """The part of a model that inference needs."""

    def __init__(self, model: DualResolutionNet, dtype: torch.dtype, memory_format: torch.memory_format):
        super().__init__()
        self.model, self.dtype, self.memory_format = model, dtype, memory_format

    def forward(self, images):  # a traced graph keeps annotations, and as text it could not be pickled
        images = images.to(self.dtype, memory_format=self.memory_format)
        _, high, low = self.model.backbone(images)
        return self.model.decode(high, low)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, PyramidContext) or super().is_leaf_module(module, name)


def _bare_copy(model: DualResolutionNet) -> DualResolutionNet:
    """A copy without hooks, which would run while the copy is traced."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


@torch.no_grad()
def _fold_head_entry(model: DualResolutionNet) -> None:
    """Fold the head's first batch norm into what the sum before it is made of: the high branch and the context.

    An affine map of each channel goes through the sum and through bilinear upsampling, whose weights add up to 1; the
    high branch alone takes the shift.
    """
    norm, high, context = model.head.bn1, model.backbone.high5, model.context
    skip = high.get_submodule("downsample.1")  # the batch norm after its 1x1
    assert isinstance(skip, NORMS) and norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    for last in (high.bn3, skip):
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    high.bn3.bias.add_(norm.bias - norm.running_mean * scale)
    for unit in filter(None, (context.compression, context.shortcut)):
        if context.norm_order == "post":
            unit.norm.weight.mul_(scale)
            unit.norm.bias.mul_(scale)
        else:
            unit.conv.weight.mul_(scale.view(-1, 1, 1, 1))
    model.set_submodule("head.bn1", nn.Identity())


def _fold_norm(network: fx.GraphModule, node: fx.Node, norm: nn.modules.batchnorm._BatchNorm) -> None:
    source = _node(node.args[0])
    conv = _called(network, source, nn.Conv2d)
    if conv is not None and len(source.users) == 1:
        network.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
        _replace(node, source)


def _cast(network: fx.GraphModule, dtype: torch.dtype, memory_format: torch.memory_format) -> fx.GraphModule:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype, memory_format=memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
        elif isinstance(module, NORMS) and dtype != torch.float64:
            module.float()
    return network


def _join_upsampling(network: fx.GraphModule, node: fx.Node) -> None:
    """Make one op of an upsampling, the sum with the map whose size it has, and the ReLUs of that."""
    (total,) = node.users
    if total.target is operator.add and _take_relus(network, total):
        (high,) = (argument for argument in total.args if argument is not node)
        operation = OPS.upsample_add_relu  # a graph is traced anew when it is unpickled
        with network.graph.inserting_after(total):
            _replace(total, network.graph.call_function(operation, (high, *node.args)))
        network.graph.eliminate_dead_code()


def _take_sum(node: fx.Node) -> None:
    """Let a convolution add what is there before it: `node` then takes it as a second argument."""
    user = next(iter(node.users))
    if len(node.users) == 1 and user.target is operator.add:
        (other,) = (_node(argument) for argument in user.args if argument is not node)
        if other < node:
            node.args = (*node.args, other)
            _replace(user, node)


@torch.no_grad()
def _take_bias(network: fx.GraphModule, node: fx.Node, conv: nn.Conv2d) -> None:
    """Let a convolution add the bias of the one whose result only it reads, to add it: where no ReLU follows at once,
    a bias is a pass of its own on a GPU.
    """
    added = _node(node.args[1]) if len(node.args) > 1 else None
    other = None if added is None or len(added.users) > 1 else _called(network, added, ConvAddReLU)
    if other is not None and not other.relu and other.conv.bias is not None and conv.bias is not None:
        conv.bias += other.conv.bias
        other.conv.bias = None


def _take_relus(network: fx.GraphModule, node: fx.Node) -> bool:
    users = list(node.users)
    if not all(_is_relu(network, user) for user in users):
        return False
    for user in users:
        _replace(user, node)
    return True


def _work_in_place(network: fx.GraphModule, node: fx.Node) -> None:
    """A ReLU or a sum writes over an argument that only it reads; every such argument is a map of its own."""
    if _is_relu(network, node):
        operation, arguments = "relu_", node.args[:1]
    elif node.target is operator.add:
        operation, arguments = "add_", node.args
    else:
        return
    for number, argument in enumerate(map(_node, arguments)):
        if [user for user in argument.users if user.target is not getattr] == [node]:
            others = arguments[:number] + arguments[number + 1 :]
            with network.graph.inserting_after(node):
                _replace(node, network.graph.call_method(operation, (argument, *others)))
            return


def _join_stem(network: fx.GraphModule, normalization: Normalization | None) -> None:
    """Make one module of the cast and the two convolutions of the stem. On a CPU the op is faster where it saves the
    normalisation's passes; without them it takes as long as oneDNN's convolution.
    """
    images, cast, first, second = list(network.graph.nodes)[:4]
    convs = [conv for node in (first, second) if (conv := _called(network, node, ConvAddReLU)) is not None]
    memory_format, device = cast.kwargs["memory_format"], _device(network)
    assert isinstance(memory_format, torch.memory_format)
    served = has_kernel("stem_conv", device) and convs[0].conv.weight.dtype in HALF_AND_SINGLE
    as_op = served and memory_format == torch.channels_last and (normalization is not None or device != "cpu")
    network.add_submodule("stem", Stem(convs[0], convs[1], memory_format, normalization, as_op))
    with network.graph.inserting_after(second):
        _replace(second, network.graph.call_module("stem", (images,)))
    network.graph.erase_node(first)
    network.graph.erase_node(cast)


def _device(network: nn.Module) -> str:
    return next(network.parameters()).device.type


def _is_relu(network: fx.GraphModule, node: fx.Node) -> bool:
    return node.target is F.relu or _called(network, node, nn.ReLU) is not None


def _called(network: fx.GraphModule, node: fx.Node, kind: type[Kind] | tuple[type[Kind], ...]) -> Kind | None:
    """The module of a node that calls one of a kind, else None."""
    if node.op != "call_module":
        return None
    module = network.get_submodule(str(node.target))
    return module if isinstance(module, kind) else None


def _node(argument: fx.node.Argument) -> fx.Node:
    """The argument of a node that is a map: what computes it."""
    assert isinstance(argument, fx.Node)
    return argument


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _finished(network: fx.GraphModule) -> fx.GraphModule:
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    return network
