"""How close the kit comes to what a card gives: one command for a machine with a GPU and without network.

    python tests/benchmarks/cuda.py [--old TREE] [--minutes 7.5]
    python tests/benchmarks/cuda.py --device cpu --small

Prediction: photos per second of the plan (5 frozen folds x 2 grids x 4 views, from JPEG files to grams), of
the bare backbone on tiles in memory (autocast, weights in half precision, compiled), and of the plan of an
older version. `--old` is its source tree; without it, it is taken from git where that knows it. Each version
runs in a process of its own, and their grams are compared.

Fine-tuning: photos per second of some epochs from JPEG files, the first one included, which decodes them, and
of the same loop fed with augmented tiles that lie on the card already.

`--small` tries the script itself, with a tiny backbone.

A section is a function of (Job, seconds that are left) that returns rows of the table; all are in SECTIONS.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, Optional

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BEFORE = "bb9dd06"  # the commit that issue 16 began with
DISTINCT = 8  # photos that are drawn; the others are copies of them
FAILURES = subprocess.TimeoutExpired, RuntimeError  # of a process
SHARES = 12  # of its time that a process may spend on one round of one plan; a slow card gets fewer photos
BARS = {"plan / bare": 1.10, "new / old": 1.3, "disk / card": 0.9}
EPOCHS = 5  # of fine-tuning from disk; a slow card gets fewer
SHARE_OF_PREDICTION = 0.7  # of the time, where fine-tuning comes after it


@dataclass(frozen=True)
class Args:
    "Time the plan against the bare backbone and an older plan."

    device: Literal["cuda", "cpu"] = "cuda"
    old: Optional[Path] = None  # source tree of the older version
    backbone: str = "vit_base_patch14_reg4_dinov2.lvd142m"  # with random weights: the time is the same
    tile_size: int = 518
    photos: int = 128
    height: int = 1000  # pixels
    batch_size: int = 4
    num_workers: int = 8
    rounds: int = 3
    minutes: float = 7.5  # for everything
    small: bool = False  # a tiny backbone, few photos, nothing really compiled


SMALL = dict(backbone="test_vit", tile_size=32, photos=8, height=64, num_workers=1, rounds=2, batch_size=2)


class Job(NamedTuple):
    "What the processes share."
    args: dict
    photos: str  # folder
    bundle: str
    work: str
    old: Optional[str]  # source tree


class Row(NamedTuple):
    "One line of the table."
    what: str
    value: str
    bar: str = ""


# What runs in a process of its own


def sync(device: str):
    import torch

    if device == "cuda": torch.cuda.synchronize()


def rate(run, photos: int, job: Job, until: float) -> float:
    "Photos per second, the median of some rounds; one at least."
    seconds = []
    while not seconds or len(seconds) < job.args["rounds"] and time.time() < until:
        start = time.perf_counter()
        run()
        sync(job.args["device"])
        seconds.append(time.perf_counter() - start)
    return photos / median(seconds)


def time_plan(job: Job, until: float, name: str, **options) -> dict:
    "Rate of the plan of this process's version; its grams are left in the room."
    from biomass_kit.data.photos import list_photos
    from biomass_kit.inference.bundle import read_bundle
    from biomass_kit.inference.ensemble import Ensemble

    paths, a = list_photos(job.photos), job.args
    reading = a["batch_size"], a["num_workers"]
    start = time.perf_counter()
    ensemble = Ensemble(read_bundle(job.bundle), device_type=a["device"], **options)
    ensemble.predict(paths[: a["batch_size"]], *reading)
    warm = time.perf_counter() - start
    again = rate(lambda: ensemble.predict(paths[: a["batch_size"]], *reading), a["batch_size"], job, 0)
    some = paths[: max(a["batch_size"], int(again * (until - time.time()) / SHARES))]
    found = []
    per_second = rate(lambda: found.append(ensemble.predict(some, *reading)), len(some), job, until)
    np.save(Path(job.work) / f"{name}.npy", found[-1])
    return {"rate": per_second, "warm": warm, "precision": ensemble.precision}


def bare_forms(backbone, precision: str, size: int, backend: str) -> dict:
    "Form -> (function of tiles, precision of autocast)."
    import torch

    from biomass_kit.features.runner import HALVES, in_half

    forms = {"autocast": (backbone, precision)}
    if precision in HALVES: forms["weights"] = in_half(backbone, size, precision), "fp32"
    fastest, own = list(forms.values())[-1]
    forms["compiled"] = torch.compile(fastest, dynamic=False, backend=backend), own
    return forms


def time_bare(job: Job, until: float, backend: str) -> dict:
    "Form -> photos per second of the bare backbone on tiles in memory, as many as the plan's photos have."
    import torch

    from biomass_kit.features.device import autocast
    from biomass_kit.features.runner import block_size, most_tiles
    from biomass_kit.inference.bundle import read_bundle
    from biomass_kit.inference.ensemble import Ensemble

    a, rates = job.args, {}
    plan, size = Ensemble(read_bundle(job.bundle), device_type=a["device"]), a["tile_size"]
    backbone = plan.bundle.load_backbone(plan.bundle.members[0]).to(plan.device)
    per_photo = sum(len(p.views) * 2 * p.spec.rows * p.spec.cols for p in plan.passes)
    tiles = a["batch_size"] * per_photo
    (planned,) = plan.runners.values()
    block = block_size(tiles, most_tiles(planned._run, size, plan.device))
    seen = torch.randint(0, 255, (block, 3, size, size), dtype=torch.uint8).to(plan.device)
    times = 4 * -(-tiles // block)  # as four batches of photos

    for form, (run, precision) in bare_forms(backbone, plan.precision, size, backend).items():

        @torch.inference_mode()
        def passes(n=times, run=run, precision=precision):
            with autocast(plan.device, precision):
                for _ in range(n): run(seen)

        try:
            passes(2)
            rates[form] = rate(passes, times * block / per_photo, job, until)
        except Exception as e: print(f"bare {form}: {type(e).__name__}: {e}", file=sys.stderr)
    return rates


def new_side(job: Job, until: float) -> dict:
    "Everything of the version at hand, in turn."
    from biomass_kit.features import runner

    backend = runner.BACKEND = "eager" if job.args["small"] else runner.BACKEND
    found = {}
    for how in ("on", "off"):  # what must be compiled gets more of the time
        found[f"plan, compile {how}"] = time_plan(job, until, f"compile-{how}", compile=how)
    return found | {"bare": time_bare(job, until, backend)}


def training_table(job: Job):
    "A table of as many distinct photo files as the job has photos; their labels are repeated."
    import pandas as pd

    from biomass_kit.data.table import read_train

    labels = read_train(Path(job.work) / "data")
    count, folder = job.args["photos"], Path(job.work) / "training"
    folder.mkdir()
    table = pd.concat([labels] * -(-count // len(labels)), ignore_index=True)[:count]
    for i, path in enumerate(table["path"]):
        copy = folder / f"{i:04d}{Path(path).suffix}"
        copy.write_bytes(Path(path).read_bytes() + i.to_bytes(4))  # or all would share one decoded file
        table.loc[i, "path"] = str(copy)
    return table


def training_member(job: Job):
    "A member that fine-tunes its backbone, as `biomass_train` makes it, and its only stage."
    import torch

    from biomass_kit.features.backbone import build_backbone
    from biomass_kit.features.device import pick_device, pick_precision
    from biomass_kit.features.tiles import TileSpec
    from biomass_kit.training.config import TrainConfig, check_config
    from biomass_kit.training.member import MemberTrainer, Source, stages
    from biomass_kit.training.setup import make_accelerator, photo_reader

    a, work = job.args, Path(job.work)
    options = {name: a[name] for name in ("backbone", "tile_size", "batch_size", "num_workers")}
    config = check_config(TrainConfig(
        data=work / "data", out=work / "run", cache_dir=work / "pairs", freeze_backbone=False,
        use_aux_heads=False, pretrained=False, **options))
    torch.manual_seed(0)
    device = pick_device(a["device"])
    backbone, size = build_backbone(a["backbone"], None, a["tile_size"], pretrained=False)
    spec = TileSpec(*config.grid, size)
    precision = pick_precision(device)
    source = Source(backbone.to(device), spec, read=photo_reader(config, spec))
    table = training_table(job)
    accelerator = make_accelerator(device, precision)
    f = MemberTrainer(0, config, table, np.ones(len(table)), [source], accelerator, precision)
    (stage,) = stages(config)
    return f, stage


def lying_batches(f, count: int) -> list:
    "Batches of augmented tiles of some photos, on the device; their numbers stay, which labels are taken by."
    import torch

    from biomass_kit.training.batches import PixelBatches, stage_batches

    made = PixelBatches(f.paths, f.sources[0].spec, f.config, f.k)  # which keeps no decoded photo
    device = f.accelerator.device
    return [{name: value.to(device) if torch.is_tensor(value) and name != "photo" else value
             for name, value in batch.items()} for batch in stage_batches(made, f.fit[:count], [0])]


def time_fine_tuning(job: Job, until: float) -> dict:
    "Photos per second of epochs from disk, of the first of them, and of batches that lie on the card."
    from biomass_kit.training.batches import stage_batches
    from biomass_kit.training.loop import Loop, train_step
    from biomass_kit.training.member import set_mode

    f, stage = training_member(job)
    loop, photos = Loop(f), len(f.fit)
    loop.begin(stage)
    f.model.train()
    set_mode(f.backbone, True)

    def seconds(batches):
        start = time.perf_counter()
        for batch in batches: train_step(f, batch, loop.optimizer, stage)
        sync(job.args["device"])
        return time.perf_counter() - start

    card = lying_batches(f, 4 * job.args["batch_size"])
    repeated = card * -(-loop.steps // len(card))
    held = sum(len(batch["photo"]) for batch in repeated)
    seconds(card)  # what is slow once
    before = seconds(repeated)
    epochs = max(1, min(EPOCHS, int((until - time.time()) / (2 * before))))
    batches = stage_batches(f.dataset, f.fit, range(epochs))
    first = seconds(islice(batches, loop.steps))
    later = seconds(batches)
    after = seconds(repeated)
    return {"card": held / min(before, after), "first": photos / first,
            "disk": epochs * photos / (first + later), "epochs": epochs, "precision": f.precision}


SIDES = {
    "new": new_side,
    "old": lambda job, until: time_plan(job, until, "old"),
    "training": time_fine_tuning,
}


# What the first process does


def ask(side: str, tree, job: Job, seconds: float) -> dict:
    "What a side says, in a process that imports the kit from a source tree."
    order = Path(job.work) / f"{side}.json"
    order.write_text(json.dumps({"job": job._asdict(), "until": time.time() + 0.6 * seconds}))
    found = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": found, "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [sys.executable, __file__, "side", side, str(order)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(1, seconds))
    sys.stderr.write(done.stderr[-2000:])
    if done.returncode: raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def gap(job: Job, a: str, b: str) -> float:
    "The largest difference in grams of two sides' predictions."
    found, due = (np.load(Path(job.work) / f"{name}.npy") for name in (a, b))
    both = min(len(found), len(due))
    return np.abs(found[:both] - due[:both]).max()


def prediction(job: Job, seconds: float) -> list:  # Rows
    "The plan beside the bare backbone, and beside an older plan."
    start = time.time()
    new = ask("new", ROOT, job, seconds * (0.65 if job.old else 1))
    plans = {name: found["rate"] for name, found in new.items() if name != "bare"}
    ready = {name: f"ready after {new[name]['warm']:.0f} s" for name in plans}
    rows = [Row(f"{name} ({ready[name]})", f"{r:.2f} photos/s") for name, r in plans.items()]
    rows += [Row(f"bare backbone, {form}", f"{r:.2f} photos/s") for form, r in new["bare"].items()]
    best, floor = max(plans.values()), max(new["bare"].values())
    rows.append(Row("time of the plan / of the fastest bare backbone", f"{floor / best:.3f}",
                    f"at most {BARS['plan / bare']:g}"))
    rows.append(Row("largest difference, compiled or not", f"{gap(job, 'compile-on', 'compile-off'):.2g} g"))
    if not job.old: return [*rows, Row("older plan", "not at hand: give --old")]
    try: old = ask("old", job.old, job, seconds - (time.time() - start))
    except FAILURES as e: return [*rows, Row("older plan", f"failed: {type(e).__name__}")]
    rows.append(Row(f"older plan (ready after {old['warm']:.0f} s)", f"{old['rate']:.2f} photos/s"))
    rows.append(Row("speed of the new plan / of the old", f"{best / old['rate']:.2f}",
                    f"at least {BARS['new / old']:g}"))
    return [*rows, Row("largest difference, new and old", f"{gap(job, 'compile-off', 'old'):.2g} g")]


def fine_tuning(job: Job, seconds: float) -> list:  # Rows
    "Epochs from disk beside the same loop on tiles that lie on the card."
    found = ask("training", ROOT, job, seconds)
    epochs = f"{found['epochs']} epoch{'s' * (found['epochs'] > 1)}"
    return [Row(f"tiles on the card, {found['precision']}", f"{found['card']:.2f} photos/s"),
            Row(f"from disk, {epochs}, the first included", f"{found['disk']:.2f} photos/s"),
            Row("from disk, the first epoch", f"{found['first']:.2f} photos/s"),
            Row("speed from disk / on the card", f"{found['disk'] / found['card']:.3f}",
                f"at least {BARS['disk / card']:g}")]


SECTIONS = {"Prediction": prediction, "Fine-tuning": fine_tuning}


def old_tree(a: Args, work: Path) -> Optional[str]:
    "The source tree of the older version; None where it cannot be had."
    if a.old: return str(a.old.resolve())
    made = subprocess.run(["git", "archive", "-o", work / "old.tar", BEFORE], cwd=ROOT, capture_output=True)
    if made.returncode: return None
    shutil.unpack_archive(work / "old.tar", work / "old")
    return str(work / "old")


def prepared(a: Args, work: Path) -> Job:
    "Photos and an untrained bundle."
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from untrained import untrained_bundle

    from biomass_kit.data.photos import list_photos
    from biomass_kit.data.synthetic import write_dataset

    drawn = write_dataset(work / "data", n_photos=2, n_test=min(DISTINCT, a.photos), seed=1, height=a.height)
    photos = work / "photos"
    photos.mkdir()
    sources = list_photos(drawn / "test")
    for i in range(a.photos):
        source = sources[i % len(sources)]
        shutil.copy(source, photos / f"{i:04d}{source.suffix}")
    bundle = untrained_bundle(work / "bundle", backbone=a.backbone, tile_size=a.tile_size)
    args = {k: v for k, v in asdict(a).items() if k != "old"}
    return Job(args, str(photos), str(bundle), str(work), old_tree(a, work))


def table(title: str, rows: list) -> str:
    "Rows as Markdown."
    return "\n".join([f"\n## {title}\n", "| | measured | bar |", "|---|---|---|",
                      *(f"| {r.what} | {r.value} | {r.bar} |" for r in rows)])


def named(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main():
    import torch
    import tyro

    from biomass_kit.data.targets import in_one_line

    a = tyro.cli(Args)
    if a.small: a = Args(**{**asdict(a), **SMALL})
    end = time.time() + 60 * a.minutes
    parts = []
    with tempfile.TemporaryDirectory() as work:
        job = prepared(a, Path(work))
        for title, section in SECTIONS.items():
            left = end - time.time()
            if section is prediction: left *= SHARE_OF_PREDICTION
            try: rows = section(job, left)
            except FAILURES as e: rows = [Row("failed", in_one_line(e))]
            parts.append(table(title, rows))
    print(f"{named(a.device)}, torch {torch.__version__}, {date.today()}: {a.backbone}, "
          f"tiles of {a.tile_size} px, batches of {a.batch_size} photos, {a.num_workers} readers",
          *parts, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        order = json.loads(Path(sys.argv[3]).read_text())
        print(json.dumps(SIDES[sys.argv[2]](Job(**order["job"]), order["until"])))
    else: main()
