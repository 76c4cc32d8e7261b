"""One small architecture of every model file of timm: attention goes in everywhere, unchanged and called once.

Run alone, ``python tests/test_families.py`` prints the table.
"""

import logging
import sys
import time

import pytest
import timm
import torch
from torch import Tensor, nn

from visattn import Attention, insert, insertions, remove
from visattn.surgery import SurgeryError

# Model file → a small architecture in it, and what makes it smaller still.
FAMILIES: dict[str, tuple[str, dict]] = {
    "beit": ("beit_base_patch16_224", {"depth": 2}),
    "byoanet": ("halonet_h1", {}),
    "byobnet": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", {}),
    "coat": ("coat_tiny", {}),
    "convit": ("convit_tiny", {}),
    "convmixer": ("convmixer_768_32", {}),
    "convnext": ("test_convnext", {}),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_tiny_240", {}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": ("davit_tiny", {"depths": (1, 1, 1, 1)}),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 2}),
    "deit": ("deit_tiny_patch16_224", {}),
    "densenet": ("densenet121", {}),
    "dla": ("dla34", {}),
    "dpn": ("dpn48b", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {}),
    "efficientnet": ("mobilenetv2_050", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("vit_small_patch16_dinov3", {"depth": 3}),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "gcvit": ("gcvit_xxtiny", {}),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 2}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_b", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {"stages": (1, 1, 2, 1)}),
    "hieradet_sam2": ("sam2_hiera_tiny", {}),
    "hrnet": ("hrnet_w18_small", {}),
    "iformer": ("iformer_t", {}),
    "inception_next": ("inception_next_atto", {}),
    "inception_resnet_v2": ("inception_resnet_v2", {}),
    "inception_v3": ("inception_v3", {}),
    "inception_v4": ("inception_v4", {}),
    "lcnetv2": ("lcnetv2_small", {}),
    "levit": ("levit_128s", {}),
    "lowformer": ("lowformer_b0", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("test_coatnet", {}),
    "metaformer": ("poolformer_s12", {}),
    "mlp_mixer": ("gmixer_12_224", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilenetv5": ("mobilenetv5_base", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 2}),
    "nasnet": ("nasnetalarge", {}),
    "nest": ("nest_tiny", {}),
    "nextvit": ("nextvit_small", {}),
    "nfnet": ("test_nfnet", {}),
    "pit": ("pit_ti_224", {}),
    "pnasnet": ("pnasnet5large", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 2}),
    "rdnet": ("rdnet_tiny", {}),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m1", {}),
    "res2net": ("res2net50_26w_4s", {}),
    "resnest": ("resnest14d", {}),
    "resnet": ("test_resnet", {}),
    "resnetv2": ("resnetv2_18", {}),
    "rexnet": ("rexnet_100", {}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", {}),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {}),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tnt": ("tnt_s_legacy_patch16_224", {}),
    "tresnet": ("tresnet_m", {}),
    "twins": ("twins_svt_small", {}),
    "vgg": ("vgg11", {}),
    "visformer": ("visformer_tiny", {}),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {}),
    "vision_transformer_relpos": ("test_vit_relpos", {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"depth": 2}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": ("volo_d1_224", {}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": ("legacy_xception", {}),
    "xception_aligned": ("xception41p", {}),
    "xcit": ("xcit_nano_12_p8_224", {}),
}


class Brighten(Attention):
    """Has an effect from the start and counts its calls."""

    paper = "none"

    def __init__(self, channels: int):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, channels)[:, None, None])
        self.calls = 0

    def attend(self, x: Tensor) -> Tensor:
        return self.factor

    def read(self, x: Tensor, *, weights: Tensor) -> Tensor:
        self.calls += 1
        return x * weights


def tensors(output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def walk(family: str) -> dict[str, str]:
    """What happens at the three places of one architecture: the number of sites and their layouts, or why not."""
    name, smaller = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **smaller).eval()
    image = torch.randn(1, *model.default_cfg["input_size"])
    found = {}
    with torch.no_grad():
        before = tensors(model(image))
        for at in ("stages", "blocks", "residual"):
            try:
                insert(model, Brighten, at=at)
            except SurgeryError as error:
                found[at] = str(error)
                continue
            inserted = insertions(model)
            assert all(map(torch.equal, tensors(model(image)), before)), f"{family} changes at {at}"
            calls = {i.site.name: i.attention.calls for i in inserted}
            assert set(calls.values()) == {1}, f"{family} at {at}: {calls}"
            found[at] = f"{len(inserted)} {'/'.join(sorted({i.site.layout for i in inserted}))}"
            remove(model)
    return found


def test_every_model_file_is_walked():
    assert not set(FAMILIES) - set(timm.list_modules())
    known = set(timm.list_modules()) - set(FAMILIES)
    assert not known or timm.__version__ != "1.0.31", f"add {known}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_goes_in_at_stages_and_blocks_unchanged_and_called_once(family):
    found = walk(family)
    assert found["stages"][0].isdigit()
    assert found["blocks"][0].isdigit()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print("| model file | architecture | stages | blocks | residual | s |\n|---|---|---|---|---|---|")
    for family in sys.argv[1:] or FAMILIES:
        start = time.perf_counter()
        found = walk(family)
        print(
            f"| {family} | {FAMILIES[family][0]} | {' | '.join(found.values())} | {time.perf_counter() - start:.0f} |"
        )
        sys.stdout.flush()
