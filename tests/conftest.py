"""Shared by the tests: small drawn data, a tiny backbone's weights, one finished run,
and the switch for long forms."""
import gc
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import end_all
from sources import ROOT
from untrained import random_weights, untrained_bundle

from biomass_kit.data.synthetic import write_dataset
from biomass_kit.inference.predict import predict_competition
from biomass_kit.training.config import TrainConfig
from biomass_kit.training.run import train

SHARED = ROOT.parent / "shared"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long forms too (minutes each)")
    parser.addoption("--device", default="cuda", choices=("cuda", "cpu"),
                     help="where tests marked cuda run; on the CPU they test themselves")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; run by make test-long")
    config.addinivalue_line("markers", "cuda: needs a GPU; run by pytest -m cuda")
    if config.getoption("-m") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # other tests compare with the CPU
    # a shell's background job, and what it starts, would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session):
    """Each fold's end collects what is no longer used:
    not once more among a million objects of imported modules."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(): end_all()


def pytest_collection_modifyitems(config, items):
    without_gpu = config.getoption("--device") == "cuda" and not torch.cuda.is_available()
    for item in items:
        if "long" in item.keywords and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="a long form: make test-long"))
        if "cuda" in item.keywords and without_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m cuda tests"))


def run(*command, **options):
    "Run a command of the project in its own process; output as text."
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=options.pop("cwd", ROOT), **options)


def python(*arguments, **options):
    "Run this Python."
    return run(sys.executable, *arguments, **options)


def assert_close(found, due):
    """The same but for the last bits, in grams: what other shapes may change.

    A product of other shapes adds up in another order, so nothing that differs in batch size, number of
    threads or device is compared for equality; which shapes differ, and by how much, depends on the
    processor.
    """
    np.testing.assert_allclose(found, due, rtol=1e-5, atol=1e-4)


def launch(processes, module, *arguments, **options):
    """Run a module in several processes, as `accelerate launch` does on several GPUs.

    On the CPU `accelerate launch` itself starts one process, whatever number it is given; torchrun is what it
    calls for GPUs.
    """
    return python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m", module,
        *arguments, timeout=300, **options)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    "Thirty synthetic photos in the competition's layout."
    return write_dataset(tmp_path_factory.mktemp("drawn") / "data", n_photos=30, n_test=4, seed=3, height=96)


@pytest.fixture
def device(request):
    "Where a test marked cuda runs."
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    "Random weights of a tiny convolutional backbone, as a file: what `--backbone-weights` wants."
    path = tmp_path_factory.mktemp("weights") / "test_efficientnet.safetensors"
    return random_weights(path, "test_efficientnet", 64)


@pytest.fixture(scope="session")
def config(data, weights, tmp_path_factory):
    "A frozen run of three folds on the tiny backbone."
    work = tmp_path_factory.mktemp("run")
    return TrainConfig(data=data, out=work / "run", n_folds=3, backbone="test_efficientnet",
                       backbone_weights=weights, tile_size=64, freeze_backbone=True,
                       use_aux_heads=True, epochs=4, cache_dir=work / "cache", device_type="cpu")


@pytest.fixture(scope="session")
def finished(config):
    "The run of `config`, finished; its folder."
    train(config, log=lambda line: None)
    return config.out


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Sixteen synthetic test photos, a bundle of 5 frozen folds of two grids, one of 3 fine-tuned folds."
    folder = tmp_path_factory.mktemp("work")
    write_dataset(folder / "data", n_photos=4, n_test=16, seed=5, height=64)
    untrained_bundle(folder / "frozen")
    untrained_bundle(folder / "tuned", ((2, 2),), 3, fine_tuned=True)
    return folder


@pytest.fixture(scope="module")
def whole(work):
    "The frozen bundle's submission, undisturbed."
    return predict_competition(work / "frozen", work / "data", work / "whole.csv", device_type="cpu")
