"""What each stage takes beyond the loaded dense model, from shapes alone.

Numbers are float32 unless a term says otherwise. D is the width of a layer's tokens, H its hidden neurons, N the tokens of an
image there, B images of a batch, T tokens a layer, K experts. Where each term comes from:

- A forward pass: B N (12 D + 2 H) of the widest layer, for stream, its copies in the frames around, norm, attention's parts and
  those of windows, and the hidden layer before and behind its activation; three copies of the images.
- What threads and libraries hold beside their results, and holes that the C library keeps: 128 MiB in every stage.
- Narrower heads: T (5 D + an image's share) of the tokens that an attention is fitted on, for what a waiting pass holds and what
  the projection reads; a part that runs; all blocks' inputs of the probes. And 3 D^2 in float64 of every attention, for moments.
- Calibration: an int64 permutation of the data set's tokens where not all are kept (`_Sampler._draw`), and a forward pass
  with the layer's tokens picked. On disk T D in half precision a layer.
- Grouping, a layer: T (D + 3 H) of the clustered tokens, for members, activations and a centred copy; another T H by density
  (`moee.clustering.pairwise`), 9 H^2 for `eigh` in float64 with principal components. Or a chunk's tokens (D + 4 H), for the
  statistics (`MomentAccumulator.add`).
- Kept from there on: moments of 3 K H in float64 a layer.
- Sensitivity: T (6 D + 3 H) of every layer for the T of a backward pass, which needs of a block the inputs of two norms, queries,
  keys, values, their product and the activation's input; the squared deviations (`_Accumulator.see`) and what they come from.
  And 3 (D^2 + K H) in float64 of every layer and objective: sums, the part that is added, the total (`_Accumulator.take`,
  `OrderedSum`).
- Kept from there on: D^2 + K H in float64 a layer (`Sensitivity`).
- The cut model: 2 D H a layer at most, 3 D H of a gated one; less where one expert keeps what a budget leaves. All else are the
  dense model's own weights (`moee.models.model.sharing`).
- Refit: T (4 D + an image's share) for what a waiting pass holds, the model's input, a block's, the stream and the layer's
  input; T 8 D more for the dense model's pass, its stream and the targets. T (8 D + 4 H) of the one part that runs or is summed
  up. And for one layer 12 H^2 + 8 H D: sums of two parts with held-out tokens apart, or copies and factors in float64, and
  LAPACK's own (`solve_ridge`, `eliminate`).
- A layer that is solved from its sampled tokens alone (`corp`): T 2 D of them, a chunk's (8 D + 4 H), and the same matrices
  of the neurons that stay.
- Decomposed maps: B N 9 D for the pass over all images of the calibration, which go through the layers at once; or B N 4 D while
  it waits, T (4 D + 3 H) of the tokens, and 12 H^2 + 8 H D + 20 D^2.
- Measurement: a forward pass, and 1.5 of each number of the held-out feature maps, in half precision: the dense model's, these in
  batches, and whole.
- Fine-tuning: 6 of every trained weight, for the student, gradients, AdamW's two moments, best and tried weights. And
  B N (10 D + H) of every layer for the B images of a part, what a backward pass needs where weights have gradients: the inputs of
  norms and products; a routed layer keeps its input alone, and computes the rest again.
- Comparing experts, a layer: T 2 D of its tokens; 3 K D and 6 H of each token of a part, for the outputs of all experts and the
  hidden layer in float64 (`Mixture.outputs`, `merged_layer`); K^3 in float64 of their products.
- Export: 4 of every weight, since graphs hold weights of their own, and so does ONNX Runtime; 2 for the trial of one graph.

Held against what a tiny and a small model really take by tests/moee/test_space.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moee.space.limits import OUTPUTS, USUAL, Limits

FLOAT, HALF = 4, 2
CHUNK = 8192  # tokens of a matrix product
BUFFERS = 1 << 25  # numbers that threads and libraries hold, and holes between what was freed
PARTS = 8  # of the images of a refit, in passes that wait for each other
MOST_MAPS = 1 << 30  # bytes of feature maps that a measurement keeps


class LayerShape(NamedTuple):
    """An MLP: width of its tokens, hidden neurons, tokens of an image, maps between the two (three where it is gated)."""

    dim: int
    hidden: int
    tokens: int
    maps: int = 2

    @property
    def weights(self) -> int:
        return self.maps * self.dim * self.hidden


@dataclass(frozen=True)
class ModelShape:
    """A dense model: its trainable `weights` and the numbers of an `image`, the MLPs that are cut in their order, and their
    `share` of its MACs."""

    weights: int
    image: int
    layers: tuple[LayerShape, ...]
    share: float = 1.0

    @property
    def feature_map(self) -> int:
        """Numbers of an image's last feature map, about."""
        return self.layers[-1].dim * self.layers[-1].tokens if self.layers else 0


@dataclass(frozen=True)
class Extraction:
    """What an extraction is asked for. `images`: of calibration, collages included; `held_out`: of the measurement. `tokens`: a
    layer, 0 where nothing is calibrated; `clustered`: of these in the clustering, 0 for none; `by_density`, `components`: how.
    `experts`: a layer, about. `objectives`: of the sensitivity on `measured` tokens, 0 for none. `refitted`: tokens of the refit,
    0 for none, to the dense `stream` or not. `kept`: the share of the MLPs' weights that the layers store, at
    most. `solved`: the share of its neurons that a layer keeps which is solved from its sampled tokens alone, 0 for none.
    `decomposed`: images that the maps are decomposed on, 0 for none. `narrowed`: tokens that an attention is fitted on, 0 for
    none, its widths tried on so many images, `probes`. `jobs`: layers side by side."""

    images: int
    held_out: int
    tokens: int
    clustered: int = 0
    by_density: bool = False
    components: bool = False
    experts: int = 1
    objectives: int = 0
    measured: int = 0
    refitted: int = 0
    stream: bool = False
    kept: float = 1.0
    solved: float = 0.0
    decomposed: int = 0
    narrowed: int = 0
    probes: int = 0
    jobs: int = 1


@dataclass(frozen=True)
class Need:
    """What a stage takes at its peak, in bytes."""

    stage: str
    memory_bytes: int
    disk_bytes: int = 0


def forward(model: ModelShape, images: int) -> int:
    """Bytes of a forward pass."""
    widest = max((each.tokens * (12 * each.dim + each.maps * each.hidden) for each in model.layers), default=0)
    return FLOAT * (images * (widest + 3 * model.image) + BUFFERS)


def matrices(layer: LayerShape, share: float = 1.0) -> int:
    """Numbers of the least-squares sums, and their solution, of a layer that keeps so much of its neurons."""
    kept = round(share * layer.hidden)
    return 12 * kept**2 + 8 * kept * layer.dim


def summed(layer: LayerShape, tokens: int, share: float = 1.0) -> int:
    """Numbers of so many of a layer's tokens while they run through it, or are summed up."""
    return tokens * (8 * layer.dim + round((layer.maps + 2 * share) * layer.hidden))


def sampled(layer: LayerShape, images: int, tokens: int) -> int:
    """Tokens of a layer that are kept of so many images."""
    return min(tokens, images * layer.tokens)


def calibration(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> Need:
    """The pass that keeps tokens on disk."""
    totals = {work.images * each.tokens for each in model.layers if work.images * each.tokens > work.tokens}
    kept = sum(sampled(each, work.images, work.tokens) * each.dim for each in model.layers)
    images = min(limits.forward, work.images)
    running = forward(model, images) + FLOAT * images * max(2 * each.tokens * each.dim for each in model.layers)
    return Need("calibration", 2 * FLOAT * sum(totals) + running, HALF * kept)


def grouping(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> Need:
    """Clustering and statistics; layers side by side take as much each."""
    most = 0
    for each in model.layers:
        count = sampled(each, work.images, work.tokens)
        clustered = min(work.clustered, count)
        wide = clustered * (each.dim + (3 + work.by_density) * each.hidden)
        most = max(
            most, FLOAT * (wide + 9 * each.hidden**2 * work.components), FLOAT * min(CHUNK, count) * (each.dim + 4 * each.hidden)
        )
    name = "clustering" if work.clustered else "statistics"
    return Need(name, limits.side_by_side(work.jobs) * most + FLOAT * BUFFERS)


def heads(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> Need:
    """Narrower heads: passes that wait at every attention, or the probes through the model at once."""
    if not work.narrowed:
        return Need("narrower heads", 0)
    widest = max(model.layers, key=lambda each: each.tokens * each.dim)
    images, probes = min(work.images, max(4, work.narrowed // widest.tokens)), min(work.probes, work.images)
    held = images * (5 * widest.tokens * widest.dim + model.image) + probes * model.image + BUFFERS
    held += summed(widest, -(-images // min(PARTS, images)) * widest.tokens)
    tried = probes * (sum(each.tokens * each.dim for each in model.layers) + model.image) + images * model.image
    moments = sum(6 * each.dim**2 for each in model.layers)
    return Need("narrower heads", max(FLOAT * held, FLOAT * tried + forward(model, probes)) + FLOAT * moments)


def sensitivity(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> Need:
    """Backward passes."""
    if not work.objectives:
        return Need("sensitivity", 0)
    images = max(1, min(work.images, limits.backward // max(each.tokens for each in model.layers)))
    graph = sum(images * each.tokens * (6 * each.dim + 3 * each.hidden) for each in model.layers)
    sums = sum(6 * work.objectives * (each.dim**2 + work.experts * each.hidden) for each in model.layers)
    return Need("sensitivity", FLOAT * (graph + sums + 3 * images * model.image + BUFFERS))


def passes(work: Extraction, limits: Limits = USUAL) -> int:
    """Passes of the refit that wait for each other, each in a thread of its own; as many again run of the dense model."""
    wanted = limits.refitted(work.refitted)
    return max(1, min(PARTS, wanted // (256 * work.experts), work.images))


def refit(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> Need:
    """Waiting passes, and one layer's sums and solution."""
    widest = max(model.layers, key=lambda each: each.hidden)
    if work.solved:
        counts = [sampled(each, work.images, work.tokens) for each in model.layers]
        pairs = zip(model.layers, counts, strict=True)
        most = max(2 * count * each.dim + summed(each, min(CHUNK, count), work.solved) for each, count in pairs)
        return Need("solution", FLOAT * (most + matrices(widest, work.solved) + BUFFERS))
    if not work.refitted:
        return Need("refit", 0)
    most, at_once = 0, passes(work, limits)
    for each in model.layers:
        count = sampled(each, work.images, limits.refitted(work.refitted))
        held = count * ((4 + 8 * work.stream) * each.dim + model.image // max(1, each.tokens))
        most = max(most, held + summed(each, -(-count // at_once)))
    return Need("refit", FLOAT * (most + matrices(widest) + BUFFERS))


def decomposition(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> list[Need]:
    """Every stage of a decomposition: the pass over all images, which waits while a layer is made, and the measurement."""
    widest = max(model.layers, key=lambda each: each.hidden)
    dim, hidden, images = widest.dim, widest.hidden, min(work.decomposed, work.images)
    tokens = max(sampled(each, images, work.tokens) for each in model.layers)
    running = images * max(each.tokens * each.dim for each in model.layers)
    layer = tokens * (4 * dim + 3 * hidden) + matrices(widest) + 20 * dim**2
    most = max(9 * running, 4 * running + layer) + images * model.image + BUFFERS
    kept = sum(sampled(each, images, work.tokens) * each.dim for each in model.layers)
    after, stores = measurement(model, work, limits), sum(each.weights for each in model.layers)
    return [
        Need("decomposition", FLOAT * most, HALF * kept),
        Need(after.stage, after.memory_bytes + FLOAT * stores),
    ]


def measurement(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> Need:
    """The held-out images through the cut model, beside what is kept of the dense one."""
    maps = HALF * model.feature_map * work.held_out
    running = forward(model, min(limits.forward, max(work.images, work.held_out)))  # a probe is fitted on the training images
    return Need("measurement", running + 3 * maps * (maps <= MOST_MAPS))


def extraction(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> list[Need]:
    """Every stage in turn, with what is kept of those before it."""
    if work.decomposed:
        return decomposition(model, work, limits)
    if not work.tokens:
        return [measurement(model, work, limits)]
    moments = FLOAT * sum(6 * work.experts * each.hidden for each in model.layers)
    found = FLOAT * sum(2 * (each.dim**2 + work.experts * each.hidden) for each in model.layers) * bool(work.objectives)
    stores = round(work.kept * FLOAT * sum(each.weights for each in model.layers))
    stages = [(heads, 0), (calibration, 0), (grouping, 0), (sensitivity, moments), (refit, moments + found + stores)]
    stages += [(measurement, moments + found + stores)]
    needs = [(make(model, work, limits), held) for make, held in stages]
    return [Need(each.stage, each.memory_bytes + held, each.disk_bytes) for each, held in needs if each.memory_bytes]


def comparison(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> Need:
    """The experts of a layer beside each other, where they become fewer."""
    most = 0
    for each in model.layers:
        count = sampled(each, work.images, work.tokens)
        part = min(count, max(1, OUTPUTS // (work.experts * each.dim)))
        most = max(most, 2 * count * each.dim + part * (3 * work.experts * each.dim + 6 * each.hidden) + 2 * work.experts**3)
    return Need("comparison", FLOAT * most)


def shrinking(model: ModelShape, work: Extraction, limits: Limits = USUAL) -> list[Need]:
    """Every stage of making experts fewer, with the smaller layers beside those that they are made from."""
    stores = FLOAT * sum(each.weights for each in model.layers)
    stages = [(calibration, 0), (comparison, stores), (refit, stores), (measurement, stores)]
    needs = [(make(model, work, limits), held) for make, held in stages]
    return [Need(each.stage, each.memory_bytes + held, each.disk_bytes) for each, held in needs if each.memory_bytes]


def tuning(model: ModelShape, batch: int, accumulate: int, trained: int, checkpointing: bool = False) -> Need:
    """Steps on `batch` images in `accumulate` parts, of `trained` weights."""
    part = -(-batch // accumulate)
    each_layer = [part * each.tokens * (10 * each.dim + each.hidden) for each in model.layers]
    inputs = part * sum(each.tokens * each.dim for each in model.layers)
    graph = inputs + max(each_layer, default=0) if checkpointing else sum(each_layer)
    return Need("fine-tuning", FLOAT * (6 * trained + graph + 2 * part * model.image))


def trial(weights: int) -> Need:
    """The trial export of the dense model."""
    return Need("trial export", 2 * FLOAT * weights)


def export(weights: int, reference: bool = False) -> Need:
    """Two models' graphs, one after another; their files, and those of a `reference` where the graphs are in int8."""
    return Need("export", 4 * FLOAT * weights, (2 + reference) * FLOAT * weights)
