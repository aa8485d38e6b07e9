"""The network against a functional re-implementation, selectivity against slow loops."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import model
from model import LAYERS, METER, assigned_selectivity, layer_thresholds, load_checkpoint, record

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
    network, image = random_meter(), torch.randn(1, 3, 64, 64)
    compiled = random_meter()
    compiled.compile(backend="eager")
    with torch.no_grad():
        for name in ("enc_4", "dec_3"):                                    # opened, closed, anew
            with record(network, [name]) as expected, record(compiled, [name]) as features:
                torch.testing.assert_close(compiled(image), network(image))
            torch.testing.assert_close(features, expected)
            features.clear()
            compiled(image)
            assert not features
    assert list(compiled.state_dict()) == list(network.state_dict())


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
    depth = torch.cat([t, t[1:-1].nextafter(torch.tensor(99.0)), torch.tensor([10.001, 50])])
    member = model.bin_weights(depth.view(1, 1, 1, -1), t, (1, len(depth)))[0, :, 0]
    bins = [None, *range(8), *range(1, 8), None, None]
    expected = torch.tensor([[float(b == k) for b in bins] for k in range(8)])
    assert torch.equal(member, expected)


def bin_masks(depth, units, notebook):
    """Pixels of each bin, spelt out: depth (H, W) metres, or in grey levels for the notebook."""
    bins, far = min(units, 64), 100 if notebook else 10
    t = [math.exp(math.log(far + 0.25) * i / (bins - 1)) - 0.25 for i in range(bins - 1)]
    masks = [(depth > low) & (depth <= high) for low, high in itertools.pairwise([0, *t, far])]
    if notebook:
        masks[0] = masks[0] | (depth > far)
    return masks


def random_depth(notebook, batch=2):
    """Few depths, so that some bins are empty; also none, and beyond the last bin."""
    choice = [5.0, 20, 23, 88, 100, 101, 255] if notebook else [0.0, 0.5, 1, 1.02, 3, 7, 11, 40]
    choice = torch.tensor(choice)
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
    masks = [bin_masks(d, 64, notebook=False) for d in depth[:, 0]]
    slow = [sum(x[:, mask[k]].sum(1) for x, mask in zip(up, masks)) for k in range(64)]
    weights = model.bin_weights(depth, layer_thresholds(64), features.shape[-2:])
    found = model.bin_sums(features, weights)
    torch.testing.assert_close(found, torch.stack(slow, 1), rtol=1e-4, atol=1e-3)
    pixels = torch.stack([torch.stack(mask).sum((1, 2)) for mask in masks]).float()
    torch.testing.assert_close(weights.sum((2, 3)), pixels, rtol=1e-5, atol=1e-3)


def slow_selectivity(features, depth, notebook):
    """FACTS 2, image by image and bin by bin: assigned bin against the mean of the other bins."""
    units = features.shape[1]
    bins = min(units, 64)
    total, count = torch.zeros(units, bins), torch.zeros(bins)
    for x, d in zip(features.abs(), depth[:, 0]):
        x = F.interpolate(x[None], d.shape, mode="bilinear", align_corners=False)[0]
        for k, mask in enumerate(bin_masks(d, units, notebook)):
            total[:, k] += x[:, mask].sum(1)
            count[k] += mask.sum()
    assert 0 < (count == 0).sum() < bins
    score = 0
    for unit in range(units):
        response, own = total[unit] / count.clamp(min=1), unit * bins // units
        if count[own] > 0:
            other = (response[:own].sum() + response[own + 1:].sum()) / (bins - 1)
            score += (response[own] - other) / (response[own] + other + 1e-15)
    return score / units


@pytest.mark.parametrize("notebook", [False, True])
@pytest.mark.parametrize("units, height", LAYER_SHAPES)
def test_assigned_selectivity_and_its_gradient_match_a_slow_loop(units, height, notebook):
    torch.manual_seed(units)
    features = torch.randn(2, units, height, height * 4 // 3, requires_grad=True)
    units_depth = random_depth(notebook)                                   # metres or grey levels
    depth = model.notebook_depth(units_depth * (10 / 255)) if notebook else units_depth
    fast = assigned_selectivity(features, depth, layer_thresholds(units, notebook))
    slow = slow_selectivity(features, units_depth, notebook)
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


@pytest.mark.parametrize("min_share, units", [(0.24, (1, 4)), (0.25, (4,)), (0.75, ())])
def test_bins_with_no_more_than_min_share_of_the_measured_pixels_are_left_out(min_share, units):
    features = torch.rand(2, 8, 6, 8, requires_grad=True)
    depth = torch.full((2, 1, 48, 64), 3.0)                                # bin 4 of 8
    depth[:, :, :, 32:] = 0                                                # missing
    depth[:, :, :12, :32] = 1.0                                            # bin 1, a quarter
    assigned_selectivity(features, depth, layer_thresholds(8), min_share).backward()
    assert [bool(x) for x in features.grad.abs().sum((0, 2, 3))] == [k in units for k in range(8)]


def test_selectivity_is_1_for_one_bin_and_0_for_none_and_for_equal_ones():
    response = torch.tensor([[0, 3.0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [1, 3, 1, 1]])
    score = model.selectivity(response, torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(score, torch.tensor([1, 0, 0, 0.5]))


def test_units_are_assigned_to_bins_in_order():
    assert model.assigned_bins(160, 64).tolist() == [math.floor(k * 64 / 160) for k in range(160)]
    assert model.assigned_bins(24, 24).tolist() == list(range(24))


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


STEM = "encoder.conv1.0.depthwise.weight"
BROKEN = {
    "text file": lambda path: path.write_text("hello"),
    "empty file": lambda path: path.write_bytes(b""),
    "missing file": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pickle with code": lambda path: torch.save({"model": Code(path.with_name("ran"))}, path),
    "cut short": lambda path: (torch.save(METER().state_dict(), path),
                               path.write_bytes(path.read_bytes()[:100_000])),
    "missing key": save_broken(STEM, lambda x: None),
    "missing last encoder key": save_broken("encoder.conv2.0.weight", lambda x: None),
    "extra key": save_broken("encoder.extra", lambda x: torch.ones(1)),
    "nan": save_broken(STEM, lambda x: x * math.nan),
    "infinity": save_broken(STEM, lambda x: x * math.inf),
    "no units": lambda path: torch.save(
        {"model": METER().state_dict(), "units_per_metre": 0.0}, path),
    "wrong shape": save_broken(STEM, lambda x: x[:, :2]),
    "wrong size": save_broken("encoder.conv2.0.weight", lambda x: x[:37]),
    "not a tensor": save_broken(STEM, lambda x: 3),
    "units in words": lambda path: torch.save(
        {"model": METER().state_dict(), "units_per_metre": "cm"}, path),
    "list": lambda path: torch.save([1, 2], path)}


@pytest.mark.parametrize("fault", BROKEN)
def test_load_checkpoint_ends_with_a_sentence_and_runs_no_code(tmp_path, fault):
    path = tmp_path / "broken.pt"
    BROKEN[fault](path)
    with pytest.raises(SystemExit) as stopped:
        load_checkpoint(path)
    message = stopped.value.code
    assert message.startswith("error: ") and str(path) in message and "\n" not in message
    assert len(message) < 600 and not (tmp_path / "ran").exists()


def test_layers_without_a_final_relu_are_those_that_answer_with_both_signs():
    network = METER().eval()
    with torch.no_grad(), record(network, LAYERS) as features:
        network(torch.randn(1, 3, 64, 64))
    assert [name for name, x in features.items() if (x < 0).any()] == list(model.SIGNED)
