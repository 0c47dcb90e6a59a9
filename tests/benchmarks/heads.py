"""Ten neural members on stored features, this tree against an older one, and shared by two processes.

    git archive COMMIT | tar x -C OLD
    python tests/benchmarks/heads.py --old OLD --data DIR --backbone-weights FILE --cache-dir DIR

The recipe `neural` (two grids, five folds, 60 epochs) is trained by both trees in turn, each in a process of
one thread; features are computed before. CPU seconds are those of fitting the members, imports and features
left out. Wall seconds are those of the whole command, which also writes bundle and report: the older tree in
one process, this one in two (`torchrun`). Weights of both trees are compared bit for bit.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Optional

import tyro
from real_photos import RealPhotos

HERE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Args(RealPhotos):
    "Compare two trees."

    old: Optional[Path] = None  # the older tree; its workers do without
    rounds: int = 3
    epochs: int = 60
    wall: bool = True  # time whole commands too
    worker: bool = False  # what the processes of a round run


def runs_of(a: Args):  # yields each Run of the recipe, its features mapped
    "What is trained, by whichever library is imported here."
    import torch

    from biomass_kit.training.config import TrainConfig, check_config
    from biomass_kit.training.recipes import recipe_runs
    from biomass_kit.training.run import Run
    from biomass_kit.training.setup import make_accelerator

    torch.set_num_threads(1)
    config = TrainConfig(**a.options(), epochs=a.epochs, out=Path(tempfile.mkdtemp()) / "run")
    accelerator = make_accelerator(torch.device("cpu"), "fp32")
    for c in recipe_runs(config, "neural"):
        run = Run(check_config(c), accelerator, "fp32", {})
        run.store(lambda x, **_: x, lambda line: None)
        yield run


def work(a: Args):
    "Fit all members; print CPU seconds and digests of weights."
    spent, weights = 0.0, []
    for run in runs_of(a):
        for k in run.members:
            start = time.process_time()
            f, _ = run.fit_member(k, lambda x, **_: x)
            spent += time.process_time() - start
            tensors = b"".join(t.numpy().tobytes() for t in f.model.state_dict().values())
            weights.append(hashlib.sha256(tensors).hexdigest())
    print(json.dumps({"cpu_s": spent, "weights": weights}))


def environment(tree: Path) -> dict:
    "One thread, and this tree's library."
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}


def words(values: dict) -> list:
    "Options as on a command line."
    return [str(word) for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]


def fitted(a: Args, tree: Path) -> dict:
    "What a worker found with a tree's library."
    own = {k: v for k, v in a.options().items() if k != "device_type"}
    command = [sys.executable, __file__, "--worker", *words(own | {"epochs": a.epochs})]
    how = dict(env=environment(tree), cwd=tree, check=True, capture_output=True, text=True)
    return json.loads(subprocess.run(command, **how).stdout.splitlines()[-1])


def wall_seconds(a: Args, tree: Path, processes: int) -> float:
    "The whole command."
    out = Path(tempfile.mkdtemp()) / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "biomass_kit.train"]
    command += ["--recipe", "neural", "--out", str(out), "--no-report-photos"]
    command += words(a.options() | {"epochs": a.epochs})
    start = time.perf_counter()
    subprocess.run(command, env=environment(tree), cwd=tree, check=True, capture_output=True)
    return time.perf_counter() - start


def main():
    a = tyro.cli(Args)
    if a.worker: return work(a)
    fitted(a, HERE)  # features are stored from here on
    old, new = [], []
    for _ in range(a.rounds):
        old.append(fitted(a, a.old))
        new.append(fitted(a, HERE))
    before, now = (median(r["cpu_s"] for r in runs) for runs in (old, new))
    equal = all(r["weights"] == old[0]["weights"] for r in old + new)
    print("| | CPU seconds | old / it | weights |\n|---|---|---|---|")
    print(f"| old | {before:.1f} | 1 | |")
    print(f"| new | {now:.1f} | {before / now:.2f} | {'equal to the last bit' if equal else 'DIFFERENT'} |")
    if not a.wall: return
    times = [(wall_seconds(a, a.old, 1), wall_seconds(a, HERE, 2)) for _ in range(a.rounds)]
    one, two = (median(t) for t in zip(*times))
    print(f"\nwhole command: old in one process {one:.1f} s, new in two {two:.1f} s, ratio {one / two:.2f}")


if __name__ == "__main__": main()
