"""METER, a small network for depth from one image, and the depth selectivity of its units.

    model, _ = load_checkpoint("meter_xxs_nyu.pth")   # or METER("xxs"), to start from scratch
    with record(model, ["dec_3"]) as features:
        prediction = model(image)                     # (B, 1, 48, 64) metres
    assigned_selectivity(features["dec_3"], depth, sid_thresholds(8))

Network: Papa et al., METER, IEEE TCSVT 2023 (arXiv 2403.08368).
Selectivity: You et al., Towards Interpretable Deep Networks for Monocular Depth Estimation,
ICCV 2021 (arXiv 2108.05312).

Sizes: B batch, C channels (units), H W depth map, h w activation, K depth bins.
"""
import functools
import re
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CENTIMETRES = 100.0  # units per metre in which METER's released networks answer
GREY_LEVELS = 25.5   # and the notebook's: 8-bit depth, 255 = 10 m
MAX_BINS = 64        # a layer has as many depth bins as units, up to this (You et al.)

# Channels: encoder (enc_0, enc_1, enc_2 to 4, enc_5 and 6, enc_7 and 8, enc_9 and 10, enc_output),
# expansion of the MobileNetV2 blocks, transformers (enc_6, enc_8, enc_10), decoder (dec_0 to 3).
VARIANTS = {  # 713,464, 1,449,760 and 3,295,168 parameters
    "xxs": ((16, 16, 24, 48, 64, 80, 160), 2, (64, 80, 96), (64, 32, 16, 8)),
    "xs": ((16, 32, 48, 64, 80, 96, 192), 4, (96, 120, 144), (128, 64, 32, 16)),
    "s": ((16, 32, 64, 96, 128, 160, 320), 4, (144, 192, 240), (128, 64, 32, 16))}
LAYERS = {  # name -> module path, in the order of the forward pass
    "enc_0": "encoder.conv1", "enc_1": "encoder.mv2.0",
    "enc_2": "encoder.mv2.1", "enc_3": "encoder.mv2.2",
    "enc_4": "encoder.mv2.3", "enc_5": "encoder.mv2.4",
    "enc_6": "encoder.mvit.0", "enc_7": "encoder.mv2.5",
    "enc_8": "encoder.mvit.1", "enc_9": "encoder.mv2.6",
    "enc_10": "encoder.mvit.2", "enc_output": "encoder.conv2",
    "dec_0": "decoder.conv2d_in", "dec_1": "decoder.ups_block_1",
    "dec_2": "decoder.ups_block_2", "dec_3": "decoder.ups_block_3"}
WEIGHTS = "model_state_dict", "model", "state_dict", "net"  # where checkpoints keep them,
PREFIXES = r"^((module|_orig_mod|model|net)\.)+"            # and what stands before their names


# The network. Modules bear the names of the released weights, which load without a mapping.

def conv(inputs, outputs, size=1, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def conv3x3(inputs, outputs, stride=1):
    """METER's release calls this separable, but its weights are a dense 3x3: kept dense."""
    return nn.Sequential(OrderedDict(
        depthwise=conv(inputs, outputs, 3, stride), pointwise=conv(outputs, outputs)))


def bn_relu(convolution, channels):
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class MobileNetV2Block(nn.Module):
    """Widen, 3x3 depthwise, narrow. No ReLU at the end."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        wide = inputs * expansion
        depthwise = conv(wide, wide, 3, stride, groups=wide)
        self.conv = nn.Sequential(*bn_relu(conv(inputs, wide), wide), *bn_relu(depthwise, wide),
                                  conv(wide, outputs), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class Attention(nn.Module):
    """Self-attention with 4 heads of width 8."""

    def __init__(self, width):
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * 4 * 8, bias=False)
        self.to_out = nn.Sequential(nn.Linear(4 * 8, width))

    def forward(self, x):
        qkv = self.to_qkv(x).unflatten(-1, (3, 4, 8))          # (B, N, 3, 4, 8)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)         # (B, 4, N, 8) each
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(mixed.transpose(1, 2).flatten(-2))  # (B, N, width)


def feed_forward(width, hidden):
    return nn.Sequential(OrderedDict(net=nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(inplace=True),
        nn.Identity(),  # a dropout of rate 0 in the release, whose number it keeps
        nn.Linear(hidden, width))))


class PreNorm(nn.Module):
    def __init__(self, width, fn):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x):
        return x + self.fn(self.norm(x))


class METERBlock(nn.Module):
    """MobileViT block: convolutions see the neighbourhood, a transformer layer the whole image."""

    def __init__(self, channels, width, mlp_ratio):
        super().__init__()
        self.conv1 = bn_relu(conv3x3(channels, channels), channels)
        self.conv2 = bn_relu(conv(channels, width), width)
        layer = nn.Sequential(PreNorm(width, Attention(width)),
                              PreNorm(width, feed_forward(width, mlp_ratio * width)))
        self.transformer = nn.ModuleDict({"layers": nn.Sequential(layer)})
        self.conv3 = bn_relu(conv(width, channels), channels)
        self.conv4 = bn_relu(conv3x3(2 * channels, channels), channels)

    def forward(self, x):
        y = self.conv2(self.conv1(x))
        b, c, h, w = y.shape

        # Attention runs over patches of 2x2, separately for each of the 4 places in a patch.
        y = y.reshape(b, c, h // 2, 2, w // 2, 2)
        y = y.permute(0, 3, 5, 2, 4, 1).reshape(4 * b, h * w // 4, c)
        y = self.transformer.layers(y)
        y = y.reshape(b, 2, 2, h // 2, w // 2, c)
        y = y.permute(0, 5, 3, 1, 4, 2).reshape(b, c, h, w)

        return self.conv4(torch.cat([self.conv3(y), x], dim=1))


class UpBlock(nn.Module):
    """Doubles height and width, then merges the encoder's map of that size."""

    def __init__(self, inputs, outputs, skip):
        super().__init__()
        self.conv2d_transpose = nn.ConvTranspose2d(
            inputs, outputs, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.end_up_layer = nn.Sequential(conv3x3(outputs + skip, outputs), nn.ReLU(inplace=True))

    def forward(self, x, skip):
        return self.end_up_layer(torch.cat([self.conv2d_transpose(x), skip], dim=1))


class METER(nn.Module):
    """METER of size "xxs", "xs" or "s".
    Input (B, 3, H, W), ImageNet-normalised RGB, H and W multiples of 64. Output (B, 1, H/4, W/4),
    float32 metres: what the last convolution answers, divided by `units_per_metre`."""

    def __init__(self, variant="xxs", units_per_metre=CENTIMETRES):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}")
        self.variant, self.units_per_metre = variant, float(units_per_metre)

        (c0, c1, c2, c3, c4, c5, c6), expansion, (t0, t1, t2), (d0, d1, d2, d3) = VARIANTS[variant]
        self.encoder = nn.ModuleDict({
            "conv1": bn_relu(conv3x3(3, c0, stride=2), c0),          # enc_0
            "mv2": nn.ModuleList([
                MobileNetV2Block(c0, c1, 1, expansion),              # enc_1
                MobileNetV2Block(c1, c2, 2, expansion),              # enc_2
                MobileNetV2Block(c2, c2, 1, expansion),              # enc_3
                MobileNetV2Block(c2, c2, 1, expansion),              # enc_4
                MobileNetV2Block(c2, c3, 2, expansion),              # enc_5
                MobileNetV2Block(c3, c4, 2, expansion),              # enc_7
                MobileNetV2Block(c4, c5, 2, expansion),              # enc_9
            ]),
            "mvit": nn.ModuleList([
                METERBlock(c3, t0, mlp_ratio=2),                     # enc_6
                METERBlock(c4, t1, mlp_ratio=4),                     # enc_8
                METERBlock(c5, t2, mlp_ratio=4),                     # enc_10
            ]),
            "conv2": bn_relu(conv(c5, c6), c6)})                     # enc_output
        self.decoder = nn.ModuleDict({
            "conv2d_in": conv(c6, d0),                               # dec_0
            "ups_block_1": UpBlock(d0, d1, skip=c4),                 # dec_1
            "ups_block_2": UpBlock(d1, d2, skip=c3),                 # dec_2
            "ups_block_3": UpBlock(d2, d3, skip=c2),                 # dec_3
            "conv2d_out": conv(d3, 1, size=3)})

    def forward(self, image):
        # Height and width are halved five times, then cut into 2x2 patches. Channels below: xxs.
        if any(side % 64 for side in image.shape[-2:]):
            raise ValueError(f"image {(*image.shape,)}: height and width must be multiples of 64")

        mv2, mvit = self.encoder.mv2, self.encoder.mvit
        x = self.encoder.conv1(image)            # enc_0       (B, 16, H/2, W/2)
        x = mv2[0](x)                            # enc_1       (B, 16, H/2, W/2)
        skip_3 = mv2[1](x)                       # enc_2       (B, 24, H/4, W/4)
        x = mv2[2](skip_3)                       # enc_3       (B, 24, H/4, W/4)
        x = mv2[3](x)                            # enc_4       (B, 24, H/4, W/4)
        skip_2 = mv2[4](x)                       # enc_5       (B, 48, H/8, W/8)
        x = mvit[0](skip_2)                      # enc_6       (B, 48, H/8, W/8)
        skip_1 = mv2[5](x)                       # enc_7       (B, 64, H/16, W/16)
        x = mvit[1](skip_1)                      # enc_8       (B, 64, H/16, W/16)
        x = mv2[6](x)                            # enc_9       (B, 80, H/32, W/32)
        x = mvit[2](x)                           # enc_10      (B, 80, H/32, W/32)
        x = self.encoder.conv2(x)                # enc_output  (B, 160, H/32, W/32)
        x = self.decoder.conv2d_in(x)            # dec_0       (B, 64, H/32, W/32)
        x = self.decoder.ups_block_1(x, skip_1)  # dec_1       (B, 32, H/16, W/16)
        x = self.decoder.ups_block_2(x, skip_2)  # dec_2       (B, 16, H/8, W/8)
        x = self.decoder.ups_block_3(x, skip_3)  # dec_3       (B, 8, H/4, W/4)

        # In full precision: bf16 would round 5 m to +-1.6 cm.
        with torch.autocast(image.device.type, enabled=False):
            return self.decoder.conv2d_out(x.float().contiguous()) / self.units_per_metre

    def compile(self, **options):
        """In place, as nn.Module's; compiled anew when `record` opens or closes later on."""
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        super().compile(**options)


# Checkpoints.

class CheckpointError(OSError):
    """A file that holds no METER. The message says why, and what to do."""


def load_checkpoint(path):
    """Read our best.pt or last.pt, the notebook's best_meter_model.pth, or METER's raw state dict.
    Weights may lie under any of WEIGHTS, their names behind any of PREFIXES. Returns (METER in eval
    mode, what the file holds). CheckpointError on any other file; never runs code inside it."""
    content = read_file(Path(path))
    try:
        weights = next((content[key] for key in WEIGHTS if key in content), content)
        weights = {re.sub(PREFIXES, "", key): x for key, x in weights.items()}
        units_per_metre = GREY_LEVELS if "model_state_dict" in content else CENTIMETRES
        units_per_metre = float(content.get("units_per_metre", units_per_metre))

        outputs = len(weights["encoder.conv2.0.weight"])
        variant = next(key for key, (x, *_) in VARIANTS.items() if x[-1] == outputs)
        model = METER(variant, units_per_metre)
        model.load_state_dict(weights)
        broken = [key for key, x in weights.items() if not x.isfinite().all()]
        if broken or not units_per_metre > 0:
            raise ValueError(f"{units_per_metre} units per metre, nan or infinity in {broken[:3]}")
    except Exception as error:  # noqa: BLE001  what is no METER may raise almost anything
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} is no METER ({type(error).__name__}: {reason}): give a "
                              "best.pt, or METER's released weights.") from error
    return model.eval(), content


def read_file(path):
    """What torch.save wrote, without running code that may lie in it; or CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path.absolute()} does not exist as a file: give a best.pt.")
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
        with torch.serialization.safe_globals(numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  a damaged file may raise almost anything
        if start.startswith(b"version https://git-lfs"):
            reason = "is a Git LFS pointer: `git lfs pull` gets the file itself"
        elif start.startswith(b"<"):
            reason = "is a web page: download the raw file itself"
        elif "GLOBAL" in str(error):
            reason = "holds Python objects, perhaps a whole model: save its state_dict() alone"
        else:
            reason = f"is damaged or no checkpoint ({' '.join(str(error).split())[:150]})"
        raise CheckpointError(f"{path} {reason}: give a best.pt.") from error


def numpy_scalars():
    """What the notebook's file needs to be read: it holds losses as NumPy's float64."""
    allowed = [np.dtype, *(type(np.dtype(code)) for code in ("f4", "f8", "i8"))]
    for module in "numpy.core.multiarray", "numpy._core.multiarray":  # NumPy 1 and 2
        def scalar(kind, content):
            return np.frombuffer(content, kind)[0]

        scalar.__module__, scalar.__qualname__ = module, "scalar"
        allowed.append(scalar)
    return allowed


@contextmanager
def record(network, names):
    """Collect activations: `with record(model, ["enc_4"]) as features: model(image)`.
    Works on any network; names are of LAYERS or module paths as of named_modules().
    features[name] is what that module answers, here (B, C, h, w), signed, attached to the graph,
    overwritten by each forward pass; also of a model compiled by METER.compile. ValueError for an
    unknown name."""
    modules = dict(network.named_modules())
    paths = {name: LAYERS.get(name, name) for name in names}
    unknown = [name for name, path in paths.items() if path not in modules]
    if unknown:
        raise ValueError(f"unknown layer {', '.join(unknown)}: choose from {', '.join(LAYERS)}")

    features = {}
    hooks = [modules[path].register_forward_hook(
        lambda _, inputs, x, name=name: features.update({name: x})) for name, path in paths.items()]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


# Depth selectivity. A unit's response to a depth bin is its mean activation over the pixels whose
# depth lies in that bin.

def sid_thresholds(bins, near=0.75, far=10.0):
    """Spacing-increasing discretisation of depth (You et al.): (bins + 1,) metres.
    Bin i holds t[i] < depth <= t[i + 1], with t[0] = 0, t[1] = near, t[bins] = far."""
    if bins < 2 or not 0 < near < far:
        raise ValueError(f"{bins} bins from {near} to {far}: 2 or more, and 0 < near < far")
    steps = torch.linspace(0, 1, bins, dtype=torch.float64)
    thresholds = (far + 1 - near) ** steps - (1 - near)
    return F.pad(thresholds, (1, 0)).float()


@functools.cache
def layer_thresholds(units, notebook=False, device="cpu"):
    """Bin thresholds of a layer, metres; the notebook's reach to 100 *grey levels*, 3.92 m."""
    far, metres = (100.0, 1 / GREY_LEVELS) if notebook else (10.0, 1.0)
    return (sid_thresholds(min(units, MAX_BINS), far=far) * metres).to(device)


def notebook_depth(depth):
    """Depth as the notebook bins it: whatever is beyond its last threshold is in the first bin."""
    thresholds = layer_thresholds(MAX_BINS, notebook=True, device=depth.device)
    return depth.where(depth <= thresholds[-1], thresholds[1])


def bin_masks(depth, thresholds):
    """1 where a pixel is in a bin: (B, K, H, W).
    depth (B, 1, H, W), thresholds (K + 1,), both in one unit. Depth 0 (missing) and depth beyond
    the last threshold are in no bin."""
    bin_number = torch.bucketize(depth, thresholds)  # 0 missing, 1 to K, K + 1 beyond
    batch, _, height, width = depth.shape
    masks = depth.new_zeros(batch, len(thresholds) + 1, height, width)
    return masks.scatter_(1, bin_number, 1.0)[:, 1:-1]  # compiled, an integer 1 makes them integers


def bin_weights(depth, thresholds, size):
    """Weight of every cell of an activation map, h x w = size, in every bin: (B, K, h, w).
    Adding up the map under these weights equals interpolating it to H x W and adding up each bin's
    pixels, since interpolation is linear; but it is done once for all units. A finer map than the
    depth is interpolated in `bin_sums` instead: its weights are the masks."""
    masks = bin_masks(depth, thresholds)
    height, width = masks.shape[-2:]
    if size[0] >= height and size[1] >= width:
        return masks
    rows = interpolation(size[0], height, depth.device)      # (h, H)
    columns = interpolation(size[1], width, depth.device)    # (w, W)
    return rows @ (masks @ columns.T)


@functools.cache
def interpolation(cells, pixels, device):
    """What each cell contributes to each pixel, interpolating along one axis: (cells, pixels)."""
    return F.interpolate(torch.eye(cells, device=device)[None], pixels, mode="linear")[0]


def bin_sums(features, weights):
    """Activations (B, C, h, w) added up under their bin_weights: (C, K)."""
    features = features.float()
    if features.shape[-2:] != weights.shape[-2:]:  # finer than the depth
        features = F.interpolate(features, weights.shape[-2:], mode="bilinear")
    # (B, K, h w) @ (B, h w, C): in this order gradients come back channels last
    return (weights.flatten(2) @ features.flatten(2).mT).sum(0).T


def counted_bins(count, min_share):
    """The bins that count: those with more than the share `min_share` of the pixels: (K,) bool.
    count (K,), pixels of each bin. 0 is the papers' form: all bins count, also empty ones."""
    return (count > min_share * count.sum()) | (min_share == 0)


def selectivity(response, chosen, counted=None):
    """(R_chosen - mean of the other R) / (their sum) of each unit (You et al.), -1 .. 1: (C,).
    response (C, K), not negative, 0 for an empty bin; chosen (C,), the bin of each unit; counted
    (K,) bool, the bins that count, None for all."""
    if counted is None:
        counted = torch.ones_like(response[0], dtype=torch.bool)
    response = response * counted
    picked = response.gather(1, chosen[:, None]).squeeze(1)
    others = (response.sum(1) - picked) / (counted.sum() - 1).clamp(min=1)
    return (picked - others) / (picked + others + 1e-15)


def assigned_bins(units, bins, device="cpu"):
    """The bin that training gives to each unit, in order: (units,), values 0 .. bins - 1."""
    return torch.arange(units, device=device) * bins // units


def unit_selectivity(response, count, min_share=0.0):
    """Selectivity of each unit for its assigned bin: (C,).
    response (C, K); count (K,), pixels of each bin. Bins with no more than the share `min_share`
    of the pixels do not count (`counted_bins`): a unit of such a bin, or of an empty one, scores 0.
    """
    units, bins = response.shape
    chosen = assigned_bins(units, bins, response.device)
    enough = count[chosen] > min_share * count.sum()
    return selectivity(response, chosen, counted_bins(count, min_share)).where(enough, 0.0)


def assigned_selectivity(features, depth, thresholds, min_share=0.0):
    """The regulariser's term for one layer (You et al.): scalar, -1 .. 1, high is selective.
    features (B, C, h, w) as recorded, signed; depth (B, 1, H, W) and thresholds (K + 1,) metres.
    Responses are means of |activation| over the batch, where the dissection takes the mean of the
    signed activation over the data set. A unit whose bin does not count (`unit_selectivity`) gets
    no gradient."""
    weights = bin_weights(depth, thresholds.to(depth.device), features.shape[-2:])
    count = weights.sum((0, 2, 3))                                       # (K,) pixels
    response = bin_sums(features.abs(), weights) / count.clamp(min=1)    # (C, K)
    return unit_selectivity(response, count, min_share).mean()
