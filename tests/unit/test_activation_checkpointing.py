"""What activation checkpointing keeps of a forward pass, and that it changes no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit3_dist.command_line import parse
from beit3_dist.config import ModelConfig, RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.objectives.together import PretrainingModule
from tests.micro_batches import counts_of, prepared, pretraining, random_micro_batch

ARCHITECTURES = {
    "paper": {"attention": "shared", "sub_layernorm": False},
    "released": {"attention": "per_modality", "sub_layernorm": True},
}


class Allocations(TorchDispatchMode):
    """Remembers every storage that an operation makes, without keeping it alive. Views of parameters do not count."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes of the storages that somebody still holds."""
        return sum(
            nbytes
            for pointer, (storage, nbytes) in self._storages.items()
            if pointer not in self._parameters and not storage.expired()
        )


def model_config(architecture: str, layers: int) -> ModelConfig:
    return ModelConfig(
        layers=layers, width=64, heads=4, ffn_width=256, patch_size=8, image_size=64, vocab_size=120,
        visual_vocab_size=40, max_text_length=80, drop_path=0.3, vl_expert_layers=0, **ARCHITECTURES[architecture],
    )  # fmt: skip


def step_of(config: ModelConfig, recompute: str, every: int) -> tuple[PretrainingModule, tuple[Any, ...]]:
    objective = pretraining(BEiT3(config, seed=3), 5).train()
    objective.model.blocks.recompute, objective.model.blocks.recompute_every = recompute, every
    batch = random_micro_batch(config, images=2, pairs=2, texts=2, caption_length=60, text_length=80)
    return objective, (*prepared(objective, batch), counts_of(objective, batch), 7)


def held_by(architecture: str, layers: int, recompute: str, every: int = 1) -> float:
    """Activations that the graph holds after a forward pass, in numbers per token and feature."""
    config = model_config(architecture, layers)
    objective, step = step_of(config, recompute, every)
    with Allocations(objective) as allocations:
        contribution, _ = objective(*step)
    assert contribution.requires_grad
    tokens = sum(step[0].layout.segments)
    return allocations.alive() / (4 * tokens * config.width)


def per_block(architecture: str, recompute: str) -> float:
    """What one more block adds."""
    return (held_by(architecture, 5, recompute) - held_by(architecture, 3, recompute)) / 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_mode_keeps_less_than_the_one_before(architecture: str) -> None:
    none, attention, selective, full = (per_block(architecture, m) for m in ("none", "attention", "selective", "full"))
    print(f"{architecture}: none {none:.2f}, attention {attention:.2f}, selective {selective:.2f}, full {full:.2f}")
    # q, k and v are copied into one padded tensor per kind of sample, and the mixture out of it.
    assert 1.5 < none - attention < 5
    # An expert keeps its normed input [D], fc1's output [4 D] and, in these models, one more [4 D].
    assert 8.5 < attention - selective < 10.5
    # Only the block's input [D] and the drop-path factors of its tokens stay.
    assert full == pytest.approx(1 + 2 / 64, abs=0.02)


@pytest.mark.parametrize("recompute", ["attention", "selective", "full"])
def test_every_second_block_saves_half(recompute: str) -> None:
    none, every, second = held_by("paper", 8, "none"), held_by("paper", 8, recompute), held_by("paper", 8, recompute, 2)
    # Blocks 0, 2, 4 and 6 recompute; the last one, which works for selected tokens alone, saves less than they do.
    saved = per_block("paper", "none") - per_block("paper", recompute)
    assert none - second == pytest.approx(4 * saved, rel=0.02)
    assert none - every > 7 * saved


@pytest.mark.parametrize(("architecture", "vl_expert_layers"), [("paper", 0), ("paper", 1), ("released", 0)])
def test_no_gradient_changes(architecture: str, vl_expert_layers: int) -> None:
    config = replace(model_config(architecture, 4), vl_expert_layers=vl_expert_layers)

    def gradients(recompute: str, every: int) -> dict[str, torch.Tensor]:
        objective, step = step_of(config, recompute, every)
        objective(*step)[0].backward()
        return {name: parameter.grad for name, parameter in objective.named_parameters()}

    plain = gradients("none", 1)
    assert all(gradient.norm() > 0 for name, gradient in plain.items() if ".k." not in name)
    for recompute in ("attention", "selective", "full"):
        for every in (1, 2, 3):
            ours = gradients(recompute, every)
            assert all(torch.equal(ours[name], gradient) for name, gradient in plain.items()), (recompute, every)


def test_fusion_layers_recompute_the_same() -> None:
    """Those of words that look at images as those of attention alone."""
    fusion = replace(model_config("released", 5), sub_layernorm=False, fusion_layers=4, connected_every=1)
    alive, plain = [], {}
    for recompute in ("none", "attention", "selective", "full"):
        objective, step = step_of(fusion, recompute, 1)
        with Allocations(objective) as allocations:
            contribution, _ = objective(*step)
        alive.append(allocations.alive())
        contribution.backward()
        ours = {name: parameter.grad for name, parameter in objective.named_parameters()}
        plain = plain or ours
        assert all(torch.equal(ours[name], gradient) for name, gradient in plain.items()), recompute
    assert alive == sorted(alive, reverse=True) and len({*alive}) == 4


FILES = ["--out", "out", "--text_tokenizer", "t", "--image_tokenizer", "i"]
FILES += ["--data.images", "i.tar", "--data.texts", "t.tar", "--data.pairs", "p.tar"]


def parsed(*arguments: str) -> RunConfig:
    return parse(RunConfig, "pretrain.py", "", [*FILES, *arguments])


def test_one_value_or_one_per_pipeline_rank(tmp_path: Path) -> None:
    assert parsed().recompute(0) == "none"
    assert parsed("--activation_checkpointing", "full", "--parallel.pipeline", "4").recompute(3) == "full"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("activation_checkpointing: [full, none]\nactivation_checkpointing_every: 2\n")
    config = parsed("--config", str(recipe), "--parallel.pipeline", "2")
    assert [config.recompute(rank) for rank in range(2)] == ["full", "none"]
    assert config.activation_checkpointing_every == 2
    recipe.write_text("activation_checkpointing: selective\n")
    assert parsed("--config", str(recipe)).activation_checkpointing == "selective"


def test_the_printed_config_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, printed in (("full", "full"), ("[full, attention]", "\n- full\n- attention")):
        arguments = ("--parallel.pipeline", "2", "--activation_checkpointing", given)
        with pytest.raises(SystemExit, match="0"):
            parsed(*arguments, "--print_config")
        text = capsys.readouterr().out
        assert f"activation_checkpointing: {printed}".replace(": \n", ":\n") in text
        (tmp_path / "recipe.yaml").write_text(text)
        again = parse(RunConfig, "pretrain.py", "", ["--config", str(tmp_path / "recipe.yaml")])
        assert again == parsed(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--activation_checkpointing", "[full, none]"], "has 2 entries but parallel.pipeline=1"),
        (["--activation_checkpointing", "[]"], "activation_checkpointing has 0 entries"),
        (["--activation_checkpointing", "some"], "activation_checkpointing"),
        (["--activation_checkpointing", "[full, some]", "--parallel.pipeline", "2"], "activation_checkpointing"),
        (["--activation_checkpointing_every", "0"], "activation_checkpointing_every must be positive, not 0"),
        (["--activation_checkpointing_every", "2"], "activation_checkpointing=none recomputes nothing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(*arguments)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
