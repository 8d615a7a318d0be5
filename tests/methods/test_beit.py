"""BEiT: what is masked, what stands in for it, and which visual tokens are predicted."""

import math

import pytest
import torch
from lightly.models.utils import patchify
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from nepa_plugin.methods import BEiT
from nepa_plugin.methods.beit import transform
from nepa_plugin.methods.masks import BlockwiseMasks

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def beit(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    small = {"num_classes": 3, "codebook_size": 9, "min_per_block": 2, "drop_path_rate": 0.0}
    model = BEiT(**(args | small | kwargs))
    for block in model.backbone.blocks:  # so that what attention does shows in the outputs
        nn.init.ones_(block.ls1.gamma)
        nn.init.ones_(block.ls2.gamma)
    return model


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_loss_is_the_masked_patches_cross_entropy_written_out(images):
    model = beit()
    mask, masked = model.masks(4)
    loss, features = model.step([images], [mask, masked])
    vit = model.backbone
    embedded = vit.patch_embed(images)
    embedded = torch.where(mask[:, :, None], model.mask_token, embedded)
    tokens = torch.cat([vit.cls_token.expand(4, -1, -1), embedded], dim=1) + vit.pos_embed
    for block in vit.blocks:
        tokens = block(tokens)
    patches = vit.norm(tokens)[:, 1:]
    pixels = patchify(images, 4)
    pixels = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    ids = torch.cdist(pixels, model.codebook.centers.expand(4, -1, -1)).argmin(dim=-1)
    torch.testing.assert_close(loss, F.cross_entropy(model.head(patches[mask]), ids[mask]))
    torch.testing.assert_close(features, patches.mean(dim=1))


def test_what_is_masked_is_not_seen(images):
    model = beit().eval()
    mask, masked = model.masks(4)
    other = images.clone()
    other += (mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)) * 3.0
    assert (images - other).abs().max() > 1
    with torch.no_grad():
        features = [model.step([x], [mask, masked])[1] for x in (images, other)]
    torch.testing.assert_close(*features)


def test_masks_have_blocks_and_their_share():
    torch.manual_seed(0)
    mask, masked = BlockwiseMasks(14, 0.4, 16)(64)
    assert mask.shape == (64, 196) and torch.equal(mask.flatten().nonzero().squeeze(1), masked)
    counts = mask.sum(dim=1)
    assert counts.max() <= 78 and counts.float().mean() > 0.37 * 196  # int(0.4 * 196) at most
    # a patch that is masked has masked neighbours: blocks, no single patches
    grid = F.pad(mask.view(64, 1, 14, 14).float(), (1, 1, 1, 1))
    around = F.conv2d(grid, torch.tensor([[[[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]]]))
    assert around[mask.view(64, 1, 14, 14)].mean() > 2.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio=1.0 of 16 patches must leave some"),
        ({"min_per_block": 16}, "mask at least min_per_block=16: lower"),
        ({"backbone": "nepa_vit_tiny_patch14_224"}, "BEiT hides patches and needs timm's VisionTransformer"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        beit(**options)


def test_the_view_has_the_papers_colour_jitter():
    steps = transform.transform.transforms
    (jitter,) = [step for step in steps if isinstance(step, v2.ColorJitter)]
    assert jitter.brightness == jitter.contrast == jitter.saturation == pytest.approx((0.6, 1.4))
    assert jitter.hue is None
    plain = beit(color_jitter=0.0).train_transform().transform.transforms
    assert not any(isinstance(step, v2.ColorJitter) for step in plain)
    image = Image.new("RGB", (32, 32), (90, 120, 200))
    values = {tuple(transform(image)[0][:, 0, 0].tolist()) for _ in range(5)}
    assert len(values) == 5
    assert all(map(math.isfinite, next(iter(values))))
