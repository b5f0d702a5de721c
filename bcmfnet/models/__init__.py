"""Networks by name, their weights files and their sizes."""

from bcmfnet.models.bcmfnet import BCMFNet
from bcmfnet.models.count import count_multiply_adds, count_parameters, multiply_adds_by_module
from bcmfnet.models.ddrnet import DDRNet23Slim, SegmentationOutput
from bcmfnet.models.pretrained import LoadReport, load_pretrained
from bcmfnet.models.registry import create_model, list_models, model_from_weights, save_weights
from bcmfnet.models.weights import list_weights, read_weights

__all__ = [
    "BCMFNet",
    "DDRNet23Slim",
    "LoadReport",
    "SegmentationOutput",
    "count_multiply_adds",
    "count_parameters",
    "create_model",
    "list_models",
    "list_weights",
    "load_pretrained",
    "model_from_weights",
    "multiply_adds_by_module",
    "read_weights",
    "save_weights",
]
