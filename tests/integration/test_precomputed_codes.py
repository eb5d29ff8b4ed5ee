"""Codes computed beforehand give the run that the tokenizer would give, and refuse every other run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from beit3_dist.config import BatchConfig, EvalConfig, RunConfig
from beit3_dist.run.preflight import prepare_run
from tests.integration.runs import metrics, reproducible, run_config, save_random_tokenizer, train, write_recipe
from tests.launching import Ended, launch
from tests.parallel.workers import run_workers

STEPS = 4


def config_in(folder: Path) -> RunConfig:
    """Four steps that are validated twice; the tokenizer's views have another size than the model's."""
    config = run_config(folder, steps=STEPS)
    save_random_tokenizer(folder / "large_patches.pth", patch_size=16)
    data = config.data
    return replace(
        config,
        image_tokenizer=str(folder / "large_patches.pth"),
        eval=EvalConfig(every=2, batches=2, images=data.images, texts=data.texts, pairs=data.pairs),
    )


def precompute(config: RunConfig, out: Path, *flags: str) -> Ended:
    recipe = write_recipe(config, out.with_suffix(".yaml"))
    return launch("tools.precompute_codes", "--out", str(out), *flags, "--config", str(recipe))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """The config and a folder with both kinds of codes."""
    folder = tmp_path_factory.mktemp("codes")
    config = config_in(folder)
    for name, flags in (("train", []), ("held_out", ["--held_out"])):
        result = precompute(config, folder / name, *flags)
        assert result.returncode == 0, result.stderr
        assert "wrote the codes of" in result.stdout
    return config, folder


def with_codes(made: tuple[RunConfig, Path]) -> RunConfig:
    config, folder = made
    eval_ = replace(config.eval, image_codes=str(folder / "held_out"))
    return replace(config, image_codes=str(folder / "train"), eval=eval_)


@pytest.mark.slow
def test_the_run_is_bitwise_the_one_with_the_tokenizer(made: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """On one rank and, where the codes are looked up by other micro-batches, on two."""
    plain, looked_up = (
        replace(made[0], out=str(tmp_path / "plain")),
        replace(with_codes(made), out=str(tmp_path / "codes")),
    )
    assert run_workers(2, train, plain) == ["", ""] and run_workers(2, train, looked_up) == ["", ""]
    assert reproducible(plain.out) == reproducible(looked_up.out)
    evaluations = [Path(run.out, "eval.jsonl").read_text() for run in (plain, looked_up)]
    assert evaluations[0] == evaluations[1] and len(evaluations[0].splitlines()) == 2
    other = replace(looked_up, out=str(tmp_path / "one"), batch=replace(plain.batch, accumulation=1))
    assert run_workers(1, train, other) == [""]
    assert [r["loss"] for r in metrics(other.out)] == pytest.approx([r["loss"] for r in metrics(plain.out)], rel=1e-5)


def test_the_codes_are_used_and_the_second_view_is_not_made(made: tuple[RunConfig, Path], tmp_path: Path) -> None:
    from beit3_dist.data.batch import Request
    from beit3_dist.parallel.mesh import read_mesh

    ready = prepare_run(replace(with_codes(made), out=str(tmp_path / "run")), read_mesh())
    batch = ready.train[Request((0, 0, 0), 0)]
    assert batch.streams["images"].tokenizer_images is None
    assert ready.train_codes is not None and ready.held_out_codes is not None
    codes = ready.train_codes.of(batch)
    assert codes.shape == (sum(map(len, batch.with_images)), 16)
    batch.streams["images"].ids[0] = 12345
    with pytest.raises(KeyError, match="no codes of 1 images"):
        ready.train_codes.of(batch)


def test_codes_of_another_run_are_refused(made: tuple[RunConfig, Path], tmp_path: Path) -> None:
    from beit3_dist.parallel.mesh import read_mesh

    config = replace(with_codes(made), out=str(tmp_path / "run"))
    other = save_random_tokenizer(tmp_path / "other.pth", patch_size=16, width=32)
    with_blocks = replace(config, data=replace(config.data, shuffle="blocks"))
    mistakes = {
        r"image_codes: .* seed=0, this run has 1": replace(config, seed=1),
        r"image_codes: .* data.color_jitter=0.4": replace(config, data=replace(config.data, color_jitter=0.0)),
        r"image_codes: .* data.shuffle=full, this run has blocks of": with_blocks,
        r"image_codes: .* image_tokenizer=": replace(config, image_tokenizer=str(other)),
        r"image_codes: .* covers 16 images, this run takes 20": replace(config, steps=5),
        r"image_codes: .* images=": replace(config, data=replace(config.data, images=config.data.pairs)),
        r"image_codes: .* part=held-out views": replace(config, image_codes=config.eval.image_codes),
        r"^image_codes: .*nowhere is no whole folder": replace(config, image_codes="/nowhere"),
        r"^eval.image_codes: .* covers 8": replace(config, eval=replace(config.eval, batches=3)),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(ValueError, match=message):
            prepare_run(mistake, read_mesh())
    fewer = replace(config, steps=3, batch=BatchConfig(images=2, texts=4, pairs=4))
    assert prepare_run(fewer, read_mesh()).train_codes is not None, "codes that reach further serve as well"


def test_a_damaged_or_existing_folder_is_named(made: tuple[RunConfig, Path], tmp_path: Path) -> None:
    from beit3_dist.parallel.mesh import read_mesh

    config, folder = made
    again = precompute(config, folder / "train")
    assert again.returncode == 2 and "already exists" in again.stderr.splitlines()[-1], again.stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (folder / "train").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: -1 if file.name.endswith("codes.bin") else None])
    with pytest.raises(ValueError, match="codes.bin has .* bytes, its manifest says"):
        prepare_run(replace(config, image_codes=str(broken), out=str(tmp_path / "run")), read_mesh())
