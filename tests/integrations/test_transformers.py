"""Models of transformers, made from their configurations: loss, gradients and label maps as with their own code."""

from __future__ import annotations

import copy

import pytest
import torch

from bcmfnet.integrations.transformers import label_maps, use_loss
from bcmfnet.nn import BoundaryCorrectedLoss

pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BeitConfig,
    BeitForSemanticSegmentation,
    ConvNextConfig,
    DPTConfig,
    DPTForSemanticSegmentation,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

LABELS, IGNORE, SIZE = 7, 255, 64
WIDTHS = [8, 16, 24, 32]
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 37,
       "image_size": SIZE, "patch_size": 16}  # fmt: skip
MODELS = {
    "segformer": lambda labels: SegformerForSemanticSegmentation(
        SegformerConfig(
            num_labels=labels, depths=[1] * 4, hidden_sizes=WIDTHS, num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
        )
    ),
    "mobilevit": lambda labels: MobileViTForSemanticSegmentation(
        MobileViTConfig(
            num_labels=labels, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 16, 24, 32],
            aspp_out_channels=16, image_size=SIZE, num_attention_heads=2,
        )
    ),
    "beit": lambda labels: BeitForSemanticSegmentation(BeitConfig(num_labels=labels, out_indices=[1, 2, 3, 4], **VIT)),
    "dpt": lambda labels: DPTForSemanticSegmentation(
        DPTConfig(
            num_labels=labels, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16] * 4, fusion_hidden_size=16,
            **VIT,
        )
    ),
    "upernet": lambda labels: UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=ConvNextConfig(
                hidden_sizes=WIDTHS, depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
            ),
            num_labels=labels, hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=16,
        )
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param](LABELS).train()


@pytest.fixture
def segformer():
    torch.manual_seed(0)
    return MODELS["segformer"](LABELS).eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, LABELS, (2, SIZE, SIZE), generator=generator)
    labels[:, :9] = IGNORE
    return torch.randn(2, 3, SIZE, SIZE, generator=generator), labels


def step(model, images, labels):
    """A call in training mode with the same dropout, and its gradients."""
    torch.manual_seed(2)
    output = model(pixel_values=images, labels=labels)
    output.loss.backward()
    return output, [parameter.grad for parameter in model.parameters()]


def test_loss_and_gradients_are_the_models_own(model, batch):
    changed = use_loss(copy.deepcopy(model))
    assert changed.state_dict().keys() == model.state_dict().keys()
    (stock, expected), (ours, gradients) = step(model, *batch), step(changed, *batch)
    torch.testing.assert_close(ours.loss, stock.loss, rtol=1e-5, atol=0)
    assert (type(ours), list(ours.keys())) == (type(stock), list(stock.keys()))
    torch.testing.assert_close(ours.logits, stock.logits)
    largest = max(gradient.abs().max() for gradient in expected if gradient is not None)
    for gradient, own in zip(gradients, expected, strict=True):
        assert (gradient is None) == (own is None)
        if own is not None:
            torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-5 * float(largest))


def test_a_loss_of_the_users_reads_the_logits_of_the_head(segformer, batch):
    images, labels = batch
    criterion = BoundaryCorrectedLoss(weight=torch.rand(LABELS))
    output = use_loss(segformer, criterion)(images, labels=labels)
    assert output.logits.shape[-2:] == (SIZE // 4, SIZE // 4)
    torch.testing.assert_close(output.loss, criterion(output.logits, labels))


def test_weight_of_the_auxiliary_head(batch):
    torch.manual_seed(0)
    model = MODELS["upernet"](LABELS).eval()
    losses = [use_loss(copy.deepcopy(model), auxiliary_weight=w)(*batch[:1], labels=batch[1]).loss for w in (0, 1, 2)]
    assert losses[1] - losses[0] > 0
    torch.testing.assert_close(losses[2] - losses[1], losses[1] - losses[0])


def test_nothing_else_changes(segformer, batch):
    images, labels = batch
    expected = segformer(images)
    model = use_loss(segformer)
    assert model is segformer
    torch.testing.assert_close(model(images).logits, expected.logits)
    assert model(images).loss is None
    loss, logits = model(images, labels=labels, return_dict=False)[:2]
    torch.testing.assert_close(logits, expected.logits)
    assert loss == model(images, labels=labels).loss


def test_labels_without_their_name_are_labels(segformer, batch):
    stock = segformer(*batch).loss
    model = use_loss(segformer, BoundaryCorrectedLoss())
    assert model(*batch).loss == model(batch[0], labels=batch[1]).loss != stock


def test_a_copy_has_a_loss_of_its_own(segformer, batch):
    images, labels = batch
    model = use_loss(segformer)
    twin = copy.deepcopy(model)
    assert twin(images, labels=labels).loss == model(images, labels=labels).loss
    twin._bcmfnet_loss.criterion.weight = torch.zeros(LABELS)
    assert twin(images, labels=labels).loss == 0 < model(images, labels=labels).loss


@pytest.mark.parametrize("size", [None, (SIZE, SIZE), (97, 50)])
def test_label_maps_are_those_of_the_processor(segformer, batch, size):
    processing = pytest.importorskip("transformers.models.segformer.image_processing_pil_segformer")
    output = segformer(batch[0])
    sizes = None if size is None else [size, (SIZE, 3 * SIZE)]
    expected = processing.SegformerImageProcessorPil().post_process_semantic_segmentation(output, sizes)
    for ours, theirs in zip(label_maps(output, sizes), expected, strict=True):
        assert ours.dtype == torch.uint8 and (ours.long() == theirs).float().mean() > 0.999


def test_other_models_and_labels_are_refused(segformer):
    with pytest.raises(TypeError, match="^model: expected a ...ForSemanticSegmentation of transformers, got Conv2d"):
        use_loss(torch.nn.Conv2d(3, 7, 1))
    with pytest.raises(ValueError, match="^model: expected two labels or more, got 1$"):
        use_loss(MODELS["segformer"](1))
    with pytest.raises(ValueError, match="^model: expected .* its own, got one that use_loss has changed$"):
        use_loss(use_loss(segformer))
    with pytest.raises(ValueError, match="^target_sizes: expected 2, one for each map, got 1$"):
        label_maps(segformer(torch.randn(2, 3, SIZE, SIZE)), [(SIZE, SIZE)])


def test_accelerate_trains_it(segformer, batch):
    accelerate = pytest.importorskip("accelerate")
    model = use_loss(segformer, BoundaryCorrectedLoss())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        loss = model(batch[0], labels=batch[1]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
