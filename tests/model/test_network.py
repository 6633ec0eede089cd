"""The family against the published table and against timm's ResNet-RS, with branches that are not dead."""

import re

import pytest
import torch
import torch.nn.functional as F

from rsengine.model import DEPTHS, divisible, drop_path_rates, from_timm, resnet_rs
from rsengine.model.layers import PointwiseConv

# Trainable parameters at 1000 and at 10 classes, and parameter tensors (timm's models, counted).
TABLE = {
    50: (35_691_912, 33_663_402, 234),
    101: (63_618_696, 61_590_186, 455),
    152: (86_621_576, 84_593_066, 676),
    200: (93_209_992, 91_181_482, 884),
    270: (129_861_448, 127_832_938, 1196),
    350: (163_956_168, 161_927_658, 1534),
    420: (191_891_656, 189_863_146, 1833),
}


@pytest.mark.parametrize("depth", TABLE)
def test_parameters_equal_the_published_counts(depth):
    with torch.device("meta"):
        for num_classes, expected in zip((1000, 10), TABLE[depth][:2], strict=True):
            parameters = list(resnet_rs(depth, num_classes).parameters())
            assert sum(p.numel() for p in parameters) == expected
            assert len(parameters) == TABLE[depth][2]


def randomised(model):
    """Random batch-norm parameters everywhere: a zero last gamma would hide every error of the residual branch."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() == 1 and "bn" in name.split(".")[-2] or "downsample.2" in name:
            with torch.no_grad():
                p.copy_(0.5 + 0.5 * torch.rand(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("depth", [50, 101, 200])
def test_timm_weights_give_equal_outputs_and_gradients(depth):
    import timm

    torch.manual_seed(0)
    theirs = randomised(timm.create_model(f"resnetrs{depth}", num_classes=7, drop_rate=0.0)).double().train()
    ours = resnet_rs(depth, 7, dropout=0.0).double().train()
    ours.load_state_dict(from_timm(theirs.state_dict()))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    target = torch.tensor([1, 5])
    outputs = []
    for model in (theirs, ours):
        model.zero_grad()
        outputs.append(model(x))
        F.cross_entropy(outputs[-1], target).backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-10)
    expected = from_timm({name: p.grad for name, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        scale = float(expected[name].abs().max())
        assert scale > 0, f"{name}: timm's gradient is zero, so this would compare nothing"
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-7 * scale, msg=name)
    for model in (theirs, ours):
        model.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-10)


def test_from_timm_refuses_other_models():
    with pytest.raises(ValueError, match="'layers.0.weight' is not among the parameters"):
        from_timm({"layers.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="'layers.0.w', 'layers.1.w', 'layers.2.w' and 1 more are not among"):
        from_timm({"fc.bias": torch.zeros(1)} | {f"layers.{i}.w": torch.zeros(1) for i in range(4)})


@pytest.mark.parametrize(
    "options", [{"depth": 50}, {"blocks": (1, 1, 1, 1), "stem_stride": 1, "drop_path": 0.1}], ids=str
)
def test_no_parameter_is_dead_after_the_second_step(options):
    """The report's network zeroed a batch norm that feeds a ReLU: 128 of its 231 tensors never had a gradient."""
    torch.manual_seed(0)
    model = resnet_rs(num_classes=10, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    dead = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert not dead, f"{len(dead)} parameters have an all-zero gradient: {dead[:5]}"


def test_only_the_last_batch_norm_starts_at_zero():
    for name, p in resnet_rs(26).named_parameters():
        if p.dim() == 1 and name.endswith("weight"):
            assert p.eq(0.0 if ".bn3." in name and name.startswith("stages") else 1.0).all(), name


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({}, [8, 4, 2, 1]),
        ({"stem_stride": 1}, [16, 8, 4, 2]),
        ({"stem_pool_stride": 1}, [16, 8, 4, 2]),
        ({"stem_stride": 1, "stem_pool_stride": 1}, [32, 16, 8, 4]),
    ],
    ids=str,
)
def test_strides_decide_the_maps(options, sides):
    model = resnet_rs(blocks=(1, 1, 1, 1), stem_width=8, width_multiplier=0.25, **options)
    x, found = model.stem(torch.zeros(2, 3, 32, 32)), []
    for stage in model.stages:
        x = stage(x)
        found.append(x.shape[-1])
    assert found == sides


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 64)], ids=str)
def test_any_image_size_and_number_of_stages(size):
    assert resnet_rs(blocks=(1, 2, 1), num_classes=3, width_multiplier=0.25)(torch.zeros(2, 3, *size)).shape == (2, 3)


def plain(model):
    """torchvision's names for the weights of a network without ResNet-D and squeeze-and-excite."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^stages\.(\d)", lambda m: f"layer{int(m[1]) + 1}", name.removeprefix("stem."))
        renamed[name.replace("shortcut.conv", "downsample.0").replace("shortcut.bn", "downsample.1")] = tensor
    return renamed


@pytest.mark.parametrize("size", [(64, 64), (33, 47)], ids=str)  # the second: maps with odd sides
def test_without_resnet_d_and_squeeze_and_excite_it_is_torchvisions_resnet(size):
    from torchvision.models import resnet50

    torch.manual_seed(0)
    options = {"se_ratio": 0, "resnet_d": False, "zero_init": "none", "dropout": 0.0}
    ours, theirs = resnet_rs(50, 7, **options).double(), resnet50(num_classes=7).double()
    theirs.load_state_dict(plain(ours))
    x, target = torch.randn(3, 3, *size, dtype=torch.float64), torch.tensor([1, 5, 2])
    outputs = []
    for model in (theirs, ours):
        outputs.append(model(x))
        F.cross_entropy(outputs[-1], target).backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-10)
    expected = dict(theirs.named_parameters())
    for name, p in zip(plain(ours), ours.state_dict(), strict=True):
        if name in expected:
            gradient, scale = expected[name].grad, float(expected[name].grad.abs().max())
            torch.testing.assert_close(ours.get_parameter(p).grad, gradient, rtol=0, atol=1e-7 * scale, msg=name)


def test_stochastic_depth_without_squeeze_and_excite_drops_branches():
    torch.manual_seed(0)
    model = resnet_rs(blocks=(1,), width_multiplier=0.25, stem_width=8, drop_path=0.8, se_ratio=0, zero_init="none")
    block = model.stages[0][0].train()
    x = torch.randn(1, 16, 4, 4).expand(2000, -1, -1, -1)
    with torch.no_grad():
        y, shortcut = block(x), block.shortcut(x)[0]
        is_dropped = torch.tensor([torch.allclose(sample, shortcut.relu(), atol=1e-5) for sample in y])
        assert is_dropped.double().mean() == pytest.approx(0.8, abs=0.04)
        kept = y[~is_dropped][0]
        block.drop_path = 0.0
        whole = block(x)[0]
    is_open = (kept > 0) & (whole > 0)
    torch.testing.assert_close((kept - shortcut)[is_open], 5 * (whole - shortcut)[is_open])  # 1 / (1 - 0.8)


def test_stem_width_and_se_ratio_of_the_reports_recipe():
    model = resnet_rs(50, stem_width=128, se_ratio=1 / 16)
    assert model.stem.conv1.out_channels == 128 and model.stem.conv3.out_channels == 256
    assert isinstance(model.stages[0][0].shortcut, torch.nn.Identity)  # 256 channels in and out: nothing to project
    assert [stage[0].se.reduce.out_features for stage in model.stages] == [16, 32, 64, 128]
    assert [stage[0].se.reduce.out_features for stage in resnet_rs(50).stages] == [64, 128, 256, 512]


def test_drop_path_rates_follow_both_published_rules():
    blocks = DEPTHS[200]
    tf = drop_path_rates(blocks, 0.1, "tf")
    starts = [0, 3, 27, 63]
    assert [round(tf[i], 6) for i in starts] == [0.04, 0.06, 0.08, 0.10]
    assert tf[0:3] == [tf[0]] * 3 and len(tf) == sum(blocks)
    timm = drop_path_rates(blocks, 0.1, "timm")
    assert timm[0] == 0 and timm[-1] == pytest.approx(0.1)
    assert timm[1] - timm[0] == pytest.approx(timm[-1] - timm[-2])
    model = resnet_rs(blocks=(1, 1, 1, 1), drop_path=0.5)
    assert [stage[0].drop_path for stage in model.stages] == pytest.approx([0.2, 0.3, 0.4, 0.5])


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    model = resnet_rs(blocks=(1,), width_multiplier=0.25, stem_width=8, drop_path=0.8, dropout=0.0)
    block = model.stages[0][0].train()  # rate 0.8 * 2 / 2
    torch.nn.init.ones_(block.bn3.weight)
    x = torch.randn(1, 16, 4, 4).expand(4000, -1, -1, -1)
    shortcut = block.shortcut(x).relu()[0]
    dropped = sum(torch.allclose(sample, shortcut, atol=1e-5) for sample in block(x))
    assert dropped / 4000 == pytest.approx(0.8, abs=0.03)


def test_pointwise_convolution_equals_a_convolution():
    torch.manual_seed(0)
    conv = PointwiseConv(6, 4).double()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 6, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
        ours, plain = conv(x), F.conv2d(x, conv.weight)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-14)
        upstream = torch.randn_like(plain)
        for a, b in zip(
            torch.autograd.grad(ours, (x, conv.weight), upstream),
            torch.autograd.grad(plain, (x, conv.weight), upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_channels_last_survives_the_network():
    model = resnet_rs(blocks=(1, 1), width_multiplier=0.25).to(memory_format=torch.channels_last)
    x = torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert model.stages(model.stem(x)).is_contiguous(memory_format=torch.channels_last)


def test_summary_counts():
    summary = resnet_rs(50).summary((32, 32))
    assert (summary.parameters, summary.parameter_tensors) == (33_663_402, 234)
    assert summary.multiply_adds == pytest.approx(201.48e6 / 2, rel=2e-3)  # timm's, counted by its own tools
    assert "33,663,402 parameters" in str(summary) and "32x32" in str(summary)
    # By hand: a stem of width 8 and one block of width 8 -> 32 channels on an 8x8 input, strides 1.
    small = resnet_rs(
        blocks=(1,), num_classes=5, stem_width=8, stem_stride=1, stem_pool_stride=1, width_multiplier=0.125, dropout=0.0
    )
    pixels = 64
    stem = pixels * 9 * (3 * 8 + 8 * 8 + 8 * 16 + 16 * 16)
    block = pixels * (16 * 8 + 9 * 8 * 8 + 8 * 32 + 16 * 32) + 2 * 32 * 8
    assert small.summary((8, 8)).multiply_adds == stem + block + 32 * 5
    bigger = small.summary((16, 16)).activation_bytes
    assert 3.5 < bigger / small.summary((8, 8)).activation_bytes < 4.0
    assert all(p.device.type == "cpu" for p in small.parameters())


def test_divisible():
    assert [divisible(v) for v in (1, 8, 11, 12, 64, 256 * 0.25)] == [8, 8, 8, 16, 64, 64]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 51}, "depth: expected one of 26, 50"),
        ({"blocks": (2, 0)}, "blocks: expected one or more counts >= 1"),
        ({"blocks": ()}, "blocks: expected one or more"),
        ({"stem_stride": 3}, "stem_stride: expected 1 or 2; got 3"),
        ({"stem_pool_stride": 0}, "stem_pool_stride: expected 1 or 2"),
        ({"drop_path_rule": "linear"}, "drop_path_rule: expected one of tf, timm"),
        ({"drop_path": 1.0}, "drop_path: expected a number in"),
        ({"dropout": -0.1}, "dropout: expected a number in"),
        ({"num_classes": 0}, "num_classes: expected at least 1"),
        ({"width_multiplier": 0}, "width_multiplier: expected a positive"),
        ({"se_ratio": -0.1}, "se_ratio: expected a number >= 0"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        resnet_rs(**options)


def built(seed=0, **options):
    torch.manual_seed(seed)
    return resnet_rs(**{"blocks": (1, 2), "width_multiplier": 0.25, "stem_width": 8} | options)


@pytest.mark.parametrize(
    "options",
    [{"stem_width": 16}, {"blocks": (2, 2)}, {"se_ratio": 0}, {"resnet_d": False}, {"num_classes": 3}],
    ids=str,
)
def test_networks_of_one_seed_begin_alike_where_shapes_agree_and_so_does_what_is_drawn_after_them(options):
    one, drawn = built().state_dict(), torch.rand(3)
    other = built(**options).state_dict()
    assert torch.equal(torch.rand(3), drawn)
    same = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert len(same) > len(one) // 2 and all(torch.equal(one[name], other[name]) for name in same)
    third = built(seed=1).state_dict()
    assert not any(torch.equal(one[name], third[name]) for name in one if "conv" in name or "se." in name)


def test_layers_of_one_shape_begin_differently_and_as_pytorch_spreads_them():
    torch.manual_seed(0)
    model = resnet_rs(26, stem_width=32).requires_grad_(False)
    a, b = model.stages[3][1], model.stages[3][0]
    assert not torch.equal(a.conv3.weight, b.conv3.weight) and not torch.equal(a.se.expand.bias, b.se.expand.bias)
    assert float(a.conv2.weight.std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)  # fan out
    for layer in (a.se.reduce, a.se.expand):
        plain = torch.nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
        assert float(layer.weight.std()) == pytest.approx(float(plain.weight.std()), rel=0.01)
        assert float(layer.bias.std()) == pytest.approx(float(plain.bias.std()), rel=0.1)
    assert float(model.fc.weight.std()) == pytest.approx(0.01, rel=0.02) and not model.fc.bias.any()
