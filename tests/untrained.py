"""Random weights; bundles of untrained members, as heavy and many-headed as real ones, made in a second."""
import numpy as np
import torch
from safetensors.torch import save_file

from biomass_kit.data.targets import TARGETS
from biomass_kit.features.backbone import Backbone, build_backbone
from biomass_kit.features.tta import DEFAULT_VIEWS
from biomass_kit.inference.bundle import (
    read_bundle,
    save_backbone,
    save_member,
    save_reference,
    write_manifest,
)
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.physics import METHODS
from biomass_kit.inference.predict import plain_features
from biomass_kit.inference.uncertainty import make_reference
from biomass_kit.model.model import BiomassModel


def random_weights(path, backbone="test_vit", tile_size=32):
    "A tiny backbone's random weights as a file: what `--backbone-weights` wants."
    torch.manual_seed(0)
    save_file(
        build_backbone(backbone, pretrained=False, tile_size=tile_size)[0].model.state_dict(), path)
    return path


def untrained_bundle(
    folder, grids=((2, 2), (3, 3)), folds=5, fine_tuned=False, backbone="test_vit", weights=None, tile_size=32
):
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
            info = dict(
                name=f"{grid[0]}x{grid[1]}-{fold}", fold=fold, backbone=save_backbone(folder, body),
                grid=list(grid), tile_size=size, bounds=[[0.0] * 5, [200.0] * 5], means=[20.0] * 5, config={})
            infos.append(save_member(folder, model, info))
    write_manifest(folder, infos, {"method": "none", "threshold": 0.15}, DEFAULT_VIEWS, {})
    return folder


def trusted_bundle(folder, photos, views=("plain", "h")):
    "Two untrained members that know intervals and remember photos, each with some noise, as theirs."
    untrained_bundle(folder, grids=((1, 1),), folds=2)
    bundle = read_bundle(folder)
    ensemble = Ensemble(bundle, ["plain"], device_type="cpu")
    means = np.concatenate([f.mean((1, 2)).numpy() for (f,), _ in plain_features(ensemble, photos)])
    noise = np.random.default_rng(0).normal(0, means.std(0), (40, *means.shape))
    held = make_reference((means + noise).reshape(-1, means.shape[1]), np.repeat(np.arange(40), len(means)))
    file = save_reference(folder, {name: torch.from_numpy(v) for name, v in held._asdict().items()})
    margins = {method: [0.5] * len(TARGETS) for method in METHODS}
    trust = {"reference": {"file": file, "member": bundle.members[0]["name"]},
             "intervals": {"level": 0.9, "of": "figures", "margins": margins}}
    physics = {"method": "none", "threshold": 0.15}
    write_manifest(folder, bundle.members, physics, list(views), {}, trust=trust)
    return folder


def by_photo(table):
    "A submission as [photos, 5] grams."
    return table.target.to_numpy().reshape(-1, len(TARGETS))


def is_means(table):
    "Which photos have the training means of the untrained bundles."
    return np.isclose(by_photo(table), 20).all(1)


class SlowBackbones:
    "A clock that backbones move: each pixel that one sees takes `pace` seconds."

    def __init__(self, monkeypatch, pace=1e-3):
        self.now, self.pace, self.passes = 0.0, pace, []
        plain = Backbone.forward
        monkeypatch.setattr(Backbone, "forward", lambda body, tiles: self.see(tiles) or plain(body, tiles))

    def see(self, tiles):
        self.passes.append(tiles.shape[0])
        self.now += self.seconds(tiles)

    def seconds(self, tiles):
        return self.pace * tiles.shape[0] * tiles.shape[1] * tiles.shape[2] * tiles.shape[-1] ** 2

    def whole(self, photos, views=3, tiles=4 + 9, size=32):
        "Seconds that the frozen bundle takes for so many photos."
        return self.pace * photos * views * 2 * tiles * size**2
