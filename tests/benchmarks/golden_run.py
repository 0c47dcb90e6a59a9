"""The frozen default on real photos, as digests: what must stay equal to the last bit where code only moves.

    python tests/benchmarks/golden_run.py --data DIR --backbone-weights FILE --cache-dir DIR --out DIR > new
    diff <(grep -v '^#' tests/benchmarks/golden_run.txt) new

--data is the competition's folder, --backbone-weights is DINOv2-small (vit_small_patch14_dinov2) as a
safetensors file. It runs `biomass_train --freeze-backbone --grids 2 2 3 3 --tile-size 252`, all else as by
default, on the CPU with one thread. It prints one line per member and per other file of the joint bundle:
SHA-256 over the names, dtypes, shapes and bytes of its tensors, the safetensors header aside. Then come the
out-of-fold scores, each run's and the joint one, with all digits.

The first run computes the features (half an hour on one core) and keeps them in --cache-dir; later ones only
read them, and what was added is told on standard error. Give each run a new --out: a finished one is not
trained again. golden_run.txt holds the baseline; its first line names the processor, since another one gives
other last bits.
"""
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.numpy import load_file

GRIDS = ((2, 2), (3, 3))


@dataclass(frozen=True)
class Args:
    "Train the frozen default and print digests and scores."

    data: Path  # competition folder
    backbone_weights: Path  # safetensors file of vit_small_patch14_dinov2
    cache_dir: Path  # features are kept here, for the next run
    out: Path  # a new folder


def train(a: Args):
    "Run biomass_train in a process of one thread; what it prints goes to standard error."
    command = [
        Path(sys.executable).with_name("biomass_train"), "--data", a.data, "--out", a.out,
        "--backbone", "vit_small_patch14_dinov2", "--backbone-weights", a.backbone_weights,
        "--tile-size", 252, "--freeze-backbone", "--grids", *(side for grid in GRIDS for side in grid),
        "--cache-dir", a.cache_dir, "--device-type", "cpu", "--no-report-photos",
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr, env=one_thread)


def tensors_digest(path: Path) -> str:
    "SHA-256 over the names, dtypes, shapes and bytes of a file's tensors, in the order of their names."
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def bundle_lines(folder: Path) -> list:
    "One line per member, by grid and fold, and one per file that members share; names of files may change."
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    labels = {m["file"]: "member {}x{} fold {}".format(*m["grid"], m["fold"]) for m in manifest["members"]}
    lines = []
    for file in manifest["files"]:
        label = labels.get(file, file.split("-")[0])
        lines.append(f"{label}: {tensors_digest(folder / file)}")
    return sorted(lines)


def score(folder: Path) -> float:
    "The out-of-fold weighted R2 of a run or a joint bundle."
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results["scores"]["model"]["weighted_r2"]


def main():
    a = tyro.cli(Args)
    if a.out.exists(): sys.exit(f"--out {a.out}: exists; finished runs stay as they are, give a new one")
    before = set(a.cache_dir.rglob("*.npy"))
    train(a)
    added = len(set(a.cache_dir.rglob("*.npy")) - before)
    print(f"features: {len(before)} were stored before, {added} were added", file=sys.stderr)
    print(*bundle_lines(a.out / "bundle"), sep="\n")
    for rows, columns in GRIDS: print(f"score {rows}x{columns}: {score(a.out / f'{rows}x{columns}-seed0')!r}")
    print(f"score joint: {score(a.out / 'bundle')!r}")


if __name__ == "__main__": main()
