"""Any timm backbone: weight files as people have them, names of the hub, tiles of odd sizes,
rotary positions."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from biomass_kit.data.targets import BiomassError
from biomass_kit.features.backbone import (
    Backbone,
    backbone_digest,
    build_backbone,
    lora_layers,
    own_tile_size,
)
from biomass_kit.features.device import autocast
from biomass_kit.inference.bundle import Bundle, save_backbone

PREFIXES = ("", "module.", "model.", "backbone.", "encoder.", "_orig_mod.",
            "module.backbone.", "student.backbone.", "model.backbone.")
CLASSIFIER = {"head.weight": torch.zeros(9, 64), "head.bias": torch.zeros(9)}
# with four registers, rotary positions and patches of 16, as the large ones
ROTARY = "vit_small_patch16_dinov3"


@pytest.fixture(scope="module")
def state():
    "Random weights of a tiny transformer, by timm's names."
    torch.manual_seed(0)
    return build_backbone("test_vit", pretrained=False)[0].model.state_dict()


def written(tensors, folder):
    "A weight file."
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def loaded(name, path):
    "A backbone's weights as they came out of a file."
    model = build_backbone(name, weights=path)[0].model
    assert "state_dict" not in model.pretrained_cfg, "the tensors are kept twice"
    return model.state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for k in expected: assert torch.equal(found[k], expected[k]), k


def refused(name, **options):
    "What is said, in one line, of a backbone that cannot be had."
    with pytest.raises(BiomassError) as e: build_backbone(name, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_beginning_of_all_names(state, tmp_path, prefix):
    "Alone, with a classifier inside what holds the backbone, and with a decoder beside it."
    bare = {prefix + k: v for k, v in state.items()}
    classifier = {prefix + k: v for k, v in CLASSIFIER.items()}
    for beside in ({}, classifier, {"decoder.norm.weight": torch.zeros(3)}):
        assert_same(loaded("test_vit", written(bare | beside, tmp_path)), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_become_float32(state, tmp_path, dtype):
    for prefix in ("", "backbone."):
        found = loaded("test_vit", written({prefix + k: v.to(dtype) for k, v in state.items()}, tmp_path))
        assert_same(found, {k: v.to(dtype).float() for k, v in state.items()})


def test_position_embeddings_are_resized_behind_a_prefix_too(tmp_path):
    "Weights of a model for 96 pixels, read by one for 160: timm's own filter sees them in either case."
    torch.manual_seed(0)
    small = timm.create_model("test_vit", num_classes=0, img_size=96).state_dict()
    plain = loaded("test_vit", written(small, tmp_path))
    prefixed = loaded("test_vit", written({"encoder." + k: v for k, v in small.items()}, tmp_path))
    assert plain["pos_embed"].shape != small["pos_embed"].shape
    assert_same(prefixed, plain)


def test_tensors_beside_a_backbone_that_timm_loads_strictly(tmp_path):
    "DINO's and other models have no classifier in timm, so timm refuses whatever stands beside the backbone."
    name = "vit_pe_spatial_tiny_patch16_512"
    torch.manual_seed(0)
    state = build_backbone(name, pretrained=False)[0].model.state_dict()
    assert_same(loaded(name, written({**state, "decoder.weight": torch.zeros(3)}, tmp_path)), state)


def test_batch_norm_without_its_counter(tmp_path):
    torch.manual_seed(0)
    state = build_backbone("test_efficientnet", pretrained=False)[0].model.state_dict()
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(kept) < len(state)
    for prefix in ("", "model."):
        assert_same(
            loaded("test_efficientnet", written({prefix + k: v for k, v in kept.items()}, tmp_path)), state)


def test_a_model_whose_hub_weights_are_of_another_format(tmp_path):
    "Up to timm 1.0.26, a file given for such a model was opened as NumPy's, and refused as a pickle."
    name = "vit_tiny_patch16_224.augreg_in21k"
    torch.manual_seed(0)
    state = build_backbone(name, pretrained=False)[0].model.state_dict()
    for prefix in ("", "model."):
        assert_same(loaded(name, written({prefix + k: v for k, v in state.items()}, tmp_path)), state)


def as_transformers_writes(state):
    "The same tensors under names of the kind that Hugging Face's transformers give."
    names = {k: k.replace("blocks.", "encoder.layer.").replace("attn.", "attention.") for k in state}
    names["cls_token"] = "embeddings.cls_token"
    names["patch_embed.proj.weight"] = "embeddings.patch_embeddings.projection.weight"
    return {names[k]: v for k, v in state.items()}


def test_names_of_another_program_are_shown_beside_timms(state, tmp_path):
    said = refused("test_vit", weights=written(as_transformers_writes(state), tmp_path))
    for words in ("its 78 tensors are called embeddings.cls_token [1, 1, 64]",
                  "embeddings.patch_embeddings.projection.weight [64, 3, 16, 16]",
                  "the model's 78 blocks.0.attn.proj.bias [64]", "https://huggingface.co/timm/test_vit"):
        assert words in said, said


def test_files_that_cannot_fill_a_model(state, tmp_path):
    two = {f"{who}.{k}": v.clone() for who in ("student", "teacher") for k, v in state.items()}
    said = refused("test_vit", weights=written(two, tmp_path))
    assert "holds test_vit 2 times, under student. and teacher.; keep one" in said
    for prefix in ("", "backbone."):
        short = {prefix + k: v for k, v in state.items() if k != "norm.bias"}
        narrow = {prefix + k: v[:32] if k == "norm.bias" else v for k, v in state.items()}
        assert "lacks 1 of 78 tensors, first norm.bias" in refused(
            "test_vit", weights=written(short, tmp_path))
        said = refused("test_vit", weights=written(narrow, tmp_path))
        assert "norm.bias is [32] there and [64] in the model" in said
    page, pickled = tmp_path / "page.safetensors", tmp_path / "w.pth"
    page.write_text("<!DOCTYPE html>")
    torch.save(state, pickled)
    assert "cannot be read" in refused("test_vit", weights=page)
    assert "only .safetensors files are loaded, since they cannot" in refused("test_vit", weights=pickled)


@pytest.mark.parametrize("name, words", [
    ("hf_hub:timm/vit_base_patch14_reg4_dinov2.lvd142m", "write --backbone "
                                                         "vit_base_patch14_reg4_dinov2.lvd142m;"),
    ("hf-hub:timm/test_vit", "write --backbone test_vit;"), ("timm/test_vit", "write --backbone test_vit;"),
    ("facebook/dinov2-base", "download model.safetensors from https://huggingface.co/facebook/dinov2-base"),
    ("hf_hub:grass/own_vit", "download model.safetensors from https://huggingface.co/grass/own_vit"),
    ("vit_base_patch14_reg4_dinov2.lvd124m", "did you mean vit_base_patch14_reg4_dinov2.lvd142m"),
    ("test_vitt", "did you mean test_vit"),
    ("", "timm.list_models()"),
])
def test_names_as_the_hub_writes_them(name, words):
    for pretrained in (True, False): assert words in refused(name, pretrained=pretrained)


SIZES = [  # (model, tile size, what is advised instead, or None where the size works)
    ("test_vit", 252, 256), ("test_vit", 14, 16), ("vit_tiny_r_s16_p8_224", 252, None),
    ("eva02_tiny_patch14_224", 252, None), ("eva02_tiny_patch14_224", 256, 252),
    ("xcit_nano_12_p16_224", 224, None), ("xcit_nano_12_p16_224", 252, 256),
    ("hiera_tiny_224", 252, 256), ("maxvit_pico_rw_256", 252, 256), ("crossvit_tiny_240", 252, 240),
    ("levit_128s", 252, 256), ("efficientvit_m0", 224, None), ("pvt_v2_b0", 256, None),
    ("mobilevit_xxs", 252, None),
    ("test_convnext", 252, None), ("test_convnext", 14, 32),
]


@pytest.mark.parametrize("name, size, advised", SIZES)
def test_tile_sizes_that_a_model_takes(name, size, advised):
    "What is built gives features; what is refused names a size that is then taken."
    if advised:
        said = refused(name, pretrained=False, tile_size=size)
        assert said.startswith(f"--tile-size {size}: {name} takes no tiles of this size")
        assert f"use --tile-size {advised}," in said and f"own {own_tile_size(name)}" in said
    backbone, size = build_backbone(name, pretrained=False, tile_size=advised or size)
    with torch.inference_mode(): found = backbone.eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    assert found.shape == (1, backbone.dim) and torch.isfinite(found).all()


def test_a_size_that_does_not_work_is_not_blamed_on_the_weights(tmp_path):
    "XCiT is not even built for such tiles, so its file was said not to fit."
    torch.manual_seed(0)
    path = written(build_backbone("xcit_nano_12_p16_224", pretrained=False)[0].model.state_dict(), tmp_path)
    for weights in (path, None):
        assert "use --tile-size 256" in refused("xcit_nano_12_p16_224", weights=weights, tile_size=252)


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    "A backbone with rotary positions and the file of its random weights."
    torch.manual_seed(0)
    backbone, _ = build_backbone(ROTARY, pretrained=False, tile_size=64)
    return backbone.eval(), written(backbone.model.state_dict(), tmp_path_factory.mktemp("rotary"))


def some_tiles(size):
    "Two tiles of noise."
    return torch.randint(
        0, 255, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def test_what_is_read_of_a_rotary_backbone(rotary):
    """Class token and patches without the four registers, at several sizes;
    the last of its blocks is its output."""
    backbone, _ = rotary
    assert backbone.prefix == 5 and backbone.pooling == "cls_mean"
    assert not [k for k in backbone.model.state_dict() if "rope" in k]
    for size in (64, 160):
        tiles = some_tiles(size)
        with torch.inference_mode():
            tokens = backbone.model.forward_features((tiles.float() - backbone.mean) / backbone.std)
            found, blocks = backbone(tiles), Backbone(backbone.model, ROTARY, blocks=(3, 11)).eval()(tiles)
        assert tokens.shape[1] == 5 + (size // 16) ** 2
        assert torch.allclose(found, torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1), atol=1e-5)
        assert blocks.shape == (2, 4 * 384) and torch.allclose(blocks[:, 768:], found, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_rotary_backbone_in_half_precision(rotary, precision):
    "Positions are kept in float32: features differ by rounding alone, and not more at a larger size."
    backbone, _ = rotary
    for size in (64, 128):
        tiles = some_tiles(size)
        with torch.inference_mode():
            whole = backbone(tiles)
            with autocast(torch.device("cpu"), precision): half = backbone(tiles)
        assert half.dtype == torch.float32 and (half - whole).norm() < 0.03 * whole.norm()


def test_a_rotary_backbone_travels_in_a_bundle(rotary, tmp_path):
    "Weights, digest and features as they were; LoRA finds its layers."
    backbone, path = rotary
    again, size = build_backbone(ROTARY, path, 96)
    assert backbone_digest(again) == backbone_digest(backbone)
    member = {"backbone": save_backbone(tmp_path, again), "tile_size": size, "model": {"dim": again.dim}}
    assert load_file(tmp_path / member["backbone"]["file"]).keys() == load_file(path).keys()
    tiles = some_tiles(96)
    there = Bundle(tmp_path, {}).load_backbone(member)
    with torch.inference_mode(): assert torch.allclose(there(tiles), backbone(tiles), atol=1e-4)
    assert {n.rpartition(".")[2] for n in lora_layers(again, size)} == {"qkv", "proj", "fc1", "fc2"}
