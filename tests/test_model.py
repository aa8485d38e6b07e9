"""The network against a functional re-implementation, selectivity against slow loops."""
import copy
import itertools
import math
import os
import pickle
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import model
import train
from model import (
    LAYERS,
    METER,
    CheckpointError,
    assigned_selectivity,
    layer_thresholds,
    load_checkpoint,
    record,
    unit_selectivity,
)

PARAMETERS = {"xxs": 713_464, "xs": 1_449_760, "s": 3_295_168}
ENCODER = {"xxs": (16, 16, 24, 24, 24, 48, 48, 64, 64, 80, 80, 160),       # enc_0 .. enc_output
           "xs": (16, 32, 48, 48, 48, 64, 64, 80, 80, 96, 96, 192),
           "s": (16, 32, 64, 64, 64, 96, 96, 128, 128, 160, 160, 320)}
DECODER = {"xxs": (64, 32, 16, 8), "xs": (128, 64, 32, 16), "s": (128, 64, 32, 16)}
HEIGHTS = (96, 96, 48, 48, 48, 24, 24, 12, 12, 6, 6, 6, 6, 12, 24, 48)     # of 192
LAYER_SHAPES = sorted(set(zip(ENCODER["xxs"] + DECODER["xxs"], HEIGHTS)))


def random_meter(variant="xxs", seed=0, **options):
    """METER in evaluation mode, its batch norms as random as its other weights."""
    torch.manual_seed(seed)
    network = METER(variant, **options).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            for x in (module.running_var, module.weight.data):
                x.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    return network


def reference_forward(s, image, expansion):
    """METER's answer in its own units from its state dict, one functional call after the other."""
    def conv(x, key, **options):
        return F.conv2d(x, s[f"{key}.weight"], **options)

    def dense(x, key, stride=1):
        return conv(conv(x, f"{key}.depthwise", stride=stride, padding=1), f"{key}.pointwise")

    def bn(x, key):
        x = (x - s[f"{key}.running_mean"][:, None, None]) / (
            s[f"{key}.running_var"][:, None, None] + 1e-5).sqrt()
        return x * s[f"{key}.weight"][:, None, None] + s[f"{key}.bias"][:, None, None]

    def linear(x, key):
        return F.linear(x, s[f"{key}.weight"], s.get(f"{key}.bias"))

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], s[f"{key}.weight"], s[f"{key}.bias"])

    def mv2(x, number, stride):
        key = f"encoder.mv2.{number}.conv"
        y = bn(conv(x, f"{key}.0"), f"{key}.1").relu()
        assert y.shape[1] == expansion * x.shape[1]
        y = bn(conv(y, f"{key}.3", stride=stride, padding=1, groups=y.shape[1]), f"{key}.4").relu()
        y = bn(conv(y, f"{key}.6"), f"{key}.7")
        return x + y if x.shape == y.shape else y

    def transformer(tokens, key):                                              # (B, N, width)
        normed = norm(tokens, f"{key}.0.0.norm")
        query, k, v = linear(normed, f"{key}.0.0.fn.to_qkv").chunk(3, dim=-1)  # (B, N, 32) each
        heads = [torch.softmax(query[..., at] @ k[..., at].mT * 8 ** -0.5, -1) @ v[..., at]
                 for at in (slice(h, h + 8) for h in range(0, 32, 8))]
        tokens = tokens + linear(torch.cat(heads, -1), f"{key}.0.0.fn.to_out.0")
        hidden = linear(norm(tokens, f"{key}.0.1.norm"), f"{key}.0.1.fn.net.0").relu()
        return tokens + linear(hidden, f"{key}.0.1.fn.net.3")

    def meter_block(x, number):
        key = f"encoder.mvit.{number}"
        y = bn(dense(x, f"{key}.conv1.0"), f"{key}.conv1.1").relu()
        y = bn(conv(y, f"{key}.conv2.0"), f"{key}.conv2.1").relu()
        mixed = torch.empty_like(y)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):                      # place in a patch
            place = y[:, :, i::2, j::2]
            tokens = transformer(place.flatten(2).mT, f"{key}.transformer.layers")
            mixed[:, :, i::2, j::2] = tokens.mT.reshape(place.shape)
        y = bn(conv(mixed, f"{key}.conv3.0"), f"{key}.conv3.1").relu()
        return bn(dense(torch.cat([y, x], 1), f"{key}.conv4.0"), f"{key}.conv4.1").relu()

    def up(x, skip, number):
        key = f"decoder.ups_block_{number}"
        x = F.conv_transpose2d(x, s[f"{key}.conv2d_transpose.weight"], None, 2, 1, 1)
        return dense(torch.cat([x, skip], 1), f"{key}.end_up_layer.0").relu()

    x = bn(dense(image, "encoder.conv1.0", stride=2), "encoder.conv1.1").relu()
    enc_2 = mv2(mv2(x, 0, 1), 1, 2)
    enc_5 = mv2(mv2(mv2(enc_2, 2, 1), 3, 1), 4, 2)
    enc_7 = mv2(meter_block(enc_5, 0), 5, 2)
    x = meter_block(mv2(meter_block(enc_7, 1), 6, 2), 2)
    x = bn(conv(x, "encoder.conv2.0"), "encoder.conv2.1").relu()
    x = up(up(up(conv(x, "decoder.conv2d_in"), enc_7, 1), enc_5, 2), enc_2, 3)
    return conv(x, "decoder.conv2d_out", padding=1)


@pytest.mark.parametrize("variant", PARAMETERS)
def test_meter_agrees_with_a_functional_re_implementation(variant):
    network, image = random_meter(variant), torch.randn(2, 3, 128, 192)
    assert sum(x.numel() for x in network.parameters()) == PARAMETERS[variant]
    with torch.no_grad():
        expected = reference_forward(network.state_dict(), image, 2 if variant == "xxs" else 4)
        torch.testing.assert_close(network(image) * 100 / expected.std(), expected / expected.std(),
                                   rtol=1e-4, atol=1e-4)


def test_state_dict_has_the_keys_of_the_released_weights():
    shapes = {key: tuple(x.shape) for key, x in METER().state_dict().items()}
    block = "encoder.mvit.0.transformer.layers.0"
    for key, shape in {
            "encoder.conv1.0.depthwise.weight": (16, 3, 3, 3), "encoder.conv1.1.running_var": (16,),
            "encoder.mv2.1.conv.3.weight": (32, 1, 3, 3), "encoder.mvit.2.conv4.1.bias": (80,),
            f"{block}.0.fn.to_qkv.weight": (96, 64), f"{block}.0.fn.to_out.0.bias": (64,),
            f"{block}.1.fn.net.3.weight": (64, 128), "decoder.conv2d_in.weight": (64, 160, 1, 1),
            "decoder.ups_block_3.conv2d_transpose.weight": (16, 8, 3, 3),
            "decoder.ups_block_3.end_up_layer.0.pointwise.weight": (8, 8, 1, 1),
            "decoder.conv2d_out.weight": (1, 8, 3, 3)}.items():
        assert shapes[key] == shape, key
    assert f"{block}.0.fn.to_qkv.bias" not in shapes


@torch.no_grad()
def test_output_is_float32_metres_also_under_autocast():
    image = torch.randn(1, 3, 64, 64)
    centimetres, grey = random_meter()(image), random_meter(units_per_metre=25.5)(image)
    torch.testing.assert_close(centimetres * 100, grey * 25.5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = random_meter()(image)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, centimetres, rtol=0.1, atol=0.1 * centimetres.std().item())
    assert not torch.equal(mixed, mixed.bfloat16().float())


@pytest.mark.parametrize("height, width", [(192, 250), (96, 256), (61, 64), (63, 64)])
def test_sizes_that_are_no_multiples_of_64_and_unknown_variants_raise(height, width):
    with pytest.raises(ValueError, match=f"{height}.*{width}"):
        METER()(torch.zeros(1, 3, height, width))
    with pytest.raises(ValueError, match="huge"):
        METER("huge")


@pytest.mark.parametrize("variant", PARAMETERS)
def test_sixteen_layers_fire_in_order_with_the_channels_of_the_paper(variant):
    network, image = random_meter(variant), torch.randn(1, 3, 192, 256)
    with torch.no_grad(), record(network, list(LAYERS)[::-1]) as features:
        network(image)
    assert list(features) == list(LAYERS) and len(features) == 16
    shapes = [(1, c, h, h * 4 // 3) for c, h in zip(ENCODER[variant] + DECODER[variant], HEIGHTS)]
    assert [x.shape for x in features.values()] == shapes


def hook_count(network):
    return sum(len(module._forward_hooks) for module in network.modules())


def test_record_leaves_no_hook_behind():
    network = METER()
    with record(network, ["dec_3", "enc_4"]):
        assert hook_count(network) == 2
    assert hook_count(network) == 0
    with pytest.raises(ZeroDivisionError), record(network, ["dec_3"]):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="enc_99"), record(network, ["dec_3", "enc_99"]):
        pass
    assert hook_count(network) == 0


def test_record_takes_any_network_and_module_path():
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh())
    network, image = nn.Sequential(inner, nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 5, 7)
    with record(network, ["0", "0.0", "1"]) as features:
        answer = network(image)
    expected = {"0.0": inner[0](image), "0": inner(image), "1": answer}
    assert list(features) == list(expected)                            # as they fire
    for path, x in expected.items():
        assert torch.equal(features[path], x), path
    for unknown in ("enc_4", "0.2", "tanh"):
        with pytest.raises(ValueError, match=unknown), record(network, ["1", unknown]):
            pass
    assert hook_count(network) == 0

    meter, image = random_meter(), torch.randn(1, 3, 64, 64)
    names = ["enc_4", "encoder.mv2.3", "decoder.conv2d_out"]
    with torch.no_grad(), record(meter, names) as features:
        prediction = meter(image)
    assert torch.equal(features["enc_4"], features["encoder.mv2.3"])
    torch.testing.assert_close(features["decoder.conv2d_out"], prediction * 100)


@pytest.mark.parametrize("amp", [False, True])
def test_record_keeps_signs_and_passes_gradients_in_training(amp):
    network, image = METER().train(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp), record(network, ["enc_4"]) as features:
        network(image)
    assert features["enc_4"].min() < 0 < features["enc_4"].max()
    features["enc_4"].float().square().mean().backward()
    assert network.encoder.conv1[0].depthwise.weight.grad.abs().sum() > 0
    assert network.decoder.conv2d_in.weight.grad is None


def test_record_works_with_a_compiled_model_before_and_after_its_first_call():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Tanh(), nn.Conv2d(4, 2, 1)))
    compiled, image = copy.deepcopy(network), torch.randn(1, 3, 64, 64)
    compiled.compile(backend="eager")
    meter = random_meter()
    compiled_meter = copy.deepcopy(meter)
    compiled_meter.compile(backend="eager")
    with torch.no_grad():
        with record(meter, LAYERS) as expected, record(compiled_meter, LAYERS) as features:
            torch.testing.assert_close(compiled_meter(image), meter(image))
        torch.testing.assert_close(features, expected)
        for name in ("1.0", "0"):                                          # opened, closed, anew
            with record(network, [name]) as expected, record(compiled, [name]) as features:
                torch.testing.assert_close(compiled(image), network(image))
            torch.testing.assert_close(features, expected)
            features.clear()
            compiled(image)
            assert not features
    assert list(compiled_meter.state_dict()) == list(meter.state_dict())


def test_thresholds_are_those_of_the_paper():
    t = model.sid_thresholds(64)
    assert t.shape == (65,) and t.dtype == torch.float32 and t[0] == 0 and t[-1] == 10
    rounded = [round(x, 3) for x in t.tolist()]
    assert rounded[1:6] == [0.75, 0.788, 0.827, 0.867, 0.909] and rounded[-3:] == [9.27, 9.628, 10]
    by_hand = [0, 0.75, 1.1444, 1.6944, 2.4612, 3.5306, 5.0216, 7.1008, 10]
    assert model.sid_thresholds(8).tolist() == pytest.approx(by_hand, abs=1e-4)
    for bad in ((1,), (0,), (8, 0), (8, -1), (8, 5, 5)):
        with pytest.raises(ValueError, match="bins"):
            model.sid_thresholds(*bad)


def test_depth_on_a_threshold_goes_to_the_lower_bin_and_missing_and_far_to_none():
    t = layer_thresholds(8)
    assert len(t) == 9 and len(layer_thresholds(160)) == 65
    assert layer_thresholds(8, notebook=True)[-1].item() == pytest.approx(1000 / 255)  # 3.92 m
    depth = torch.cat([t, t[1:-1].nextafter(torch.tensor(99.0)), torch.tensor([10.001, 50])])
    member = model.bin_weights(depth.view(1, 1, 1, -1), t, (1, len(depth)))[0, :, 0]
    bins = [None, *range(8), *range(1, 8), None, None]
    expected = torch.tensor([[float(b == k) for b in bins] for k in range(8)])
    assert torch.equal(member, expected)


def test_what_is_beyond_the_notebooks_last_bin_is_in_its_first_and_missing_stays_missing():
    t = layer_thresholds(64, notebook=True)
    last, beyond = t[-1].item(), t[-1].nextafter(torch.tensor(99.0)).item()
    depth = torch.tensor([0, 0.01, 0.7, 3.9, last, beyond, 10, 80]).view(1, 1, 2, 4)
    binned = model.notebook_depth(depth)
    assert torch.equal(binned.flatten()[:5], depth.flatten()[:5])
    for units in (8, 24, 160):
        number = torch.bucketize(binned.flatten(), layer_thresholds(units, notebook=True))
        assert number[0] == 0 and number[5:].tolist() == [1, 1, 1]     # 0: no bin; 1: the first


def slow_masks(depth, units, notebook):
    """Pixels of each bin, spelt out: depth (H, W) metres, or in grey levels for the notebook."""
    bins, far = min(units, 64), 100 if notebook else 10
    t = [math.exp(math.log(far + 0.25) * i / (bins - 1)) - 0.25 for i in range(bins - 1)]
    masks = [(depth > low) & (depth <= high) for low, high in itertools.pairwise([0, *t, far])]
    if notebook:
        masks[0] = masks[0] | (depth > far)
    return masks


def random_depth(notebook, batch=2):
    """Few depths, so that some bins are empty or rare; also none, and beyond the last bin."""
    often = [5.0, 20, 23, 88, 100, 101, 255] if notebook else [0.0, 0.5, 1, 1.02, 3, 7, 11, 40]
    choice = torch.tensor(often * 6 + [50.0 if notebook else 5.0])
    return choice[torch.randint(len(choice), (batch, 1, 48, 64))]


@pytest.mark.parametrize("height", [24, 48, 96])
def test_the_gradient_of_channels_last_activations_is_channels_last(height):
    shape, depth = (2, 8, height, height * 4 // 3), random_depth(notebook=False)
    leaf = torch.rand(shape).to(memory_format=torch.channels_last).requires_grad_()
    seen, x = [], leaf * 1                             # of a leaf, autograd would mend the layout
    x.register_hook(seen.append)
    assigned_selectivity(x, depth, layer_thresholds(8)).backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and seen[0].any()


@pytest.mark.parametrize("height", [6, 24, 48, 96])
def test_bin_sums_match_a_loop_over_up_sampled_maps(height):
    torch.manual_seed(height)
    features = torch.randn(3, 5, height, height * 4 // 3)
    depth = random_depth(notebook=False, batch=3)
    up = F.interpolate(features, (48, 64), mode="bilinear", align_corners=False)
    masks = [slow_masks(d, 64, notebook=False) for d in depth[:, 0]]
    slow = [sum(x[:, mask[k]].sum(1) for x, mask in zip(up, masks)) for k in range(64)]
    weights = model.bin_weights(depth, layer_thresholds(64), features.shape[-2:])
    found = model.bin_sums(features, weights)
    torch.testing.assert_close(found, torch.stack(slow, 1), rtol=1e-4, atol=1e-3)
    pixels = torch.stack([torch.stack(mask).sum((1, 2)) for mask in masks]).float()
    torch.testing.assert_close(weights.sum((2, 3)), pixels, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("height", [12, 48, 96])
def test_activations_of_bf16_are_added_up_in_fp32(height):
    torch.manual_seed(0)
    features = torch.rand(4, 3, height, height * 4 // 3).bfloat16()
    weights = model.bin_weights(random_depth(notebook=False, batch=4), layer_thresholds(8),
                                features.shape[-2:])
    found = model.bin_sums(features, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.bin_sums(features.float(), weights))


def slow_score(response, count, own, min_share):
    """Selectivity of a unit for the bin `own`, spelt out; response and count: one of each bin."""
    enough = min_share * sum(count)
    others = [response[k] for k in range(len(count))
              if k != own and (count[k] > enough or min_share == 0)]
    if not count[own] > enough:
        return 0.0
    other = sum(others) / max(len(others), 1)
    return (response[own] - other) / (response[own] + other + 1e-15)


def slow_selectivity(features, depth, notebook, min_share):
    """FACTS 2, image by image and bin by bin: assigned bin against the mean of the other bins."""
    units = features.shape[1]
    bins = min(units, 64)
    total, count = torch.zeros(units, bins), torch.zeros(bins)
    for x, d in zip(features.abs(), depth[:, 0]):
        x = F.interpolate(x[None], d.shape, mode="bilinear", align_corners=False)[0]
        for k, mask in enumerate(slow_masks(d, units, notebook)):
            total[:, k] += x[:, mask].sum(1)
            count[k] += mask.sum()
    assert 0 < (count == 0).sum() < (count <= 0.05 * count.sum()).sum() < bins
    score = 0
    for unit in range(units):
        score += slow_score(total[unit] / count.clamp(min=1), count.tolist(),
                            unit * bins // units, min_share)
    return score / units


@pytest.mark.parametrize("notebook, min_share", [(False, 0), (True, 0), (False, 0.05)])
@pytest.mark.parametrize("units, height", LAYER_SHAPES)
def test_assigned_selectivity_and_its_gradient_match_a_slow_loop(
        units, height, notebook, min_share):
    torch.manual_seed(units)
    features = torch.randn(2, units, height, height * 4 // 3, requires_grad=True)
    units_depth = random_depth(notebook)                                   # metres or grey levels
    depth = model.notebook_depth(units_depth * (10 / 255)) if notebook else units_depth
    fast = assigned_selectivity(features, depth, layer_thresholds(units, notebook), min_share)
    slow = slow_selectivity(features, units_depth, notebook, min_share)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(x, features)[0] for x in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())


def test_a_unit_whose_bin_is_absent_counts_0_and_gets_no_gradient():
    features = torch.rand(2, 8, 6, 8, requires_grad=True)
    depth = torch.full((2, 1, 48, 64), 3.0)                                # bin 4 of 8, unit 4's
    score = assigned_selectivity(features, depth, layer_thresholds(8))
    torch.testing.assert_close(score, torch.tensor(1 / 8))                 # (1 + 7 * 0) / 8
    depth[:, :, :, 32:] = 1.0                                              # bin 1
    assigned_selectivity(features, depth, layer_thresholds(8)).backward()
    assert [bool(x) for x in features.grad.abs().sum((0, 2, 3))] == [k in (1, 4) for k in range(8)]


def test_units_of_a_bin_with_no_more_than_min_share_of_the_measured_pixels_get_no_gradient():
    depth = torch.full((2, 1, 48, 64), 3.0)                                # bin 4 of 8
    depth[:, :, :, 32:] = 0                                                # missing
    depth[:, :, :12, :32] = 1.0                                            # bin 1, a quarter
    depth[:, :, 12:18, :32] = 7.0                                          # bin 6, an eighth
    for min_share, units in ((0, (1, 4, 6)), (0.12, (1, 4, 6)), (0.125, (1, 4)), (0.75, ())):
        features = torch.rand(2, 8, 6, 8, requires_grad=True)
        score = assigned_selectivity(features, depth, layer_thresholds(8), min_share)
        score.backward()
        moved = features.grad.abs().sum((0, 2, 3))
        assert [bool(x) for x in moved] == [k in units for k in range(8)], min_share
    assert score == 0 and features.grad.isfinite().all()


# Of 1,024 pixels; 1 / 1,024 of them is exactly one.
COUNT = torch.tensor([0, 1.0, 2, 21, 100, 400, 500, 0])


@pytest.mark.parametrize("units", [8, 20])
@pytest.mark.parametrize("pixels", [0, 0.5, 1, 2, 50, 450, 500])
def test_rare_bins_are_neither_assigned_to_nor_among_the_others(pixels, units):
    torch.manual_seed(units)
    response, min_share = torch.rand(units, 8) * (COUNT > 0), pixels / 1024
    response[3] = 0                                                        # a dead unit
    counted = model.counted_bins(COUNT, min_share)
    assert counted.tolist() == [pixels == 0 or x > pixels for x in COUNT.tolist()]

    found = unit_selectivity(response, COUNT, min_share)
    assigned = [unit * 8 // units for unit in range(units)]
    slow = [slow_score(r, COUNT.tolist(), own, min_share)
            for r, own in zip(response.tolist(), assigned)]
    assert found.tolist() == pytest.approx(slow, abs=1e-6)
    if counted.any():                                  # the same of any bin, one that counts
        chosen = counted.nonzero()[:, 0][torch.randint(counted.sum(), (units,))]
        found = model.selectivity(response, chosen, counted)
        slow = [slow_score(r, COUNT.tolist(), own, min_share) if COUNT[own] else -1.0
                for r, own in zip(response.tolist(), chosen.tolist())]
        slow[3] = 0
        assert found.tolist() == pytest.approx(slow, abs=1e-6)


def test_min_share_0_is_the_papers_form_in_which_empty_bins_are_zeros_among_the_others():
    response = torch.tensor([[2.0, 0, 0, 1], [0, 0, 0, 3]])
    count = torch.tensor([5.0, 0, 0, 5])
    by_hand = torch.tensor([(2 - 1 / 3) / (2 + 1 / 3), 0])                 # bins 0 and 2
    torch.testing.assert_close(unit_selectivity(response, count), by_hand)
    torch.testing.assert_close(unit_selectivity(response, count, 0.0), by_hand)
    rare = torch.tensor([(2 - 1) / (2 + 1), 0])
    torch.testing.assert_close(unit_selectivity(response, count, 1e-9), rare)
    own = torch.tensor([0, 3])
    by_hand = torch.tensor([(2 - 1 / 3) / (2 + 1 / 3), 1])
    torch.testing.assert_close(model.selectivity(response, own), by_hand)


def test_selectivity_is_1_for_one_bin_and_0_for_none_and_for_equal_ones():
    response = torch.tensor([[0, 3.0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [1, 3, 1, 1]])
    score = model.selectivity(response, torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(score, torch.tensor([1, 0, 0, 0.5]))


def test_units_are_assigned_to_bins_in_order():
    assert model.assigned_bins(160, 64).tolist() == [math.floor(k * 64 / 160) for k in range(160)]
    assert model.assigned_bins(24, 24).tolist() == list(range(24))


FEATURES = {"enc_9": (2, 80, 6, 8), "dec_3": (2, 8, 48, 64)}


@pytest.mark.filterwarnings("ignore:Dynamo detected")
@pytest.mark.parametrize("notebook, backend", [(False, "aot_eager"), (True, "eager")])
def test_the_objective_is_the_same_compiled(notebook, backend):
    torch.manual_seed(0)
    torch.compiler.reset()
    features = {name: torch.randn(shape, requires_grad=True) for name, shape in FEATURES.items()}
    depth = random_depth(notebook=False).clamp(max=10)
    prediction = torch.rand(2, 1, 48, 64, requires_grad=True)
    leaves, found = [prediction, *features.values()], []
    compiled = torch.compile(train.objective, backend=backend, dynamic=False)
    for objective in (train.objective, compiled):
        terms = objective(prediction, depth, features, torch.tensor(-0.5), notebook, 0.001)
        found.append((terms, torch.autograd.grad(terms["loss"], leaves)))
    torch.testing.assert_close(*found)
    torch.compiler.reset()


def test_no_integer_is_written_where_a_graph_has_floats():
    """Compiled for a GPU, scatter_(1, index, 1) makes integers: a CPU never shows it."""
    features = {name: torch.randn(shape) for name, shape in FEATURES.items()}

    def objective(prediction, depth, features):
        return train.objective(prediction, depth, features, torch.tensor(-0.5), False, 0.001)

    depth = random_depth(notebook=False)
    assert model.bin_masks(depth, layer_thresholds(8)).dtype == torch.float32
    nodes = make_fx(objective)(torch.rand(depth.shape), depth, features).graph.nodes
    written = []
    for node in nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if any(word in name for word in ("scatter", "fill", "where", "pad")):
            scalars = [x for x, argument in zip(node.args, node.target._schema.arguments)
                       if str(argument.type) == "number"]
            written += [(name, x) for x in scalars if node.meta["val"].is_floating_point()]
    assert "aten::scatter_" in [name for name, _ in written]
    assert [pair for pair in written if not isinstance(pair[1], float)] == []


CONTENTS = {  # file content -> units per metre
    "ours": (lambda s: {"model": s, "units_per_metre": 40.0, "config": {"lr": 1}}, 40),
    "notebook's": (lambda s: {"epoch": 3, "model_state_dict": s, "val_loss": 1.5}, 25.5),
    "released": (lambda s: s, 100)}


@pytest.mark.parametrize("variant", PARAMETERS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_load_checkpoint_reads_three_kinds_of_file(tmp_path, kind, variant):
    wrap, units = CONTENTS[kind]
    weights = random_meter(variant).state_dict()
    torch.save(wrap(weights), tmp_path / "x.pt")
    network, content = load_checkpoint(tmp_path / "x.pt")
    assert (network.variant, network.units_per_metre) == (variant, units)
    assert content.keys() == wrap(weights).keys()
    torch.testing.assert_close(network.state_dict(), weights)


def prefixed(prefix, weights):
    return {prefix + key: x for key, x in weights.items()}


FOREIGN = {  # as others save: units per metre
    "DataParallel": (lambda s: prefixed("module.", s), 100),
    "compiled": (lambda s: {"state_dict": prefixed("_orig_mod.", s), "epoch": 3}, 100),
    "Lightning": (lambda s: {"state_dict": prefixed("model.", s), "global_step": 9}, 100),
    "net": (lambda s: {"net": prefixed("module._orig_mod.", s), "acc": 0.5}, 100),
    "model": (lambda s: {"model": prefixed("_orig_mod.module.", s)}, 100),
    "net in net": (lambda s: {"net": prefixed("net.", s)}, 100),
    "notebook's, DataParallel": (lambda s: {"model_state_dict": prefixed("module.", s)}, 25.5)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])      # torch's two formats
@pytest.mark.parametrize("kind", FOREIGN)
def test_load_checkpoint_reads_what_others_save(tmp_path, kind, zipped):
    wrap, units = FOREIGN[kind]
    weights = random_meter().state_dict()
    torch.save(wrap(weights), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    network, _ = load_checkpoint(str(tmp_path / "x.pth"))
    assert network.units_per_metre == units
    torch.testing.assert_close(network.state_dict(), weights)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_load_checkpoint_reads_numpy_scalars_of_numpy_1_and_2(tmp_path, module):
    class Pickler(pickle._Pickler):
        def save_global(self, thing, name=None):
            if getattr(thing, "__name__", "") != "scalar":
                return super().save_global(thing, name)
            self.write(pickle.GLOBAL + f"{module}\nscalar\n".encode())
            self.memoize(thing)

    scalars = {"epoch": np.int64(7), "val_loss": np.float64(61.0625), "rmse": np.float32(0.5)}
    content = scalars | {"model_state_dict": METER().state_dict(),
                         "selectivity": {"dec_3": np.float64(-0.25)}}
    torch.save(content, tmp_path / "best_meter_model.pth",
               types.SimpleNamespace(__name__="pickle", Pickler=Pickler))
    assert module.encode() in (tmp_path / "best_meter_model.pth").read_bytes()
    network, found = load_checkpoint(tmp_path / "best_meter_model.pth")
    assert network.units_per_metre == 25.5 and found["selectivity"] == {"dec_3": -0.25}
    assert {key: found[key] for key in scalars} == scalars
    assert [found[key].dtype for key in scalars] == [x.dtype for x in scalars.values()]


class Code:
    """A pickle that would run code on loading."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def save_broken(key, change):
    """Writes the released kind of checkpoint with one weight changed, or without it."""
    def save(path):
        weights = METER().state_dict()
        weights[key] = change(weights.get(key))
        torch.save({k: x for k, x in weights.items() if x is not None}, path)
    return save


STEM, LAST = "encoder.conv1.0.depthwise.weight", "encoder.conv2.0.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:327cddf3\nsize 2900000\n"
DAMAGED, NO_METER = "is damaged or no checkpoint", "is no METER"
BROKEN = {  # how to write it, and what the sentence says
    "text file": (lambda path: path.write_text("hello"), DAMAGED),
    "empty file": (lambda path: path.write_bytes(b""), DAMAGED),
    "missing file": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "does not exist as a file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "does not exist"),
    "link to itself": (lambda path: path.symlink_to(path), "does not exist"),
    "Git LFS pointer": (lambda path: path.write_text(LFS), "git lfs pull"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>404"), "is a web page"),
    "photo": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), DAMAGED),
    "whole model": (lambda path: torch.save(METER(), path), "state_dict()"),
    "whole model, in a container": (lambda path: torch.save({"net": METER()}, path),
                                    "state_dict()"),
    "pickle with code": (lambda path: torch.save({"model": Code(path.with_name("ran"))}, path),
                         "holds Python objects"),
    "plain pickle": (lambda path: path.write_bytes(
        pickle.dumps(Code(path.with_name("ran")), protocol=2)), "holds Python objects"),
    "cut short": (lambda path: (torch.save(METER().state_dict(), path),
                                path.write_bytes(path.read_bytes()[:100_000])), DAMAGED),
    "missing key": (save_broken(STEM, lambda x: None), STEM),
    "missing last encoder key": (save_broken(LAST, lambda x: None), LAST),
    "extra key": (save_broken("encoder.extra", lambda x: torch.ones(1)), "encoder.extra"),
    "nan": (save_broken(STEM, lambda x: x * math.nan), f"nan or infinity in ['{STEM}']"),
    "infinity": (save_broken(STEM, lambda x: x * math.inf), f"nan or infinity in ['{STEM}']"),
    "no units": (lambda path: torch.save(
        {"model": METER().state_dict(), "units_per_metre": 0.0}, path), "0.0 units per metre"),
    "wrong shape": (save_broken(STEM, lambda x: x[:, :2]), STEM),
    "wrong size": (save_broken(LAST, lambda x: x[:37]), NO_METER),
    "not a tensor": (save_broken(STEM, lambda x: 3), NO_METER),
    "units in words": (lambda path: torch.save(
        {"model": METER().state_dict(), "units_per_metre": "cm"}, path), "'cm'"),
    "list": (lambda path: torch.save([1, 2], path), NO_METER),
    "nothing": (lambda path: torch.save({}, path), NO_METER),
    "another network": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), NO_METER)}


def reason(path):
    """The sentence with which load_checkpoint refuses a file."""
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    assert isinstance(refused.value, OSError)
    return str(refused.value)


@pytest.mark.parametrize("fault", BROKEN)
def test_load_checkpoint_ends_with_a_sentence_and_runs_no_code(tmp_path, fault):
    path, (save, sentence) = tmp_path / "broken.pt", BROKEN[fault]
    save(path)
    message = reason(path)
    assert str(path) in message and sentence in message and "\n" not in message
    assert len(message) < 600 and not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
def test_load_checkpoint_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    writer = os.open(tmp_path / "pipe.pt", os.O_RDWR | os.O_NONBLOCK)  # a reader would not hang
    os.write(writer, b"hello" * 999)
    assert "does not exist as a file" in reason(tmp_path / "pipe.pt")
    os.close(writer)
