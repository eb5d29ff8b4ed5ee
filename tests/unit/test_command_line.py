"""From a recipe and the command line to a config, and from a mistake to one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from braceexpand import braceexpand

from beit3_dist import launched
from beit3_dist.command_line import parse, to_yaml
from beit3_dist.config import CaptionField, RunConfig, Source, sources_of
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.objectives import SECTIONS
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.recipe import read_recipe

RECIPE = """\
out: runs/test
text_tokenizer: text.spm
image_tokenizer: vqkd.safetensors
steps: 20
precision: fp32
data:
  images: images-{000..003}.tar
  texts: texts.tar
  pairs:
    - {shards: good.tar, weight: 3}
    - {shards: noisy.tar}
model: {layers: 2, width: 64, heads: 4, ffn_width: 128, vl_expert_layers: 1}
optim: {lr: 5e-4, warmup_steps: 5}
"""


FILES = ("--out", "o", "--text_tokenizer", "t", "--data.images", "i", "--data.texts", "t", "--data.pairs", "p")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "_place", None)


def config_of(*arguments: object) -> RunConfig:
    return parse(RunConfig, "pretrain.py", "Pretrains.", list(map(str, arguments)))


def test_recipe(recipe: Path) -> None:
    config = config_of("--config", recipe)
    assert isinstance(config, RunConfig)
    assert (config.out, config.steps, config.precision) == ("runs/test", 20, "fp32")
    assert (config.model.layers, config.model.vl_expert_layers, config.model.patch_size) == (2, 1, 14)
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.clip_norm) == (5e-4, 5, 3.0)
    assert config.data.images == "images-{000..003}.tar"


def test_weighted_sources(recipe: Path) -> None:
    pairs = config_of("--config", recipe).data.pairs
    assert pairs == [Source(shards="good.tar", weight=3.0), Source(shards="noisy.tar", weight=1.0)]


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("title", "title"),
        ("[caption, alt]", ["caption", "alt"]),
        ("[{field: caption, weight: 3}, alt]", [CaptionField(field="caption", weight=3.0), "alt"]),
    ],
)
def test_fields_of_captions(given: str, key: object, recipe: Path, tmp_path: Path) -> None:
    config = config_of("--config", recipe, "--data.caption_key", given)
    assert config.data.caption_key == key
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert config_of("--config", tmp_path / "written.yaml") == config


@pytest.mark.parametrize("where", ["recipe", "command line"])
@pytest.mark.parametrize(
    "field", ["data.images", "data.texts", "data.pairs", "eval.images", "eval.texts", "eval.pairs", "image tokenizer"]
)
def test_a_list_of_patterns_is_one_source(field: str, where: str, recipe: Path) -> None:
    listed = ["~/a/*.tar", "b/{00..09}.tar", "with,comma.tar"]
    content = yaml.safe_load(recipe.read_text())
    if of_tokenizer := field == "image tokenizer":
        field, content = "data.images", {"out": "runs/test", "teacher": {"kind": "efficientnet_lite0"}}
    section, name = field.split(".")
    given = [f"--{field}", json.dumps(listed)]
    if where == "recipe":
        content.setdefault(section, {})[name] = listed
        given = []
    recipe.write_text(yaml.safe_dump(content))
    config = parse(TokenizerConfig if of_tokenizer else RunConfig, "program", "", ["--config", str(recipe), *given])
    (source,) = sources_of(getattr(getattr(config, section), name), field)
    assert source.weight == 1
    expected = [os.path.expanduser("~/a/*.tar"), *(f"b/{n:02d}.tar" for n in range(10)), "with,comma.tar"]
    assert list(braceexpand(source.shards)) == expected


def test_the_command_line_wins(recipe: Path) -> None:
    config = config_of("--config", recipe, "--optim.lr", "2e-4", "--model.layers=3", "--batch.images", 6, "--out", "x")
    assert (config.optim.lr, config.model.layers, config.batch.images, config.out) == (2e-4, 3, 6, "x")
    assert (config.optim.warmup_steps, config.model.width) == (5, 64), "the rest of a section stays"


@pytest.mark.parametrize(
    "flag", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"], ["--local-rank", "1"]], ids=" ".join
)
def test_launchers_may_pass_a_local_rank(recipe: Path, flag: list[str]) -> None:
    plain = config_of("--config", recipe)
    assert config_of(*flag, "--config", recipe) == plain == config_of("--config", recipe, *flag)


def test_printed_config_is_a_recipe_of_the_same_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", recipe, "--model.drop_path", "0.25"]
    with pytest.raises(SystemExit) as end:
        config_of(*arguments, "--print_config")
    assert end.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = config_of("--config", printed)
    assert config == config_of(*arguments) and config.model.drop_path == 0.25
    assert "local_rank" not in printed.read_text()


def test_to_yaml_is_a_recipe_of_the_same_run(recipe: Path, tmp_path: Path) -> None:
    config = config_of("--config", recipe)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    assert yaml.safe_load(written.read_text()) == asdict(config)
    assert config_of("--config", written) == config


MISTAKES = [  # (arguments after --config recipe, words of the one line)
    (["--optim.learning_rate", "1"], ["optim.learning_rate"]),
    (["--model.layers", "two"], ["model.layers", "two"]),
    (["--precision", "fp16"], ["precision", "fp16"]),
    (["--model.attention", "joint"], ["model.attention", "joint"]),
    (["--parallel.zero_stage", "4"], ["parallel.zero_stage", "4"]),
    (["--model.heads", "3"], ["model.heads=3", "model.width=64"]),
    (["--model.vl_expert_layers", "3"], ["model.vl_expert_layers=3", "model.layers=2"]),
    (["--steps", "2"], ["optim.warmup_steps=5", "steps=2"]),
    (["--parallel.tensor", "0"], ["parallel.tensor", "not 0"]),
    (["stray"], ["stray"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        config_of("--config", recipe, *arguments)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("pretrain.py: error: ")
    assert all(word in printed.err for word in words), printed.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECIPE + "stepz: 3\n", ["recipe.yaml: ", "stepz"]),
        (RECIPE.replace("width: 64", "widht: 64"), ["recipe.yaml: ", "widht"]),
        (RECIPE.replace("layers: 2", "layers: many"), ["recipe.yaml: ", "model.layers", "many"]),
        (RECIPE.replace("precision: fp32", "precision: fp16"), ["recipe.yaml: ", "precision", "fp16"]),
        (RECIPE.replace("weight: 3", "weight: much"), ["recipe.yaml: ", "data.pairs", "weight", "much"]),
        (RECIPE + "guards: 3\n", ["recipe.yaml: guards is a section of fields, not 3"]),
        (RECIPE.replace("weight: 3", "weight: 0"), ["weight", "good.tar"]),
        (RECIPE.replace("out: runs/test\n", ""), ["out"]),
        (RECIPE.replace("  texts: texts.tar\n", ""), ["texts"]),
        ("model: [1, 2\n", ["recipe.yaml is no YAML: line 2"]),
        ("", ["recipe.yaml sets no field"]),
        ("# steps: 3\n", ["recipe.yaml sets no field"]),
        ("- steps: 3\n", ["recipe.yaml sets no field"]),
        (RECIPE + "steps: 30\n", ["recipe.yaml, line 14: steps is given twice, first in line 4"]),
        (RECIPE.replace("width: 64", "layers: 3"), ["recipe.yaml, line 12: model.layers is given twice"]),
        (RECIPE + "checkpoint:\n#  every: 100\n", ["recipe.yaml, line 14: checkpoint has no value"]),
        (RECIPE.replace("weight: 3", "weight:"), ["line 10: data.pairs[0].weight has no value"]),
        (RECIPE + "guards: &g {a: *g}\n", ["guards.a holds itself"]),
        (RECIPE + "guards:\n\tspike_factor: 1\n", ["recipe.yaml is no YAML: line 15"]),
        (RECIPE + "seed: 2024-13-45\n", ["recipe.yaml is no YAML: month"]),
    ],
    ids=[
        "unknown",
        "unknown in a section",
        "type",
        "choice",
        "type in a list",
        "no section",
        "weight of a source",
        "no out",
        "no texts",
        "no YAML",
        "empty",
        "comments",
        "a list",
        "a key twice",
        "a key of a section twice",
        "a section without fields",
        "a field of a list without a value",
        "a section inside itself",
        "a tab",
        "no date",
    ],
)
def test_a_mistake_in_the_recipe(text: str, words: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(text)
    with pytest.raises(SystemExit) as end:
        config_of("--config", recipe)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.err.count("\n") == 1
    assert all(word in printed.err for word in words), printed.err


def test_a_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        config_of("--config", tmp_path / "nowhere.yaml")
    assert end.value.code == 2 and "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"steps: \xff\n", None], ids=["no UTF-8", "a folder"])
def test_a_recipe_that_is_no_text_is_named(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        config_of("--config", path)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.err.count("\n") == 1 and str(path) in printed.err


def test_a_byte_order_mark_and_merged_keys_are_no_mistake(recipe: Path) -> None:
    plain = config_of("--config", recipe)
    recipe.write_text("\ufeff" + RECIPE, encoding="utf-8")
    assert config_of("--config", recipe) == plain
    recipe.write_text(RECIPE.replace("optim: {", "optim: {<<: {lr: 1.0, min_lr: 0.0}, <<: {eps: 1.0}, "))
    assert config_of("--config", recipe).optim.min_lr == 0.0


def test_only_the_first_process_speaks(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launched, "_place", launched.ProcessPlace(1, 2, 1, 2))
    for arguments, code in ((["--steps", "0"], 2), (["--print_config"], 0), (["--help"], 0)):
        with pytest.raises(SystemExit) as end:
            config_of("--config", recipe, *arguments)
        assert end.value.code == code
    assert capsys.readouterr() == ("", "")


def test_the_launcher_refuses_before_it_imports_torch(recipe: Path) -> None:
    """A typo should not take the seconds that torch and DeepSpeed need."""
    launcher = Path(__file__).parents[2] / "launchers" / "pretrain.py"
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['pretrain.py', '--config', {str(recipe)!r}, '--steps', '0']\n"
        "try:\n"
        f"    runpy.run_path({str(launcher)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout == "2 False\n"
    assert done.stderr == "pretrain.py: error: steps must be positive, not 0\n"


def test_a_recipe_changes_the_one_that_it_is_based_on(tmp_path: Path) -> None:
    """Field by field, through any number of them; its own path is where the next one is looked for."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.yaml").write_text("model: {layers: 2, width: 64, heads: 4}\nseed: 3\n")
    (tmp_path / "middle.yaml").write_text("based_on: models/small.yaml\nmodel: {width: 32, vl_expert_layers: 1}\n")
    (tmp_path / "top.yaml").write_text("steps: 20\nbased_on: middle.yaml\nmodel:\n  heads: 2\n")
    expected = {"model": {"layers": 2, "width": 32, "heads": 2, "vl_expert_layers": 1}, "seed": 3, "steps": 20}
    assert read_recipe(tmp_path / "top.yaml") == expected
    config = config_of("--config", tmp_path / "top.yaml", "--optim.warmup_steps", 0, *FILES)
    model = config.model
    assert (model.layers, model.width, model.heads, model.vl_expert_layers) == (2, 32, 2, 1)
    assert (config.seed, config.steps) == (3, 20)


@pytest.mark.parametrize(
    ("below", "said"),
    [
        ("based_on: top.yaml\n", "top.yaml is based on itself"),
        (None, "below.yaml cannot be read: No such file"),
        ("model: {layer: 2}\n", "below.yaml: "),
        ("model: {layers: }\n", "below.yaml, line 1: model.layers has no value"),
    ],
    ids=["circle", "missing", "typo", "no value"],
)
def test_what_is_wrong_with_a_recipe_below_is_named(
    below: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "top.yaml").write_text("based_on: below.yaml\nsteps: 20\n")
    if below is not None:
        (tmp_path / "below.yaml").write_text(below)
    with pytest.raises(SystemExit, match="2"):
        config_of("--config", tmp_path / "top.yaml", *FILES)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_sections_of_objectives(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under their own names, and masked data modelling's under that of former recipes; one that there is not."""
    both = [
        pretraining_of("--config", recipe, f"--{section}.text_mask_ratio", "0.3")
        for section in ("objectives.masked_data_modeling", "objective")
    ]
    assert both[0].objectives == both[1].objectives == {NAME: MaskedDataModelingConfig(text_mask_ratio=0.3)}
    assert pretraining_of("--config", recipe).objectives == {NAME: MaskedDataModelingConfig()}
    with pytest.raises(SystemExit, match="2"):
        pretraining_of("--config", recipe, "--objectives.contrast.weight", "1")
    assert "objectives.contrast: there is no contrast, only masked_data_modeling" in capsys.readouterr().err


def pretraining_of(*arguments: object) -> RunConfig:
    return parse(RunConfig, "pretrain.py", "", list(map(str, arguments)), SECTIONS)
