"""The paper's own tables: those that run here, and what the others would take, which need ImageNet and a GPU.

Tables 2, 7 and 8 and Figures 6 and 7 compare parts of the method, so any trained model shows them. Tables 1 and 5 are of nine
models on ImageNet-1k, extracted by the paper's recipe and tuned for 30 epochs. Their hours and memory are modelled: a GPU that
reaches half of 19.5 TFLOP/s in float32, and a clustering that takes the 170 s of a layer of 1,536 neurons that were measured on
two cores (docs/scale.md), in proportion to the neurons. Memory is that of `moee.space.estimate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from moee.config import PAPER_TOKENS, FinetuneConfig
from moee.space.estimate import Extraction, LayerShape, ModelShape, extraction, tuning

NAME, TABLES = "paper", ("2", "7", "8", "fig6", "fig7")
ELSEWHERE = "Tables 1 and 5"
IMAGES, HELD_OUT, SIDE = 1_281_167, 50_000, 224  # of ImageNet-1k
FLOPS = 0.5 * 19.5e12  # a second, assumed
CLUSTERING_S, NEURONS = 170.0, 1536  # of a layer of so many neurons
EXPERTS = 8  # of a layer, about
PASSES = 4  # of a model's MACs that a step takes for an image: the teacher's forward pass, the student's, and twice that backward


@dataclass(frozen=True)
class Published:
    """A dense model of the tables: its name in timm, MACs and parameters, and by stage the blocks, width and tokens of an image.
    MACs and parameters are those of `moee inspect`."""

    name: str
    macs: float
    params: float
    stages: tuple[tuple[int, int, int], ...]

    @property
    def shape(self) -> ModelShape:
        layers = tuple(LayerShape(dim, 4 * dim, tokens) for blocks, dim, tokens in self.stages for _ in range(blocks))
        return ModelShape(int(self.params), 3 * SIDE * SIDE, layers)

    @property
    def clustering_hours(self) -> float:
        """On two cores."""
        return sum(CLUSTERING_S * layer.hidden / NEURONS for layer in self.shape.layers) / 3600

    @property
    def tuning_hours(self) -> float:
        """On one GPU."""
        return FinetuneConfig().epochs * IMAGES * PASSES * 2 * self.macs / FLOPS / 3600

    @property
    def host_bytes(self) -> int:
        """Of the extraction, at its peak."""
        work = Extraction(
            images=IMAGES, held_out=HELD_OUT, tokens=PAPER_TOKENS, clustered=PAPER_TOKENS, by_density=True, experts=EXPERTS
        )
        return max(need.memory_bytes for need in extraction(self.shape, work)) + 4 * int(self.params)

    @property
    def gpu_bytes(self) -> int:
        """Of the tuning: the student's steps, and the teacher's weights."""
        weights = int(self.params)
        return tuning(self.shape, FinetuneConfig().batch_size, 1, weights).memory_bytes + 2 * 4 * weights


def _columns(width: int, *blocks: int) -> tuple[tuple[int, int, int], ...]:
    """Four stages, each of twice the width and a quarter of the tokens of the one before."""
    return tuple((count, width << at, 3136 >> 2 * at) for at, count in enumerate(blocks))


MODELS = (
    Published("deit_tiny_patch16_224", 1.26e9, 5.72e6, ((12, 192, 197),)),
    Published("deit_small_patch16_224", 4.61e9, 22.05e6, ((12, 384, 197),)),
    Published("deit_base_patch16_224", 17.58e9, 86.57e6, ((12, 768, 197),)),
    Published("swin_tiny_patch4_window7_224", 4.49e9, 28.29e6, _columns(96, 2, 2, 6, 2)),
    Published("swin_small_patch4_window7_224", 8.74e9, 49.61e6, _columns(96, 2, 2, 18, 2)),
    Published("swin_base_patch4_window7_224", 15.43e9, 87.77e6, _columns(128, 2, 2, 18, 2)),
    Published("convnext_tiny", 4.46e9, 28.59e6, _columns(96, 3, 3, 9, 3)),
    Published("convnext_small", 8.68e9, 50.22e6, _columns(96, 3, 3, 27, 3)),
    Published("convnext_base", 15.36e9, 88.59e6, _columns(128, 3, 3, 27, 3)),
)


def command() -> str:
    """One line that makes Tables 1 and 5 on a machine with a GPU and ImageNet-1k in the folder IMAGENET. What is there is not
    made again."""
    names = " ".join(model.name for model in MODELS)
    made = "test -d OUT/$m || moee extract $m --pretrained --data IMAGENET --preset paper --device cuda --out OUT/$m"
    tuned = "test -d OUT/$m-tuned || moee finetune OUT/$m --device cuda --out OUT/$m-tuned"
    return f"for m in {names}; do {made}; {tuned}; done"


def lines() -> list[str]:
    """What the tables that do not run here would take, as sentences and one line a model."""
    hours = sum(model.clustering_hours + model.tuning_hours for model in MODELS)
    said = [
        f"{ELSEWHERE} need ImageNet-1k and a GPU, and were not run. Modelled, for one GPU at half of 19.5 TFLOP/s and two cores "
        f"that cluster: {hours:,.0f} h in all.",
    ]
    for model in MODELS:
        said.append(
            f"  {model.name}: clustering {model.clustering_hours:.1f} h, tuning {model.tuning_hours:,.0f} h; memory "
            f"{model.host_bytes / 2**30:.0f} GiB (extraction), {model.gpu_bytes / 2**30:.0f} GiB (GPU, 32 images a step)"
        )
    return [*said, command()]
