"""What every op owes torch and its caller, for all of them in one place; an op's own file has its values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from compare import assert_close
from gpu_manners import assert_capturable, assert_never_waits, assert_uses_the_current_stream
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bcmfnet.nn import LMFM
from bcmfnet.ops import (
    backends,
    boundary_corrected_loss,
    lmfm,
    pyramid_pool,
    segmentation_loss,
    stem_conv,
    upsample_add_relu,
    upsample_argmax,
)
from bcmfnet.ops._loss_options import checked_options, pack, term_options
from bcmfnet.ops._op import LIBRARY
from bcmfnet.reference.lmfm import fusing_levels
from bcmfnet.reference.pyramid_pool import flat

POOLS = ((5, 2, 2), (9, 4, 4), (17, 8, 8))
LAYOUTS = [torch.contiguous_format, torch.channels_last]
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*HALF_AND_SINGLE, torch.float64)

Tensors = dict[str, Tensor]
Arguments = Callable[..., tuple[Any, ...]]


class Example(NamedTuple):
    """A call of an op."""

    op: str
    call: Callable[..., tuple[Tensor, ...]]
    """The call of tensors alone, by name."""
    tensors: Callable[[int], Tensors]
    """Float32 tensors and labels for a batch of some size."""
    torch_ops: dict[str, Arguments]
    """The torch ops behind the call, and their arguments from the tensors; first that of a call without gradients."""
    differentiable: tuple[str, ...] = ()
    """The tensors that it has a gradient for."""
    dtypes: tuple[torch.dtype, ...] = FLOATS


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss(*grid: int, **terms: Any) -> Example:
    """The Boundary Corrected Loss, or with terms their sum, with weights of pixels and a teacher."""
    options = {"mode": "paper0", "nms": 3, "ratio": 1 / 16, "ignore_index": 3, "per_image": True} | terms
    packed = pack(term_options(boundary=1.0, **options) if terms else checked_options(**options))
    compute = partial(segmentation_loss, boundary=1.0) if terms else boundary_corrected_loss

    def call(logits: Tensor, target: Tensor, weight: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        loss, stats = compute(logits, target, weight=weight, return_stats=True, **others, **options)
        return loss, *stats

    def tensors(batch: int) -> Tensors:
        target = torch.randint(0, 4, (batch, 8, 22), generator=torch.Generator().manual_seed(1))
        given = {"logits": normal(batch, 4, *grid), "target": target, "weight": torch.tensor([1.0, 0.5, 2.0, 1.5])}
        if not terms:
            return given
        return given | {"pixel_weight": normal(batch, 8, 22, seed=2).abs(), "teacher": normal(batch, 4, *grid, seed=3)}

    def inputs(logits: Tensor, *others: Tensor) -> tuple[Any, ...]:
        return (logits, *others, *[None] * (4 - len(others)))

    def backward(logits: Tensor, *others: Tensor) -> tuple[Any, ...]:
        given = inputs(logits.detach(), *others)
        saved = torch.ops.bcmfnet.bcl_forward(*given, None, *packed, False)[5:]
        return torch.tensor(2.0, device=logits.device), *given, *packed, *saved

    torch_ops: dict[str, Arguments] = {
        "bcl": lambda logits, *others: (*inputs(logits.detach(), *others), None, *packed),
        "bcl_forward": lambda *tensors: (*inputs(*tensors), None, *packed, False),
        "bcl_backward": backward,
    }
    if grid == (8, 22):
        torch_ops["bcl_backward_"] = lambda *tensors: backward(*tensors)[:-1]
    return Example("bcl", call, tensors, torch_ops, ("logits",))


def context() -> Example:
    weights = LMFM(6, 5, branch_channels=3).eval().pyramid_weights(torch.float32)
    levels = fusing_levels(weights.kernels, weights.receives)
    numbers = (flat(weights.pools), list(weights.kernels), list(weights.receives), list(levels))
    fixed = {name: value for name, value in weights._asdict().items() if isinstance(value, Tensor)}
    return Example(
        "lmfm",
        lambda x, *values, **named: (lmfm(x, weights._replace(**dict(zip(fixed, values, strict=False)) | named)),),
        lambda batch: {"x": normal(batch, 6, 6, 9)} | fixed,
        {"lmfm": lambda *tensors: (*tensors, *numbers)},
    )


def pools() -> Example:
    numbers = flat(POOLS)

    def forward(x: Tensor) -> tuple[Any, ...]:
        return x, numbers, x.is_contiguous(memory_format=torch.channels_last)

    def backward(x: Tensor) -> tuple[Any, ...]:
        packed = torch.ops.bcmfnet.pyramid_pool(*forward(x.detach())).requires_grad_()
        return packed, list(x.shape), *forward(x)[1:]

    return Example(
        "pyramid_pool",
        lambda x: pyramid_pool(x, POOLS),
        lambda batch: {"x": normal(batch, 5, 9, 13)},
        {"pyramid_pool": forward, "pyramid_pool_backward": backward},
        ("x",),
    )


def fusion() -> Example:
    def backward(high: Tensor, low: Tensor) -> tuple[Any, ...]:
        out = torch.ops.bcmfnet.upsample_add_relu(high.detach(), low.detach())
        return high.detach().requires_grad_(), out, list(low.shape[2:])

    return Example(
        "upsample_add_relu",
        lambda high, low: (upsample_add_relu(high, low),),
        lambda batch: {"high": normal(batch, 5, 7, 18), "low": normal(batch, 5, 3, 9, seed=1)},
        {"upsample_add_relu": lambda *maps: maps, "upsample_add_relu_backward": backward},
        ("high", "low"),
    )


def labels(classes: int, confidence: bool) -> Example:
    def size(logits: Tensor) -> tuple[int, int]:
        return 3 * logits.shape[2] + 1, 2 * logits.shape[3]

    def call(logits: Tensor) -> tuple[Tensor, ...]:
        found = upsample_argmax(logits, size(logits), return_confidence=confidence)
        return found if confidence else (found,)

    return Example(
        "upsample_argmax",
        call,
        lambda batch: {"logits": normal(batch, classes, 3, 14)},
        {"upsample_argmax": lambda logits: (logits, size(logits), confidence)},
        dtypes=HALF_AND_SINGLE,
    )


def stem(as_bytes: bool) -> Example:
    normalization = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)) if as_bytes else ()

    def tensors(batch: int) -> Tensors:
        images = normal(batch, 3, 7, 18)
        images = (64 * images.abs()).byte() if as_bytes else images
        return {"images": images, "weights": normal(5, 3, 3, 3, seed=1), "bias": normal(5, seed=2)}

    def call(images: Tensor, weights: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (stem_conv(images, weights, bias, *normalization),)

    return Example(
        "stem_conv", call, tensors, {"stem_conv": lambda *tensors: (*tensors, [0.1, 0.2, 0.3], [-0.3, -0.2, -0.1])},
        dtypes=HALF_AND_SINGLE,
    )  # fmt: skip


TERMS = {
    "focal": 0.5, "dice": 1.0, "tversky": 0.3, "distillation": 0.7, "label_smoothing": 0.1, "overlap_per_image": True,
    "distillation_temperature": 2.0, "distillation_where": "all",
}  # fmt: skip
EXAMPLES = {
    "bcl": loss(8, 22),
    "bcl, upsampled": loss(4, 11),
    "bcl, terms": loss(8, 22, **TERMS),
    "bcl, terms, upsampled": loss(4, 11, **TERMS, align_corners=True),
    "lmfm": context(),
    "pyramid_pool": pools(),
    "stem_conv": stem(as_bytes=False),
    "stem_conv, uint8": stem(as_bytes=True),
    "upsample_add_relu": fusion(),
    "upsample_argmax": labels(5, confidence=True),
    "upsample_argmax, int16": labels(300, confidence=False),
}
EXHAUSTIVE = {"bcl, terms"}
"""Examples that hardly differ from another one."""
EVERY = pytest.mark.parametrize("example", [
    pytest.param(example, id=name, marks=[pytest.mark.exhaustive] if name in EXHAUSTIVE else [])
    for name, example in EXAMPLES.items()
])  # fmt: skip


def tensors_of(example: Example, device: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensors:
    """Its tensors elsewhere and in another dtype: norms are float32 at least."""
    tensors = example.tensors(batch)
    for name, tensor in tensors.items():
        wanted = torch.promote_types(dtype, torch.float32) if name.endswith("norms") else dtype
        tensors[name] = tensor.to(device, wanted if tensor.is_floating_point() else None)
    return tensors


def run(example: Example, tensors: Tensors) -> list[Tensor]:
    """Outputs of a call, and the gradients of what it has one for."""
    leaves = [tensors[name].detach().requires_grad_() for name in example.differentiable]
    outputs = example.call(**tensors | dict(zip(example.differentiable, leaves, strict=True)))
    asked = [output for output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(asked, leaves, [torch.ones_like(output) for output in asked]) if leaves else ()
    return [output.detach() for output in (*outputs, *gradients)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def in_layout(tensors: Tensors, layout: torch.memory_format) -> Tensors:
    return {name: x.contiguous(memory_format=layout) if x.ndim == 4 else x for name, x in tensors.items()}


def test_every_op_has_an_example():
    assert {example.op for example in EXAMPLES.values()} == {op for op, _ in backends._table}
    known = {name for example in EXAMPLES.values() for name in example.torch_ops}
    assert {name.removeprefix("bcmfnet::").removesuffix(".default") for name in LIBRARY._op_defs} == known


@EVERY
@pytest.mark.any_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, example, layout):
    tensors = in_layout(tensors_of(example, device), layout)
    for name in example.differentiable:
        tensors[name].requires_grad_()
    for name, arguments in example.torch_ops.items():
        torch.library.opcheck(getattr(torch.ops.bcmfnet, name), arguments(*tensors.values()))


@EVERY
@pytest.mark.any_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, example, dynamic):
    if example.op == "bcl":
        pytest.skip("compiled in test_bcl.py, over sizes, layouts and seeds")
    compiled = torch.compile(example.call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    whole = tensors_of(example, device)
    maps = {name: x for name, x in whole.items() if x.ndim == 4 and name != "weights"}
    part = whole | {name: x[:1, ..., 1:].contiguous() for name, x in maps.items()}
    for tensors in (part, whole):
        assert_equal(run(example._replace(call=compiled), tensors), run(example, tensors))


@EVERY
@pytest.mark.tail
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_not_written_and_outputs_are_written_whole(device, example, layout, request):
    tensors = in_layout(tensors_of(example, device), layout)
    before = {name: (tensor.clone(), tensor._version) for name, tensor in tensors.items()}
    expected = run(example, tensors)
    request.getfixturevalue("poisoned")
    assert_equal(run(example, tensors), expected)
    for name, (copy, version) in before.items():
        assert torch.equal(tensors[name], copy)
        assert tensors[name]._version == version


@EVERY
def test_an_empty_batch(device, example):
    empty = run(example, tensors_of(example, device, batch=0))
    with backends.use_backend("reference"):
        whole = run(example, tensors_of(example, device))
    for actual, expected in zip(empty, whole, strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == ((0, *expected.shape[1:]) if expected.ndim else ())


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice": lambda x: torch.stack([x, x, x], 1).flatten(0, 1)[1::3],
    "every other column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "channels last, in part": lambda x: torch.stack([x, x], -1).movedim(1, -1).contiguous().movedim(-1, 1)[..., 1],
    "expanded": lambda x: x[:1, ..., :1].expand_as(x),
}


@EVERY
@pytest.mark.tail
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device, example, layout):
    """Of one map, beside others of a layout; weights are contiguous."""
    tensors = in_layout(tensors_of(example, device), layout)
    for name in {"x", "high", "low", "images", "logits", "target", "pixel_weight", "teacher"} & tensors.keys():
        for strided in STRIDED.values():
            other = strided(tensors[name])
            actual = run(example, tensors | {name: other})
            for one, wanted in zip(actual, run(example, tensors | {name: other.contiguous()}), strict=True):
                if one.is_floating_point():
                    assert_close(one, wanted)
                else:
                    assert torch.equal(one, wanted)


@EVERY
@pytest.mark.tail
def test_two_runs_and_any_number_of_threads_give_equal_bits(device, example):
    tensors = tensors_of(example, device, batch=5)
    first, threads = run(example, tensors), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_equal(run(example, tensors), first)
    finally:
        torch.set_num_threads(threads)


@EVERY
@pytest.mark.tail
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_autocast_changes_neither_the_inputs_nor_the_arithmetic(device, example, dtype):
    def call(**tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, dtype=torch.bfloat16):
            return example.call(**tensors)

    tensors = tensors_of(example, device, dtype)
    assert_equal(run(example._replace(call=call), tensors), run(example, tensors))


@EVERY
def test_float64_is_served_by_the_reference(device, example):
    if torch.float64 not in example.dtypes:
        pytest.skip("it takes none")
    tensors = tensors_of(example, device, torch.float64)
    actual = run(example, tensors)
    with backends.use_backend("reference"):
        assert_equal(actual, run(example, tensors))


class Seen(set):
    """Names of the ops that something saw before it let them be called."""

    def call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any] | None) -> Any:
        if isinstance(function, torch._ops.OpOverload):
            self.add(function.name())
        return function(*arguments, **(keywords or {}))


class Ops(TorchDispatchMode):
    seen = Seen()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return self.seen.call(function, arguments, keywords)


class Functions(TorchFunctionMode):
    seen = Seen()

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return self.seen.call(function, arguments, keywords)


@EVERY
@pytest.mark.parametrize("mode", [Ops, Functions])
def test_a_mode_sees_the_op_and_the_direct_call_has_the_same_results(example, mode):
    """A call that nothing looks at does not go through torch's dispatcher."""
    tensors = tensors_of(example, "cpu")
    direct = run(example, tensors)
    with mode() as watching:
        assert_equal(run(example, tensors), direct)
        example.call(**tensors)
    unseen = {"bcl_backward_"} if mode is Ops else {name for name in example.torch_ops if "backward" in name}
    assert {f"bcmfnet::{name}" for name in set(example.torch_ops) - unseen} <= watching.seen


class Subclass(Tensor):
    seen: set[str] = set()

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        cls.seen.add(str(function))
        return super().__torch_function__(function, types, arguments, keywords or {})


@EVERY
def test_a_subclass_of_tensors_sees_the_op(example):
    tensors = tensors_of(example, "cpu")
    first = next(iter(tensors))
    actual = example.call(**tensors | {first: tensors[first].as_subclass(Subclass)})
    assert_equal([x.as_subclass(Tensor) for x in actual], list(example.call(**tensors)))
    assert f"bcmfnet.{next(iter(example.torch_ops))}.default" in Subclass.seen


@EVERY
def test_a_trace_has_the_op(example):
    if example.op == "bcl":
        pytest.skip("torch.jit traces no check of the labels' type")
    tensors = tensors_of(example, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda *values: example.call(*values), tuple(tensors.values()), check_trace=False)
    assert f"bcmfnet::{next(iter(example.torch_ops))}" in str(traced.graph)


@EVERY
@pytest.mark.gpu
@pytest.mark.parametrize("check", [assert_never_waits, assert_uses_the_current_stream, assert_capturable])
def test_manners_on_a_gpu(cuda, example, check):
    tensors = tensors_of(example, cuda)
    check(lambda *values: tuple(run(example, dict(zip(tensors, values, strict=True)))), *tensors.values())
