"""A net as a graph of operations: traced from a copy, batch norms folded into convolutions, cast to another number format."""

from __future__ import annotations

import copy
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Each output location depends on the same location of the inputs only (in eval mode).
POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Softplus,
    nn.Dropout,
    nn.Dropout2d,
)
POINTWISE_FUNCTIONS: tuple[Any, ...] = (
    operator.add,
    operator.iadd,
    operator.sub,
    operator.isub,
    operator.mul,
    operator.imul,
    operator.truediv,
    operator.neg,
    torch.add,
    torch.sub,
    torch.mul,
    torch.relu,
    torch.relu_,
    torch.sigmoid,
    torch.tanh,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.hardswish,
    F.hardtanh,
    F.dropout,
    F.dropout2d,
)
POINTWISE_METHODS = ("add", "add_", "mul", "mul_", "relu", "relu_", "sigmoid", "tanh", "contiguous", "clone")
# What a plain cast to bfloat16 computes as well as autocast does: sums inside are accumulated in float32.
_CASTS_MODULES = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)
_CASTS_FUNCTIONS = (torch.flatten, torch.cat, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.pad, operator.getitem)
_CASTS_METHODS = ("flatten", "view", "reshape", "size", "mean")


class _OfImages(nn.Module):
    """The model as a function of its images alone: its other arguments keep their defaults instead of becoming inputs of the graph."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


def traced(model: nn.Module) -> fx.GraphModule | str:
    """An own copy of the model as a graph, in eval mode; or in one line why there is none."""
    hooked = [name or "the model itself" for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        return f"forward hooks on {hooked[0]}"
    replaced = [name or "the model itself" for name, m in model.named_modules() if "forward" in vars(m)]
    if replaced:
        return f"the forward of {replaced[0]} has been replaced"
    try:
        return fx.symbolic_trace(_OfImages(copy.deepcopy(model)).eval())
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError, AssertionError) as error:
        return f"torch.fx cannot trace it ({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else 'no message'})"


def fold(graph: fx.GraphModule) -> None:
    """Fold every batch norm that alone follows a convolution into it, in place."""
    modules = dict(graph.named_modules())
    uses: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            uses[node.target] = uses.get(node.target, 0) + 1
    for node in list(graph.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        norm, conv = modules[node.target], modules[str(before.target)]
        single = uses[node.target] == uses[str(before.target)] == 1
        if single and type(norm) is nn.BatchNorm2d and norm.running_mean is not None and type(conv) is nn.Conv2d:
            graph.add_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def save_memory(graph: fx.GraphModule) -> None:
    """Let ReLU and sums write into the fresh result of a layer that nothing else takes, in place: the same bits, less memory to map."""
    modules = dict(graph.named_modules())

    def fresh(node: Any) -> bool:
        made = isinstance(node, fx.Node) and len(node.users) == 1
        if made and node.op == "call_module":
            return type(modules[node.target]) in (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        return made and node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)

    for node in graph.graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) is nn.ReLU and fresh(node.args[0]):
            graph.add_submodule(f"{node.name}_in_place", nn.ReLU(inplace=True))
            node.target = f"{node.name}_in_place"
            modules[node.target] = graph.get_submodule(node.target)
        elif node.op == "call_function" and node.target in (F.relu, torch.relu) and fresh(node.args[0]):
            node.target, node.kwargs = torch.relu_, {}
        elif node.op == "call_function" and node.target in (operator.add, torch.add) and len(node.args) == 2 and not node.kwargs:
            first, second = node.args if fresh(node.args[0]) else node.args[::-1]
            if fresh(first) and isinstance(second, fx.Node) and shape_of(first) == shape_of(second) is not None and first is not second:
                node.target, node.args = operator.iadd, (first, second)
    graph.delete_all_unused_submodules()
    graph.recompile()


def castable(graph: fx.GraphModule) -> bool:
    """Whether every operation is one whose plain cast to a short format is as good as autocast."""
    modules = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if node.op == "call_module":
            known = type(modules[node.target]) in _CASTS_MODULES + POINTWISE_MODULES
        elif node.op == "call_function":
            known = node.target in _CASTS_FUNCTIONS + POINTWISE_FUNCTIONS
        elif node.op == "call_method":
            known = node.target in _CASTS_METHODS + POINTWISE_METHODS
        else:
            known = True
        if not known:
            return False
    return True


def cast(graph: fx.GraphModule, dtype: torch.dtype) -> None:
    """Parameters and buffers in `dtype` and channels_last, in place; a last linear layer stays float32: logits are not rounded."""
    (last,) = (node for node in graph.graph.nodes if node.op == "output")
    head = last.args[0]
    layer = graph.get_submodule(str(head.target)) if isinstance(head, fx.Node) and head.op == "call_module" else graph
    apart = type(layer) is nn.Linear and dtype != torch.float32 and sum(node.target == head.target for node in graph.graph.nodes) == 1
    exact = {name: tensor.clone() for name, tensor in layer.state_dict().items()} if apart else {}
    graph.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if apart:
        layer.float().load_state_dict(exact)
        with graph.graph.inserting_before(head):
            head.args = (graph.graph.call_method("float", (head.args[0],)),)
    graph.recompile()


def measure(graph: fx.GraphModule, image: Tensor) -> None:
    """Run one image [1, C, H, W] and note the shape of every node's value in `node.meta` ("tensor_meta")."""
    with torch.no_grad():
        ShapeProp(graph).propagate(image)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value for one image, None when it is not one tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def multiply_adds(graph: fx.GraphModule, node: fx.Node) -> int:
    """Multiply-adds of one image in this node: of convolutions and linear layers, 0 for the rest."""
    shape = shape_of(node)
    layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if shape is None or layer is None:
        return 0
    if isinstance(layer, nn.Conv2d):
        return math.prod(shape) * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return math.prod(shape) * layer.in_features if isinstance(layer, nn.Linear) else 0


def widest(graph: fx.GraphModule) -> int:
    """Elements of a row that are in memory at once: the most that one operation reads and writes, twice over for what lives beside it."""
    return 2 * max(
        sum(math.prod(shape_of(n) or (0,)) for n in (node, *node.all_input_nodes) if n.op != "get_attr") for node in graph.graph.nodes
    )
