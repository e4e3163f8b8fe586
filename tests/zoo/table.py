"""The zoo: of every timm family (a file in timm/models) its smallest model, and variants whose MLPs, attention or positions
differ, at a size that runs in seconds; the vision models of torchvision and transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VIT = dict(depth=2, embed_dim=48, num_heads=2)
FEW = (1, 1, 1, 1)  # blocks a stage
STATIC = ("--preset", "static", "--keep", "0.8", "--tokens", "2000")
HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
HF_STAGES = dict(image_size=64, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4)  # Swin
HF_CONVNEXT = dict(image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])


@dataclass(frozen=True, eq=False)
class Entry:
    """One model: its family, the name that a user gives, the arguments that make it small, its image size in pixels (None: its
    own). For `hf:CLASS` a folder of that class of transformers is written, and the arguments are its configuration's."""

    family: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    pixels: int | None = 64
    trait: str = ""  # what it is in the zoo for, beside its family
    options: tuple[str, ...] = ()  # of `moee extract`, in place of the zoo's usual method

    @property
    def title(self) -> str:
        """Its name, and what is special about it."""
        options = f"`{' '.join(self.options)}`" if self.options else ""
        return ", ".join(part for part in (self.name, self.trait, options) if part)


ENTRIES = (
    Entry("beit", "beit_base_patch16_224", VIT, trait="relative positions"),
    Entry("beit", "beitv2_base_patch16_224", VIT),
    Entry("byoanet", "eca_botnext26ts_256", {}),
    Entry("byobnet", "test_byobnet", {}),
    Entry("cait", "cait_xxs24_224", VIT, trait="talking heads, class attention"),
    Entry(
        "coat", "coat_lite_tiny", dict(serial_depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)),
        trait="convolutional positions",
    ),
    Entry("coat", "coat_tiny", dict(serial_depths=(1, 1, 1, 1), parallel_depth=1), trait="parallel blocks"),
    Entry("convit", "convit_tiny", dict(local_up_to_layer=1, **VIT), trait="gated positions"),
    Entry("convmixer", "convmixer_768_32", {}),
    Entry("convnext", "convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
    Entry("convnext", "convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), conv_mlp=True), trait="1x1 convolutions"),
    Entry("convnext", "convnextv2_atto", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), trait="GRN"),
    Entry("cpubone", "cpubone_nano", {}),
    Entry("crossvit", "crossvit_tiny_240", dict(depth=((1, 1, 0),), embed_dim=(24, 48), num_heads=(2, 2)), 240),
    Entry("csatv2", "csatv2", {}),
    Entry("cspnet", "cs3darknet_focus_s", {}),
    Entry("cspnext", "cspnext_tiny", {}),
    Entry("davit", "davit_tiny", dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 2)), trait="channel attention"),
    Entry("deepseek_vit", "deepseek_vit_412m", VIT, 56),
    Entry("deit", "deit_tiny_patch16_224", VIT),
    Entry("deit", "deit_tiny_distilled_patch16_224", VIT, trait="distillation token"),
    Entry("deit", "deit3_small_patch16_224", VIT),
    Entry("densenet", "densenet121", {}),
    Entry("dla", "dla46_c", {}),
    Entry("dpn", "dpn48b", {}),
    Entry("edgenext", "edgenext_xx_small", {}, trait="cross-covariance attention"),
    Entry("efficientformer", "efficientformer_l1", dict(depths=(1, 1, 1, 1), embed_dims=(16, 24, 32, 48)), 224),
    Entry("efficientformer_v2", "efficientformerv2_s0", {}, 224),
    Entry("efficientnet", "test_efficientnet", {}),
    Entry("efficientvim", "efficientvim_m1", {}),
    Entry("efficientvit_mit", "efficientvit_b0", {}),
    Entry("efficientvit_msra", "efficientvit_m0", {}, 224),
    Entry("eva", "eva02_tiny_patch14_224", VIT, 56, trait="SwiGLU, rotary positions"),
    Entry("eva", "eva_giant_patch14_224", dict(num_heads=2, depth=2, embed_dim=48), 56),
    Entry("eva", "vit_tiny_patch16_dinov3_qkvb", VIT, trait="DINOv3"),
    Entry("eva", "vit_7b_patch16_dinov3", VIT, trait="DINOv3, SwiGLU"),
    Entry("eva", "vit_pe_spatial_tiny_patch16_512", VIT, trait="perception encoder"),
    Entry("fasternet", "fasternet_t0", {}),
    Entry("fastvit", "fastvit_t8", dict(layers=FEW)),
    Entry("fastvit", "fastvit_sa12", dict(layers=FEW), 64, trait="attention"),
    Entry("focalnet", "focalnet_tiny_srf", {}),
    Entry("gcvit", "gcvit_xxtiny", {}),
    Entry("gemma4_vit", "gemma4_vit_167m", VIT),
    Entry("ghostnet", "ghostnet_050", {}),
    Entry("hardcorenas", "hardcorenas_a", {}),
    Entry("hgnet", "hgnetv2_b0", {}),
    Entry("hiera", "hiera_tiny_224", dict(embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), q_pool=2), trait="mask units"),
    Entry(
        "hieradet_sam2", "sam2_hiera_tiny", dict(stages=(1, 1, 2, 1), embed_dim=16, num_heads=1, global_att_blocks=(3,)),
        trait="SAM 2",
    ),
    Entry("hrnet", "hrnet_w18_small", {}),
    Entry("iformer", "iformer_t", {}),
    Entry("inception_next", "inception_next_atto", {}),
    Entry("inception_resnet_v2", "inception_resnet_v2", {}, 149),
    Entry("inception_v3", "inception_v3", {}, 149),
    Entry("inception_v4", "inception_v4", {}, 149),
    Entry("lcnetv2", "lcnetv2_small", {}),
    Entry("levit", "levit_128s", {}),
    Entry("lowformer", "lowformer_b0", {}),
    Entry("mambaout", "test_mambaout", {}),
    Entry("maxxvit", "test_coatnet", {}, trait="CoAtNet"),
    Entry("maxxvit", "test_maxvit", {}, None, trait="MaxViT"),
    Entry("maxxvit", "maxvit_rmlp_pico_rw_256", dict(depths=FEW), trait="MaxViT, relative positions by an MLP"),
    Entry("metaformer", "poolformer_s12", {}),
    Entry("metaformer", "caformer_s18", {}, trait="StarReLU"),
    Entry("mlp_mixer", "mixer_s16_224", {}, trait="MLPs over tokens and channels"),
    Entry("mlp_mixer", "resmlp_12_224", {}),
    Entry("mlp_mixer", "gmixer_12_224", {}, trait="gated"),
    Entry("mlp_mixer", "gmlp_ti16_224", {}, trait="gated over space"),
    Entry("mobilenetv3", "mobilenetv3_small_050", {}),
    Entry("mobilenetv3", "mobilenetv4_hybrid_medium", {}, trait="attention"),
    Entry("mobilenetv5", "mobilenetv5_base", {}),
    Entry("mobilevit", "mobilevit_xxs", {}),
    Entry("mobilevit", "mobilevitv2_050", {}, trait="linear attention"),
    Entry("mvitv2", "mvitv2_tiny", {}, trait="pooled attention"),
    Entry("naflexvit", "naflexvit_base_patch16_gap", VIT),
    Entry("nasnet", "nasnetalarge", {}),
    Entry("nest", "nest_tiny", {}),
    Entry("nextvit", "nextvit_small", {}),
    Entry("nfnet", "test_nfnet", {}),
    Entry("pit", "pit_ti_224", dict(depth=(1, 1, 1), base_dims=(16, 16, 16), heads=(1, 2, 2))),
    Entry("pnasnet", "pnasnet5large", {}),
    Entry("pvt_v2", "pvt_v2_b0", {}),
    Entry("qwen3_vit", "qwen3_vit_88m", VIT),
    Entry("rdnet", "rdnet_tiny", {}),
    Entry("regnet", "regnety_002", {}),
    Entry("repghost", "repghostnet_050", {}),
    Entry("repvit", "repvit_m1", {}),
    Entry("res2net", "res2net50_14w_8s", {}),
    Entry("resnest", "resnest14d", {}),
    Entry("resnet", "test_resnet", {}),
    Entry("resnetv2", "resnetv2_18", {}),
    Entry("rexnet", "rexnet_100", {}),
    Entry("selecsls", "selecsls42", {}),
    Entry("senet", "legacy_seresnet18", {}),
    Entry(
        "sequencer", "sequencer2d_s", dict(layers=(1, 1, 1, 1), embed_dims=(16, 24, 24, 24), hidden_sizes=(8, 12, 12, 12)),
        224, trait="LSTM",
    ),
    Entry("shvit", "shvit_s1", {}),
    Entry("sknet", "skresnet18", {}),
    Entry("starnet", "starnet_s050", {}),
    Entry("swiftformer", "swiftformer_xs", dict(layers=FEW)),
    Entry(
        "swin_transformer", "swin_tiny_patch4_window7_224", dict(embed_dim=16, depths=(2, 1), num_heads=(2, 2), window_size=4),
        trait="shifted windows",
    ),
    Entry(
        "swin_transformer_v2", "swinv2_tiny_window8_256", dict(embed_dim=16, depths=(2, 1), num_heads=(2, 2), window_size=4),
        trait="positions by an MLP",
    ),
    Entry("swin_transformer_v2_cr", "swinv2_cr_tiny_224", dict(embed_dim=16, depths=(2, 1), num_heads=(2, 2), window_size=4)),
    Entry("tiny_vit", "tiny_vit_5m_224", dict(depths=FEW), 224),
    Entry(
        "tnt", "tnt_s_patch16_224", dict(depth=1, embed_dim=48, inner_dim=12, num_heads_inner=2, num_heads_outer=2),
        trait="inner and outer tokens",
    ),
    Entry("tresnet", "tresnet_m", {}),
    Entry(
        "twins", "twins_svt_small", dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)),
        trait="local and global attention",
    ),
    Entry("twins", "twins_pcpvt_small", dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))),
    Entry("vgg", "vgg11", {}),
    Entry("visformer", "visformer_tiny", {}),
    Entry("vision_transformer", "test_vit", {}),
    Entry("vision_transformer", "test_vit3", {}, trait="attention pooling, LayerScale"),
    Entry("vision_transformer", "test_vit4", {}),
    Entry("vision_transformer", "vit_base_patch16_siglip_224", VIT, trait="SigLIP, attention pooling"),
    Entry("vision_transformer", "vit_base_patch32_clip_quickgelu_224", VIT, trait="OpenAI CLIP, QuickGELU"),
    Entry("vision_transformer", "vit_base_patch32_clip_224", VIT, trait="CLIP"),
    Entry("vision_transformer", "vit_small_patch14_reg4_dinov2", VIT, 56, trait="DINOv2 with registers"),
    Entry("vision_transformer", "vit_giant_patch14_dinov2", VIT, 56, trait="DINOv2 giant, SwiGLU"),
    Entry("vision_transformer", "vit_base_patch16_224.mae", VIT, trait="MAE"),
    Entry("eva", "vit_base_patch16_rope_reg1_gap_256", VIT, trait="rotary positions"),
    Entry("vision_transformer", "vit_small_patch16_18x2_224", dict(depth=1, embed_dim=48, num_heads=2), trait="parallel MLPs"),
    Entry("vision_transformer", "vit_base_patch16_xp_224", VIT, trait="parallel attention and MLP"),
    Entry("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", VIT),
    Entry("vision_transformer_relpos", "test_vit_relpos", {}, trait="relative positions by an MLP"),
    Entry("vision_transformer_relpos", "vit_relpos_small_patch16_rpn_224", VIT),
    Entry("vision_transformer_relpos", "vit_srelpos_small_patch16_224", VIT, trait="shared relative positions"),
    Entry("vision_transformer_sam", "samvit_base_patch16_224", dict(global_attn_indexes=(1,), window_size=2, **VIT), trait="SAM"),
    Entry("vitamin", "vitamin_small_224", {}),
    Entry("volo", "volo_d1_224", {}, 64, trait="outlook attention"),
    Entry("vovnet", "ese_vovnet19b_slim_dw", {}),
    Entry("xception", "legacy_xception", {}),
    Entry("xception_aligned", "xception41p", {}),
    Entry("xcit", "xcit_nano_12_p16_224", VIT, trait="cross-covariance attention"),
    Entry("eva", "eva02_tiny_patch14_224", VIT, 56, "SwiGLU, rotary positions", STATIC),
    Entry("eva", "vit_7b_patch16_dinov3", VIT, trait="DINOv3, SwiGLU", options=STATIC),
    Entry("vision_transformer", "vit_giant_patch14_dinov2", VIT, 56, "DINOv2 giant, SwiGLU", STATIC),
    Entry("mlp_mixer", "gmixer_12_224", {}, trait="gated", options=STATIC),
    Entry("torchvision", "torchvision:vit_b_16", {}, 32),
    Entry("torchvision", "torchvision:swin_t", {}, 64),
    Entry("torchvision", "torchvision:swin_v2_t", {}, 64),
    Entry("torchvision", "torchvision:convnext_tiny", {}, 64),
    Entry("torchvision", "torchvision:maxvit_t", {}, None),
    Entry("torchvision", "torchvision:resnet18", {}, 64),
    Entry("transformers", "hf:ViTForImageClassification", HF, None),
    Entry("transformers", "hf:DeiTForImageClassification", HF, None),
    Entry("transformers", "hf:ViTMSNForImageClassification", HF, None),
    Entry("transformers", "hf:Dinov2ForImageClassification", HF, None),
    Entry("transformers", "hf:Dinov2WithRegistersForImageClassification", HF, None),
    Entry("transformers", "hf:DINOv3ViTModel", HF, None),
    Entry("transformers", "hf:BeitForImageClassification", HF, None),
    Entry("transformers", "hf:SwinForImageClassification", HF_STAGES, None),
    Entry("transformers", "hf:Swinv2ForImageClassification", HF_STAGES, None),
    Entry("transformers", "hf:ConvNextForImageClassification", HF_CONVNEXT, None),
    Entry("transformers", "hf:ConvNextV2ForImageClassification", HF_CONVNEXT, None, "GRN"),
    Entry("transformers", "hf:CLIPModel", HF, None, "a tower out of a model of images and texts"),
    Entry("transformers", "hf:SiglipModel", HF, None, "a tower out of a model of images and texts"),
)  # fmt: skip
