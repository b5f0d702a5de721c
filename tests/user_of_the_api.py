"""A user's program, which a type checker reads and nobody runs: each public name with right types, then wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from torch import Tensor

import bcmfnet
from bcmfnet import BoundaryCorrectedLoss, boundary_corrected_loss, create_model, for_inference, list_models
from bcmfnet.data import (
    CITYSCAPES_ROWS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    BatchLoader,
    Dataset,
    EpochSampler,
    EvalTransform,
    LabelTable,
    PairedFiles,
    SyntheticStreets,
    TrainSamples,
    TrainTransform,
    VerifyReport,
    build_dataset,
    check_split_leak,
    collate,
    convert,
    eval_loader,
    get_label_table,
    list_datasets,
    list_label_tables,
    make_label_table,
    normalize,
    prepare,
    read_image,
    read_label,
    train_loader,
    verify,
    verify_datasets,
    write_jpeg,
    write_png,
)
from bcmfnet.metrics import BoundaryMetrics, BoundaryScores, ConfusionMatrix
from bcmfnet.models import (
    BCMFNet,
    DDRNet23Slim,
    LoadReport,
    SegmentationOutput,
    count_multiply_adds,
    count_parameters,
    list_weights,
    load_pretrained,
    model_from_weights,
    multiply_adds_by_module,
    read_weights,
    save_weights,
)
from bcmfnet.nn import (
    DAPPM,
    LMFM,
    BinaryCrossEntropy,
    DiceLoss,
    DistillationLoss,
    FocalLoss,
    JaccardLoss,
    OhemCrossEntropy,
    SegmentationLoss,
    TverskyLoss,
    UpsampledCrossEntropy,
)
from bcmfnet.ops import (
    BclStats,
    PyramidWeights,
    lmfm,
    pyramid_pool,
    segmentation_loss,
    stem_conv,
    upsample_add_relu,
    upsample_argmax,
)
from bcmfnet.viz import (
    LossMaps,
    colorize,
    comparison,
    legend,
    loss_maps,
    overlay,
    plot_confusion,
    plot_training,
    require_matplotlib,
    with_legend,
)

logits, images = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 64, 64)
target = torch.zeros(1, 64, 64, dtype=torch.uint8)
path = Path("weights.safetensors")

assert_type(bcmfnet.__version__, str)
assert_type(boundary_corrected_loss(logits, target, mode="paper", nms=3, ratio=1 / 16, step=(2, 1)), Tensor)
assert_type(boundary_corrected_loss(logits, target, jitter=1, return_stats=True), tuple[Tensor, BclStats])
criterion = BoundaryCorrectedLoss(weight=torch.ones(3), mode="detect0", max_kept=5, norm="valid", flip="mirror")
assert_type(criterion(logits, target, jitter=1, boundary_weight=0.5), Tensor)
assert_type(criterion(logits, target, return_stats=True), tuple[Tensor, BclStats])
assert_type(criterion(logits, target, return_stats=True)[1].selection(), dict[str, Tensor])
assert_type(OhemCrossEntropy(thresh=0.7, min_kept=10, ignore_index=0)(logits, target), Tensor)
assert_type(UpsampledCrossEntropy(255, weight=torch.ones(3))(logits, target), Tensor)
assert_type(segmentation_loss(logits, target, dice=1, label_smoothing=0.1, mode="ohem", boundary=0.5), Tensor)
assert_type(segmentation_loss(logits, target, focal=1, return_stats=True), tuple[Tensor, BclStats])
fused = SegmentationLoss(ce=1, dice=1, boundary=0.5, overlap_absent="zero", aux=0.4, weight=torch.ones(3))
assert_type(fused([logits, logits], target, teacher=logits, pixel_weight=torch.ones(1, 64, 64)), Tensor)
assert_type(fused({"out": logits}, target, boundary=0.1, return_stats=True), tuple[Tensor, BclStats])
assert_type(DiceLoss(smooth=1, log=True, absent="count", per_image=True)(logits, target), Tensor)
assert_type(TverskyLoss(0.3, 0.7, binary=True)(logits[:, :1], target), Tensor)
assert_type(JaccardLoss(align_corners=True)(logits, target), Tensor)
assert_type(FocalLoss(2.0, weight=torch.ones(3))(logits, target), Tensor)
assert_type(DistillationLoss(temperature=2, where="all")(logits, target, teacher=logits), Tensor)
assert_type(BinaryCrossEntropy(pos_weight=3, label_smoothing=0.1)(logits[:, :1], target), Tensor)
SegmentationLoss(dise=1)  # type: ignore[call-arg]
DiceLoss(absent="none")  # type: ignore[arg-type]

assert_type(upsample_argmax(logits, (64, 64)), Tensor)
assert_type(upsample_argmax(logits, images.shape[-2:]), Tensor)
assert_type(upsample_argmax(logits, size=(64, 64), return_confidence=True), tuple[Tensor, Tensor])
assert_type(upsample_add_relu(images, images), Tensor)
assert_type(stem_conv(images, torch.randn(8, 3, 3, 3), torch.zeros(8)), Tensor)
assert_type(stem_conv(images.byte(), torch.randn(8, 3, 3, 3), torch.zeros(8), (0.5, 0.5, 0.5), [0.2] * 3), Tensor)
assert_type(pyramid_pool(images, [(5, 2, 2)]), tuple[Tensor, ...])
context = LMFM(512, 128, direction="forward", interval=1, root_conv="1x1", branch_channels=64, pools=[(5, 2, 2)])
assert_type(context.pyramid_weights(torch.float32), PyramidWeights)
assert_type(lmfm(images, context.pyramid_weights(torch.float32)), Tensor)
DAPPM(512, 128, identity_branch=False, norm_order="post", shortcut=False)

assert_type(list_models(), list[str])
assert_type(list_weights(), list[str])
model = create_model("bcmfnet", num_classes=3, aux=True, pretrained=path, interval=1)
output: SegmentationOutput = model(images)
assert_type(output.logits, Tensor)
assert_type(output.aux, Tensor | None)
maps: Tensor = for_inference(model, dtype=torch.bfloat16)(images)
BCMFNet(3, aux=True)
DDRNet23Slim(3)
assert_type(load_pretrained(model, path), LoadReport)
restored, metadata = model_from_weights(path, "cpu")
save_weights(path, restored, {"note": "mine"})
read_weights(path)
assert_type(count_parameters(model), int)
assert_type(count_multiply_adds(model, (1, 3, 64, 64)), int)
assert_type(multiply_adds_by_module(model), dict[str, int])

confusion = ConfusionMatrix(3, ignore_index=255)
confusion.update(maps, target)
boundary = BoundaryMetrics(3)
boundary.update(maps, target)
assert_type(boundary.compute(), BoundaryScores)

table = make_label_table("three", 3)
assert_type(table, LabelTable)
image, labels = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
colorize(labels, table)
overlay(image, labels, table, alpha=0.5)
comparison(image, labels, labels, table)
legend(table, shown=[0, 2])
with_legend(image, labels, table)
score = np.zeros((64, 64))
loss_maps(image, labels, {"mine": LossMaps(score, score, score > 0, threshold=0.36)}, table)
require_matplotlib("the curves")
plot_confusion(confusion.matrix, table.classes, "confusion.png")
plot_training([{"step": 1, "loss": 0.5}], path)

frames: Dataset = build_dataset("synthetic", split="val")
drawn: Dataset = SyntheticStreets(8)
check_split_leak(frames, frames)
list_datasets(), list_label_tables(), get_label_table("camvid11")
normalize(images, IMAGENET_MEAN, IMAGENET_STD)
normalize(images, [0.5, 0.5, 0.5], [0.2, 0.2, 0.2])
write_png(path, image)
write_jpeg(path, image)
read_image(path), read_label(path)
also = (CITYSCAPES_ROWS, Batch, BatchLoader, EpochSampler, EvalTransform, PairedFiles, SyntheticStreets, TrainSamples)
more = (TrainTransform, VerifyReport, collate, convert, eval_loader, prepare, train_loader, verify, verify_datasets)

BoundaryCorrectedLoss(mode="papr")  # type: ignore[arg-type]
BoundaryCorrectedLoss(mde="paper")  # type: ignore[call-arg]
BoundaryCorrectedLoss(nms="3")  # type: ignore[arg-type]
BoundaryCorrectedLoss(step=(1, 2, 3))  # type: ignore[arg-type]
criterion(logits, target, jiter=1)  # type: ignore[call-overload]
criterion(logits)  # type: ignore[call-overload]
boundary_corrected_loss(logits, target, norm="mean")  # type: ignore[call-overload]
OhemCrossEntropy(min_kept="all")  # type: ignore[arg-type]
UpsampledCrossEntropy(ignore=255)  # type: ignore[call-arg]
upsample_argmax(logits, "64")  # type: ignore[arg-type]
LMFM(512, 128, direction="up")  # type: ignore[arg-type]
DAPPM(512, 128, interval=2)  # type: ignore[call-arg]
create_model("bcmfnet", num_classes=3, intervall=1)  # type: ignore[call-arg]
create_model("bcmfnet", num_classes="3")  # type: ignore[arg-type]
bcmfnet.boundary_loss(logits, target)  # type: ignore[attr-defined]
