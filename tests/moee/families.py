"""Models of many families at reduced size: what of each is an MLP to cut, and what must stay dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from moee.models.model import ModelSpec, Shape, load_model

SMALL = dict(depth=2, embed_dim=48, num_heads=2)


@dataclass(frozen=True)
class Family:
    """`cut` MLPs, `scaled` of them behind a LayerScale; `gated` ones, which get no experts; `dense`: what the reasons
    of the others say, each at least once."""

    timm_name: str
    kwargs: dict = field(default_factory=dict)
    pixels: int = 64
    cut: int = 0
    scaled: int = 0
    gated: int = 0
    dense: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        return 3, self.pixels, self.pixels

    def model(self) -> nn.Module:
        """The model with random weights; LayerScales, which start alike, differ between channels and layers."""
        spec = ModelSpec(name=self.timm_name, timm_name=self.timm_name, kwargs={"num_classes": 10, **self.kwargs}, random_seed=0)
        model = load_model(spec)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if "gamma" in leaf or leaf in ("ls1", "ls2") or "layer_scale" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        return model


SE = "`gate` \\(Sigmoid\\)"
FAST = {
    "repvit": Family("repvit_m1", dense=(SE, "`conv1.bn` \\(BatchNorm2d\\)")),
    "fastvit": Family("fastvit_t8", cut=10, scaled=10, dense=(SE,)),
    "regnet": Family("regnety_002", dense=(SE,)),
    "coatnet": Family("coatnet_pico_rw_224", dict(img_size=64), cut=7, dense=(SE,)),
    "gcvit": Family("gcvit_xxtiny", dict(img_size=64), cut=12, dense=(SE,)),
    "swiftformer": Family("swiftformer_xs", cut=20, scaled=20),
    "pvt_v2": Family("pvt_v2_b0", dense=("`dwconv` \\(Conv2d\\)",)),
    "vit_relpos": Family(
        "vit_relpos_small_patch16_224", dict(img_size=64, depth=2, embed_dim=96, num_heads=3), cut=2, scaled=2,
        dense=("width of its tokens from 2 to 3",),
    ),
    "swinv2_cr, a bias as wide as its input": Family(
        "swinv2_cr_tiny_224", dict(img_size=64, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4), cut=2,
        dense=("does not depend on the image",),
    ),
    "cait": Family("cait_xxs24_224", dict(img_size=64, **SMALL), cut=2, scaled=2, dense=("one token an image",)),
    "xcit": Family("xcit_nano_12_p16_224", SMALL, cut=2, scaled=2, dense=("one token an image",)),
    "beit": Family("beit_base_patch16_224", dict(img_size=64, **SMALL), cut=2, scaled=2),
    "siglip": Family("vit_base_patch16_siglip_224", dict(img_size=64, **SMALL), cut=2, dense=("one token an image",)),
    "eva02": Family("eva02_tiny_patch14_224", dict(img_size=56, **SMALL), 56, gated=2),
    "dinov2-g": Family("vit_giant_patch14_dinov2", dict(img_size=56, **SMALL), 56, gated=2),
    "dinov3-7b": Family("vit_7b_patch16_dinov3", dict(img_size=64, **SMALL), gated=2),
    "eva02, a norm inside": Family(
        "eva02_base_patch14_224", dict(img_size=56, **SMALL), 56, dense=("gated, and holds `norm` \\(LayerNorm\\)",)
    ),
    "convnextv2": Family("convnextv2_atto", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), dense=("`grn`",)),
    "convnext": Family("convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), cut=4, scaled=4),
    "convnext, convolutions": Family(
        "convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), conv_mlp=True), cut=4, scaled=4
    ),
    "test_vit2": Family("test_vit2", dict(img_size=64), cut=8, scaled=8),
    "test_vit3": Family("test_vit3", dict(img_size=64), cut=9, scaled=9, dense=("one token an image",)),
    "swin": Family(
        "swin_tiny_patch4_window7_224", dict(img_size=64, embed_dim=16, depths=(2, 1), num_heads=(2, 2), window_size=4), cut=3
    ),
    "hiera": Family("hiera_tiny_224", dict(img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), q_pool=2), cut=4),
    "parallel blocks": Family(
        "vit_small_patch16_18x2_224", dict(img_size=64, depth=1, embed_dim=48, num_heads=2), cut=2, scaled=2
    ),
    "levit": Family("levit_128s", dict(img_size=64), dense=("`ln1.bn` \\(BatchNorm1d\\)",)),
    "deit3": Family("deit3_small_patch16_224", dict(img_size=64, **SMALL), cut=2, scaled=2),
    "davit": Family("davit_tiny", dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 2)), cut=4),
    "twins": Family(
        "twins_svt_small", dict(img_size=64, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)), cut=4
    ),
    "tnt": Family(
        "tnt_s_patch16_224",
        dict(img_size=64, depth=1, embed_dim=48, inner_dim=12, num_heads_inner=2, num_heads_outer=2), cut=2,
    ),
    "resnet": Family("resnet10t"),
}  # fmt: skip
SLOW = {
    "maxvit": Family("maxvit_pico_rw_256", dict(img_size=64), cut=22, dense=(SE,)),
    "nfnet": Family("nfnet_f0", dense=(SE,)),
    "efficientformer": Family("efficientformer_l1", {}, 224, cut=1, scaled=1, dense=("`norm1` \\(BatchNorm2d\\)",)),
    "efficientformerv2": Family("efficientformerv2_s0", {}, 224, dense=("`fc1.bn`",)),
    "coat": Family("coat_tiny", dict(img_size=64), cut=8, dense=("runs 3 times in one forward pass",)),
    "resmlp": Family("resmlp_12_224", dict(img_size=64), cut=12, scaled=12),
    "mixer": Family("mixer_s32_224", {}, 224, cut=16),
    "gmixer": Family("gmixer_12_224", {}, 224, gated=24),
    "gmlp": Family("gmlp_ti16_224", dict(img_size=64), dense=("three linear maps",)),
    "test_vit": Family("test_vit", {}, 160, cut=6),
    "poolformer": Family("poolformer_s12", cut=12, scaled=12),
    "caformer": Family("caformer_s18", dense=("StarReLU",)),
    "mobilevit": Family("mobilevit_xxs", cut=9, dense=("`conv1_1x1.bn`",)),
    "tiny_vit": Family("tiny_vit_5m_224", {}, 224, cut=10),
    "edgenext": Family("edgenext_xx_small", cut=12, scaled=12),
    "focalnet": Family("focalnet_tiny_srf", cut=12, dense=("three linear maps",)),
    "nest": Family("nest_tiny", {}, 224, cut=12),
    "visformer": Family("visformer_tiny", dict(img_size=64), cut=8, dense=("`conv2` \\(Conv2d\\)",)),
    "mvitv2": Family("mvitv2_tiny", dict(img_size=64), cut=10),
    "volo": Family("volo_d1_224", {}, 224, cut=18, dense=("one token an image",)),
    "convit": Family("convit_tiny", dict(img_size=64, local_up_to_layer=1, **SMALL), cut=2),
    "shvit": Family("shvit_s1", dense=(SE,)),
    "quick gelu": Family("vit_base_patch32_clip_quickgelu_224", dict(img_size=64, **SMALL), cut=2),
}
