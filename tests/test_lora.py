"""The second stage: what learns and what rests, LoRA factors stored and merged without peft.
And intervals from two processes."""
import dataclasses
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_close, launch
from ended_runs import quiet
from safetensors.torch import load_file
from untrained import random_weights

from biomass_kit.data.files import file_digest
from biomass_kit.data.targets import TARGETS, BiomassError
from biomass_kit.evidence.space import as_options as options
from biomass_kit.features.backbone import (
    Backbone,
    adapted_layers,
    add_lora,
    build_backbone,
    lora_layers,
    take_lora,
)
from biomass_kit.inference.bundle import Bundle, read_bundle, save_backbone, save_lora
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.predict import predict_folder
from biomass_kit.training import loop
from biomass_kit.training.member import set_mode
from biomass_kit.training.run import train


def start(name, folder, size=64):
    return random_weights(folder / f"{name}.safetensors", name, size)


@pytest.fixture(scope="module")
def adapting(config, tmp_path_factory):
    "A two-stage run on a tiny transformer whose second stage learns LoRA factors, for two folds."
    work = tmp_path_factory.mktemp("lora")
    return dataclasses.replace(config, out=work / "run", backbone="test_vit",
                               backbone_weights=start("test_vit", work), freeze_backbone=False,
                               two_stage=True, freeze_epochs=1, epochs=3, lora_rank=2, backbone_lr=1e-2,
                               train_folds=(0, 1), use_aux_heads=False)


@pytest.fixture(scope="module")
def adapted(adapting):
    train(adapting, **quiet)
    return adapting.out


def agrees(run, data):
    """The largest difference between the out-of-fold rows and what the bundle's own members say
    of those photos."""
    oof, bundle = pd.read_csv(run / "oof.csv"), read_bundle(run)
    worst = 0.0
    for m in bundle.members:
        rows = oof[oof.fold == m["fold"]]
        alone = Ensemble(bundle._replace(manifest={**bundle.manifest, "members": [m]}), device_type="cpu")
        worst = max(
            worst,
            np.abs(alone.predict([data / p for p in rows.image_path])
                   - rows[[t + "_raw" for t in TARGETS]].to_numpy()).max())
    return worst


@pytest.mark.parametrize("name", ["test_vit", "test_vit4", "test_convnext"])
def test_merged_weights_are_what_peft_computes(name, tmp_path):
    torch.manual_seed(0)
    backbone, size = build_backbone(name, pretrained=False, tile_size=64)
    tiles, layers = torch.randint(0, 255, (3, 3, size, size), dtype=torch.uint8), lora_layers(backbone, size)
    add_lora(backbone, 3, layers, seed=1)
    assert sorted(adapted_layers(backbone)) == layers and {n.rpartition(".")[2] for n in layers} == (
        {"fc1", "fc2"} if "conv" in name else {"qkv", "proj", "fc1", "fc2"})
    for n, p in backbone.named_parameters():
        if n.endswith("gamma"):
            torch.nn.init.ones_(p)  # a new network's layer scale lets next to nothing of a block through
        if p.requires_grad: torch.nn.init.normal_(p, std=0.05)
    with torch.no_grad(): theirs = backbone.eval()(tiles)
    lora = take_lora(backbone)
    member = {
        "backbone": save_backbone(tmp_path, backbone) | save_lora(tmp_path, **lora), "tile_size": size,
        "model": {"dim": backbone.dim}}
    with torch.no_grad(): ours = Bundle(tmp_path, {}).load_backbone(member)(tiles)
    assert (ours - theirs).abs().max() < 1e-4 and (backbone.eval()(tiles) - theirs).abs().max() > 1e-2


def test_a_member_holds_only_what_it_learned(adapting, adapted, data):
    bundle = read_bundle(adapted)
    files = {
        kind: sorted(p.name for p in (adapted / "bundle").glob(f"{kind}-*"))
        for kind in ("backbone", "lora", "member")}
    assert ({kind: len(names) for kind, names in files.items()} == {"backbone": 1, "lora": 2, "member": 2}
            and set(sum(files.values(), [])) == set(bundle.manifest["files"]))
    base, begin = load_file(adapted / "bundle" / files["backbone"][0]), load_file(adapting.backbone_weights)
    assert all(torch.equal(base[k], begin[k]) for k in begin), "the base never moves"
    factors = load_file(adapted / "bundle" / files["lora"][0])
    assert max(v.abs().max() for k, v in factors.items() if k.endswith(".B")) > 1e-3, "it learned nothing"
    factors, whole = ((adapted / "bundle" / files[kind][0]).stat().st_size for kind in ("lora", "backbone"))
    assert factors < whole / 5
    ensemble = Ensemble(bundle, device_type="cpu")
    assert len(ensemble.passes) == len(ensemble.backbones) == 2, "other factors are other backbones"
    assert bundle.members[0]["config"]["lora_rank"] == 2 and agrees(adapted, data) < 1e-3


def test_prediction_needs_no_peft(adapted, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it would raise
    assert len(predict_folder(adapted, data / "test", tmp_path / "table.csv", device_type="cpu")) == 4


def test_lost_factors_are_learned_again(adapting, adapted, tmp_path):
    "A fold whose factors are gone is not finished; trained again, it ends with the same bytes."
    before = {p.name: file_digest(p) for p in (adapted / "bundle").glob("*.safetensors")}
    lost = next((adapted / "bundle").glob("lora-*"))
    lost.unlink()
    with pytest.raises(BiomassError, match="missing"): read_bundle(adapted)
    train(adapting, **quiet)
    assert {p.name: file_digest(p) for p in (adapted / "bundle").glob("*.safetensors")} == before
    with pytest.raises(BiomassError, match="lora_rank"):
        train(dataclasses.replace(adapting, lora_rank=4), **quiet)


@pytest.mark.parametrize("chosen", [dict(average="ema"), dict(average="swa"), dict(checkpoint="best"),
                                    dict(two_stage=False, freeze_epochs=10, grad_checkpointing=True,
                                         layer_decay=0.7)], ids=lambda c: next(iter(c)))
def test_lora_beside_other_options(chosen, adapting, data, tmp_path):
    run = dataclasses.replace(adapting, out=tmp_path / "run", train_folds=(0,), epochs=2, **chosen)
    train(run, **quiet)
    assert agrees(run.out, data) < 1e-3
    begin, base = load_file(run.backbone_weights), load_file(next((run.out / "bundle").glob("backbone-*")))
    assert all(torch.equal(base[k], begin[k]) for k in begin)


@pytest.mark.long
def test_two_processes_learn_one_set_of_factors(adapting, data, tmp_path):
    run = dataclasses.replace(adapting, out=tmp_path / "run", train_folds=(0,), epochs=2, shard="photos")
    done = launch(2, "biomass_kit.train", *options(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((run.out / "bundle").glob("lora-*"))) == 1 and agrees(run.out, data) < 1e-3


def test_layers_that_are_not_called_are_left_alone():
    "EVA-02's `qkv` is multiplied by hand: factors there would be read by nobody."
    layers = lora_layers(build_backbone("eva02_tiny_patch14_224", pretrained=False, tile_size=28)[0], 28)
    assert {n.rpartition(".")[2] for n in layers} == {"proj", "fc1", "fc2"}


def test_what_cannot_be_adapted_is_refused(adapting, weights, monkeypatch, tmp_path):
    plain = dataclasses.replace(
        adapting, out=tmp_path / "run", backbone="test_efficientnet", backbone_weights=weights)
    with pytest.raises(BiomassError, match="test_efficientnet has no linear"): train(plain, **quiet)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BiomassError, match="pip install peft"):
        train(dataclasses.replace(adapting, out=tmp_path / "run"), **quiet)
    assert not (tmp_path / "run/config.json").exists(), "refused before the folder is claimed"


@pytest.fixture
def watch(monkeypatch):
    """The backbone's buffers when each stage starts,
    and the mode in which each stage's batches pass through it."""
    seen, make, forward = {"buffers": [], "modes": []}, loop.make_optimizer, Backbone.forward

    def starts(model, backbone, stage, c):
        seen["buffers"].append({k: v.clone() for k, v in backbone.model.named_buffers()})
        seen["modes"].append(set())
        return make(model, backbone, stage, c)

    def passes(self, tiles):
        if seen["modes"] and not torch.is_inference_mode_enabled(): seen["modes"][-1].add(self.training)
        return forward(self, tiles)

    monkeypatch.setattr(loop, "make_optimizer", starts)
    monkeypatch.setattr(Backbone, "forward", passes)
    return seen


def test_a_frozen_stage_leaves_running_statistics_alone(config, tmp_path, watch):
    "Batch norm in train mode would drift under heads that are told the backbone is frozen."
    train(
        dataclasses.replace(
            config, out=tmp_path / "run", freeze_backbone=False, two_stage=True, freeze_epochs=1, epochs=2,
            train_folds=(0,)), **quiet)
    first, second = watch["buffers"]
    assert any("running_mean" in k for k in first) and all(torch.equal(first[k], second[k]) for k in first)
    assert watch["modes"] == [{False}, {True}]
    left = load_file(next((tmp_path / "run/bundle").glob("backbone-*")))
    assert not all(torch.equal(first[k], left[k]) for k in first if "running" in k), (
        "the second stage has its own statistics")


def test_lora_leaves_running_statistics_alone(config, tmp_path, watch):
    "A network with batch norm and attention: beside LoRA factors the base stays what it was, all of it."
    begin = start("mobilevit_xxs", tmp_path)
    train(dataclasses.replace(config, out=tmp_path / "run", backbone="mobilevit_xxs", backbone_weights=begin,
                              freeze_backbone=False, epochs=1,
                              batch_size=10, lora_rank=2, train_folds=(0,)), **quiet)
    left, begin = load_file(next((tmp_path / "run/bundle").glob("backbone-*"))), load_file(begin)
    assert watch["modes"] == [{True}] and any("running_mean" in k for k in begin) and all(
        torch.equal(begin[k], left[k]) for k in begin)


@pytest.mark.parametrize("name, rank", [("test_vit", 0), ("test_vit", 2), ("vit_small_patch16_dinov3", 2)])
def test_checkpointing_changes_no_gradient(name, rank):
    "Nor does it lose those of the first block, whose input asks for none when only factors learn."
    def gradients(checkpointing):
        torch.manual_seed(0)
        backbone, size = build_backbone(name, pretrained=False, tile_size=64)
        if checkpointing: backbone.model.set_grad_checkpointing()
        if rank: add_lora(backbone, rank, lora_layers(backbone, size), seed=0)
        for n, p in backbone.named_parameters():
            if "lora_B" in n: torch.nn.init.normal_(p, std=0.05)
        set_mode(backbone, True)
        tiles = torch.arange(2 * 3 * 64 * 64).remainder(251).to(torch.uint8).view(2, 3, 64, 64)
        backbone(tiles).square().mean().backward()
        return {n: p.grad for n, p in backbone.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and len(plain) > 40
    for n in plain: assert torch.allclose(plain[n], again[n], atol=1e-6) and plain[n].abs().max() > 0, n


@pytest.mark.long
def test_two_processes_share_photos_with_intervals(config, data, tmp_path):
    train(
        dataclasses.replace(config, out=tmp_path / "run", epochs=1, uncertainty=True, train_folds=(0,)),
        **quiet)
    alone = predict_folder(tmp_path / "run", data / "test", tmp_path / "alone.csv", device_type="cpu")
    done = launch(2, "biomass_kit.predict", "--weights", tmp_path / "run", "--photos", data / "test",
                  "--out", tmp_path / "shared.csv",
                  "--device-type", "cpu", "--no-cache")
    assert done.returncode == 0, done.stderr[-3000:]
    shared = pd.read_csv(tmp_path / "shared.csv")
    grams = [c for c in alone if c.startswith(TARGETS)]
    assert [*shared] == [*alone] and len(grams) == 15
    assert_close(shared[grams], alone[grams])
