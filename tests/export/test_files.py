"""Exported files give the labels of the network that they were made from, and bad ones are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bcmfnet.data import normalize
from bcmfnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from bcmfnet.engine.exported import ExportedPredictor
from bcmfnet.errors import CheckpointError, ConfigError, MissingFileError, MissingPackageError
from bcmfnet.export import FORMATS, DeployedGraph, export, files, format_of, least_side, read_exported
from bcmfnet.export import check as check_module
from bcmfnet.export.check import check_exported
from bcmfnet.inference import for_inference
from bcmfnet.models import create_model

SIZE = (64, 96)
METADATA = {"model": "bcmfnet", "num_classes": 5, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
            "label_table": {"classes": ["a", "b", "c", "d", "e"], "colors": [[i, 0, 0] for i in range(5)]}}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """A network whose batch norms are no identities and whose labels vary."""
    torch.manual_seed(0)
    model = create_model("bcmfnet", num_classes=5).train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 128, 128))
    return model.eval()


def needs(format):
    for package in FORMATS[format].packages:
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    """One file that several tests read: to convert takes seconds."""
    return written(model, tmp_path_factory.mktemp("exported"), "onnx")


def images(*size, count=1):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    return (255 * torch.nn.functional.interpolate(coarse, size, mode="bilinear")).byte()


def written(model, folder, format, *, dynamic=False, size=SIZE, **options):
    needs(format)
    path = folder / f"network{FORMATS[format].ending}"
    graph = DeployedGraph(model, **{"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | options)
    export(graph, path, format=format, size=size, dynamic=dynamic, metadata=METADATA)
    return path


@pytest.mark.parametrize(
    "format", ["onnx", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in list(FORMATS)[1:])]
)
def test_labels_are_the_networks_own(model, tmp_path, format, request):
    path = request.getfixturevalue("onnx_file") if format == "onnx" else written(model, tmp_path, format)
    file = read_exported(path)
    assert format_of(path) == format and file.metadata["num_classes"] == 5
    frame = images(*SIZE)
    check = check_exported(
        file, for_inference(model, mean=IMAGENET_MEAN, std=IMAGENET_STD), [frame], [normalize(frame)]
    )
    assert check.pixels == SIZE[0] * SIZE[1] and check.holds() and check.largest_margin < 1e-4
    labels = ExportedPredictor(file)(images(*SIZE, count=3))
    assert labels.dtype == torch.uint8 and labels.shape == (3, *SIZE) and len(labels.unique()) > 1
    with pytest.raises(ConfigError, match=f"^weights: expected frames of 96x64, as {path} takes them, got 96x65$"):
        ExportedPredictor(file)(images(65, 96))
    with pytest.raises(ConfigError, match="^weights: expected a file of --output logits, got .*, which gives labels$"):
        ExportedPredictor(file).logits(frame)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)  # AOTInductor compiles for minutes
@pytest.mark.parametrize("format", FORMATS)
def test_dynamic_sizes(model, tmp_path, format):
    path = written(model, tmp_path, format, dynamic=True, output="logits", mean=None, std=None)
    predictor = ExportedPredictor(read_exported(path))
    least = 64 if FORMATS[format].any_size else 513
    assert predictor.file.metadata["least_side"] == least == least_side(DeployedGraph(model), format)
    for size in ((least, least), (least + 33, least + 68)):
        frames = images(*size, count=2)
        network = for_inference(model)
        torch.testing.assert_close(predictor.logits(frames), network.logits(normalize(frames)), rtol=1e-3, atol=1e-4)
        assert (predictor(frames) != network(normalize(frames))).float().mean() < 1e-3
    with pytest.raises(ConfigError, match=f"^weights: expected frames of at least {least}x{least}, as "):
        predictor(images(least - 1, least))


@pytest.mark.exhaustive
def test_float16_is_typed(model, tmp_path):
    path = written(model, tmp_path, "onnx", dtype=torch.float16)
    onnx = pytest.importorskip("onnx")
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    assert sum(w.nbytes for w in weights if w.dtype == np.float16) > 0.9 * sum(w.nbytes for w in weights)
    frame = images(*SIZE)
    file = read_exported(path)
    assert file.metadata["dtype"] == "float16"
    check = check_exported(
        file, for_inference(model, mean=IMAGENET_MEAN, std=IMAGENET_STD), [frame], [normalize(frame)]
    )
    assert check.differing < 0.02 * check.pixels and check.largest_margin < 0.05


def test_an_onnx_file_needs_nothing_of_ours(onnx_file):
    """Standard operators, the input and output that are said, and metadata that others can read."""
    onnx = pytest.importorskip("onnx")
    content = onnx.load(onnx_file)
    onnx.checker.check_model(content)
    assert {entry.domain for entry in content.opset_import} == {""} and content.opset_import[0].version >= 18
    assert [v.name for v in (*content.graph.input, *content.graph.output)] == ["images", "labels"]
    kinds = [v.type.tensor_type.elem_type for v in (*content.graph.input, *content.graph.output)]
    assert kinds == [onnx.TensorProto.UINT8] * 2
    kept = {entry.key: json.loads(entry.value) for entry in content.metadata_props}
    assert kept["classes"] == list("abcde") and kept["mean"] == list(IMAGENET_MEAN) and len(kept["colors"]) == 5


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_int8_gives_nearly_the_same_labels(model, tmp_path, format):
    needs(format)
    pytest.importorskip("nncf")
    path, calibration = tmp_path / f"network{FORMATS[format].ending}", list(images(*SIZE, count=4).split(1))
    graph = DeployedGraph(model, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    export(graph, path, format=format, size=SIZE, metadata=METADATA, calibration=calibration)
    files_of_it = tmp_path.glob("network.*")
    assert sum(f.stat().st_size for f in files_of_it) < 0.4 * sum(p.nbytes for p in graph.network.parameters())
    file = read_exported(path)
    assert file.metadata["dtype"] == "int8" and file.metadata["output"] == "labels"
    frame = images(*SIZE)
    check = check_exported(
        file, for_inference(model, mean=IMAGENET_MEAN, std=IMAGENET_STD), [frame], [normalize(frame)]
    )
    assert 0 < check.differing < 0.1 * check.pixels and check.most_differing > 1e-3
    assert not torch.equal(file.run(frame), file.run(255 - frame))
    predictor = ExportedPredictor(read_exported(path, logits=True))
    own = for_inference(model).logits(normalize(frame))
    assert 0 < (predictor.logits(frame) - own).norm() < 0.4 * own.norm()  # of a network that was hardly trained
    assert (predictor(frame) != file.run(frame)).float().mean() < 1e-3


def test_int8_is_of_some_formats_alone(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="^format: expected onnx or openvino with int8, got torch$"):
        export(None, tmp_path / "n.pt2", format="torch", size=SIZE, calibration=[images(*SIZE)])
    monkeypatch.setattr(files, "find_spec", lambda name: None if name == "nncf" else name)
    with pytest.raises(MissingPackageError, match="^format: onnx in int8 needs nncf: pip install nncf$"):
        export(None, tmp_path / "n.onnx", format="onnx", size=SIZE, calibration=[images(*SIZE)])


def test_a_file_of_labels_has_logits_too(model, onnx_file):
    predictor = ExportedPredictor(read_exported(onnx_file, logits=True))
    frame = images(*SIZE)
    torch.testing.assert_close(
        predictor.logits(frame), for_inference(model).logits(normalize(frame)), rtol=0, atol=1e-4
    )
    assert (predictor(frame) != read_exported(onnx_file).run(frame)).float().mean() < 1e-3


@pytest.mark.exhaustive
def test_peak_memory_is_that_of_a_process(onnx_file):
    pytest.importorskip("resource")
    assert 50e6 < check_module.peak_memory(read_exported(onnx_file), SIZE) < 4e9


def test_a_process_that_fails_costs_no_file(onnx_file):
    """The peak memory of a file that cannot be run on such an image is not told; the file and its check stay."""
    assert check_module.peak_memory(read_exported(onnx_file), (3, 3)) is None


def test_bad_files_are_named(tmp_path, monkeypatch):
    needs("onnx")
    path = tmp_path / "network.onnx"
    with pytest.raises(MissingFileError, match="network.onnx: expected an exported network, found no file$"):
        read_exported(path)
    path.write_bytes(b"no network")
    with pytest.raises(CheckpointError, match=r"network.onnx: not a complete file of onnx \(.*\)$"):
        read_exported(path)
    with pytest.raises(CheckpointError, match=r"network.bin: expected an exported network \(.onnx, .xml, "):
        read_exported(tmp_path / "network.bin")
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="^format: openvino needs openvino: pip install openvino$"):
        export(None, tmp_path / "network.xml", format="openvino", size=SIZE)


@pytest.mark.parametrize("logits", [False, True])
def test_a_file_of_somebody_else_is_refused(tmp_path, logits):
    needs("onnx")
    from onnx import TensorProto, helper, save

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("images", "labels")]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["labels"])], "g", values[:1], values[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match="expected a file that bcmfnet export wrote, got one without its m"):
        read_exported(tmp_path / "other.onnx", logits=logits)
