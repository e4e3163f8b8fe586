"""What a target that the MLPs cannot meet is answered with: only options that the model can take."""

import pytest
import timm

from moee.errors import OutOfReach
from moee.measure.metrics import dense_macs
from moee.methods.recipe import make_recipe
from moee.stages.reach import refuse_beyond_reach

VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=3)


def refusal(model, **values):
    shape = (3, 32, 32)
    recipe = make_recipe("static", values={"target_macs": 0.1, **values})
    with pytest.raises(OutOfReach) as caught:
        refuse_beyond_reach(recipe, model.eval(), shape, dense_macs(model, shape), 40)
    return str(caught.value)


def test_a_plain_vit_is_told_of_its_attention_and_its_tokens():
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    assert refusal(model).endswith("give a larger share, or --attention-macs 0.5, or --token-macs 0.8")
    assert refusal(model, attention_macs=0.6).endswith("give a larger share, or --attention-macs 0.5, or --token-macs 0.8")


def test_what_is_as_narrow_as_it_can_be_is_not_advised_again():
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    assert refusal(model, attention_macs=0.5).endswith("give a larger share, or --token-macs 0.8")
    assert refusal(model, token_macs=0.9).endswith("or --attention-macs 0.5, or --token-macs 0.72")


def test_a_swin_is_told_neither():
    sizes = dict(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=3)
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    assert refusal(model).endswith("stays above 1.00; give a larger share")
