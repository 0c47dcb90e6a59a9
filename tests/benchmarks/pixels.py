"""Photos a second through the pixel batches: this tree against an earlier one.

    python tests/benchmarks/pixels.py [--photos DIR] [--workers 2] [--rounds 7]

The earlier tree comes from `git archive`. Each side is a process of its own that makes one epoch when its
turn comes, the same epoch of the same photos on every side, with the options that fine-tuning has by default.
What the old side and the new one make at the photos' own size must be the same bits. The first epoch, which
fills the new side's photo store, is not timed. Synthetic photos have 2000x1000 pixels and, like the
competition's, 0.9 MB.
"""
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Optional

ROOT = Path(__file__).parent.parent.parent
BYTES = 900_000  # of a photo of the competition
BARS = {"native": 2.0, "tiles": 4.0}  # times the photos per second of the earlier tree


@dataclass(frozen=True)
class Args:
    "Time the pixel batches of two trees in turn."

    photos: Optional[Path] = None  # folder; synthetic ones without it
    before: str = "bb9dd06"  # commit of the earlier tree
    count: int = 32  # photos an epoch
    tile_size: int = 112  # of 2x2 tiles per half
    workers: int = 2
    rounds: int = 7


def write_photos(folder: Path, count: int) -> list:
    "Synthetic photos, each at the JPEG quality that brings it nearest to the competition's size."
    from PIL import Image

    from biomass_kit.data.synthetic import paint_photo

    folder.mkdir()
    for i in range(count):
        photo, encoded = Image.fromarray(paint_photo((3 * i % 60, 5, 8), seed=i, height=1000)), {}
        for quality in range(80, 100, 3):
            buffer = io.BytesIO()
            photo.save(buffer, "JPEG", quality=quality)
            encoded[quality] = buffer.getvalue()
        nearest = min(encoded.values(), key=lambda data: abs(len(data) - BYTES))
        (folder / f"{i:03}.jpg").write_bytes(nearest)
    return sorted(folder.glob("*.jpg"))


def batches_of(side: str, job: dict):
    "A function of the epoch: the batches that one side makes."
    import numpy as np

    from biomass_kit.features.tiles import TileSpec
    from biomass_kit.training.batches import PixelBatches, epoch_batches
    from biomass_kit.training.config import TrainConfig, check_config

    spec = TileSpec(2, 2, job["tile_size"])
    options = {} if side == "old" else dict(augment_size=side)
    config = TrainConfig(data=Path("data"), out=Path("out"), num_workers=job["workers"], **options)
    read = {}
    if side != "old":
        from biomass_kit.features.pairs import PairStore

        read = dict(read=PairStore(job["cache"], spec if side == "tiles" else None))
    dataset = PixelBatches(job["photos"], spec, check_config(config), 0, **read)
    return lambda epoch: list(epoch_batches(dataset, np.arange(len(job["photos"])), epoch))


def digest(batches: list) -> str:
    "SHA-256 over all that the batches hold."
    found = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            tensor = hasattr(value, "numpy")
            found.update(value.numpy().tobytes() if tensor else f"{key} {value}".encode())
    return found.hexdigest()


def serve(side: str, job: dict):
    "One side: an epoch for each number on standard input, what it took on standard output."
    make = batches_of(side, job)
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        batches = make(int(line))
        took = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps({"wall": took[0], "cpu": took[1], "digest": digest(batches)}), flush=True)


class Side:
    "A process that serves epochs of one tree."

    def __init__(self, side: str, tree: Path, job: dict):
        there = {**os.environ, "PYTHONPATH": str(tree)}
        command = [sys.executable, __file__, "serve", side, json.dumps(job)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=there, cwd=tree)

    def epoch(self, number: int) -> dict:
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def earlier_tree(commit: str, folder: Path) -> Path:
    "The tree of a commit."
    command = ["git", "archive", commit, "biomass_kit"]
    packed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar: tar.extractall(folder, filter="data")
    return folder


def measure(sides: dict, rounds: int) -> list:
    "What each round took of each side, outputs compared; one round before them is not kept."
    kept = []
    for number in range(rounds + 1):
        found = {name: side.epoch(number) for name, side in sides.items()}
        assert found["old"]["digest"] == found["native"]["digest"], f"epoch {number}: other bits"
        kept.append(found)
    return kept[1:]


def table(rounds: list, count: int):
    "Photos a second and CPU milliseconds of each side, and their ratios to the old one round by round."
    print("| side | photos per second | CPU ms a photo | times the old: wall | CPU | bar |")
    print("|---|---|---|---|---|---|")
    for side in rounds[0]:
        wall, cpu = (median(r[side][clock] for r in rounds) for clock in ("wall", "cpu"))
        ratios = (median(r["old"][clock] / r[side][clock] for r in rounds) for clock in ("wall", "cpu"))
        bar = f"{BARS[side]:g}" if side in BARS else ""
        faster = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {side} | {count / wall:.1f} | {1e3 * cpu / count:.1f} | {faster} | {bar} |", flush=True)


def main(a: Args):
    import torch

    print(f"{a.workers} workers, 2x2 tiles of {a.tile_size} px, {a.count} photos, {os.cpu_count()} cores, "
          f"{platform.machine()}, torch {torch.__version__}, {date.today()}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        if a.photos: photos = sorted(a.photos.rglob("*.jpg"))[: a.count]
        else: photos = write_photos(work / "photos", a.count)
        job = {"photos": list(map(str, photos)), "tile_size": a.tile_size, "workers": a.workers,
               "cache": str(work / "cache")}
        old = earlier_tree(a.before, work / "old")
        sides = {name: Side(name, old if name == "old" else ROOT, job) for name in ("old", *BARS)}
        rounds = measure(sides, a.rounds)
        for side in sides.values(): side.close()
    table(rounds, len(photos))
    print("native: the same bits as the old side in every round")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]: serve(sys.argv[2], json.loads(sys.argv[3]))
    else:
        import tyro

        main(tyro.cli(Args))
