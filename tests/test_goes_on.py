"""Many photos: a killed run goes on where it stopped, to the same bytes; memory and report are bounded."""
import itertools
import json
import os
import re
import shutil
import tracemalloc
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from commands import Started, command, run_command, share
from conftest import assert_close
from PIL import Image
from untrained import trusted_bundle

from biomass_kit.data import photos as reading
from biomass_kit.data.synthetic import paint_photo
from biomass_kit.data.targets import TARGETS
from biomass_kit.features.backbone import Backbone
from biomass_kit.inference import folder as folder_table
from biomass_kit.inference import predict
from biomass_kit.inference.partial import partial_path, partial_paths
from biomass_kit.inference.predict import predict_folder
from biomass_kit.reports.folder import MOST

PHOTOS = 14  # three batches of four, and two photos
BATCHES = 4
VIEWS = 2  # backbone passes of a batch
OPTIONS = ("--device-type", "cpu", "--no-cache", "--no-report")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def write_photos(folder, names):
    "Photos that differ by their names."
    folder.mkdir()
    for name in names: write_photo(folder / name, zlib.crc32(name.encode()) % 1000)
    return folder


def write_photo(path, seed): Image.fromarray(paint_photo((seed % 30, 5, 3), seed=seed, height=64)).save(path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Fourteen photos, one of them cut short."
    folder = tmp_path_factory.mktemp("drawn") / "photos"
    write_photos(folder, [f"{i:02d}.png" for i in range(PHOTOS)])
    cut = folder / "05.png"
    cut.write_bytes(cut.read_bytes()[:900])
    return folder


@pytest.fixture
def photos(drawn, tmp_path):
    "The same, for a test that changes them."
    return shutil.copytree(drawn, tmp_path / "photos")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "Two members that know intervals and remember the photos that they were trained on."
    work = tmp_path_factory.mktemp("goes-on")
    seen = write_photos(work / "seen", [f"{i}.png" for i in range(6)])
    return trusted_bundle(work / "bundle", sorted(seen.iterdir()))


@pytest.fixture(autouse=True)
def compared_by_batch(monkeypatch):
    "P-values are known after each batch, not after a thousand photos."
    monkeypatch.setattr(predict, "COMPARED", 4)


def whole(bundle, photos, out, *words):
    "The table's bytes where nothing disturbs, and what the command said."
    done = command("predict", "--weights", bundle, "--photos", photos, "--out", out, *OPTIONS, *words)
    assert done.returncode == 0, done.stderr
    assert not partial_paths(out), "nothing is kept of a table that is whole"
    return out.read_bytes(), done


def predicting_until(passes, hangs, *words):
    "`biomass_predict`, whose device hangs after so many backbone passes."
    calls, plain = itertools.count(), Backbone.forward
    predict.COMPARED = 4

    def forward(self, tiles):
        if next(calls) < passes: return plain(self, tiles)
        hangs.with_name(f"{hangs.name}-{os.environ.get('RANK', 0)}").touch()
        while True: torch.ones(1500, 1500) @ torch.ones(1500, 1500)

    Backbone.forward = forward
    run_command("predict", *words)


def killed(bundle, photos, out, passes, ranks=(None,), *words):
    "Processes that are killed in the middle of a backbone pass."
    started, hangs = [], out.with_name("hangs")
    for rank in ranks:
        world = {} if rank is None else {
            "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{len(ranks)}",
            "LOCAL_WORLD_SIZE": f"{len(ranks)}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        asked = ["--weights", bundle, "--photos", photos, "--out", out, *OPTIONS, *words]
        log = out.with_name(f"said-{rank}")
        started.append(Started(predicting_until, passes, hangs, *asked, log=log, **world))
    for rank, process in zip(ranks, started):
        process.wait_for(hangs.with_name(f"hangs-{rank or 0}").exists)
    for process in started: process.kill()


def cut_short(bundle, photos, out, batches, **options):
    "A run that ends after so many batches."
    def progress(found, **_):
        yield from itertools.islice(found, batches)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_folder(bundle, photos, out, device_type="cpu", progress=progress, **options)
    assert partial_path(out).is_file()


@pytest.fixture
def read(monkeypatch):
    "Names of the photos that are read from here on, each time."
    names, plain = [], reading.read_photo
    monkeypatch.setattr(reading, "read_photo", lambda path: names.append(path.name) or plain(path))
    return names


@pytest.mark.parametrize("passes, left", [
    (1, PHOTOS + PHOTOS), (2 * VIEWS, PHOTOS - 4 + PHOTOS), (BATCHES * VIEWS + 2, PHOTOS - 4)])
def test_a_killed_run_goes_on_to_the_same_bytes(bundle, photos, tmp_path, read, passes, left):
    """Killed in its first batch, after one of them or more, among the p-values.

    A batch is handed over by another thread, so the one before the pass that hangs may be lost too.
    """
    due, _ = whole(bundle, photos, tmp_path / "whole.csv")
    read.clear()
    killed(bundle, photos, tmp_path / "grams.csv", passes)
    found, done = whole(bundle, photos, tmp_path / "grams.csv")
    assert found == due
    assert len(read) <= left + 4, read
    assert ("by a run that did not end" in done.stdout) == (passes > VIEWS), done.stdout
    assert "1 got training means: 05.png" in done.stdout


def test_the_first_table_of_a_run_that_goes_on_has_what_is_known(bundle, photos, tmp_path):
    out = tmp_path / "grams.csv"
    whole(bundle, photos, tmp_path / "whole.csv")
    due = pd.read_csv(tmp_path / "whole.csv")[list(TARGETS)]
    cut_short(bundle, photos, out, 2)
    out.unlink()
    cut_short(bundle, photos, out, 0)
    found = pd.read_csv(out)[list(TARGETS)]
    assert np.allclose(found[:8], due[:8]) and np.allclose(found[8:], due.iloc[5]), "training means"
    reasons = pd.read_csv(tmp_path / "grams_issues.csv").reason
    assert len(reasons) == 1 + 6 and (reasons == "not predicted yet").sum() == 6


def changed(photos): write_photo(photos / "01.png", 77)


def added(photos): write_photo(photos / "00b.png", 78)


def removed(photos): (photos / "02.png").unlink()


def touched(photos): os.utime(photos / "06.png", ns=(0, 0))


@pytest.mark.parametrize("meanwhile, again", [
    (changed, "00 01 02 03"), (added, "00 00b 01 02"), (removed, "09 10 11 12 13"), (touched, "04 05 06 07")])
def test_photos_that_change_meanwhile(bundle, photos, tmp_path, read, meanwhile, again):
    "Who is new or changed is predicted, with its whole batch; the bytes are those of a fresh run."
    cut_short(bundle, photos, tmp_path / "grams.csv", 3)
    meanwhile(photos)
    read.clear()
    table = predict_folder(bundle, photos, tmp_path / "grams.csv", device_type="cpu")
    count, tail = len(table), {f"{i}.png" for i in (12, 13)}
    predicted = read[: len(read) - count]  # the rest is for p-values
    due = {f"{name}.png" for name in again.split()} | tail
    if meanwhile is added: due |= {"11.png"}  # its batch has a photo that was not predicted yet
    assert set(predicted) == due and len(predicted) == len(due)
    predict_folder(bundle, photos, tmp_path / "fresh.csv", device_type="cpu")
    fresh, found = pd.read_csv(tmp_path / "fresh.csv"), pd.read_csv(tmp_path / "grams.csv")
    assert_close(found[list(TARGETS)], fresh[list(TARGETS)])
    if meanwhile in (changed, touched):
        assert (tmp_path / "grams.csv").read_bytes() == (tmp_path / "fresh.csv").read_bytes()


def test_another_bundle_or_other_options_begin_anew(bundle, photos, tmp_path, read):
    "And say so in a line; what comes after the raw grams may change."
    other = trusted_bundle(tmp_path / "other", [photos / "00.png", photos / "01.png"], views=("plain", "v"))
    for weights, words, differs in ((other, (), "bundle"), (bundle, ("--tta", "plain"), "views")):
        due, _ = whole(weights, photos, tmp_path / "whole.csv", *words)
        cut_short(bundle, photos, tmp_path / "grams.csv", 2)
        found, done = whole(weights, photos, tmp_path / "grams.csv", *words)
        assert found == due
        line = f"grams_partial.jsonl: left by a run that differs in {differs}; predicting begins anew"
        assert line in done.stdout
    cut_short(bundle, photos, tmp_path / "grams.csv", 2, physics="none")
    read.clear()
    words = ("--physics", "derive_dead", "--quadrat-cm", 50, 50)
    found, done = whole(bundle, photos, tmp_path / "grams.csv", *words)
    assert len(read) == PHOTOS - 8 + PHOTOS and "did not end" in done.stdout
    assert found == whole(bundle, photos, tmp_path / "whole.csv", *words)[0]


def torn(data): return data[:-20]


def garbage(data): return os.urandom(300_000)


def zeros(data): return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def forged(data):
    "Lines with a checksum, but not of the kit's form, before the right ones."
    header, *lines = data.splitlines(keepends=True)
    texts = [b"[" * 90_000, b"1" * 5000, b"{}"]
    texts += [b'{"photo":{},"size":1,"time":1}', b'{"photo":"00.png","size":"x"}']
    own = json.loads(lines[0][9:])
    for wrong in (own["grams"][:4], [1e99] * 5, ["1"] * 4 + [{}], "12345", None):
        texts.append(json.dumps(own | {"grams": wrong}).encode())
    for wrong in ([], "x", 7): texts.append(json.dumps(own | {"likeness": wrong}).encode())
    return b"".join([header, *(b"%08x %s\n" % (zlib.crc32(t), t) for t in texts), *lines])


@pytest.mark.parametrize("damage, says", [
    (torn, "did not end"), (garbage, "damaged; predicting begins anew"), (zeros, "did not end"),
    (forged, r"line 2 and 12 more: damaged")])
def test_a_damaged_file_is_survived(bundle, photos, tmp_path, damage, says):
    "What is whole of it is used; what is not is named, but for a last line that the kill tore."
    due, _ = whole(bundle, photos, tmp_path / "whole.csv")
    cut_short(bundle, photos, tmp_path / "grams.csv", 3)
    path = partial_path(tmp_path / "grams.csv")
    path.write_bytes(damage(path.read_bytes()))
    found, done = whole(bundle, photos, tmp_path / "grams.csv")
    assert found == due and re.search(says, done.stdout), done.stdout


def test_a_file_that_cannot_be_written_costs_nothing(bundle, photos, tmp_path):
    due, _ = whole(bundle, photos, tmp_path / "whole.csv")
    partial_path(tmp_path / "grams.csv").mkdir()
    words = ["--weights", bundle, "--photos", photos, "--out", tmp_path / "grams.csv"]
    done = command("predict", *words, *OPTIONS)
    assert done.returncode == 0 and (tmp_path / "grams.csv").read_bytes() == due
    assert "grams_partial.jsonl: cannot be written (Is a directory)" in done.stdout


def test_two_processes_go_on_and_say_what_one_says(bundle, photos, tmp_path):
    "Each keeps its own part; killed and started again, the table is that of two that were not killed."
    alone = tmp_path / "alone.csv"
    whole(bundle, photos, alone)
    out, undisturbed = tmp_path / "grams.csv", tmp_path / "shared.csv"
    words = ["--weights", bundle, "--photos", photos, *OPTIONS]
    share(2, run_command, "predict", *words, "--out", undisturbed, log=tmp_path / "a")
    killed(bundle, photos, out, VIEWS + 1, (0, 1))
    assert [p.name for p in partial_paths(out)] == ["grams_partial-1.jsonl", "grams_partial.jsonl"]
    said = share(2, run_command, "predict", *words, "--out", out, log=tmp_path / "b")
    assert said.count("4 of 7 photos were predicted by a run that did not end") >= 2, said
    assert out.read_bytes() == undisturbed.read_bytes() and not partial_paths(out)
    found, due = (pd.read_csv(path, keep_default_na=False) for path in (out, alone))
    assert_close(found[list(TARGETS)], due[list(TARGETS)])
    assert found[["photo", "flag"]].equals(due[["photo", "flag"]])


def linked(folder, photo, count):
    "So many photos, all of them the same one."
    folder.mkdir()
    for i in range(count): os.link(photo, folder / f"IMG_{i:05d}.png")
    return folder


def test_a_report_shows_some_of_many_photos(bundle, photos, tmp_path):
    words = ["--weights", bundle, "--out", tmp_path / "grams.csv", "--device-type", "cpu", "--no-cache"]
    done = command("predict", *words, "--photos", linked(tmp_path / "many", photos / "00.png", 300))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "grams_report.html").read_text(encoding="utf-8")
    assert text.count('class="photo"') == text.count("<article") == MOST == 24
    assert "300 photos: median total" in text and text.count('<th scope="row" class="text">IMG_') >= 300


def played(devices, make, run, rows, batch_size, deadline, outcome, *_):
    "What an ensemble would yield, without one."
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        yield batch, np.full((len(batch), len(TARGETS)), 20, np.float32), {}


def test_memory_of_a_photo_is_a_few_hundred_bytes(bundle, photos, tmp_path, monkeypatch):
    "All that is held of each while a folder is predicted, its row in the table that is returned included."
    monkeypatch.setattr(predict, "serve_all", played)
    monkeypatch.setattr(folder_table, "ROWS", 64)  # or parts would be larger where there are more photos
    monkeypatch.setattr(predict, "photo_p_values", lambda bundle, paths, **_: np.full(len(paths), 0.5))
    peaks = {}
    for count in (50, 50, 550):
        many = linked(tmp_path / f"{count}-{len(peaks)}", photos / "00.png", count)
        tracemalloc.start()
        table = predict_folder(bundle, many, tmp_path / "grams.csv", device_type="cpu")
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(table) == count
    assert (peaks[550] - peaks[50]) / 500 < 800, peaks
