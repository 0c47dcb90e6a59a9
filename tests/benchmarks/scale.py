"""Memory and time of `biomass_predict --photos` by the number of photos: `python tests/benchmarks/scale.py`.

Each number runs in a process of its own, the whole command with its report: a tiny ViT of two members,
intervals, a reference of training photos, photos of 320x160. Photos are hard links of eight synthetic JPEGs
under names of their own; the kit reads and decodes each anew, the disk does not. Time is CPU time over
that of a run of 48 photos, divided by the other photos. What else runs on a machine moves CPU time as well,
so the few photos are predicted over and over while the many are, each on one thread, and the median counts.
`--photos 1000 20000` takes less long; `--height 1000` has photos of the competition's size, and `--cache`
stores their features too.
"""
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from untrained import trusted_bundle

from biomass_kit.data.photos import list_photos
from biomass_kit.data.synthetic import paint_photo

SOURCES = 8  # photos that differ
START = 48  # photos of the run whose time is taken off: more than a report shows
FOLDER = 1000  # photos in one subfolder


@dataclass(frozen=True)
class Args:
    "What is measured."

    photos: tuple[int, int] = (1000, 100_000)  # few, many
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
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = os.posix_spawn(sys.executable, command, alone, file_actions=said)
        _, status, used = os.wait4(child, 0)
    assert status == 0, out.with_suffix(".log").read_text()
    with open(out, "rb") as table: assert sum(1 for _ in table) == count + 1
    report = out.with_name(f"{out.stem}_report.html").stat().st_size
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(count, peak, used.ru_utime + used.ru_stime, time.monotonic() - began, report)


def main():
    a = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "sources").mkdir()
        for i in range(SOURCES):
            photo = Image.fromarray(paint_photo((10 * i, 5, 3), seed=i, height=a.height))
            photo.save(work / f"sources/{i}.jpg", quality=90)
        sources = list_photos(work / "sources")
        bundle = trusted_bundle(work / "bundle", sources)
        photos = {n: links(work / f"{n}-photos", sources, n) for n in (START, *a.photos)}

        def once(n: int, name: str) -> Measured:
            "One run of so many photos, under a name of its own."
            cache = work / f"{name}-cache" if a.cache else None
            return measured(n, photos[n], bundle, work / f"{name}.csv", cache)

        few, many = a.photos
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(once, many, "many")
            rounds = []
            while not long.done():
                number = len(rounds)
                rounds.append((once(START, f"start{number}"), once(few, f"few{number}")))
                print(f"round {number}: {cost(*rounds[-1]):.2f} ms a photo", flush=True)
            tell(rounds, long.result())


def cost(start: Measured, found: Measured) -> float:
    "CPU milliseconds of a photo."
    return 1000 * (found.cpu - start.cpu) / (found.photos - start.photos)


def tell(rounds: list, many: Measured):
    "One table; a round is the run that is taken off and the run of few photos, made while the long one ran."
    starts, fews = zip(*rounds)
    start = min(starts, key=lambda m: abs(m.cpu - median(m.cpu for m in starts)))
    few = min(fews, key=lambda m: abs(m.cpu - median(m.cpu for m in fews)))
    costs = median(cost(*pair) for pair in rounds), cost(start, many)
    print("\n| photos | peak memory, MB | CPU, ms a photo | CPU, s | wall, s | report, MB |\n|" + "---|" * 6)
    for m, milliseconds in zip((few, many), costs):
        print(f"| {m.photos} | {m.peak / 1e6:.0f} | {milliseconds:.2f} | {m.cpu:.0f} | {m.wall:.0f} | "
              f"{m.report / 1e6:.1f} |")
    print(f"| ratio | {many.peak / few.peak:.3f} | {costs[1] / costs[0]:.3f} | | | | {len(rounds)} rounds")


if __name__ == "__main__": main()
