"""Weights from and to other forms: heads, precision, what a file may lack, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3_dist.checkpoint.fitting import shapes_of
from beit3_dist.checkpoint.formats import load_released, read_initial_weights, read_source, to_released
from beit3_dist.checkpoint.model_folder import read_model_folder, save_model_folder
from beit3_dist.checkpoint.released import canonical_name, released_name
from beit3_dist.config import ModelConfig
from beit3_dist.inference import Model
from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import initial_value
from beit3_dist.tasks.registry import task_class
from tests.unit import test_neutral
from tests.unit.tar_fixtures import train_tokenizer
from tests.unit.test_inference import PIECES, tokenizer  # noqa: F401  (a fixture)
from tests.unit.test_neutral import refusal, write_checkpoint
from tools.convert_checkpoint import main

WIDTH = 16
TINY = ModelConfig(
    layers=2,
    width=WIDTH,
    heads=2,
    ffn_width=24,
    patch_size=8,
    image_size=16,
    attention="per_modality",
    sub_layernorm=True,
    vl_expert_layers=0,
    vocab_size=40,
    visual_vocab_size=12,
    max_text_length=20,
)
PAPER = replace(TINY, attention="shared", sub_layernorm=False, vl_expert_layers=1)
HEADS = ["--attention_heads", "2"]

TASK_HEADS: dict[str, dict[str, tuple[int, ...]]] = {  # of unilm's fine-tuned models, beside `beit3.`
    "vqa": {
        "pooler.norm.weight": (WIDTH,), "pooler.norm.bias": (WIDTH,),
        "pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,),
        "head.0.weight": (2 * WIDTH, WIDTH), "head.0.bias": (2 * WIDTH,),
        "head.1.weight": (2 * WIDTH,), "head.1.bias": (2 * WIDTH,),
        "head.3.weight": (9, 2 * WIDTH), "head.3.bias": (9,),
    },
    "retrieval": {
        "language_head.weight": (WIDTH, WIDTH), "vision_head.weight": (WIDTH, WIDTH), "logit_scale": (),
    },
    "nlvr2": {
        "head.norm1.weight": (4 * WIDTH,), "head.norm1.bias": (4 * WIDTH,),
        "head.dense1.weight": (2 * WIDTH, 4 * WIDTH), "head.dense1.bias": (2 * WIDTH,),
        "head.norm2.weight": (2 * WIDTH,), "head.norm2.bias": (2 * WIDTH,),
        "head.dense2.weight": (2, 2 * WIDTH), "head.dense2.bias": (2,),
    },
    "captioning": {"mlm_head.weight": (40, WIDTH), "mlm_head.bias": (40,)},
    "imagenet": {
        "fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,), "head.weight": (5, WIDTH), "head.bias": (5,),
    },
}  # fmt: skip
CLASSES = {"vqa": 9, "imagenet": 5}
ANSWERS = [f"answer {number}" for number in range(9)]


def released(task: str | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict as unilm's models have it: of pretraining, or of a task."""
    state = to_released(BEiT3(TINY))
    if task is not None:
        final_norm = task not in ("vqa", "imagenet")
        state = {
            k: v for k, v in state.items() if k.startswith("beit3.") and (final_norm or ".encoder.layer_norm." not in k)
        }
        draw = torch.Generator().manual_seed(0)
        state |= {name: torch.randn(shape, generator=draw) for name, shape in TASK_HEADS[task].items()}
    return {key: value.to(dtype) for key, value in state.items()}


def save(state: dict[str, Tensor], path: Path) -> str:
    torch.save({"model": state}, path)
    return str(path)


def write_answers(folder: Path) -> Path:
    """A file of the VQA model's answers."""
    (folder / "answers.txt").write_text("\n".join(ANSWERS) + "\n")
    return folder / "answers.txt"


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


def notes(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("task", TASK_HEADS)
def test_a_fine_tuned_file_keeps_its_head(task: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Released -> folder -> released is identical, and the folder is what our own fine-tuned model has."""
    state = released(task, dtype)
    answers = ["--answers", str(write_answers(tmp_path))] if task == "vqa" else []
    main([save(state, tmp_path / "task.pth"), str(tmp_path / "ours"), "--to", "safetensors", *HEADS, *answers])
    main([str(tmp_path / "ours"), str(tmp_path / "back.pth"), "--to", "released"])
    assert_identical(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)
    folder = read_model_folder(tmp_path / "ours")
    named = {"answers": ANSWERS} if answers else {}
    assert folder.task == {"name": task} | ({"classes": CLASSES[task]} if task in CLASSES else {}) | named
    model = task_class(folder.task["name"]).network(folder.config, folder.task.get("classes", 0), device="meta")
    model.load_state_dict(
        {name: value for name, value in folder.weights.items() if "mask_token" not in name}, strict=False, assign=True
    )
    needed = {
        name: parameter.shape
        for name, parameter in task_class(task).network(TINY, CLASSES.get(task, 0), device="meta").named_parameters()
    }
    assert {name: value.shape for name, value in folder.weights.items()} == needed


@pytest.mark.parametrize("task", [*TASK_HEADS, None])
def test_heads_can_be_dropped(task: str | None, tmp_path: Path) -> None:
    source = save(released(task), tmp_path / "task.pth")
    main([source, str(tmp_path / "ours"), "--to", "safetensors", *HEADS, "--heads", "drop"])
    folder = read_model_folder(tmp_path / "ours")
    assert folder.task is None
    assert not any("head" in name for name in folder.weights)
    main([source, str(tmp_path / "encoder.pth"), "--to", "released", *HEADS, "--heads", "drop"])
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    assert_identical(state, {k: v for k, v in released(task).items() if k.startswith("beit3.")})


def test_names_go_both_ways() -> None:
    names = [*shapes_of(TINY), "task_head.pooler.dense.weight", "task_head.head.3.bias", "task_head.logit_scale"]
    assert [canonical_name(released_name(name)) for name in names] == names
    assert len({released_name(name) for name in names}) == len(names)
    with pytest.raises(ValueError, match=r"beit3\.encoder\.layers\.0\.ffn\.C\.fc1\.weight is no key"):
        canonical_name("beit3.encoder.layers.0.ffn.C.fc1.weight")


# ----------------------------------------------------------------------------------------------------------- precision


def test_precision_is_as_asked_for(tmp_path: Path) -> None:
    state = released()
    source = save(state, tmp_path / "fp32.pth")
    main([source, str(tmp_path / "fp16.pth"), "--to", "released", "--dtype", "fp16", *HEADS])
    half = torch.load(tmp_path / "fp16.pth", weights_only=True)["model"]
    assert_identical(half, {key: value.half() for key, value in state.items()})
    main([str(tmp_path / "fp16.pth"), str(tmp_path / "again.pth"), "--to", "released", "--dtype", "fp32", *HEADS])
    assert_identical(
        torch.load(tmp_path / "again.pth", weights_only=True)["model"], {k: v.float() for k, v in half.items()}
    )


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = released()
    state["beit3.encoder.layers.1.ffn.B.fc2.bias"][3] = 1e5
    source = save(state, tmp_path / "large.pth")
    error = refusal([source, str(tmp_path / "x.pth"), "--to", "released", "--dtype", "fp16", *HEADS], capsys)
    assert "blocks.1.ffn.language.fc2.bias" in error and "65504" in error
    assert not (tmp_path / "x.pth").exists()


# --------------------------------------------------------------------------------------- architectures that do not fit


@pytest.mark.parametrize("form", ["released", "torchscale", "timm"])
def test_other_forms_have_no_heads_of_objectives(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {name: parameter.detach() for name, parameter in BEiT3(TINY).named_parameters()}
    head = {"objective_heads.contrast.weight": torch.ones(3, 4)}
    for name, content in (("without", weights), ("with", weights | head)):
        save_model_folder(tmp_path / name, content, TINY)
        main([str(tmp_path / name), str(tmp_path / f"{name}.pth"), "--to", form])
    ours, theirs = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("with", "without"))
    assert_identical(ours.get("model", ours), theirs.get("model", theirs))
    assert form == "timm" or "has no place for the heads of contrast" in notes(caplog)


@pytest.mark.parametrize("form", ["released", "torchscale"])
def test_vl_experts_are_refused_with_the_reason(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_folder(tmp_path / "ours", dict(BEiT3(PAPER).named_parameters()), PAPER)
    error = refusal([str(tmp_path / "ours"), str(tmp_path / "x.pth"), "--to", form], capsys)
    assert "VL experts" in error and "--to safetensors" in error
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("ffn", ["per_modality", "shared"])
def test_what_is_shared_is_expanded_with_a_note(ffn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(PAPER, vl_expert_layers=0, sub_layernorm=True, ffn=ffn)
    model = BEiT3(config)
    save_model_folder(tmp_path / "ours", dict(model.named_parameters()), config)
    main([str(tmp_path / "ours"), str(tmp_path / "x.pth"), "--to", "released"])
    assert "what vision and language share is written twice" in notes(caplog)
    state = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert state.keys() == released().keys()
    query = model.blocks["1"].attention.q["shared"].weight
    for branch in "AB":
        assert torch.equal(state[f"beit3.encoder.layers.1.self_attn.q_proj.{branch}.weight"], query)
    first, second = (state[f"beit3.encoder.layers.1.ffn.{branch}.fc1.weight"] for branch in "AB")
    assert torch.equal(first, second) == (ffn == "shared")
    assert_identical(state, to_released(model))


# ----------------------------------------------------------------------------------------------------------- init_from


def initial(name: str) -> Tensor:
    return initial_value(name, shapes_of(TINY)[name], TINY, 0)


@pytest.mark.parametrize("form", ["released", "fp16", "torchscale", "model folder", "checkpoint", "neutral"])
def test_a_run_starts_from_any_form(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {name: value + 0.25 for name, value in BEiT3(TINY).state_dict().items()}
    path = tmp_path / "source"
    if form in ("released", "fp16", "torchscale"):
        model = BEiT3(TINY, device="meta")
        model.load_state_dict(weights, assign=True)
        state = to_released(model)
        if form == "fp16":
            state = {key: value.half() for key, value in state.items()}
            weights = {name: value.half().float() for name, value in weights.items()}
        if form == "torchscale":
            state = {k.removeprefix("beit3."): v for k, v in state.items() if k.startswith("beit3.")}
            weights = {name: value for name, value in weights.items() if "head" not in name}
            save_file(state, path.with_suffix(".safetensors"))
            path = path.with_suffix(".safetensors")
        else:
            save(state, path)
    elif form == "model folder":
        save_model_folder(path, weights, TINY)
    else:
        path = write_checkpoint(path, 2, 2, values=weights, model=TINY)
        if form == "neutral":
            main([str(path), str(tmp_path / "neutral"), "--to", "neutral"])
            path = tmp_path / "neutral"
    assert_identical(read_initial_weights(path, TINY), weights)
    heads = "has no weights for the image head: initial values are taken"
    assert (heads in notes(caplog)) == (form == "torchscale")


def test_groups_that_a_file_lacks_start_from_initial_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model of VQA has neither the heads of pretraining nor the final norm."""
    path = save({key: value + 1 for key, value in released("vqa").items()}, tmp_path / "vqa.pth")
    model = load_released(path, TINY)
    for group in ("the image head", "the text head", "the final norm"):
        assert f"{path} has no weights for {group}: initial values are taken" in notes(caplog)
    assert f"{path}: the task's head is not used" in notes(caplog)
    for name, parameter in model.named_parameters():
        fresh = name.startswith(("image_head", "text_head", "norm."))
        assert torch.equal(parameter, initial(name) if fresh else initial(name) + 1), name


def test_a_task_starts_from_pretraining(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The fine-tuned model's own parameters: without the final norm and the heads of pretraining."""
    path = Path(save(released(), tmp_path / "pretrained.pth"))
    task = task_class("vqa").network(TINY, 9, device="meta")
    shapes = {name: parameter.shape for name, parameter in task.named_parameters()}
    weights = read_initial_weights(path, TINY, shapes)
    assert set(shapes) - set(weights) == {name for name in shapes if name.startswith("task_head.")}
    for group in ("the image head", "the text head", "the final norm"):
        assert f"{path}: {group} is not used" in notes(caplog)
    assert "has no weights for the task's head" in notes(caplog)
    with pytest.raises(ValueError, match=r"head\.3\.(weight|bias).*\[9.*the model needs \[7.*--heads drop"):
        other = task_class("vqa").network(TINY, 7, device="meta")
        read_initial_weights(
            Path(save(released("vqa"), tmp_path / "vqa.pth")), TINY, {n: p.shape for n, p in other.named_parameters()}
        )


def test_positions_follow_the_runs_resolution(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(save(released(), tmp_path / "x.pth"))
    weights = read_initial_weights(path, replace(TINY, image_size=40))
    assert weights["vision_embedding.positions"].shape == (3 + 25, WIDTH)
    assert torch.equal(weights["vision_embedding.positions"][:3], initial("vision_embedding.positions")[:3])
    assert "7 vision positions are interpolated to 28" in notes(caplog)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 1}, r"blocks\.1\..* is no weight of a model with model\.layers=1"),
        ({"layers": 3}, r"has no .*blocks\.2\."),
        ({"attention": "shared"}, r"model\.attention=shared|has no blocks\.0\.attention\.k\.shared"),
        ({"sub_layernorm": False}, r"inner_attn_ln.* is no weight of a model with .*sub_layernorm=False"),
        ({"vocab_size": 50}, r"shape \[40.*needs \[50"),
        ({"max_text_length": 30}, r"embed_positions\.B\.weight .*shape \[22, 16\], the model needs \[32, 16\]"),
    ],
)
def test_another_models_weights_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    path = Path(save(released(), tmp_path / "x.pth"))
    with pytest.raises(ValueError, match=rf"^init_from: {path}: .*({message})"):
        read_initial_weights(path, replace(TINY, **change))


def test_vision_language_experts_that_are_new_begin_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of them, or none: half of them are another model's."""
    path = Path(save(released(), tmp_path / "x.pth"))
    weights = read_initial_weights(path, replace(TINY, vl_expert_layers=1))
    assert not any(".ffn.vl." in name for name in weights) and "blocks.1.ffn.vision.fc1.weight" in weights
    assert "has no weights for the vision-language experts: initial values are taken" in notes(caplog)
    save_model_folder(tmp_path / "ours", BEiT3(PAPER).state_dict(), PAPER)
    with pytest.raises(ValueError, match=r"^init_from: .*ours: it has no blocks\.0\.ffn\.vl"):
        read_initial_weights(tmp_path / "ours", replace(PAPER, vl_expert_layers=2))


def test_what_no_shape_tells_is_compared(tmp_path: Path) -> None:
    save_model_folder(tmp_path / "ours", BEiT3(TINY).state_dict(), TINY)
    with pytest.raises(ValueError, match=r"^init_from: .*ours has model\.heads=2, this run has 4"):
        read_initial_weights(tmp_path / "ours", replace(TINY, heads=4))


def test_half_a_group_is_refused(tmp_path: Path) -> None:
    state = released()
    del state["beit3.encoder.layer_norm.B.bias"]
    with pytest.raises(
        ValueError, match=r"x\.pth: it has no beit3\.encoder\.layer_norm\.B\.bias \(norm\.language\.bias"
    ):
        read_source(Path(save(state, tmp_path / "x.pth")), 2)


# --------------------------------------------------------------------------------------------------------- the program


def test_a_runs_checkpoint_becomes_a_model_folder(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    model = replace(TINY, vocab_size=PIECES + 10)
    weights = BEiT3(model).state_dict()
    recipe = f"text_tokenizer: {tokenizer}\n"
    checkpoint = write_checkpoint(tmp_path / "step_0000007", 2, 2, values=weights, model=model, recipe=recipe)
    main([str(checkpoint), str(tmp_path / "ours"), "--to", "safetensors"])
    folder = read_model_folder(tmp_path / "ours")
    assert_identical(folder.weights, weights)
    assert folder.config == model and folder.task is None
    assert folder.text_tokenizer is not None and folder.text_tokenizer.read_bytes() == tokenizer.read_bytes()
    recipe = "task: text\ndata: {text_length: 12}\n"
    other = write_checkpoint(tmp_path / "other", values=weights, model=model, recipe=recipe)
    main([str(other), str(tmp_path / "second"), "--to", "safetensors", "--text_tokenizer", str(tokenizer)])
    second = read_model_folder(tmp_path / "second")
    assert second.text_tokenizer is not None and second.text_tokenizer.read_bytes() == tokenizer.read_bytes()
    assert second.task == {"name": "text", "text_length": 12}


@pytest.mark.parametrize("source", ["run", "run/checkpoints", "run/checkpoints/latest", "run/checkpoints/step_0000007"])
def test_a_run_is_its_newest_checkpoint(source: str, tmp_path: Path) -> None:
    """As what a run starts from, and for the program."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    weights = BEiT3(TINY).state_dict()
    for step, values in ((3, {name: torch.zeros_like(value) for name, value in weights.items()}), (7, weights)):
        write_checkpoint(tmp_path / f"run/checkpoints/step_{step:07d}", values=values, model=TINY)
    (tmp_path / "run/checkpoints/latest").write_text("step_0000007\n")
    assert_identical(read_initial_weights(tmp_path / source, TINY), weights)
    main([str(tmp_path / source), str(tmp_path / "ours"), "--to", "safetensors"])
    assert_identical(read_model_folder(tmp_path / "ours").weights, weights)


def test_a_run_without_checkpoints_is_its_model(tmp_path: Path) -> None:
    weights = BEiT3(TINY).state_dict()
    save_model_folder(tmp_path / "run/model", weights, TINY)
    assert_identical(read_initial_weights(tmp_path / "run", TINY), weights)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="^init_from: .*empty is neither a model folder nor a checkpoint"):
        read_initial_weights(tmp_path / "empty", TINY)


@pytest.mark.parametrize("file", ["a secret", "the tokenizer of another model"])
def test_a_checkpoint_gives_no_other_file_away(
    file: str,
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What its recipe calls the text tokenizer is copied into the model folder, which people publish."""
    named = tokenizer
    if file == "a secret":
        named = tmp_path / "id_ed25519"
        named.write_text("PRIVATE KEY")
    recipe = f"text_tokenizer: {named}\n"
    source = write_checkpoint(tmp_path / "step_0000007", values=BEiT3(TINY).state_dict(), model=TINY, recipe=recipe)
    error = refusal([str(source), str(tmp_path / "ours"), "--to", "safetensors"], capsys)
    assert "text_tokenizer: " in error and str(named) in error
    assert not (tmp_path / "ours").exists()


def test_a_folder_says_what_its_model_was_pretrained_by(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "text.spm")
    config = replace(TINY, vocab_size=310)
    values = {name: parameter.detach() for name, parameter in BEiT3(config).named_parameters()}
    names = ["masked_data_modeling", "prefix_language_modeling"]
    recipe = f"text_tokenizer: {tmp_path / 'text.spm'}\nobjectives: {{{names[0]}: {{}}, {names[1]}: {{texts: true}}}}\n"
    run = write_checkpoint(tmp_path / "step_0000007", values=values, model=config, recipe=recipe)
    main([str(run), str(tmp_path / "model"), "--to", "safetensors"])
    main([str(run), str(tmp_path / "encoder"), "--to", "safetensors", "--heads", "drop"])
    assert read_model_folder(tmp_path / "model").objectives == tuple(names)
    assert read_model_folder(tmp_path / "encoder").objectives == ()


def test_a_vqa_model_answers_after_its_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a released file with --answers, and from a run with the list that it read."""
    train_tokenizer(tmp_path / "text.spm")
    config = replace(TINY, vocab_size=310)
    network = task_class("vqa").network(config, len(ANSWERS))
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    data = f"data: {{text_length: 12, answers: {write_answers(tmp_path)}}}"
    recipe = f"text_tokenizer: {tmp_path / 'text.spm'}\ntask: vqa\n{data}\n"
    run = write_checkpoint(tmp_path / "step_0000007", values=weights, model=config, recipe=recipe)
    main([str(run), str(tmp_path / "from_run"), "--to", "safetensors"])
    assert read_model_folder(tmp_path / "from_run").task == {
        "name": "vqa", "classes": 9, "answers": ANSWERS, "text_length": 12,
    }  # fmt: skip
    main([str(run), str(tmp_path / "released.pth"), "--to", "released"])
    released = [str(tmp_path / "released.pth"), str(tmp_path / "from_file"), "--to", "safetensors", *HEADS]
    assert "does not name its answers: give --answers FILE with its 9 answers" in refusal(released, capsys)
    main([*released, "--text_tokenizer", str(tmp_path / "text.spm"), "--answers", str(tmp_path / "answers.txt")])
    picture = Image.new("RGB", (20, 20), "red")
    for folder in ("from_run", "from_file"):
        (answer,) = Model.load(tmp_path / folder, "cpu").answer([picture], ["what is this?"])
        assert answer in ANSWERS
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    assert "answers.txt names 2 answers" in refusal([str(run), str(tmp_path / "x"), "--to", "safetensors"], capsys)
    (tmp_path / "answers.txt").unlink()
    error = refusal([str(run), str(tmp_path / "x"), "--to", "safetensors"], capsys)
    assert "answers.txt, which is not there any more: give --answers" in error


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 2)])
def test_the_average_of_a_runs_weights_is_what_is_used(
    tensor: int, data: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(test_neutral, "SUFFIXES", (*test_neutral.SUFFIXES, "/ema"))
    weights = BEiT3(TINY).state_dict()
    checkpoint = write_checkpoint(tmp_path / "step_0000007", tensor, data, values=weights, model=TINY)
    main([str(checkpoint), str(tmp_path / "ours"), "--to", "safetensors"])
    average = {name: test_neutral.stored(weight, "/ema") for name, weight in weights.items()}
    assert_identical(read_model_folder(tmp_path / "ours").weights, average)
    assert notes(caplog).count("step_0000007: the moving average of its weights is taken") == 1
    assert_identical(read_initial_weights(checkpoint, TINY), average)
    main([str(checkpoint), str(tmp_path / "neutral"), "--to", "neutral"])
    assert_identical(read_initial_weights(tmp_path / "neutral", TINY), average)


def test_notes_say_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    save_model_folder(tmp_path / "ours", BEiT3(TINY).state_dict(), TINY)
    main([str(tmp_path / "ours"), str(tmp_path / "x.pth"), "--to", "torchscale"])
    assert "torchscale's BEiT3 has no heads; left out: mim_head.bias" in notes(caplog)
    main([str(tmp_path / "ours"), str(tmp_path / "x.safetensors"), "--to", "timm"])
    assert "only the vision side is written" in notes(caplog)
    main([str(tmp_path / "x.safetensors"), str(tmp_path / "vision"), "--to", "safetensors", *HEADS])
    assert "the result has no weights for the language side" in notes(caplog)
    vision = {
        name: value
        for name, value in BEiT3(TINY).state_dict().items()
        if name in load_file(tmp_path / "vision" / "model.safetensors")
    }
    vision["vision_embedding.positions"][:2] = 0  # timm has not the two unused rows
    assert_identical(read_model_folder(tmp_path / "vision").weights, vision)


MISTAKES = {
    "no file": ("{folder}/nowhere.pth {folder}/x --to safetensors", ["nowhere.pth"]),
    "no checkpoint": ("{folder} {folder}/x --to safetensors", ["neither a model folder nor a checkpoint"]),
    "unwritable": ("{folder}/good.pth {folder}/good.pth/x.pth --to torchscale", ["good.pth cannot be written to"]),
    "exists": ("{folder}/good.pth {folder}/good.pth --to released", ["good.pth already exists"]),
    "width unknown": ("{folder}/good.pth {folder}/x --to safetensors", ["width 16", "--attention_heads"]),
    "not a divisor": ("{folder}/good.pth {folder}/x --to safetensors --attention_heads 3", ["model.heads=3"]),
    "size": (
        "{folder}/good.pth {folder}/x --to safetensors --attention_heads 2 --image_size 30", ["model.patch_size=8"]),
    "no size": (
        "{folder}/good.pth {folder}/x --to safetensors --attention_heads 2 --image_size 0", ["image_size", "not 0"]),
    "no memory": (
        "{folder}/good.pth {folder}/x --to safetensors --attention_heads 2 --image_size 80000000",
        ["--image_size 80000000: "]),
    "ending": ("{folder}/good.pth {folder}/x --to released --attention_heads 2", [".pth or .safetensors"]),
    "released ending": (
        "{folder}/good.pth {folder}/x.safetensors --to released --attention_heads 2", ["released form is a .pth"]),
    "text file": ("{folder}/text.pth {folder}/x --to safetensors", ["text.pth cannot be read as a file of tensors"]),
    "hostile": ("{folder}/hostile.pth {folder}/x --to safetensors", ["hostile.pth cannot be read", "holds other"]),
    "other dict": ("{folder}/numbers.pth {folder}/x --to safetensors", ["numbers.pth is not a state dict"]),
    "other model": ("{folder}/other.pth {folder}/x --to safetensors", ["other.pth has the keys neither of"]),
    "unknown key": ("{folder}/unknown.pth {folder}/x --to safetensors", ["beit3.extra.weight is no key"]),
    "truncated": ("{folder}/cut.pth {folder}/x --to safetensors", ["cut.pth cannot be read as a file of tensors"]),
    "cut safetensors": ("{folder}/cut.safetensors {folder}/x --to safetensors", ["cut.safetensors cannot be read"]),
    "integers": ("{folder}/integers.pth {folder}/x --to safetensors --attention_heads 2", ["int64", "floating-point"]),
    "tokenizer": (
        "{folder}/good.pth {folder}/x.pth --to released --attention_heads 2 --text_tokenizer t.spm",
        ["--text_tokenizer: only --to safetensors"]),
    "answers": (
        "{folder}/good.pth {folder}/x --to safetensors --attention_heads 2 --answers {folder}/text.pth",
        ["--answers: ", "good.pth has no head"]),
    "no answers": (
        "{folder}/good.pth {folder}/x --to safetensors --attention_heads 2 --answers {folder}/a.txt",
        ["--answers: there is no file", "a.txt"]),
    "no tokenizer": (
        "{folder}/good.pth {folder}/x --to safetensors --attention_heads 2 --text_tokenizer {folder}/t.spm",
        ["--text_tokenizer: there is no file", "t.spm"]),
}  # fmt: skip


class Hostile:
    """Would be called by an unpickler that runs what a file says."""

    def __reduce__(self) -> tuple:
        return print, ("run",)


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(case: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(released(), tmp_path / "good.pth")
    (tmp_path / "text.pth").write_text("weights")
    torch.save({"model": Hostile()}, tmp_path / "hostile.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    save(released() | {"beit3.extra.weight": torch.zeros(1)}, tmp_path / "unknown.pth")
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    save(
        released() | {"beit3.vision_embed.proj.bias": torch.zeros(WIDTH, dtype=torch.int64)}, tmp_path / "integers.pth"
    )
    before = sorted(tmp_path.iterdir())
    arguments, expected = case
    error = refusal(arguments.format(folder=tmp_path).split(), capsys)
    for words in expected:
        assert words in error
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"
