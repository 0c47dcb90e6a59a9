"""Memory and time of `biomass_predict --photos` by the number of photos: `python tests/benchmarks/scale.py`.

Each number runs in a process of its own, the whole command with its report: a tiny ViT of two members,
intervals, a reference of training photos, photos of 320x160. Photos are hard links of eight synthetic JPEGs
under names of their own; the kit reads and decodes each anew, the disk does not. Time is CPU time over that of
a run of 48 photos, divided by the other photos. `--photos 1000 20000` takes less long; `--height 1000` has
photos of the competition's size, and `--cache` stores their features too.
"""
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from untrained import trusted_bundle

from biomass_kit.data.photos import list_photos
from biomass_kit.data.synthetic import draw_photo

SOURCES = 8  # photos that differ
START = 48  # photos of the run whose time is taken off: more than a report shows
FOLDER = 1000  # photos in one subfolder


@dataclass(frozen=True)
class Args:
    "What is measured."

    photos: tuple[int, ...] = (1000, 100_000)
    height: int = 160
    cache: bool = False


class Measured(NamedTuple):
    "What one run took."

    photos: int
    peak: int  # bytes
    cpu: float  # seconds
    wall: float  # seconds
    report: int  # bytes


def links(folder, sources, count):
    "So many photos, in subfolders."
    for i in range(count):
        if i % FOLDER == 0: (folder / f"{i // FOLDER:03d}").mkdir(parents=True)
        os.link(sources[i % len(sources)], folder / f"{i // FOLDER:03d}" / f"IMG_{i:06d}.jpg")
    return folder


def measured(count, photos, bundle, out, cache) -> Measured:
    "Predict a folder in a process of its own."
    words = ["--weights", bundle, "--photos", photos, "--out", out, "--device-type", "cpu"]
    words += ["--cache-dir", cache] if cache else ["--no-cache"]
    began = time.monotonic()
    with open(out.with_suffix(".log"), "wb") as log:
        said = [(os.POSIX_SPAWN_DUP2, log.fileno(), stream) for stream in (1, 2)]
        command = [sys.executable, "-m", "biomass_kit.predict", *map(str, words)]
        child = os.posix_spawn(sys.executable, command, os.environ, file_actions=said)
        _, status, used = os.wait4(child, 0)
    assert status == 0, out.with_suffix(".log").read_text()
    with open(out, "rb") as table: assert sum(1 for _ in table) == count + 1
    report = out.with_name(f"{out.stem}_report.html").stat().st_size
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(count, peak, used.ru_utime + used.ru_stime, time.monotonic() - began, report)


def main():
    a = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        (room / "sources").mkdir()
        for i in range(SOURCES):
            photo = Image.fromarray(draw_photo((10 * i, 5, 3), seed=i, height=a.height))
            photo.save(room / f"sources/{i}.jpg", quality=90)
        sources = list_photos(room / "sources")
        bundle = trusted_bundle(room / "bundle", sources)
        found = []
        for n in (START, *a.photos):
            photos = links(room / f"{n}-photos", sources, n)
            cache = room / f"{n}-cache" if a.cache else None
            found.append(measured(n, photos, bundle, room / f"{n}.csv", cache))
            print(f"{n} photos: {found[-1].wall:.0f} s", flush=True)
        tell(*found)


def tell(start, *found):
    "One table."
    per_photo = [(m.cpu - start.cpu) / (m.photos - start.photos) for m in found]
    print("\n| photos | peak memory, MB | CPU, ms a photo | CPU, s | wall, s | report, MB |\n|" + "---|" * 6)
    for m, seconds in zip(found, per_photo):
        print(f"| {m.photos} | {m.peak / 1e6:.0f} | {1000 * seconds:.2f} | {m.cpu:.0f} | {m.wall:.0f} | "
              f"{m.report / 1e6:.1f} |")
    print(f"| ratio | {found[-1].peak / found[0].peak:.3f} | {per_photo[-1] / per_photo[0]:.3f} | | | |")


if __name__ == "__main__": main()
