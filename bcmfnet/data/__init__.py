"""Datasets, augmentation and loading. Names load on first use: label tables need neither torch nor OpenCV."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "conversion": ("convert",),
    "datasets": ("build_dataset", "list_datasets"),
    "io": ("read_image", "read_label", "write_jpeg", "write_png"),
    "labels": ("CITYSCAPES_ROWS", "LabelTable", "get_label_table", "list_label_tables", "make_label_table"),
    "loader": ("Batch", "BatchLoader", "EpochSampler", "TrainSamples", "collate", "eval_loader", "train_loader"),
    "pairs": ("Dataset", "PairedFiles", "check_split_leak"),
    "prepared": ("prepare",),
    "synthetic": ("SyntheticStreets",),
    "transforms": ("IMAGENET_MEAN", "IMAGENET_STD", "EvalTransform", "TrainTransform", "normalize"),
    "verification": ("VerifyReport", "verify", "verify_datasets"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


if TYPE_CHECKING:
    from bcmfnet.data.conversion import convert as convert
    from bcmfnet.data.datasets import build_dataset as build_dataset
    from bcmfnet.data.datasets import list_datasets as list_datasets
    from bcmfnet.data.io import read_image as read_image
    from bcmfnet.data.io import read_label as read_label
    from bcmfnet.data.io import write_jpeg as write_jpeg
    from bcmfnet.data.io import write_png as write_png
    from bcmfnet.data.labels import CITYSCAPES_ROWS as CITYSCAPES_ROWS
    from bcmfnet.data.labels import LabelTable as LabelTable
    from bcmfnet.data.labels import get_label_table as get_label_table
    from bcmfnet.data.labels import list_label_tables as list_label_tables
    from bcmfnet.data.labels import make_label_table as make_label_table
    from bcmfnet.data.loader import Batch as Batch
    from bcmfnet.data.loader import BatchLoader as BatchLoader
    from bcmfnet.data.loader import EpochSampler as EpochSampler
    from bcmfnet.data.loader import TrainSamples as TrainSamples
    from bcmfnet.data.loader import collate as collate
    from bcmfnet.data.loader import eval_loader as eval_loader
    from bcmfnet.data.loader import train_loader as train_loader
    from bcmfnet.data.pairs import Dataset as Dataset
    from bcmfnet.data.pairs import PairedFiles as PairedFiles
    from bcmfnet.data.pairs import check_split_leak as check_split_leak
    from bcmfnet.data.prepared import prepare as prepare
    from bcmfnet.data.synthetic import SyntheticStreets as SyntheticStreets
    from bcmfnet.data.transforms import IMAGENET_MEAN as IMAGENET_MEAN
    from bcmfnet.data.transforms import IMAGENET_STD as IMAGENET_STD
    from bcmfnet.data.transforms import EvalTransform as EvalTransform
    from bcmfnet.data.transforms import TrainTransform as TrainTransform
    from bcmfnet.data.transforms import normalize as normalize
    from bcmfnet.data.verification import VerifyReport as VerifyReport
    from bcmfnet.data.verification import verify as verify
    from bcmfnet.data.verification import verify_datasets as verify_datasets
else:

    def __getattr__(name: str):
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        return value
