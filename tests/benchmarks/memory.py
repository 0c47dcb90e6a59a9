"""Peak memory of predicting many photos against few: `python tests/benchmarks/memory.py`.

Each count runs in a process of its own, a tiny ViT on photos of the competition's size (a handful of drawn photos, copied
under as many names as needed), no cache. With `--cache` the features are stored as well.
"""
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from untrained import untrained_bundle

from biomass_kit.data.photos import list_photos
from biomass_kit.data.synthetic import write_dataset

PREDICT = """
import sys, torch
from biomass_kit.inference.ensemble import peak_memory
from biomass_kit.inference.predict import predict_folder
table = predict_folder(sys.argv[1], sys.argv[2], sys.argv[3], device_type="cpu", cache_dir=sys.argv[4] or None)
print(len(table), peak_memory(torch.device("cpu")))
"""


@dataclass(frozen=True)
class Args:
    "Peak memory of predicting `many` photos against `few`."

    few: int = 50
    many: int = 1000
    height: int = 1000
    cache: bool = False


def main():
    a = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        drawn = list_photos(write_dataset(room / "data", n_photos=2, n_test=10, height=a.height) / "test")
        bundle, peak = untrained_bundle(room / "bundle", tile_size=64), {}
        for n in (a.few, a.many):
            (room / str(n)).mkdir()
            for i in range(n): shutil.copy(drawn[i % len(drawn)], room / str(n) / f"{i:04d}.jpg")
            done = subprocess.run([
                sys.executable, "-c", PREDICT, bundle, room / str(n), room / f"{n}.csv", str(room / f"cache-{n}") if a.cache else ""],
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            rows, peak[n] = map(int, done.stdout.split())
            assert rows == n
            print(f"{n} photos: peak {peak[n] / 1e6:.0f} MB", flush=True)
        print(f"ratio {peak[a.many] / peak[a.few]:.3f}")


if __name__ == "__main__": main()
