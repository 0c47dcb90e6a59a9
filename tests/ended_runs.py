"""Runs that end as if killed, and what a run leaves behind."""
import itertools

import pytest

from biomass_kit.data.files import file_digest
from biomass_kit.training import loop
from biomass_kit.training.loop import CHECKPOINT
from biomass_kit.training.run import train

quiet = dict(log=lambda line: None)


class Killed(Exception): pass


def left(folder):
    "What a run leaves: digests of its members, its predictions and its curves."
    members = {p.name: file_digest(p) for p in sorted((folder / "bundle").glob("*.safetensors"))}
    return members, (folder / "oof.csv").read_bytes(), (folder / "history.csv").read_bytes()


def killed_after(monkeypatch, config, epochs):
    "Start a run that ends, as if killed, when it has kept so many epochs."
    plain, count = loop.Loop.write, itertools.count(1)

    def write(self):
        plain(self)
        if next(count) == epochs: raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "write", write)
        with pytest.raises(Killed): train(config, **quiet)
    assert list((config.out / "folds").glob(f"*{CHECKPOINT}"))
