"""What benchmarks on the competition's photos are told alike."""
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class RealPhotos:
    "Photos, a backbone, and where its features are kept."

    data: Path  # competition folder
    backbone_weights: Path  # safetensors file
    cache_dir: Path  # features are kept here
    backbone: str = "vit_small_patch14_dinov2"
    tile_size: int = 252

    def options(self) -> dict:  # field of TrainConfig -> value
        "The same for a training on the CPU."
        return {f.name: getattr(self, f.name) for f in fields(RealPhotos)} | {"device_type": "cpu"}
