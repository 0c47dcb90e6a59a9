"""Mixes of photos before a frozen backbone sees them, for `ablation.py`: eight stored mixes a photo instead of fresh ones every epoch.

A mix of photo i is drawn once: a partner, both photos' flips, and a share or a box. It is trained on in the folds whose
training part holds both photos, with the grams mixed by the share; scored photos are never mixed. The comparison is
between mixing the pixels and mixing the features of the same pairs by the same shares. Epochs are shortened so that every
row takes about as many steps as the default, whose one mix a photo and epoch is drawn anew.
"""
import dataclasses

import numpy as np
import pandas as pd
import torch

from biomass_kit.data.files import file_digest, write_csv
from biomass_kit.data.folds import make_folds, read_table
from biomass_kit.data.photos import read_photo, split_pair
from biomass_kit.data.targets import TARGETS
from biomass_kit.features.augment import Box, cutmix_pairs, draw_cutmix, draw_rng, draw_view, mix
from biomass_kit.features.backbone import build_backbone
from biomass_kit.features.store import Draw, FeatureCache, FeatureRequest, StoredFeatures, store_features
from biomass_kit.features.tiles import TileSpec
from biomass_kit.features.tta import STORED_VIEWS, arrange, parse_view
from biomass_kit.training.config import check_config
from biomass_kit.training.loop import run_fold
from biomass_kit.training.member import MemberTrainer, Source, predict_fold
from biomass_kit.training.setup import make_accelerator

K = 8  # mixes stored a photo
FEATURES = f"2x2 MixUp of features, {K} stored"
# row -> the row that it is compared with
MIXES = {
    FEATURES: "2x2 in bf16", f"2x2 MixUp of photos, {K} stored": FEATURES,
    f"2x2 CutMix of photos, {K} stored": FEATURES}


class Mix:
    "Number `j` of photo `i`'s mixes: its partner, both photos' flips, and what stays of the photo itself."

    def __init__(self, i: int, j: int, photos: int, box: bool):
        rng = draw_rng("mixup", i, j)
        self.photo, self.partner = i, int((i + rng.integers(1, photos)) % photos)
        self.views = [draw_view(rng, swap_prob=0) for _ in range(2)]
        self.box = draw_cutmix(rng, 1, 1.0, (1000, 1000))[0] if box else Box()
        self.share = self.box.share(1000, 1000) if box else float(rng.beta(0.4, 0.4))

    def pixels(self, pair: np.ndarray, other: np.ndarray) -> np.ndarray:
        "The mixed pair, uint8 `[2, S, S, 3]`."
        pair, other = (
            p[:, :: -1 if v.v else 1, :: -1 if v.h else 1] for p, v in zip((pair, other), self.views))
        if self.box != Box(): return cutmix_pairs(pair, other, self.box)
        return np.rint(self.share * pair + (1 - self.share) * other.astype(np.float32)).astype(np.uint8)


def stored(table, backbone, spec: TileSpec, variants: tuple, accelerator, progress) -> StoredFeatures:
    "Features in bf16, each process computing its share of the photos."
    paths, request = list(table["path"]), FeatureRequest(
        backbone.eval(), spec, variants, FeatureCache(backbone, spec, None, "bf16"))
    store_features(
        paths[accelerator.process_index :: accelerator.num_processes], request, precision="bf16",
        progress=progress)
    accelerator.wait_for_everyone()
    return store_features(paths, request, precision="bf16")


def mixed_features(row: str, mixes: list, table, backbone, spec: TileSpec, plain: StoredFeatures, accelerator, progress) -> torch.Tensor:
    "Features `[N * K, 2, T, D]` of all mixes: of mixed pixels, or mixed."
    paths = list(table["path"])
    if row == FEATURES:
        seen = lambda photo, view: arrange(plain.gather([photo], view), view, spec.grid)
        return torch.cat(
            [mix(torch.cat([seen(m.photo, m.views[0]), seen(m.partner, m.views[1])]), m.share, torch.tensor([1, 0]))[:1] for m in mixes])
    numbered = {(file_digest(paths[m.photo]), n % K): m for n, m in enumerate(mixes)}

    def apply(j):
        return lambda pair, digest: numbered[digest, j].pixels(
            pair, split_pair(read_photo(paths[numbered[digest, j].partner])))

    draws = tuple(Draw(f"{row.split()[1].lower()}-{j}", apply(j)) for j in range(K))
    drawn = stored(table, backbone, spec, draws, accelerator, progress)
    return torch.stack([drawn.gather([m.photo], draws[n % K])[0] for n, m in enumerate(mixes)])


def member_paths(a, row: str, table) -> dict:
    "(seed, grid, fold) -> the file of that member's out-of-fold grams."
    folder = a.out / row.replace(" ", "-").replace(",", "")
    return {
        (s, g, int(k)): folder / f"{g[0]}x{g[1]}-seed{s}-fold{k}.csv" for s in a.seeds for g in a.grids[:1]
        for k in np.unique(make_folds(table, seed=s))}


def train_member(config, k: int, table, mixes: list, features: np.ndarray, plain: StoredFeatures, backbone, spec: TileSpec, accelerator) -> pd.DataFrame:
    "Raw grams of fold k's photos, from a head trained on the mixes that hold none of them."
    fold, grams = make_folds(table, seed=config.fold_seed), table[list(TARGETS)].to_numpy()
    fit, scored = np.array([n for n, m in enumerate(mixes) if k not in (fold[m.photo], fold[m.partner])]), np.flatnonzero(fold == k)
    labels = np.stack(
        [mixes[n].share * grams[mixes[n].photo] + (1 - mixes[n].share) * grams[mixes[n].partner] for n in fit])
    virtual = table.iloc[[mixes[n].photo for n in fit]].assign(**dict(zip(TARGETS, labels.T)))
    rows = pd.concat([table.iloc[scored], virtual], ignore_index=True)
    seen = StoredFeatures(
        np.concatenate([plain.array[scored], np.repeat(features[fit][:, None], len(STORED_VIEWS), 1)]),
        STORED_VIEWS)
    config = check_config(
        dataclasses.replace(
            config, use_mixup=False, augment="none", epochs=round(
                config.epochs * (fold != k).sum() / len(fit))))
    f = MemberTrainer(
        k, config, rows, np.r_[np.full(len(scored), k), np.full(len(fit), k + 1)],
        [Source(backbone, spec, seen)], accelerator, "bf16")
    run_fold(f, lambda x, **_: x)
    return rows.loc[f.scored, ["image_path"]].assign(
        **dict(zip(TARGETS, predict_fold(f, f.scored, [parse_view(v) for v in config.tta]).T)))


def mixed_predictions(a, base, row: str, table, progress=lambda x, **_: x) -> dict:
    "(seed, deal, grid) -> [N, 5] raw out-of-fold grams of heads trained on stored mixes alone; trains what is not there."
    paths, accelerator = member_paths(a, row, table), make_accelerator(torch.device("cpu"), "bf16")
    mixes = [Mix(i, j, len(table), "CutMix" in row) for i in range(len(table)) for j in range(K)]
    missing = [m for m, path in paths.items() if not path.exists()]
    accelerator.wait_for_everyone()
    for grid in dict.fromkeys(g for _, g, _ in missing):
        backbone, size = build_backbone(base.backbone, base.backbone_weights, base.tile_size)
        spec = TileSpec(*grid, size)
        plain = stored(table, backbone, spec, STORED_VIEWS, accelerator, progress)
        features = mixed_features(row, mixes, table, backbone, spec, plain, accelerator, progress).numpy()
        for seed, _, k in [m for m in missing if m[1] == grid][accelerator.process_index :: accelerator.num_processes]:
            config = dataclasses.replace(base, grid=grid, seed=seed, fold_seed=seed)
            write_csv(
                paths[seed, grid, k],
                train_member(config, k, table, mixes, features, plain, backbone, spec, accelerator))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process: return {}
    whole = lambda s, g: pd.concat(
        [read_table(p) for (seed, grid, _), p in paths.items() if (seed, grid) == (s, g)])
    return {
        (s, s, g): whole(s, g).set_index("image_path").loc[table["image_path"], list(TARGETS)].to_numpy()
        for s, g, _ in paths}
