"""The network cut in three gives what ONNX Runtime gives of the whole."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from malaria_ray.errors import ModelError
from malaria_ray.models import engines
from malaria_ray.models.engines import NcnnEngine, OnnxEngine, open_engine
from malaria_ray.models.trunk import Cut, cut

CHANCE = np.random.default_rng(0)


class Network:
    """An ONNX network of images, built node by node."""

    def __init__(self, size: int):
        self.size, self.nodes, self.constants = size, [], []
        self.at = "image"
        self.add("Cast", to=TensorProto.FLOAT)
        self.add("Mul", np.float32(1 / 255))
        self.add("Transpose", perm=[0, 3, 1, 2])

    def add(self, kind: str, *constants: np.ndarray, inputs: tuple[str, ...] = (), **settings) -> str:
        names = [f"{kind}{len(self.nodes)}_{i}" for i in range(len(constants))]
        self.constants += [onnx.numpy_helper.from_array(c, n) for n, c in zip(names, constants, strict=True)]
        made = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.at, *inputs, *names], [made], **settings))
        self.at = made
        return made

    def conv(self, n_in: int, n_out: int, side: int = 3, *, bias: bool = True, group: int = 1, **changed) -> None:
        kernel = CHANCE.normal(0, 1 / side / n_in**0.5, (n_out, n_in // group, side, side)).astype(np.float32)
        constants = [kernel, CHANCE.normal(0, 0.1, n_out).astype(np.float32)][: 1 + bias]
        usual = {"pads": [side // 2] * 4, "strides": [1, 1], "dilations": [1, 1], "group": group}
        self.add("Conv", *constants, **{**usual, "kernel_shape": [side, side], **changed})

    def pool(self, side: int = 2, **settings) -> None:
        self.add("MaxPool", kernel_shape=[side, side], strides=[side, side], **settings)

    def scored(self) -> bytes:
        """The network with its mean over all as the score."""
        self.add("Flatten")
        self.add("ReduceMean", axes=[1], keepdims=1)
        self.add("Sigmoid")
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", self.size, self.size, 3])],
            [helper.make_tensor_value_info(self.at, TensorProto.FLOAT, ["n", 1])],
            self.constants,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        onnx.checker.check_model(made, full_check=True)
        return made.SerializeToString()


def plain(size: int) -> Network:
    network = Network(size)
    network.conv(3, 16)
    network.add("Relu")
    network.pool()
    network.conv(16, 32)
    network.add("Relu")
    network.conv(32, 16)
    network.add("Relu")
    network.pool()
    return network


def unusual(size: int) -> Network:
    network = Network(size)
    network.conv(3, 5, side=5, bias=False, strides=[1, 2], pads=[0, 1, 2, 3])
    network.pool(3)
    network.add("Relu")  # behind a pooling, so no longer part of the line
    return network


def dilated(size: int) -> Network:
    network = Network(size)
    network.conv(3, 16, dilations=[2, 3])
    network.conv(16, 16, pads=[0, 0, 0, 0])
    return network


def both(model: bytes, size: int, n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    pixels = CHANCE.integers(0, 256, (n, size, size, 3), np.uint8)
    ncnn = NcnnEngine(model, n_threads=1, batch_size=2)
    return ncnn.score(pixels), OnnxEngine(model, n_threads=1, batch_size=2).score(pixels)


@pytest.mark.parametrize("build", [plain, unusual, dilated])
@pytest.mark.parametrize("size", [32, 47, 125])
def test_ncnn_gives_what_onnx_runtime_gives(build, size: int):
    model = build(size).scored()
    found, expected = both(model, size)
    assert found.shape == expected.shape == (5,)
    assert np.ptp(expected) > 1e-4, "the images must not all have one score"
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


def test_what_stands_behind_a_branch_stays_with_onnx_runtime():
    network = plain(32)
    network.add("Add", inputs=(network.at,))
    found, expected = both(network.scored(), 32)
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


def test_convolutions_in_groups_and_padded_poolings_stay_with_onnx_runtime():
    network = plain(32)
    n_lines = len(cut(plain(32).scored()).layers.splitlines())
    network.pool(2, pads=[1, 1, 1, 1])
    network.conv(16, 16, group=4)
    model = network.scored()
    assert len(cut(model).layers.splitlines()) == n_lines
    np.testing.assert_allclose(*both(model, 32), atol=2e-6, rtol=0)


def test_a_network_without_a_straight_line_is_refused():
    without = Network(8)
    with pytest.raises(ModelError, match="straight line of convolutions, and model.onnx has none"):
        cut(without.scored())
    skipping = Network(8)
    skipping.conv(3, 3)
    inside = skipping.at
    skipping.add("Relu")
    skipping.add("Add", inputs=(inside,))
    with pytest.raises(ModelError, match="straight line"):
        cut(skipping.scored())


def dead_on_noise(size: int) -> Network:
    """Wakes where a patch is brighter than noise is on average, as in a cell."""
    network = Network(size)
    mean = np.full((4, 3, 9, 9), 1 / 243, np.float32)
    network.add("Conv", mean, np.full(4, -0.62, np.float32), kernel_shape=[9, 9], pads=[4] * 4)
    network.add("Relu")
    network.conv(4, 4)
    return network


def damaged(model: bytes) -> Cut:
    parts = cut(model)
    return replace(parts, weights=parts.weights[:-64] + np.full(16, 3, "<f4").tobytes())


@pytest.mark.parametrize("build", [plain, dead_on_noise])
def test_a_machine_where_ncnn_computes_otherwise_is_found(build, monkeypatch: pytest.MonkeyPatch):
    model = build(125).scored()
    NcnnEngine(model, n_threads=1, batch_size=2)
    monkeypatch.setattr(engines, "cut", damaged)
    with pytest.raises(ModelError, match=r"ncnn and ONNX Runtime differ by .* on this machine .*, at most 0.0001"):
        NcnnEngine(model, n_threads=1, batch_size=2)


def test_a_network_that_nothing_wakes_cannot_be_checked_and_is_refused():
    network = Network(32)
    network.add("Conv", np.ones((1, 3, 1, 1), np.float32), np.float32([-4]))
    network.add("Relu")
    with pytest.raises(ModelError, match="nothing but 0 for drawn cells"):
        NcnnEngine(network.scored(), n_threads=1, batch_size=2)


def test_where_ncnn_cannot_be_used_onnx_runtime_computes_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    model = plain(32).scored()
    assert open_engine("ncnn", model, n_threads=1, batch_size=2).name == "ncnn"
    with monkeypatch.context() as patched:
        patched.setattr(engines, "cut", damaged)
        assert open_engine("ncnn", model, n_threads=1, batch_size=2).name == "onnx"
    assert "all is computed by ONNX Runtime, which is slower: ncnn and ONNX Runtime differ by" in caplog.text
    monkeypatch.setitem(sys.modules, "ncnn", None)
    assert open_engine("ncnn", model, n_threads=1, batch_size=2).name == "onnx"
    with pytest.raises(ModelError, match="model.onnx cannot be loaded"):
        open_engine("ncnn", model[: len(model) // 2], n_threads=1, batch_size=2)


def test_what_onnx_lets_out_has_the_value_that_it_says():
    network = Network(32)
    network.add("Conv", CHANCE.normal(0, 0.1, (6, 3, 3, 3)).astype(np.float32))
    network.add("MaxPool", kernel_shape=[2, 2])
    network.conv(6, 4)
    model = network.scored()
    assert len(cut(model).layers.splitlines()) == 6  # its two lines, the input, and all three
    np.testing.assert_allclose(*both(model, 32), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Conv", {"auto_pad": "SAME_UPPER"}),
        ("MaxPool", {"kernel_shape": [3, 3], "ceil_mode": 1, "strides": [2, 2]}),
        ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 2]}),
        ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    ],
)
def test_what_ncnn_would_take_for_something_else_stays_with_onnx_runtime(kind: str, settings: dict):
    network = plain(32)
    n_lines = len(cut(plain(32).scored()).layers.splitlines())
    constants = [CHANCE.normal(0, 0.1, (4, 16, 2, 2)).astype(np.float32)] if kind == "Conv" else []
    network.add(kind, *constants, **settings)
    model = network.scored()
    assert len(cut(model).layers.splitlines()) == n_lines
    np.testing.assert_allclose(*both(model, 32), atol=2e-6, rtol=0)


def test_a_kernel_that_is_computed_stays_with_onnx_runtime():
    network = plain(32)
    kernel = onnx.numpy_helper.from_array(CHANCE.normal(0, 0.1, (4, 16, 1, 1)).astype(np.float32))
    network.nodes.append(helper.make_node("Constant", [], ["kernel"], value=kernel))
    network.add("Conv", inputs=("kernel",))
    np.testing.assert_allclose(*both(network.scored(), 32), atol=2e-6, rtol=0)


def test_threads_change_no_score():
    model = plain(64).scored()
    pixels = CHANCE.integers(0, 256, (4, 64, 64, 3), np.uint8)
    one, two = (NcnnEngine(model, n_threads=n, batch_size=4).score(pixels) for n in (1, 2))
    np.testing.assert_array_equal(one, two)
