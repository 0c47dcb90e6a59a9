"""Bundles of untrained members: as heavy and as many-headed as real ones, made in a second."""
import torch

from biomass_kit.features.backbone import build_backbone
from biomass_kit.features.tta import DEFAULT_VIEWS
from biomass_kit.inference.bundle import save_backbone, save_member, write_manifest
from biomass_kit.model.model import BiomassModel


def untrained_bundle(folder, grids=((2, 2), (3, 3)), folds=5, fine_tuned=False, backbone="test_vit", weights=None, tile_size=32):
    "Each fold of each grid a head on one backbone; or, fine-tuned, each with a backbone of its own."
    torch.manual_seed(0)
    body, size = build_backbone(backbone, weights, tile_size, pretrained=weights is not None)
    infos = []
    for grid in grids:
        for fold in range(folds):
            if fine_tuned:
                with torch.no_grad(): body.model.norm.bias.add_(0.1)
            model = BiomassModel(body.dim, learning=True)
            model.fit_output(torch.rand(20, 5) * 50)
            infos.append(save_member(folder, model, dict(name=f"{grid[0]}x{grid[1]}-{fold}", fold=fold, backbone=save_backbone(folder, body),
                                                         grid=list(grid), tile_size=size, bounds=[[0.0] * 5, [200.0] * 5], means=[20.0] * 5, config={})))
    write_manifest(folder, infos, {"method": "none", "threshold": 0.15}, DEFAULT_VIEWS, {})
    return folder
