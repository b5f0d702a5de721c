"""Datasets, augmentation and loading. Names load on first use: label tables need neither torch nor OpenCV."""

from importlib import import_module

_HOMES = {
    "datasets": ("build_dataset", "list_datasets"),
    "io": ("read_image", "read_label", "write_jpeg", "write_png"),
    "labels": ("CITYSCAPES_ROWS", "LabelTable", "get_label_table", "list_label_tables", "make_label_table"),
    "loader": ("Batch", "BatchLoader", "EpochSampler", "TrainSamples", "collate", "eval_loader", "train_loader"),
    "pairs": ("Dataset", "PairedFiles", "check_split_leak"),
    "synthetic": ("SyntheticStreets",),
    "transforms": ("IMAGENET_MEAN", "IMAGENET_STD", "EvalTransform", "TrainTransform", "normalize"),
    "verification": ("VerifyReport", "verify", "verify_datasets"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return value
