"""Predictions on a bad day: short time, photos that cannot be read.
Clocks are stand-ins; levels and counts are asserted, not seconds."""
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from commands import Started, run_command
from conftest import assert_close
from PIL import Image
from untrained import SlowBackbones, by_photo, is_means

from biomass_kit.data import photos as reading
from biomass_kit.data.files import atomic_path
from biomass_kit.data.photos import list_photos
from biomass_kit.data.table import check_submission, read_test
from biomass_kit.data.targets import BiomassError
from biomass_kit.features import store
from biomass_kit.features.backbone import Backbone
from biomass_kit.inference import predict
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.issues import MEANS, Outcome, summary_lines
from biomass_kit.inference.plan import Deadline
from biomass_kit.inference.predict import predict_competition, predict_folder, predict_photos

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_time_enough_changes_nothing(work, whole, monkeypatch):
    slow = SlowBackbones(monkeypatch)
    table = predict_competition(
        work / "frozen", work / "data", work / "a.csv", Deadline(2 * slow.whole(16), lambda: slow.now),
        device_type="cpu")
    assert (work / "a.csv").read_bytes() == (work / "whole.csv").read_bytes()
    assert not table.attrs["outcome"].issues and not (work / "a_issues.csv").exists()
    assert slow.passes == [1, 1] + [4] * 6 * 4, "two to measure, then the plan"


@pytest.mark.parametrize("share, fallback", [
    (0.75, "2 backbone views, 10 members"), (0.45, "1 backbone view, 10 members"),
    (0.2, "1 backbone view, 5 members")])
def test_the_plan_is_cut_to_what_fits(work, whole, monkeypatch, share, fallback):
    slow = SlowBackbones(monkeypatch)
    deadline = Deadline(share * slow.whole(16), lambda: slow.now)
    table = predict_competition(work / "frozen", work / "data", work / "b.csv", deadline, device_type="cpu")
    issues = pd.read_csv(work / "b_issues.csv")
    assert deadline.left() >= 0 and issues.fallback.value_counts().index[0] == fallback
    assert set(issues.reason) == {
        f"deadline of {deadline.text}"}
    assert not is_means(table).any() and len(issues) >= 12, (
        "what is left of a level's time may go to richer ones near the end")
    assert f"{(issues.fallback == fallback).sum()} got {fallback}" in "\n".join(summary_lines(table))


def test_fine_tuned_folds_go_one_by_one(work, monkeypatch):
    slow, names = SlowBackbones(monkeypatch), list(map(str, list_photos(work / "data/test")))
    outcome, one = Outcome(names), slow.whole(16, 1, 4)  # one fold, one view
    predict_photos(
        work / "tuned", names, deadline=Deadline(2.6 * one, lambda: slow.now), outcome=outcome,
        device_type="cpu")
    assert {i.fallback for i in outcome.issues.values()} >= {"1 backbone view, 2 members"} and MEANS not in {
        i.fallback for i in outcome.issues.values()}


def test_a_machine_that_slows_down_still_ends_in_time(work, monkeypatch):
    slow = SlowBackbones(monkeypatch)
    deadline = Deadline(1.3 * slow.whole(16), lambda: slow.now)
    steps, plain = [], Ensemble.predict_loaded

    def watched(self, photos, paths, level=None, intervals=False):
        steps.append(self.levels.index(level))
        if len(steps) == 2 + 5:
            slow.pace *= 5  # two calls measure; from the fifth photo on, everything takes five times as long
        return plain(self, photos, paths, level, intervals)

    monkeypatch.setattr(Ensemble, "predict_loaded", watched)
    table = predict_competition(
        work / "frozen", work / "data", work / "c.csv", deadline, device_type="cpu", batch_size=1)
    levels = steps[2:]
    assert levels[:5] == [0] * 5 and len(levels) == 16 and 0 not in levels[5:12], levels
    assert deadline.left() >= 0 and not is_means(table).any()
    assert len(table.attrs["outcome"].issues) == 16 - levels.count(0)


def test_no_time_for_anything_but_means(work, monkeypatch):
    slow = SlowBackbones(monkeypatch)
    table = predict_competition(
        work / "frozen", work / "data", work / "d.csv", Deadline(slow.whole(1) / 100, lambda: slow.now),
        device_type="cpu")
    assert is_means(table).all() and slow.passes == [1]
    assert check_submission(work / "d.csv", work / "data") is not None
    assert pd.read_csv(work / "d_issues.csv").fallback.tolist() == [MEANS] * 16
    assert "16 got training means" in "\n".join(summary_lines(table))


def test_a_batch_that_never_ends_does_not_hold_the_deadline(work, monkeypatch):
    "On the real clock: a backbone hangs, the call returns with what there is."
    hangs, plain, before = threading.Event(), Backbone.forward, set(threading.enumerate())

    def forward(self, tiles):
        if tiles.shape[0] > 1: hangs.wait(60)
        return plain(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)
    table = predict_competition(work / "frozen", work / "data", work / "e.csv", "6s", device_type="cpu")
    hangs.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)  # or it would do its batch in the next test
    assert is_means(table).all() and table.attrs["outcome"].seconds < 30


def predicting_for_ever(*words):
    "`biomass_predict`, whose device is busy with its first batch until the end."
    def forward(self, tiles):
        while True: torch.ones(1500, 1500) @ torch.ones(1500, 1500)
    Backbone.forward = forward
    run_command("predict", *words)


def test_the_command_ends_well_while_a_device_is_busy(work, tmp_path):
    "Python's own way out would abort the process, and its exit code would say that there is no submission."
    words = [
        "--weights", work / "frozen", "--data", work / "data", "--out", tmp_path / "s.csv", "--no-cache",
        "--device-type", "cpu"]
    process = Started(predicting_for_ever, *words, "--deadline", "5s", log=tmp_path / "said")
    assert process.wait(60) == 0, process.said()
    assert "16 got training means" in process.said() and "terminate" not in process.said(), process.said()
    assert is_means(check_submission(tmp_path / "s.csv", work / "data")).all()


def test_a_valid_file_comes_first_and_is_replaced_now_and_then(work, whole, monkeypatch):
    slow, seen, saves = SlowBackbones(monkeypatch), [], []
    build, plain = Ensemble.__init__, predict.write_submission

    def first(self, *args, **options):
        means = is_means(check_submission(work / "f.csv", work / "data")).all()
        seen.append((means, set(pd.read_csv(work / "f_issues.csv").reason), slow.passes[:]))
        build(self, *args, **options)

    monkeypatch.setattr(Ensemble, "__init__", first)
    monkeypatch.setattr(reading, "read_photo", lambda path, plain=reading.read_photo: seen and plain(path))
    monkeypatch.setattr(predict, "write_submission", lambda path, rows, photos, grams: (
        saves.append((slow.now, np.isclose(grams, 20).all(1).sum())) or plain(path, rows, photos, grams)))
    monkeypatch.setattr(predict, "SAVE_EVERY", 1.5 * slow.whole(4))
    predict_competition(
        work / "frozen", work / "data", work / "f.csv", Deadline(10 * slow.whole(16), lambda: slow.now),
        device_type="cpu")
    assert seen == [(True, {"not predicted yet"}, [])], "before anything is loaded or seen"
    assert saves[0] == (0, 16) and saves[-1][1] == 0 and 3 <= len(saves) <= 4, saves
    assert (work / "f.csv").read_bytes() == (work / "whole.csv").read_bytes()
    assert not (work / "f_issues.csv").exists()


def test_a_write_that_fails_meanwhile_stops_nothing(work, monkeypatch):
    monkeypatch.setattr(predict, "SAVE_EVERY", 0)
    plain, calls = predict.write_submission, []

    def full(*args):
        calls.append(1)
        if len(calls) != 3: return plain(*args)
        with atomic_path(args[0]): raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "write_submission", full)
    table = predict_competition(work / "frozen", work / "data", work / "g.csv", device_type="cpu")
    assert len(calls) == 1 + 4 + 1 and any("No space left" in line for line in summary_lines(table))
    assert not is_means(table).any()


# Photos

def spoil(data, names):
    "Make one of each kind of bad photo of the first six, other codings of the next three."
    cut, missing, black, tiny, huge_png, text, cmyk, turned, huge = (data / name for name in names[:9])
    pixels = np.asarray(Image.open(cmyk))
    cut.write_bytes(cut.read_bytes()[:400])
    missing.unlink()
    Image.new("RGB", (128, 64)).save(black)
    Image.fromarray(pixels[:10, :20]).save(tiny)
    Image.new("L", (16_000, 6_250)).save(huge_png, "PNG")
    text.write_text("<html>404</html>")
    Image.open(cmyk).convert("CMYK").save(cmyk, "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(np.asarray(Image.open(turned)))).save(turned, "JPEG", quality=95, exif=exif)
    Image.open(huge).resize((14_400, 7_200), Image.NEAREST).save(huge, "JPEG", quality=80)  # 104 megapixels


def test_every_kind_of_bad_photo(work, whole, tmp_path, monkeypatch):
    "One of each kind among good ones: those get the means and are named, and the good ones do not feel it."
    data = tmp_path / "data"
    (data / "test").mkdir(parents=True)
    names = list(read_test(work / "data")[1])
    for name in ("test.csv", "sample_submission.csv", *names):
        (data / name).write_bytes((work / "data" / name).read_bytes())
    spoil(data, names)
    out = tmp_path / "submission.csv"
    table = predict_competition(work / "frozen", data, out, device_type="cpu", batch_size=1)
    issues = pd.read_csv(tmp_path / "submission_issues.csv").set_index("photo")
    unreadable = "not a readable photo"
    said = (unreadable, "no such photo", "shows nothing", "too small", "over 64 million", unreadable)
    for name, words in zip(names, said):
        assert words in issues.reason[name] and issues.fallback[name] == MEANS
    assert is_means(table)[:6].all()
    assert sorted(issues.index) == sorted(names[:6]) and "6 got training means" in summary_lines(table)[1]
    untouched = [names.index(n) for n in names[9:]]
    assert_close(by_photo(table)[untouched], by_photo(whole)[untouched])
    assert np.abs(by_photo(table)[6:9] - by_photo(whole)[6:9]).max() < 5, "another coding of the same photo"


HUGE = """
import resource, sys
from biomass_kit.data.photos import read_photo
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shape = read_photo(sys.argv[1]).shape
print(shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_huge_photo_takes_little_memory(tmp_path):
    Image.effect_noise((512, 256), 60).resize((14_400, 7_200), Image.NEAREST).convert("RGB").save(
        tmp_path / "huge.jpg", quality=80)
    done = subprocess.run(
        [sys.executable, "-c", HUGE, str(tmp_path / "huge.jpg")], capture_output=True, text=True)
    shape, mb = done.stdout.strip().rsplit(" ", 1)
    assert shape == "(3600, 7200, 3)" and int(mb) < 350, (
        "decoded whole, it would take 300 MB for each of its copies")


def test_a_photo_whose_reading_hangs(work, whole, monkeypatch):
    "Whoever reads it waits for ever: it gets the means, and all others are read."
    plain, never = reading.read_photo, threading.Event()
    stuck = list_photos(work / "data/test")[5].name
    monkeypatch.setattr(store, "READ_TIMEOUT", 3.0)
    monkeypatch.setattr(
        reading, "read_photo",
        lambda path: never.wait(60) or plain(path) if str(path).endswith(stuck) else plain(path))
    table = predict_competition(
        work / "frozen", work / "data", work / "h.csv", device_type="cpu", batch_size=1)
    never.set()
    (row, issue), = table.attrs["outcome"].issues.items()
    assert table.attrs["outcome"].names[row].endswith(stuck) and "was not read in 3 s, twice" in issue.reason
    assert is_means(table)[row]
    assert any("one by one from here on" in line for line in summary_lines(table))
    others = np.arange(16) != row
    assert_close(by_photo(table)[others], by_photo(whole)[others])


def test_a_wrong_option_writes_nothing(work):
    wrong = {"views": ["diagonal"]}, {"device_type": "tpu"}, {"deadline": "8:30"}, {"threshold": 0.1}
    for options in wrong:
        with pytest.raises(BiomassError):
            predict_competition(work / "frozen", work / "data", work / "never.csv", **options)
    assert not (work / "never.csv").exists()


def test_a_table_keeps_its_intervals_and_its_deadline(work, tmp_path):
    table = predict_folder(
        work / "frozen", work / "data/test", tmp_path / "t.csv", deadline="1h", device_type="cpu")
    assert len(table) == 16 and not table.attrs["outcome"].issues and "16 photos" in summary_lines(table)[0]
    assert "cpu in fp32" in summary_lines(table)[0]
