"""METER, a small network for depth from one image, and the depth selectivity of its units.

    model, _ = load_checkpoint("meter_xxs_nyu.pth")        # or METER("xxs"), to start from scratch
    with record(model, ["dec_3"]) as features:
        prediction = model(image)                          # (B, 1, 48, 64) metres
    assigned_selectivity(features["dec_3"], depth, sid_thresholds(8))

Network: Papa et al., METER, IEEE TCSVT 2023 (arXiv 2403.08368). Selectivity: You et al., Towards
Interpretable Deep Networks for Monocular Depth Estimation, ICCV 2021 (arXiv 2108.05312).
"""
# B batch, C channels (units), H W size of the depth map, h w size of an activation, K depth bins
import functools
import sys
from collections import OrderedDict
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

CENTIMETRES, GREY_LEVELS = 100.0, 25.5   # network units per metre: METER's, the notebook's
MAX_BINS = 64                           # a layer has as many bins as units, up to this (You et al.)
VARIANTS = {  # channels of enc_0, 1, 2-4, 5-6, 7-8, 9-10, output; expansion; transformers; dec_0-3
    "xxs": ((16, 16, 24, 48, 64, 80, 160), 2, (64, 80, 96), (64, 32, 16, 8)),         # 713,464
    "xs": ((16, 32, 48, 64, 80, 96, 192), 4, (96, 120, 144), (128, 64, 32, 16)),      # 1,449,760
    "s": ((16, 32, 64, 96, 128, 160, 320), 4, (144, 192, 240), (128, 64, 32, 16))}    # 3,295,168
LAYERS = {  # name -> module path, in the order of the forward pass
    "enc_0": "encoder.conv1", "enc_1": "encoder.mv2.0", "enc_2": "encoder.mv2.1",
    "enc_3": "encoder.mv2.2", "enc_4": "encoder.mv2.3", "enc_5": "encoder.mv2.4",
    "enc_6": "encoder.mvit.0", "enc_7": "encoder.mv2.5", "enc_8": "encoder.mvit.1",
    "enc_9": "encoder.mv2.6", "enc_10": "encoder.mvit.2", "enc_output": "encoder.conv2",
    "dec_0": "decoder.conv2d_in", "dec_1": "decoder.ups_block_1",
    "dec_2": "decoder.ups_block_2", "dec_3": "decoder.ups_block_3"}
SIGNED = "enc_1", "enc_2", "enc_3", "enc_4", "enc_5", "enc_7", "enc_9", "dec_0"   # no final ReLU

def conv(inputs, outputs, size=1, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)

def conv3x3(inputs, outputs, stride=1):
    """METER's release calls this separable, but its weights are a dense 3x3: kept dense."""
    return nn.Sequential(OrderedDict(depthwise=conv(inputs, outputs, 3, stride),
                                     pointwise=conv(outputs, outputs)))

def bn_relu(convolution, width):
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))

class MobileNetV2Block(nn.Module):
    """Widen, 3x3 depthwise, narrow. No ReLU at the end, so its units answer with either sign."""
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        wide = inputs * expansion
        depthwise = conv(wide, wide, 3, stride, groups=wide)
        self.conv = nn.Sequential(*bn_relu(conv(inputs, wide), wide), *bn_relu(depthwise, wide),
                                  conv(wide, outputs), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)

class TransformerLayer(nn.ModuleList):
    """Self-attention with 4 heads of width 8, then a perceptron, each after a norm, added to x."""
    def __init__(self, width, hidden):
        attention = {"to_qkv": nn.Linear(width, 3 * 4 * 8, bias=False),
                     "to_out": nn.Sequential(nn.Linear(4 * 8, width))}
        mlp = {"net": nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True),
                                    nn.Identity(), nn.Linear(hidden, width))}  # dropout of rate 0
        super().__init__(nn.ModuleDict({"norm": nn.LayerNorm(width), "fn": nn.ModuleDict(part)})
                         for part in (attention, mlp))

    def forward(self, x):                                                  # (B, N, width)
        attention, mlp = self[0], self[1]
        qkv = attention.fn.to_qkv(attention.norm(x)).unflatten(-1, (3, 4, 8))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)                     # (B, heads, N, 8) each
        mixed = F.scaled_dot_product_attention(query, key, value)          # scale 8 ** -0.5
        x = x + attention.fn.to_out(mixed.transpose(1, 2).flatten(-2))     # (B, N, width)
        return x + mlp.fn.net(mlp.norm(x))

class METERBlock(nn.Module):
    """MobileViT block: convolutions see the neighbourhood, a transformer layer the whole image."""
    def __init__(self, channels, width, mlp_ratio):
        super().__init__()
        self.conv1 = bn_relu(conv3x3(channels, channels), channels)
        self.conv2 = bn_relu(conv(channels, width), width)
        layer = TransformerLayer(width, mlp_ratio * width)
        self.transformer = nn.ModuleDict({"layers": nn.Sequential(layer)})
        self.conv3 = bn_relu(conv(width, channels), channels)
        self.conv4 = bn_relu(conv3x3(2 * channels, channels), channels)

    def forward(self, x):                                                  # (B, C, h, w)
        y = self.conv2(self.conv1(x))                                      # (B, width, h, w)
        b, c, h, w = y.shape
        # Attention runs over patches of 2x2, separately for each of the 4 places in a patch.
        y = y.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1)
        y = self.transformer.layers(y.reshape(4 * b, -1, c))               # (4B, hw/4, width)
        y = y.reshape(b, 2, 2, h // 2, w // 2, c).permute(0, 5, 3, 1, 4, 2)
        y = self.conv3(y.reshape(b, c, h, w))                              # (B, C, h, w)
        return self.conv4(torch.cat([y, x], dim=1))

class UpBlock(nn.Module):
    """Doubles height and width, then merges the encoder's map of that size."""
    def __init__(self, inputs, outputs, skip):
        super().__init__()
        self.conv2d_transpose = nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, 1, bias=False)
        self.end_up_layer = nn.Sequential(conv3x3(outputs + skip, outputs), nn.ReLU(inplace=True))

    def forward(self, x, skip):
        return self.end_up_layer(torch.cat([self.conv2d_transpose(x), skip], dim=1))

class METER(nn.Module):
    """METER of size "xxs", "xs" or "s", with the module names of its released weights.
    Input (B, 3, H, W), ImageNet-normalised RGB, H and W multiples of 64. Output (B, 1, H/4, W/4),
    float32 metres: the last convolution answers in units (centimetres or the notebook's levels)."""
    def __init__(self, variant="xxs", units_per_metre=CENTIMETRES):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}")
        self.variant, self.units_per_metre = variant, float(units_per_metre)
        c, expansion, widths, d = VARIANTS[variant]
        mv2 = [(c[0], c[1], 1), (c[1], c[2], 2), (c[2], c[2], 1), (c[2], c[2], 1), (c[2], c[3], 2),
               (c[3], c[4], 2), (c[4], c[5], 2)]                           # inputs, outputs, stride
        self.encoder = nn.ModuleDict({
            "conv1": bn_relu(conv3x3(3, c[0], stride=2), c[0]),
            "mv2": nn.ModuleList(MobileNetV2Block(*shape, expansion) for shape in mv2),
            "mvit": nn.ModuleList(METERBlock(*shape) for shape in zip(c[3:6], widths, (2, 4, 4))),
            "conv2": bn_relu(conv(c[5], c[6]), c[6])})
        self.decoder = nn.ModuleDict({
            "conv2d_in": conv(c[6], d[0]),
            **{f"ups_block_{i}": UpBlock(d[i - 1], d[i], skip=c[5 - i]) for i in (1, 2, 3)},
            "conv2d_out": conv(d[3], 1, 3)})

    def compile(self, **options):  # in place, and anew when `record` opens or closes later on
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        super().compile(**options)

    def forward(self, image):                                              # (B, 3, H, W)
        if any(side % 64 for side in image.shape[-2:]):        # halved 5 times, then 2x2 patches
            raise ValueError(f"image {(*image.shape,)}: height and width must be multiples of 64")
        e, d = self.encoder, self.decoder
        x = e.mv2[0](e.conv1(image))                                       # enc_1 (B, 16, H/2, W/2)
        skip_3 = e.mv2[1](x)                                               # enc_2 (B, 24, H/4, W/4)
        x = e.mv2[3](e.mv2[2](skip_3))                                     # enc_4 (B, 24, H/4, W/4)
        skip_2 = e.mv2[4](x)                                               # enc_5 (B, 48, H/8, W/8)
        skip_1 = e.mv2[5](e.mvit[0](skip_2))                             # enc_7 (B, 64, H/16, W/16)
        x = e.mv2[6](e.mvit[1](skip_1))                                  # enc_9 (B, 80, H/32, W/32)
        x = d.conv2d_in(e.conv2(e.mvit[2](x)))                           # dec_0 (B, 64, H/32, W/32)
        x = d.ups_block_1(x, skip_1)                                     # dec_1 (B, 32, H/16, W/16)
        x = d.ups_block_2(x, skip_2)                                       # dec_2 (B, 16, H/8, W/8)
        x = d.ups_block_3(x, skip_3)                                       # dec_3 (B, 8, H/4, W/4)
        with torch.autocast(image.device.type, enabled=False):             # bf16: 5 m is +-1.6 cm
            return d.conv2d_out(x.float()) / self.units_per_metre          # (B, 1, H/4, W/4) metres

def load_checkpoint(path):
    """Read our best.pt or last.pt, the notebook's best_meter_model.pth, or METER's raw state dict.
    Returns (METER, content of the file). Ends on any other file, and never runs code inside it."""
    variants = {channels[-1]: variant for variant, (channels, *_) in VARIANTS.items()}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("model", content.get("model_state_dict", content))
        units = GREY_LEVELS if "model_state_dict" in content else CENTIMETRES
        if not (units := float(content.get("units_per_metre", units))) > 0:
            raise ValueError(f"units_per_metre {units}")
        model = METER(variants[len(weights["encoder.conv2.0.weight"])], units)
        model.load_state_dict(weights)
        if broken := [key for key, x in weights.items() if not x.isfinite().all()]:
            raise ValueError(f"nan or infinity in {', '.join(broken[:3])}")
    except Exception as error:  # noqa: BLE001  a damaged file may raise almost anything
        reason = " ".join(str(error).split(". ")[0].split())[:300]         # torch's advice cut off
        sys.exit(f"error: {path} is no METER ({type(error).__name__}: {reason}): give a best.pt.")
    return model, content

@contextmanager
def record(model, names):
    """Collect activations: `with record(model, ["enc_4"]) as features: model(image)`.
    features[name] is (B, C, h, w), signed, attached to the graph, overwritten by each forward pass;
    also of a model compiled by METER.compile. ValueError for a name that is not in LAYERS."""
    if unknown := [name for name in names if name not in LAYERS]:
        raise ValueError(f"unknown layer {', '.join(unknown)}: choose from {', '.join(LAYERS)}")
    features = {}
    with ExitStack() as hooks:                                             # removes them at its end
        for name in names:
            hooks.enter_context(model.get_submodule(LAYERS[name]).register_forward_hook(
                lambda module, inputs, output, name=name: features.update({name: output})))
        yield features

# Depth selectivity. A unit's response to a depth bin: its mean activation over that bin's pixels.
def sid_thresholds(bins, near=0.75, far=10.0):
    """Spacing-increasing discretisation of depth (You et al.): (bins + 1,) metres.
    Bin i holds t[i] < depth <= t[i+1]; t[0] = 0, t[1] = near, t[bins] = far."""
    if bins < 2 or not 0 < near < far:
        raise ValueError(f"{bins} bins from {near} to {far}: 2 or more, and 0 < near < far")
    thresholds = (far + 1 - near) ** torch.linspace(0, 1, bins, dtype=torch.float64) - (1 - near)
    thresholds[-1] = far                                                 # exact: 10 m is no outlier
    return F.pad(thresholds, (1, 0)).float()

def bin_weights(depth, thresholds, size):
    """Weight of every cell of an activation map, h x w = size, in every depth bin: (B, K, h, w).
    depth (B, 1, H, W), thresholds (K+1,) in one unit; depth 0 or beyond the last is in no bin.
    Interpolation is linear: a map interpolated to H x W and added up over a bin's pixels equals the
    map added up under the bin's mask pulled back to h x w. Finer maps: H x W, see `bin_sums`."""
    shape = len(depth), len(thresholds) + 1, *depth.shape[-2:]             # 0 missing, K + 1 beyond
    weights = depth.new_zeros(shape).scatter_(1, torch.bucketize(depth, thresholds), 1)
    size = tuple(map(min, size, depth.shape[-2:]))
    if size != depth.shape[-2:]:
        rows, columns = (
            F.interpolate(torch.eye(cells, device=depth.device)[None], pixels, mode="linear")[0]
            for cells, pixels in zip(size, depth.shape[-2:]))              # (h, H), (w, W)
        weights = rows @ (weights @ columns.mT)
    return weights[:, 1:-1]

def bin_sums(features, weights):
    """Activations (B, C, h, w) added up under their bin_weights: (C, K)."""
    features = features.float()
    if features.shape[-2:] != weights.shape[-2:]:                          # finer than the depth
        features = F.interpolate(features, weights.shape[-2:], mode="bilinear")
    return (weights.flatten(2) @ features.flatten(2).mT).sum(0).T   # keeps gradients channels last

@functools.cache
def layer_thresholds(units, notebook=False, device="cpu"):
    """Bin thresholds of a layer, metres; the notebook's reach to 100 *grey levels*, 3.92 m."""
    far, metres = (100.0, 10 / 255) if notebook else (10.0, 1)
    return (sid_thresholds(min(units, MAX_BINS), far=far) * metres).to(device)

def notebook_depth(depth):
    """Depth as the notebook bins it: whatever is beyond its last threshold is in the first bin."""
    first, last = layer_thresholds(MAX_BINS, notebook=True)[[1, -1]].tolist()
    return depth.where(depth <= last, first)

def selectivity(response, chosen):
    """(R_chosen - mean of the other R) / (their sum) of each unit (You et al.), -1 .. 1: (C,).
    response (C, K), not negative, 0 for an empty bin; chosen (C,), the bin of each unit."""
    picked = response.gather(1, chosen[:, None]).squeeze(1)
    others = (response.sum(1) - picked) / (response.shape[1] - 1)
    return (picked - others) / (picked + others + 1e-15)

def assigned_bins(units, bins, device="cpu"):
    """The bin that training gives to each unit, in order: (units,), values 0 .. bins - 1."""
    return torch.arange(units, device=device) * bins // units

def unit_selectivity(response, count, min_share=0.0):
    """Selectivity of each unit for its assigned bin: (C,); 0 if that holds a share <= min_share."""
    chosen = assigned_bins(*response.shape, response.device)
    return selectivity(response, chosen).where(count[chosen] > min_share * count.sum(), 0)

def assigned_selectivity(features, depth, thresholds, min_share=0.0):
    """The regulariser's term for one layer (You et al.): scalar, -1 .. 1, high is selective.
    features (B, C, h, w) as recorded, signed; depth (B, 1, H, W) and thresholds (K+1,) metres.
    Responses are means of |activation| over the batch (the dissection takes |mean|). A unit whose
    bin holds no more than the share `min_share` of the pixels counts 0 and gets no gradient."""
    weights = bin_weights(depth, thresholds.to(depth.device), features.shape[-2:])
    count = weights.sum((0, 2, 3))                                         # (K,) pixels
    response = bin_sums(features.abs(), weights) / count.clamp(min=1)  # (C, K); dissect.py: |mean|
    return unit_selectivity(response, count, min_share).mean()
