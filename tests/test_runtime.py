"""Predictions on a bad day: short time, bad photos, failing devices.
Clocks, memory and GPUs are played; levels and counts are asserted, not seconds."""
import itertools
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
from untrained import untrained_bundle

from biomass_kit.data import photos as reading
from biomass_kit.data.files import atomic_path
from biomass_kit.data.photos import list_photos
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.table import check_submission, read_test
from biomass_kit.data.targets import TARGETS, BiomassError
from biomass_kit.features import device, store
from biomass_kit.features.backbone import Backbone
from biomass_kit.inference import predict
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble, combine_some
from biomass_kit.inference.issues import MEANS, Outcome, summary_lines
from biomass_kit.inference.plan import Deadline
from biomass_kit.inference.predict import predict_competition, predict_folder, predict_photos

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "Sixteen drawn test photos, a bundle of 5 frozen folds of two grids, one of 3 fine-tuned folds."
    room = tmp_path_factory.mktemp("runtime")
    write_dataset(room / "data", n_photos=4, n_test=16, seed=5, height=64)
    untrained_bundle(room / "frozen")
    untrained_bundle(room / "tuned", ((2, 2),), 3, fine_tuned=True)
    return room


@pytest.fixture(scope="module")
def whole(room):
    "The frozen bundle's submission, undisturbed."
    return predict_competition(room / "frozen", room / "data", room / "whole.csv", device_type="cpu")


def by_photo(table):
    "A submission as [photos, 5] grams."
    return table.target.to_numpy().reshape(-1, len(TARGETS))


def is_means(table):
    "Which photos have the training means of the untrained bundles."
    return np.isclose(by_photo(table), 20).all(1)


class SlowBackbones:
    "A clock that backbones move: each pixel that one sees takes `pace` seconds."

    def __init__(self, monkeypatch, pace=1e-3):
        self.now, self.pace, self.passes = 0.0, pace, []
        plain = Backbone.forward
        monkeypatch.setattr(Backbone, "forward", lambda body, tiles: self.see(tiles) or plain(body, tiles))

    def see(self, tiles):
        self.passes.append(tiles.shape[0])
        self.now += self.seconds(tiles)

    def seconds(self, tiles):
        return self.pace * tiles.shape[0] * tiles.shape[1] * tiles.shape[2] * tiles.shape[-1] ** 2

    def whole(self, photos, views=3, tiles=4 + 9, size=32):
        "Seconds that the frozen bundle takes for so many photos."
        return self.pace * photos * views * 2 * tiles * size**2


def test_time_enough_changes_nothing(room, whole, monkeypatch):
    slow = SlowBackbones(monkeypatch)
    table = predict_competition(
        room / "frozen", room / "data", room / "a.csv", Deadline(2 * slow.whole(16), lambda: slow.now),
        device_type="cpu")
    assert (room / "a.csv").read_bytes() == (room / "whole.csv").read_bytes()
    assert not table.attrs["outcome"].issues and not (room / "a_issues.csv").exists()
    assert slow.passes == [1, 1] + [4] * 6 * 4, "two to measure, then the plan"


@pytest.mark.parametrize("share, fallback", [(0.75, "2 backbone views, 10 members"), (0.45, "1 backbone view, 10 members"),
                                             (0.2, "1 backbone view, 5 members")])
def test_the_plan_is_cut_to_what_fits(room, whole, monkeypatch, share, fallback):
    slow = SlowBackbones(monkeypatch)
    deadline = Deadline(share * slow.whole(16), lambda: slow.now)
    table = predict_competition(room / "frozen", room / "data", room / "b.csv", deadline, device_type="cpu")
    issues = pd.read_csv(room / "b_issues.csv")
    assert deadline.left() >= 0 and issues.fallback.value_counts().index[0] == fallback
    assert set(issues.reason) == {
        f"deadline of {deadline.text}"}
    assert not is_means(table).any() and len(issues) >= 12, (
        "what is left of a level's time may go to richer ones near the end")
    assert f"{(issues.fallback == fallback).sum()} got {fallback}" in "\n".join(summary_lines(table))


def test_fine_tuned_folds_go_one_by_one(room, monkeypatch):
    slow, names = SlowBackbones(monkeypatch), list(map(str, list_photos(room / "data/test")))
    outcome, one = Outcome(names), slow.whole(16, 1, 4)  # one fold, one view
    predict_photos(
        room / "tuned", names, deadline=Deadline(2.6 * one, lambda: slow.now), outcome=outcome,
        device_type="cpu")
    assert {i.fallback for i in outcome.issues.values()} >= {"1 backbone view, 2 members"} and MEANS not in {
        i.fallback for i in outcome.issues.values()}


def test_a_machine_that_slows_down_still_ends_in_time(room, monkeypatch):
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
        room / "frozen", room / "data", room / "c.csv", deadline, device_type="cpu", batch_size=1)
    levels = steps[2:]
    assert levels[:5] == [0] * 5 and len(levels) == 16 and 0 not in levels[5:12], levels
    assert deadline.left() >= 0 and not is_means(table).any()
    assert len(table.attrs["outcome"].issues) == 16 - levels.count(0)


def test_no_time_for_anything_but_means(room, monkeypatch):
    slow = SlowBackbones(monkeypatch)
    table = predict_competition(
        room / "frozen", room / "data", room / "d.csv", Deadline(slow.whole(1) / 100, lambda: slow.now),
        device_type="cpu")
    assert is_means(table).all() and slow.passes == [1]
    assert check_submission(room / "d.csv", room / "data") is not None
    assert pd.read_csv(room / "d_issues.csv").fallback.tolist() == [MEANS] * 16
    assert "16 got training means" in "\n".join(summary_lines(table))


def test_a_batch_that_never_ends_does_not_hold_the_deadline(room, monkeypatch):
    "On the real clock: a backbone hangs, the call returns with what there is."
    hangs, plain, before = threading.Event(), Backbone.forward, set(threading.enumerate())

    def forward(self, tiles):
        if tiles.shape[0] > 1: hangs.wait(60)
        return plain(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)
    table = predict_competition(room / "frozen", room / "data", room / "e.csv", "6s", device_type="cpu")
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


def test_the_command_ends_well_while_a_device_is_busy(room, tmp_path):
    "Python's own way out would abort the process, and its exit code would say that there is no submission."
    words = [
        "--weights", room / "frozen", "--data", room / "data", "--out", tmp_path / "s.csv", "--no-cache",
        "--device-type", "cpu"]
    process = Started(predicting_for_ever, *words, "--deadline", "5s", log=tmp_path / "said")
    assert process.wait(60) == 0, process.said()
    assert "16 got training means" in process.said() and "terminate" not in process.said(), process.said()
    assert is_means(check_submission(tmp_path / "s.csv", room / "data")).all()


def test_a_valid_file_comes_first_and_is_replaced_now_and_then(room, whole, monkeypatch):
    slow, seen, saves = SlowBackbones(monkeypatch), [], []
    build, plain = Ensemble.__init__, predict.write_submission

    def first(self, *args, **options):
        seen.append(
            (is_means(check_submission(room / "f.csv", room / "data")).all(), set(pd.read_csv(room / "f_issues.csv").reason), slow.passes[:]))
        build(self, *args, **options)

    monkeypatch.setattr(Ensemble, "__init__", first)
    monkeypatch.setattr(reading, "read_photo", lambda path, plain=reading.read_photo: seen and plain(path))
    monkeypatch.setattr(predict, "write_submission", lambda path, rows, photos, grams: (
        saves.append((slow.now, np.isclose(grams, 20).all(1).sum())) or plain(path, rows, photos, grams)))
    monkeypatch.setattr(predict, "SAVE_EVERY", 1.5 * slow.whole(4))
    predict_competition(
        room / "frozen", room / "data", room / "f.csv", Deadline(10 * slow.whole(16), lambda: slow.now),
        device_type="cpu")
    assert seen == [(True, {"not predicted yet"}, [])], "before anything is loaded or seen"
    assert saves[0] == (0, 16) and saves[-1][1] == 0 and 3 <= len(saves) <= 4, saves
    assert (room / "f.csv").read_bytes() == (room / "whole.csv").read_bytes()
    assert not (room / "f_issues.csv").exists()


def test_a_write_that_fails_meanwhile_stops_nothing(room, monkeypatch):
    monkeypatch.setattr(predict, "SAVE_EVERY", 0)
    plain, calls = predict.write_submission, []

    def full(*args):
        calls.append(1)
        if len(calls) != 3: return plain(*args)
        with atomic_path(args[0]): raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "write_submission", full)
    table = predict_competition(room / "frozen", room / "data", room / "g.csv", device_type="cpu")
    assert len(calls) == 1 + 4 + 1 and any("No space left" in line for line in summary_lines(table))
    assert not is_means(table).any()


# Photos

def test_every_kind_of_bad_photo(room, whole, tmp_path, monkeypatch):
    "One of each kind among good ones: those get the means and are named, and the good ones do not feel it."
    data = tmp_path / "data"
    (data / "test").mkdir(parents=True)
    for name in ("test.csv", "sample_submission.csv"): (data / name).write_bytes((room / "data" / name).read_bytes())
    names = list(read_test(room / "data")[1])
    for name in names: (data / name).write_bytes((room / "data" / name).read_bytes())
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
    table = predict_competition(room / "frozen", data, tmp_path / "submission.csv", device_type="cpu", batch_size=1)
    issues = pd.read_csv(tmp_path / "submission_issues.csv").set_index("photo")
    for name, words in zip(names, ("not a readable photo", "no such photo", "shows nothing", "too small", "over 64 million", "not a readable photo")):
        assert words in issues.reason[name] and issues.fallback[name] == MEANS and is_means(table)[names.index(name)]
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


def test_a_photo_whose_reading_hangs(room, whole, monkeypatch):
    "Whoever reads it waits for ever: it gets the means, and all others are read."
    plain, never = reading.read_photo, threading.Event()
    stuck = list_photos(room / "data/test")[5].name
    monkeypatch.setattr(store, "READ_TIMEOUT", 3.0)
    monkeypatch.setattr(
        reading, "read_photo",
        lambda path: never.wait(60) or plain(path) if str(path).endswith(stuck) else plain(path))
    table = predict_competition(
        room / "frozen", room / "data", room / "h.csv", device_type="cpu", batch_size=1)
    never.set()
    (row, issue), = table.attrs["outcome"].issues.items()
    assert table.attrs["outcome"].names[row].endswith(stuck) and "was not read in 3 s, twice" in issue.reason
    assert is_means(table)[row]
    assert any("one by one from here on" in line for line in summary_lines(table))
    others = np.arange(16) != row
    assert_close(by_photo(table)[others], by_photo(whole)[others])


# Devices

MEMORY = {"gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "python": MemoryError(),
          "cpu": RuntimeError(
              "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")}


def small_memory(monkeypatch, photos, whose="gpu"):
    "A device that holds so many photos; returns the sizes that were tried."
    tried, plain = [], Backbone.forward

    def forward(self, tiles):
        tried.append(tiles.shape[0])
        if tiles.shape[0] > photos: raise MEMORY[whose]
        return plain(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)
    return tried


@pytest.mark.parametrize("photos, tried_sizes, whose", [(2, [4, 2], "gpu"), (2, [4, 2], "python"), (1, [4, 2, 1], "cpu")])
def test_out_of_memory_halves_the_batch_once(room, whole, monkeypatch, photos, tried_sizes, whose):
    tried = small_memory(monkeypatch, photos, whose)
    table = predict_competition(room / "frozen", room / "data", room / "i.csv", device_type="cpu")
    assert_close(by_photo(table), by_photo(whole))
    assert not table.attrs["outcome"].issues
    assert [n for n, _ in itertools.groupby(tried)] == tried_sizes and max(tried[3:]) <= photos, (
        "it remembers")
    said = [line for line in summary_lines(table) if "ran out of memory" in line]
    assert said == [f"cpu ran out of memory with 4 photos at once; {photos} at once from here on"]


def test_what_does_not_fit_one_by_one_is_an_error(room, monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        predict_competition(room / "frozen", room / "data", room / "j.csv", device_type="cpu")
    assert not (room / "j.csv").exists() and not (room / "j_issues.csv").exists(), (
        "no table of means that looks like predictions")


@pytest.mark.parametrize("batch_size", [4, 3])
def test_two_devices_say_what_one_says(room, monkeypatch, batch_size):
    one = predict_competition(
        room / "frozen", room / "data", room / "k1.csv", device_type="cpu", batch_size=batch_size)
    who, plain, both = set(), Ensemble.predict_loaded, threading.Barrier(2)

    def shared(self, *args):
        # neither runs away with all photos
        if len(who) < 2 and threading.get_ident() not in who:
            who.add(threading.get_ident())
            both.wait(60)
        return plain(self, *args)

    monkeypatch.setattr(Ensemble, "predict_loaded", shared)
    two = predict_competition(
        room / "frozen", room / "data", room / "k2.csv", devices=[CPU, CPU], batch_size=batch_size)
    assert len(who) == 2 and two.attrs["outcome"].devices == ["cpu in fp32"] * 2
    assert not two.attrs["outcome"].issues
    assert_close(by_photo(two), by_photo(one))
    assert len(one) == 80


def test_two_devices_share_the_time(room, monkeypatch):
    "Each thread on a clock of its own. However the photos fall, both end in time, and no photo is left out."
    slow, times, both = SlowBackbones(monkeypatch), {}, threading.Barrier(2)
    one = slow.whole(1)

    def see(tiles):
        me = threading.get_ident()
        if me not in times: both.wait(60)  # neither runs away with all photos
        times[me] = times.get(me, 0) + slow.seconds(tiles)

    monkeypatch.setattr(slow, "see", see)
    deadline = Deadline(10 * one, lambda: times.get(threading.get_ident(), 0))
    table = predict_competition(
        room / "frozen", room / "data", room / "l.csv", deadline, devices=[CPU, CPU], batch_size=1)
    assert not is_means(table).any() and len(times) == 2 and max(times.values()) <= deadline.seconds


@pytest.mark.parametrize("when", ["loading", "working"])
def test_a_device_that_fails_leaves_its_photos_to_the_other(room, whole, monkeypatch, when):
    lock, failing, build, plain = threading.Lock(), [], Ensemble.__init__, Ensemble.predict_loaded

    def fails(self):
        with lock:
            if not failing: failing.append(self)
        if failing[0] is self: raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr(
        Ensemble, "__init__", lambda self,
        *args: (fails(self) if when == "loading" else None, build(self, *args))[1])
    monkeypatch.setattr(
        Ensemble, "predict_loaded", lambda self,
        *args: (fails(self) if when == "working" else None, plain(self, *args))[1])
    table = predict_competition(room / "frozen", room / "data", room / "m.csv", devices=[CPU, CPU])
    assert_close(by_photo(table), by_photo(whole))
    assert not table.attrs["outcome"].issues
    assert any(
        "cpu failed (CUDA error: unspecified launch failure); its photos went to cpu" in line
        for line in summary_lines(table))


def test_gpus_that_launch_nothing_leave_it_to_the_cpu(room, whole, monkeypatch):
    def launches(device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla P100")
    monkeypatch.setattr(device, "launches", launches)
    table = predict_competition(room / "frozen", room / "data", room / "n.csv")
    assert_close(by_photo(table), by_photo(whole))
    assert table.attrs["outcome"].devices == ["cpu in fp32"]
    assert [line[:6] for line in summary_lines(table) if "cannot launch a kernel" in line] == ["cuda:0", "cuda:1"]


def test_all_gpus_fail_and_the_cpu_does_it(room, whole, monkeypatch):
    """Two GPUs that launch a probe and fail under load; played, since there is none here:
    loading weights to them raises."""
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 0), ("get_device_capability", (7, 5))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(device, "launches", lambda device: True)

    def to(self, device, *args, plain=torch.nn.Module.to, **options):
        if str(device).startswith("cuda"): raise torch.OutOfMemoryError(f"{device} is full")
        return plain(self, device, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, plain=torch.nn.Module.to, **options: (
        to(self, *args, plain=plain, **options) if args else plain(self, **options)))
    table = predict_competition(room / "frozen", room / "data", room / "o.csv")
    assert_close(by_photo(table), by_photo(whole))
    assert [line.split(" failed")[0] for line in summary_lines(table) if "went to cpu" in line] == ["cuda:0", "cuda:1"]


# Numbers

def overflow(monkeypatch, bad, everywhere=False):
    "Backbones that give no number for some calls in half precision, or in any."
    plain, calls = Backbone.forward, []

    def forward(self, tiles):
        out = plain(self, tiles)
        half = self.dtype != torch.float32
        calls.append(half)
        if half or everywhere: out[bad] = torch.nan
        return out

    monkeypatch.setattr(Backbone, "forward", forward)
    return calls


def test_no_number_in_half_precision_is_computed_again(room, whole, monkeypatch):
    calls = overflow(monkeypatch, slice(0, 1))  # the first photo of each batch
    table = predict_competition(
        room / "frozen", room / "data", room / "p.csv", device_type="cpu", precision="bf16")
    outcome = table.attrs["outcome"]
    assert sorted(outcome.issues) == [0, 4, 8, 12] and {tuple(i) for i in outcome.issues.values()} == {
        ("no number in bf16", "the whole in fp32")}
    assert_close(by_photo(table)[::4], by_photo(whole)[::4])
    assert calls.count(False) == 4 * 6
    assert np.abs(by_photo(table) - by_photo(whole)).max() < 2
    assert "4 got the whole in fp32" in "\n".join(summary_lines(table))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("broken", [1, 10])
def test_a_member_that_gives_no_number_is_left_out(room, whole, monkeypatch, value, broken):
    bundle = read_bundle(room / "frozen")
    plain = type(bundle).load_model

    def load_model(self, member):
        model = plain(self, member)
        if member["name"] in [m["name"] for m in bundle.members[:broken]]: model.heads.bias.data[2] = value
        return model

    monkeypatch.setattr(type(bundle), "load_model", load_model)
    table = predict_competition(bundle, room / "data", room / "q.csv", device_type="cpu", precision="bf16")
    issues = pd.read_csv(room / "q_issues.csv")
    if broken == 10:
        assert is_means(table).all() and set(issues.reason) == {"no member gave a number"}
        assert set(issues.fallback) == {MEANS}
    else:
        assert set(issues.reason) == {"no number from 2x2-0"}
        assert set(issues.fallback) == {"the other 9 members"}
        assert not is_means(table).any()
        monkeypatch.undo()
        others = bundle._replace(manifest={**bundle.manifest, "members": bundle.members[1:]})
        due = predict_competition(others, room / "data", room / "r.csv", device_type="cpu")
        assert_close(by_photo(table), by_photo(due))


def test_weights_of_the_members_that_are_left():
    some = np.arange(20, dtype=np.float32).reshape(2, 2, 5)
    manifest = {"members": [0, 1, 2], "combine": {"how": "weighted", "weights": [0.5, 0.4, 0.1]}}
    assert np.allclose(combine_some(some, (1, 2), manifest), 0.8 * some[0] + 0.2 * some[1])
    manifest["combine"]["weights"] = [1.0, 0.0, 0.0]
    assert np.allclose(combine_some(some, (1, 2), manifest), some.mean(0))


def test_without_an_outcome_nothing_is_made_up(room, monkeypatch):
    overflow(monkeypatch, slice(None), everywhere=True)
    with pytest.raises(BiomassError, match="no member gave a number; 16 of 16"):
        predict_photos(room / "frozen", list_photos(room / "data/test"), device_type="cpu")


def test_a_wrong_option_writes_nothing(room):
    for options in ({"views": ["diagonal"]}, {"device_type": "tpu"}, {"deadline": "8:30"}, {"threshold": 0.1}):
        with pytest.raises(BiomassError):
            predict_competition(room / "frozen", room / "data", room / "never.csv", **options)
    assert not (room / "never.csv").exists()


def test_a_table_keeps_its_intervals_and_its_deadline(room, tmp_path):
    table = predict_folder(
        room / "frozen", room / "data/test", tmp_path / "t.csv", deadline="1h", device_type="cpu")
    assert len(table) == 16 and not table.attrs["outcome"].issues and "16 photos" in summary_lines(table)[0]
    assert "cpu in fp32" in summary_lines(table)[0]
