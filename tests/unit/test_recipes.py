"""Recipes: each is whole, and builds at full size, on the meta device, what its paper counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from torch import nn

from beit3_dist.command_line import parse
from beit3_dist.config import STREAMS, RunConfig
from beit3_dist.objectives import SECTIONS
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.run.stage_file import read_stages
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.tasks.registry import task_class

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"
HEADS = "(image|text)_head|objective_heads"
"""Heads of pretraining, which papers leave out where they count."""


@dataclass(frozen=True)
class Published:
    """A count of parameters, in millions, that somebody gives."""

    millions: float
    source: str
    left_out: str
    """Pattern of what this count leaves out of ours, from the beginning of a name."""
    lacking: float = 0.0
    """Millions that ours has not, as the recipe says."""
    within: float = 0.01


TABLE = {
    "vlmo_base": Published(175, "unilm/vlmo/README", HEADS),
    "vlmo_large": Published(562, "unilm/vlmo/README", HEADS),
    **{f"vlmo_base_{stage}": Published(175, "the same", HEADS) for stage in ("images", "texts")},
    **{f"vlmo_large_{stage}": Published(562, "the same", HEADS) for stage in ("images", "texts")},
    "vilt_base": Published(87.4, "ViLT, section 4: without the words", f"{HEADS}|language_embedding"),
    "vit_bert_base": Published(85.8, "timm's vit_base_patch16_224", f"{HEADS}|language_embedding"),
    "albef_base": Published(209.5, "ALBEF, 3.1: 85.8 + 123.7", HEADS),
    # Each of its two heads for words has a matrix before it, and the connected layer a cross-attention that never runs.
    "mplug_base": Published(350, "mPLUG/README", "(image|text)_head", lacking=2 * 0.59 + 2.36),
    # Its fusion has BERT's word table, too, which never is read; `test_mplugs_figures_are_rounded` has both readings.
    "mplug_large": Published(600, "mPLUG/README: rounded", "(image|text)_head", lacking=2 * 0.59 + 23.84, within=0.02),
    "clip_base": Published(86.2, "open_clip's ViT-B-16, the image tower",
                           f"{HEADS}|language_embedding|(.*\\.)?language\\."),
    "siglip_base": Published(203.2, "open_clip's ViT-B-16-SigLIP", HEADS, lacking=7.1),
    "beit3_base_contrast": Published(222, "unilm/beit3/README: with contrast's head", "(image|text)_head"),
    "base": Published(276, "unilm/beit3/README", "objective_heads"),
    "large": Published(746, "unilm/beit3/README", "objective_heads"),
    "giant": Published(1900, "beit3, table 2: rounded", "objective_heads", within=0.03),
}  # fmt: skip

FINE_TUNED = {  # task of a recipe for base -> count, with its classes
    "captioning": (Published(271, "unilm/beit3/README", "$"), 0),
    "nlvr2": (Published(226, "the same", "$"), 2),
    "retrieval": (Published(222, "the same", "$"), 0),
    "vqa": (Published(228, "the same", "$"), 3129),
    "open_vqa": (Published(271, "captioning's: the encoder and the head for words", "$"), 0),
    "retrieval_matching": (Published(222, "retrieval's, beside two classes of match", "$"), 0),
    "text_classification": (Published(221, "the released encoder, see test_parameter_counts", "task_head"), 2),
}


def config_of(recipe: str) -> RunConfig:
    """The recipe with what it asks for in its first lines."""
    streams = [part for stream in ("images", "texts", "pairs") for part in (f"--data.{stream}", f"{stream}.tar")]
    asked = ["--out", "o", "--text_tokenizer", "t.spm", "--image_tokenizer", "i.pth", *streams]
    return parse(RunConfig, "pretrain.py", "", ["--config", str(RECIPES / f"{recipe}.yaml"), *asked], SECTIONS)


def millions(model: nn.Module, published: Published) -> float:
    """Parameters of a model, as somebody counts them."""
    counted = sum(p.numel() for name, p in model.named_parameters() if not re.match(published.left_out, name))
    return counted / 1e6 + published.lacking


@pytest.mark.parametrize("recipe", TABLE)
def test_it_builds_what_its_paper_counts(recipe: str) -> None:
    published, config = TABLE[recipe], config_of(recipe)
    objectives = objectives_of(config)
    assert millions(objectives.build(), published) == pytest.approx(published.millions, rel=published.within)
    assert bool(objectives.coded) == (recipe.endswith("_images") or "beit3" in published.source)


def test_mplugs_figures_are_rounded() -> None:
    """The README gives 350M and 600M. What the released code's layers use is 347.8M and 566.0M, where 350 fits and 600
    is 6 % off. With the word table of BERT that its fusion holds and never reads, they are 371.7M and 589.8M: the one
    reading in which both figures are right, to the next 50M. CLIP's text encoder (63.4M; 123.7M), which its code loads
    with the images' one, is in neither."""
    counted = {size: millions(objectives_of(config_of(f"mplug_{size}")).build(), TABLE[f"mplug_{size}"])
               for size in ("base", "large")}  # fmt: skip
    whole = [counted["base"] + 23.84, counted["large"]]
    assert whole == pytest.approx([371.7, 589.8], abs=0.1) and counted["large"] - 23.84 == pytest.approx(566.0, abs=0.1)
    assert [50 * round(count / 50) for count in whole] == [350, 600]


@pytest.mark.parametrize("task", FINE_TUNED)
def test_a_fine_tuned_base_is_what_its_readme_counts(task: str) -> None:
    published, classes = FINE_TUNED[task]
    asked = ["--out", "o", "--text_tokenizer", "t", "--data.train", "x"]
    config = parse(FinetuneConfig, "", "", ["--config", str(RECIPES / f"finetune/{task}_base.yaml"), *asked])
    model = task_class(task).network(config.model, classes, device="meta")
    assert millions(model, published) == pytest.approx(published.millions, rel=0.003)


def test_all_recipes_are_in_the_table_or_a_demos() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert {name for name in names if not re.match("demo|image_tokenizer|.*_stages$", name)} == TABLE.keys()


@pytest.mark.parametrize("file", sorted(path.stem for path in RECIPES.glob("*_stages.yaml")))
def test_stages_are_of_one_model_and_train_what_they_read(file: str) -> None:
    recipes = [path.stem for path in read_stages(RECIPES / f"{file}.yaml").values()]
    stages = [config_of(recipe) for recipe in recipes]
    assert recipes[-1] == file.removesuffix("_stages") and all(stage.model == stages[0].model for stage in stages)
    read = [[name for name in STREAMS if getattr(stage.batch, name)] for stage in stages]
    assert read == [["images"], ["texts"], ["pairs"]]
    of_images, of_texts, of_pairs = (objectives_of(stage).trained or frozenset() for stage in stages)
    assert all("language" not in name and ".vl." not in name and "text_head" not in name for name in of_images)
    assert all(re.match(r"language_embedding|.*\.language\.|norm\.|text_head", name) for name in of_texts)
    assert of_images | of_texts < of_pairs | {"image_head.weight", "image_head.bias"}


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("demo*.yaml") if not p.stem.endswith("_stages")))
def test_demos_are_small_and_go_nowhere_else(recipe: str) -> None:
    config = config_of(recipe)
    assert sum(p.numel() for p in objectives_of(config).build().parameters()) < 6e6
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert re.search(r"^out: demo/", text, re.MULTILINE)


@pytest.mark.parametrize("recipe", [name for name in TABLE if name not in ("base", "large", "giant")])
def test_every_figure_has_its_source(recipe: str) -> None:
    """Beside it, or in a line above it. How a run reads and saves is no paper's matter."""
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    for before, line in pairwise(lines):
        figure = re.search(r"^ *(?!seed|workers|checkpoint|parallel|deepspeed_config|teacher)\w+: .*\d", line)
        assert not figure or "# " in line or before.startswith("# "), f"{recipe} gives no source of {line.strip()}"
