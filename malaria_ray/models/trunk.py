"""A network in three: what stands before its convolutions, the convolutions as ncnn takes them, and the rest.

ncnn computes 3 × 3 convolutions by Winograd's minimal filtering, with a quarter of the multiplications or less; ONNX
Runtime does not. Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from malaria_ray.errors import ModelError

_MAGIC = 7767517  # the first line of ncnn's text format
_AS_FLOAT32 = b"\0\0\0\0"  # its word for how the weights of a layer are written
_RELU = " 9=1"
_DEFAULTS = {"pads": [0] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET", "ceil_mode": 0}
_ONLY_DEFAULT = ("group", "auto_pad", "ceil_mode")  # other values of these stay with ONNX Runtime


@dataclass(frozen=True)
class Cut:
    """`before`: ONNX, images → float32 (n, channels, height, width). `layers` and `weights`: the content of ncnn's two
    files, from the blob `at0` of one image to the blob `end`. `line`: ONNX, the same convolutions, to compare with.
    `behind`: ONNX, from there to the network's outputs.
    """

    before: bytes
    layers: str
    weights: bytes
    end: str
    line: bytes
    behind: bytes


def cut(model: bytes) -> Cut:
    """Cuts an ONNX network before its first convolution, and behind the convolutions and poolings that follow in a
    straight line. Raises: `ModelError` where there is no such line.
    """
    import onnx

    try:
        network = onnx.load_from_string(model)
    except Exception as error:  # protobuf's, of which each implementation has its own
        raise ModelError(f"model.onnx cannot be loaded: {error}") from error
    nodes, constants = list(network.graph.node), {one.name: one for one in network.graph.initializer}
    first = next((i for i, node in enumerate(nodes) if node.op_type == "Conv"), len(nodes))
    lines: list[str] = []
    weights: list[bytes] = []
    last = first
    for node in nodes[first:]:
        settings = _DEFAULTS | {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        is_plain = all(settings[name] == _DEFAULTS[name] for name in _ONLY_DEFAULT)
        if last > first and list(node.input[:1]) != list(nodes[last - 1].output):
            break
        if node.op_type == "Conv" and is_plain and all(name in constants for name in node.input[1:]):
            arrays = [onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:]]
            lines.append(_convolution(len(lines), arrays[0].shape, settings, has_bias=len(arrays) == 2))
            weights += [_AS_FLOAT32, *(array.astype("<f4").tobytes() for array in arrays)]
        elif node.op_type == "Relu" and lines[-1].startswith("Convolution"):
            lines[-1] += _RELU
        elif node.op_type == "MaxPool" and is_plain and not any(settings["pads"]) and settings["dilations"] == [1, 1]:
            lines.append(_pooling(len(lines), settings))
        else:
            break
        last += 1
    begin, end = nodes[first].input[0] if lines else "", nodes[last - 1].output[0]
    computed = {name for node in nodes[:last] for name in node.output} - {end}
    if not lines or computed & {name for node in nodes[last:] for name in node.input}:
        raise ModelError("ncnn takes a straight line of convolutions, and model.onnx has none")

    def part(of: list[Any], inputs: Any, outputs: Any) -> bytes:
        used = {name for node in of for name in node.input}
        its_constants = [one for name, one in constants.items() if name in used]
        graph = onnx.helper.make_graph(of, "part", inputs, outputs, its_constants)
        made = onnx.helper.make_model(graph, opset_imports=network.opset_import, ir_version=network.ir_version)
        return _content(made)

    at_begin, at_end = (onnx.helper.make_tensor_value_info(at, onnx.TensorProto.FLOAT, None) for at in (begin, end))
    before, line = part(nodes[:first], network.graph.input, [at_begin]), part(nodes[first:last], [at_begin], [at_end])
    n = len(lines) + 1
    return Cut(
        before=before,
        layers="\n".join([str(_MAGIC), f"{n} {n}", "Input images 0 1 at0", *lines, ""]),
        weights=b"".join(weights),
        end=f"at{len(lines)}",
        line=line,
        behind=_behind(network, last, at_end),
    )


def _behind(network: Any, n_nodes: int, at_end: Any) -> bytes:
    """The network without its first nodes; made of itself, for its last layers' weights may be most of it."""
    graph = network.graph
    del graph.node[:n_nodes], graph.input[:]
    graph.input.append(at_end)
    used = {name for node in graph.node for name in node.input}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]
    return _content(network)


def _content(network: Any) -> bytes:
    content: bytes = network.SerializeToString()
    return content


# What ncnn's numbers mean: https://github.com/Tencent/ncnn/blob/master/docs/developer-guide/operators.md


def _convolution(i: int, kernel: tuple[int, ...], settings: dict[str, Any], *, has_bias: bool) -> str:
    n_out, n_in, height, width = kernel
    top, left, bottom, right = settings["pads"]
    (down, across), (dilated_down, dilated_across) = settings["strides"], settings["dilations"]
    return (
        f"Convolution layer{i} 1 1 at{i} at{i + 1} 0={n_out} 1={width} 11={height} 2={dilated_across} "
        f"12={dilated_down} 3={across} 13={down} 4={left} 15={right} 14={top} 16={bottom} 5={has_bias:d} "
        f"6={n_out * n_in * height * width}"
    )


def _pooling(i: int, settings: dict[str, Any]) -> str:
    (height, width), (down, across) = settings["kernel_shape"], settings["strides"]
    return f"Pooling layer{i} 1 1 at{i} at{i + 1} 0=0 1={width} 11={height} 2={across} 12={down} 5=1"
