"""What the recipe `quick` costs once features are stored, beside importing torch.

    python tests/benchmarks/quick.py --data DIR --backbone-weights FILE --cache-dir DIR

CPU seconds of child processes, run in turn: `import torch` and `biomass_train --recipe quick` (five folds
and one head of all photos, bundle, scores and report), and in one process with everything loaded the
fitting, bundling and scoring alone. The first run fills --cache-dir, which is not counted. The bar:
fitting, bundling and scoring cost less than importing torch four times.
"""
import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from real_photos import RealPhotos


@dataclass(frozen=True)
class Args(RealPhotos):
    "Measure."

    rounds: int = 5


def child_seconds(command: list) -> float:
    "CPU seconds of a child process and its own children."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def words(a: Args, out: Path) -> list:
    "The command's options."
    return [
        "--data", a.data, "--out", out, "--recipe", "quick", "--backbone", a.backbone, "--backbone-weights",
        a.backbone_weights, "--tile-size", a.tile_size, "--cache-dir", a.cache_dir, "--device-type", "cpu",
        "--no-report-photos"]


def inside_seconds(a: Args, work: Path) -> list:
    "CPU seconds of training, bundling and scoring in a process that has loaded everything."
    from biomass_kit.train import TrainArgs, configs_of
    from biomass_kit.training.run import train_runs

    found = []
    for i in range(a.rounds + 1):
        args = TrainArgs(**a.options(), out=work / f"inside{i}", recipe="quick")
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            train_runs(configs_of(args, ()), log=lambda line: None)
        found.append(time.process_time() - start)
    return found[1:]


def main():
    a = tyro.cli(Args)
    command = [sys.executable, "-m", "biomass_kit.train"]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        child_seconds([*command, *words(a, work / "first")])
        torch_s, train_s = [], []
        for i in range(a.rounds):
            torch_s.append(child_seconds([sys.executable, "-c", "import torch"]))
            train_s.append(child_seconds([*command, *words(a, work / f"{i}")]))
        inside_s = inside_seconds(a, work)
    one, whole, inside = median(torch_s), median(train_s), median(inside_s)
    print(f"CPU seconds, median of {a.rounds}: import torch {one:.2f}, biomass_train --recipe quick "
          f"{whole:.2f} "
          f"({whole / one:.1f} times), fitting, bundling and scoring alone {inside:.2f} ({inside / one:.1f} "
          "times)")


if __name__ == "__main__": main()
