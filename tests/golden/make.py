"""How the golden bundles, their photos and their predictions were made: once, by biomass_kit 0.2.0.

    PYTHONPATH=tests python tests/golden/make.py

It is kept to be read. Do not run it again to make a failing test pass: tests/test_golden.py asks whether the
library still predicts what 0.2.0 did, and files made anew would say yes to anything.

The photos are synthetic. Those that are predicted are PNG files: decoders of JPEG differ in last bits, and
photos drawn again would depend on OpenCV's version too. The bundles are small (tiny backbones of random
weights, two folds), and their options are not the defaults, so that they hold much of what a bundle may hold.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from test_golden import BUNDLES, DATA, GOLDEN, KINDS, predicted

from biomass_kit.features.backbone import build_backbone

SIZE = 64  # pixels of a tile
ALIKE = (
    "--n-folds", 2, "--epochs", 12, "--lr", 4e-3, "--batch-size", 6, "--tile-size", SIZE,
    "--device-type", "cpu", "--no-report-photos",
)
FROZEN = (
    "--backbone", "test_efficientnet", "--freeze-backbone", "--grids", 2, 2, 3, 3,
    "--use-aux-heads", "--interval-head", "--uncertainty", "--log-targets", "all", "--physics", "mint",
    "--quadrat-cm", 50, 35, "--tta", "plain", "h", "v+swap", "swap",
)
LORA = (
    "--backbone", "test_vit", "--lora-rank", 2, "--backbone-lr", 1e-2, "--two-stage", "--freeze-epochs", 6,
    "--grid", 1, 2, "--fusion", "gated", "--symmetric", "--two-part", "--average", "ema", "--ema-decay", 0.8,
    "--target-weights", "equal", "--correction-threshold", 0.02, "--tta", "plain", "v", "h+v",
)


def command(name: str, *words):
    "Run a command of the library."
    subprocess.run([str(word) for word in (Path(sys.executable).with_name(name), *words)], check=True)


def paint_photos(folder: Path) -> Path:
    "Synthetic photos to train on; those to predict go to DATA as PNG, with a table that names them so."
    command("biomass_synth", "--out", folder, "--photos", 24, "--test", 4, "--seed", 14, "--height", 128)
    (DATA / "test").mkdir(parents=True)
    for photo in sorted((folder / "test").glob("*.jpg")):
        Image.open(photo).save(DATA / "test" / f"{photo.stem}.png", optimize=True)
    for name in ("test.csv", "sample_submission.csv"):
        text = (folder / name).read_text(encoding="utf-8")
        (DATA / name).write_text(text.replace(".jpg", ".png"), encoding="utf-8")
    return folder


def random_weights(backbone: str, folder: Path) -> Path:
    "A backbone's random weights as a file."
    torch.manual_seed(14)
    path = folder / f"{backbone}.safetensors"
    save_file(build_backbone(backbone, pretrained=False, tile_size=SIZE)[0].model.state_dict(), path)
    return path


def train(data: Path, folder: Path, options: tuple):
    "Run biomass_train with options that begin with the backbone's."
    weights = random_weights(options[1], data)
    command("biomass_train", "--data", data, "--out", folder, "--backbone-weights", weights, *options, *ALIKE)


def main():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = paint_photos(folder / "data")
        train(data, folder / "frozen", FROZEN)
        runs = (folder / "frozen" / run for run in ("2x2-seed0", "3x3-seed0"))
        how = ("--combine", "trimmed", "--no-report-photos")
        command("biomass_bundle", *runs, "--out", folder / "joint", *how)
        train(data, folder / "lora", LORA)
        for name, made in zip(BUNDLES, (folder / "joint", folder / "lora" / "bundle")):
            (GOLDEN / name).mkdir()
            files = (made / "manifest.json", *made.glob("*.safetensors"))
            for file in files: shutil.copy(file, GOLDEN / name)
            for kind in KINDS:
                table = predicted(name, kind, folder / "table.csv")
                table.to_csv(GOLDEN / f"{name}_{kind}.csv", index=False, lineterminator="\n")


if __name__ == "__main__": main()
