"""Devices that run out of memory, fail or hang, and NaN or infinite values: what is predicted then.
GPUs and memory are stand-ins; counts and levels are asserted, not seconds."""
import itertools
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_close
from untrained import SlowBackbones, by_photo, is_means

from biomass_kit.data.photos import list_photos
from biomass_kit.data.targets import BiomassError
from biomass_kit.features import device
from biomass_kit.features.backbone import Backbone
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble, combine_some
from biomass_kit.inference.issues import MEANS, summary_lines
from biomass_kit.inference.plan import Deadline
from biomass_kit.inference.predict import predict_competition, predict_photos

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
}


def small_memory(monkeypatch, photos, whose="gpu"):
    "A device that holds so many photos; returns the sizes that were tried."
    tried, plain = [], Backbone.forward

    def forward(self, tiles):
        tried.append(tiles.shape[0])
        if tiles.shape[0] > photos: raise MEMORY[whose]
        return plain(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)
    return tried


@pytest.mark.parametrize(
    "photos, tried_sizes, whose", [(2, [4, 2], "gpu"), (2, [4, 2], "python"), (1, [4, 2, 1], "cpu")])
def test_out_of_memory_halves_the_batch_once(work, whole, monkeypatch, photos, tried_sizes, whose):
    tried = small_memory(monkeypatch, photos, whose)
    table = predict_competition(work / "frozen", work / "data", work / "i.csv", device_type="cpu")
    assert_close(by_photo(table), by_photo(whole))
    assert not table.attrs["outcome"].issues
    assert [n for n, _ in itertools.groupby(tried)] == tried_sizes and max(tried[3:]) <= photos, (
        "it remembers")
    said = [line for line in summary_lines(table) if "ran out of memory" in line]
    assert said == [f"cpu ran out of memory with 4 photos at once; {photos} at once from here on"]


def test_what_does_not_fit_one_by_one_is_an_error(work, monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        predict_competition(work / "frozen", work / "data", work / "j.csv", device_type="cpu")
    assert not (work / "j.csv").exists() and not (work / "j_issues.csv").exists(), (
        "no table of means that looks like predictions")


@pytest.mark.parametrize("batch_size", [4, 3])
def test_two_devices_say_what_one_says(work, monkeypatch, batch_size):
    one = predict_competition(
        work / "frozen", work / "data", work / "k1.csv", device_type="cpu", batch_size=batch_size)
    who, plain, both = set(), Ensemble.predict_loaded, threading.Barrier(2)

    def shared(self, *args):
        # neither runs away with all photos
        if len(who) < 2 and threading.get_ident() not in who:
            who.add(threading.get_ident())
            both.wait(60)
        return plain(self, *args)

    monkeypatch.setattr(Ensemble, "predict_loaded", shared)
    two = predict_competition(
        work / "frozen", work / "data", work / "k2.csv", devices=[CPU, CPU], batch_size=batch_size)
    assert len(who) == 2 and two.attrs["outcome"].devices == ["cpu in fp32"] * 2
    assert not two.attrs["outcome"].issues
    assert_close(by_photo(two), by_photo(one))
    assert len(one) == 80


def test_two_devices_share_the_time(work, monkeypatch):
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
        work / "frozen", work / "data", work / "l.csv", deadline, devices=[CPU, CPU], batch_size=1)
    assert not is_means(table).any() and len(times) == 2 and max(times.values()) <= deadline.seconds


@pytest.mark.parametrize("when", ["loading", "working"])
def test_a_device_that_fails_leaves_its_photos_to_the_other(work, whole, monkeypatch, when):
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
    table = predict_competition(work / "frozen", work / "data", work / "m.csv", devices=[CPU, CPU])
    assert_close(by_photo(table), by_photo(whole))
    assert not table.attrs["outcome"].issues
    assert any(
        "cpu failed (CUDA error: unspecified launch failure); its photos went to cpu" in line
        for line in summary_lines(table))


def test_gpus_that_launch_nothing_leave_it_to_the_cpu(work, whole, monkeypatch):
    def launches(device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla P100")
    monkeypatch.setattr(device, "launches", launches)
    table = predict_competition(work / "frozen", work / "data", work / "n.csv")
    assert_close(by_photo(table), by_photo(whole))
    assert table.attrs["outcome"].devices == ["cpu in fp32"]
    silent = [line[:6] for line in summary_lines(table) if "cannot launch a kernel" in line]
    assert silent == ["cuda:0", "cuda:1"]


def test_all_gpus_fail_and_the_cpu_does_it(work, whole, monkeypatch):
    """Two GPUs that launch a probe and fail under load; played, since there is none here:
    loading weights to them raises."""
    has = dict(is_available=True, device_count=2, current_device=0, get_device_capability=(7, 5))
    for name, value in has.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(device, "launches", lambda device: True)

    def to(self, device, *args, plain=torch.nn.Module.to, **options):
        if str(device).startswith("cuda"): raise torch.OutOfMemoryError(f"{device} is full")
        return plain(self, device, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, plain=torch.nn.Module.to, **options: (
        to(self, *args, plain=plain, **options) if args else plain(self, **options)))
    table = predict_competition(work / "frozen", work / "data", work / "o.csv")
    assert_close(by_photo(table), by_photo(whole))
    failed = [line.split(" failed")[0] for line in summary_lines(table) if "went to cpu" in line]
    assert failed == ["cuda:0", "cuda:1"]


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


def test_no_number_in_half_precision_is_computed_again(work, whole, monkeypatch):
    calls = overflow(monkeypatch, slice(0, 1))  # the first photo of each batch
    table = predict_competition(
        work / "frozen", work / "data", work / "p.csv", device_type="cpu", precision="bf16")
    outcome = table.attrs["outcome"]
    assert sorted(outcome.issues) == [0, 4, 8, 12] and {tuple(i) for i in outcome.issues.values()} == {
        ("NaN or infinite values in bf16", "the whole in fp32")}
    assert_close(by_photo(table)[::4], by_photo(whole)[::4])
    assert calls.count(False) == 4 * 6
    assert np.abs(by_photo(table) - by_photo(whole)).max() < 2
    assert "4 got the whole in fp32" in "\n".join(summary_lines(table))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("broken", [1, 10])
def test_a_member_that_gives_no_number_is_left_out(work, whole, monkeypatch, value, broken):
    bundle = read_bundle(work / "frozen")
    plain = type(bundle).load_model

    def load_model(self, member):
        model = plain(self, member)
        if member["name"] in [m["name"] for m in bundle.members[:broken]]: model.heads.bias.data[2] = value
        return model

    monkeypatch.setattr(type(bundle), "load_model", load_model)
    table = predict_competition(bundle, work / "data", work / "q.csv", device_type="cpu", precision="bf16")
    issues = pd.read_csv(work / "q_issues.csv")
    if broken == 10:
        assert is_means(table).all() and set(issues.reason) == {"no member gave finite values"}
        assert set(issues.fallback) == {MEANS}
    else:
        assert set(issues.reason) == {"NaN or infinite values from 2x2-0"}
        assert set(issues.fallback) == {"the other 9 members"}
        assert not is_means(table).any()
        monkeypatch.undo()
        others = bundle._replace(manifest={**bundle.manifest, "members": bundle.members[1:]})
        due = predict_competition(others, work / "data", work / "r.csv", device_type="cpu")
        assert_close(by_photo(table), by_photo(due))


def test_weights_of_the_members_that_are_left():
    some = np.arange(20, dtype=np.float32).reshape(2, 2, 5)
    manifest = {"members": [0, 1, 2], "combine": {"how": "weighted", "weights": [0.5, 0.4, 0.1]}}
    assert np.allclose(combine_some(some, (1, 2), manifest), 0.8 * some[0] + 0.2 * some[1])
    manifest["combine"]["weights"] = [1.0, 0.0, 0.0]
    assert np.allclose(combine_some(some, (1, 2), manifest), some.mean(0))


def test_without_an_outcome_nothing_is_made_up(work, monkeypatch):
    overflow(monkeypatch, slice(None), everywhere=True)
    with pytest.raises(BiomassError, match="no member gave finite values; 16 of 16"):
        predict_photos(work / "frozen", list_photos(work / "data/test"), device_type="cpu")
