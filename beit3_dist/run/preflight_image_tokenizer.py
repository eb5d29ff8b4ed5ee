"""Everything that can be wrong with a training run of the image tokenizer, found before a process group starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from beit3_dist.config import require, require_divides
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.image_tokenizer.images import ImageBatches
from beit3_dist.looking import of_node
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.checkpointing import ReadyToTrain, starting_point
from beit3_dist.run.resumption import same_recipe
from beit3_dist.run.shared_memory import check_shared_memory, image_bytes
from beit3_dist.run.sources import same_sources, tokenizer_sources
from beit3_dist.teachers.build import build_teacher
from beit3_dist.teachers.vision import Teacher
from beit3_dist.trackers.registry import check_trackers


@dataclass
class TokenizerReady(ReadyToTrain):
    """What a run starts from."""

    teacher: Teacher
    """The frozen teacher, on the CPU."""
    train: ImageBatches
    """The images of this rank."""


def prepare_tokenizer_run(config: TokenizerConfig, mesh: Mesh) -> TokenizerReady:
    """Opens and checks everything. Raises ValueError with one line that names the field and the remedy."""
    check_trackers(config.trackers, mesh.is_first)
    require_divides("the number of ranks", mesh.world, "batch", config.batch)
    require(config.optim.name == "adamw", f"optim.name={config.optim.name}: the image tokenizer trains by adamw alone")
    require(
        not config.checkpoint.other_resolution,
        "checkpoint.other_resolution: an image tokenizer stays at its resolution: leave it out",
    )
    check_shared_memory(config.data, mesh, config.batch // mesh.world * image_bytes(config.model.image_size))
    checkpoint, state = starting_point(config)
    consumed = state.consumed.get("images", 0)
    require(
        consumed == state.step * config.batch,
        f"batch={config.batch}: {checkpoint} has taken {consumed} images in {state.step} steps; "
        "a resumed run keeps its batch",
    )
    train = ImageBatches(config.data, config.model.image_size, config.seed, config.batch, mesh.rank, mesh.world)
    teacher = build_teacher(grid=config.model.grid, **asdict(config.teacher))
    sources = of_node(lambda: tokenizer_sources(config, train.stream))
    state.sources = same_sources(config, checkpoint, state.sources, sources)
    same_recipe(config, checkpoint)
    return TokenizerReady(config, mesh, state, checkpoint, teacher, train)
