"""A screen finds what carries the grams, reads every photo once, and says the same twice."""
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from commands import command
from untrained import random_weights

from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.table import read_train
from biomass_kit.data.targets import TARGETS, weighted_r2
from biomass_kit.evidence import screen
from biomass_kit.evidence.splits import splits
from biomass_kit.features.backbone import Backbone
from biomass_kit.features.options import STATISTICS
from biomass_kit.features.tiles import TileSpec
from biomass_kit.training.config import TrainConfig, check_config
from biomass_kit.training.member import Source
from biomass_kit.training.setup import start_backbone

PHOTOS = 24
SPLITS = 2
PLANTED = 2, "max"  # block and statistic


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A few synthetic photos and the weights of a tiny transformer."
    work = tmp_path_factory.mktemp("screen")
    write_dataset(work / "data", n_photos=PHOTOS, n_test=1, seed=4, height=64)
    random_weights(work / "vit.safetensors")
    return work


@pytest.fixture
def config(work, tmp_path):
    return check_config(TrainConfig(
        data=work / "data", out=tmp_path / "out", backbone="test_vit", tile_size=32,
        backbone_weights=work / "vit.safetensors", cache_dir=tmp_path / "cache", device_type="cpu",
        freeze_backbone=True, head="ridge", fit_views=False))


@pytest.fixture
def words(work, tmp_path):
    "A screen on the command line."
    places = ["--data", work / "data", "--out", tmp_path / "out", "--cache-dir", tmp_path / "cache"]
    backbone = ["--backbone", "test_vit", "--backbone-weights", work / "vit.safetensors", "--tile-size", 32]
    return [*places, *backbone, "--device-type", "cpu", "--screen", "--splits", SPLITS]


@pytest.fixture
def passes(monkeypatch):
    "How many photos any backbone was shown."
    shown = []
    plain = Backbone.forward

    def forward(self, tiles):
        shown.append(len(tiles))
        return plain(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)
    return shown


def run(configs, blocks=()):
    return screen.run_screen(configs, range(SPLITS), blocks, log=lambda line: None)


def test_what_carries_the_grams_ranks_first(config, monkeypatch):
    "Roots of the grams planted in one statistic of one block, noise in all others."
    grams = read_train(config.data)[list(TARGETS)].to_numpy()
    signal = torch.from_numpy(np.sqrt(grams)).float()

    def planted(source, config, paths, progress, log):
        seeded = torch.Generator().manual_seed(0)
        rows = torch.randn(1, len(paths), source.backbone.dim, generator=seeded)
        cells = screen.screen_cells(source.backbone)
        cell = next(cell for cell in cells if (cell.block, cell.statistic) == PLANTED)
        rows[0][:, cell.channels[:len(TARGETS)]] = signal
        rows[0][:, cell.channels[len(TARGETS):]] = 0
        return rows

    monkeypatch.setattr(screen, "read_rows", planted)
    rooted = dataclasses.replace(config, link="sqrt", log_targets="all")
    table = run([rooted])
    best = table.iloc[0]
    assert (best["block"], best["statistic"]) == (str(PLANTED[0]), PLANTED[1])
    assert best["mean"] > 0.9 and best["difference"] > 0.5 and best["won"] == 1
    assert min(best[f"{t}_r2"] for t in TARGETS) > 0.8
    alone = table["block"].ne(screen.ALL) & table["statistic"].ne(screen.ALL)
    assert table["mean"][alone].iloc[1] < 0.5, "all other cells of one block and statistic are noise"
    ranked = [line.split() for line in screen.screen_lines(table)]
    assert ["1", str(PLANTED[0]), PLANTED[1]] in [line[:3] for line in ranked]


def test_one_pass_serves_all_cells_and_a_second_screen_needs_none(config, passes):
    table = run([config])
    assert passes == [1] * PHOTOS, "all blocks and statistics of a photo at once"
    depth = len(set(table["block"]) - {screen.ALL})
    assert len(table) == depth * len(STATISTICS) + depth + len(STATISTICS) + 1
    passes.clear()
    pd.testing.assert_frame_equal(run([config]), table)
    other = dataclasses.replace(config, grid=(1, 1))
    few = run([config, other], (0, 0.5))
    assert passes == [1] * PHOTOS, "of the other grid alone"
    assert set(few["block"]) == {"0", f"{depth // 2 - 1}", f"{depth - 1}", screen.ALL}
    assert set(few["grid"]) == {"2x2", "1x1"}
    passes.clear()
    run([dataclasses.replace(other, fit_views=True)], (0,))
    assert len(passes) == 3 * PHOTOS, "the three flipped views"


def test_a_cell_is_scored_as_its_own_features_would_be(config):
    "The columns of one cell, cut out of all, are what a backbone that reads nothing else gives."
    table = run([config], (1,))
    found = table[(table["block"] == "1") & (table["statistic"] == "min")].iloc[0]
    photos = read_train(config.data)
    backbone, size, _ = start_backbone(dataclasses.replace(config, pooling="min", feature_blocks=(1,)), {})
    alone = Source(backbone, TileSpec(*config.grid, size))
    rows = screen.read_rows(alone, config, list(photos["path"]), log=lambda line: None)
    scores = []
    for split in splits(photos, range(SPLITS)):
        grams = screen.held_out_grams(rows, photos, split, config)
        scores.append(weighted_r2(photos.loc[split.held_out, list(TARGETS)], grams))
    assert abs(found["mean"] - np.mean(scores)) < 1e-4


def test_the_command_writes_a_table_and_a_picture(words, work, tmp_path, passes):
    net = random_weights(tmp_path / "net.safetensors", "test_efficientnet")
    further = ["--screen-backbones", f"test_efficientnet={net}", "--screen-tile-sizes", 48]
    done = command("search", *words, "--screen-blocks", 0.5, *further)
    assert done.returncode == 0, done.stderr
    assert len(passes) == 2 * 2 * PHOTOS, "two backbones, two tile sizes"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["screen.csv", "screen.png"]
    assert (tmp_path / "out/screen.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(tmp_path / "out/screen.csv")
    assert set(zip(table["backbone"], table["tile_size"])) == {
        (name, size) for name in ("test_vit", "test_efficientnet") for size in (32, 48)}
    assert set(table.loc[table["probe"], "statistic"]) == {"cls+mean", "mean"}, "a net has no class token"
    assert table["mean"].is_monotonic_decreasing and (table["splits"] == SPLITS).all()
    assert all(said in done.stdout for said in ("optimistically biased", "--first-seed 1000", "screen.csv"))
    other = command("search", *words, "--screen-blocks", 0.5, "--head", "kernel_ridge", "--first-seed", 1000)
    assert other.returncode == 0 and len(passes) == 2 * 2 * PHOTOS, other.stderr
    assert not table["mean"].isin(pd.read_csv(tmp_path / "out/screen.csv")["mean"]).any()


REFUSED = {  # what is typed beside a screen -> what is said
    ("--trials", 3): "--trials is not read with --screen; drop it",
    ("--seeds", 1): "--seeds is not read with --screen; drop it",
    ("--trials", 1): "--trials is not read with --screen; drop it",
    ("--epochs", 3): "--epochs is not read with --screen; drop it",
    ("--physics", "none"): "--physics is not read with --screen; drop it",
    ("--pooling", "max"): "--pooling is not read with --screen; drop it",
    ("--feature-blocks", 1): "--feature-blocks is not read with --screen; drop it",
    ("--head", "neural"): "a screen takes one in closed form",
    ("--no-freeze-backbone",): "add --freeze-backbone",
    ("--no-cache",): "drop --no-cache",
    ("--kernel", "linear"): "--kernel is read only with",
    ("--splits", 0): "--splits must be at least 1",
    ("--screen-grids", 2, 2): "each once",
    ("--screen-backbones", "test_vit", "test_vit"): "each once",
    ("--screen-blocks", 99): "has blocks 0 to",
    ("--screen-tile-sizes", 40): "use --tile-size",
    ("--screen-grids", 5, 5): "use at most 4 rows and columns",
    ("--screen-backbones", "test_vit2=nowhere.safetensors"): "no such file",
}


@pytest.mark.parametrize("more", REFUSED, ids=str)
def test_what_contradicts_a_screen_is_refused_before_a_backbone_runs(words, more, passes, tmp_path):
    at = words.index("--cache-dir")  # which contradicts --no-cache by itself
    done = command("search", *words[:at], *words[at + 2 :], *more)
    assert done.returncode == 2 and REFUSED[more] in done.stderr, done.stderr
    assert passes == [] and not (tmp_path / "out").exists()


SCREENING = [("--screen-grids", 3, 3), ("--splits", 3), ("--first-seed", 1), ("--screen-blocks", 1)]


@pytest.mark.parametrize("more", SCREENING, ids=str)
def test_options_of_a_screen_are_refused_in_a_study(words, more, tmp_path):
    study = words[:words.index("--screen")]
    done = command("search", *study, "--freeze-backbone", *more)
    assert done.returncode == 2, done.stderr
    assert f"{more[0]} is read only with --screen; add that or drop it" in done.stderr
    assert not (tmp_path / "out").exists()
