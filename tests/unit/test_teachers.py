"""Teachers from local files against independent derivations: CLIP's tower in plain loops and in timm, timm's models."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3_dist.teachers.build import build_teacher
from beit3_dist.teachers.vision import CLIP_MEAN, CLIP_STD, teacher_weights

WIDTH, HEAD, PATCH, GRID, LAYERS, JOINT = 32, 8, 8, 3, 2, 12


def pixels(count: int = 2, side: int = GRID * PATCH) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def clip_file() -> dict[str, Tensor]:
    """Random values under the names of OpenAI's files, a text tower's included."""
    shapes = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (GRID * GRID + 1, WIDTH),
        "proj": (WIDTH, JOINT),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    for layer in range(LAYERS):
        block = f"transformer.resblocks.{layer}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{block}.attn.in_proj_bias": (3 * WIDTH,),
            f"{block}.attn.out_proj.weight": (WIDTH, WIDTH),
            f"{block}.attn.out_proj.bias": (WIDTH,),
            f"{block}.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            f"{block}.mlp.c_fc.bias": (4 * WIDTH,),
            f"{block}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            f"{block}.mlp.c_proj.bias": (WIDTH,),
        }
    norms = ["ln_pre", "ln_post", *(f"transformer.resblocks.{i}.ln_{n}" for i in range(LAYERS) for n in (1, 2))]
    shapes |= {f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}
    draw = torch.Generator().manual_seed(1)
    values = {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    values |= {name: 1 + value for name, value in values.items() if "ln_" in name and name.endswith("weight")}
    return {f"visual.{name}": value for name, value in values.items()} | {"logit_scale": torch.tensor(4.6)}


def plain_features(state: dict[str, Tensor], pictures: Tensor, quick: bool) -> Tensor:
    """CLIP's tower from its description, in float64, patch by patch and head by head."""
    w = {name.removeprefix("visual."): value.double() for name, value in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    result = []
    for picture in pictures.double():
        picture = torch.stack([(picture[c] - CLIP_MEAN[c]) / CLIP_STD[c] for c in range(3)])
        tokens = [w["class_embedding"]]
        for row in range(GRID):
            for column in range(GRID):
                patch = picture[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
                tokens.append((w["conv1.weight"] * patch).sum((1, 2, 3)))
        x = norm(torch.stack(tokens) + w["positional_embedding"], "ln_pre")
        for layer in range(LAYERS):
            block = f"transformer.resblocks.{layer}"
            y = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
            heads = []
            for start in range(0, WIDTH, HEAD):
                q, k, v = (y[:, part * WIDTH + start : part * WIDTH + start + HEAD] for part in range(3))
                scores = (q @ k.T / math.sqrt(HEAD)).exp()
                heads.append(scores / scores.sum(-1, keepdim=True) @ v)
            x = x + torch.cat(heads, -1) @ w[f"{block}.attn.out_proj.weight"].T + w[f"{block}.attn.out_proj.bias"]
            y = norm(x, f"{block}.ln_2") @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"]
            y = y / (1 + (-1.702 * y).exp()) if quick else y * (1 + torch.erf(y / math.sqrt(2))) / 2
            x = x + y @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
        result.append(norm(x[1:], "ln_post") @ w["proj"])
    return torch.stack(result)


class Archive(nn.Module):
    """A module whose state dict holds given names, to be written as OpenAI's TorchScript archives are."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            owner.register_buffer(leaf, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


def write(state: dict[str, Tensor], kind: str, folder: Path) -> str:
    path = folder / f"clip.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    else:
        torch.jit.script(Archive(state)).save(str(path))
    return str(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["safetensors", "pth", "jit.pt"])
@pytest.mark.parametrize("quick", [True, False])
def test_clip_teacher_equals_a_plain_derivation(kind: str, quick: bool, tmp_path: Path) -> None:
    state = clip_file()
    teacher = build_teacher("clip", GRID, weights=write(state, kind, tmp_path), quick_gelu=quick, head_dim=HEAD)
    expected = plain_features(state, pixels(), quick)
    features = teacher(pixels())
    assert features.shape == (2, GRID * GRID, JOINT) and teacher.channels == JOINT
    # fp32 against fp64 over two layers; the two kinds of GELU differ by 1e-2.
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_clip_teacher_equals_timms_clip(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    state = clip_file()
    theirs = VisionTransformer(
        img_size=GRID * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=LAYERS, num_heads=WIDTH // HEAD,
        num_classes=JOINT, pre_norm=True, norm_layer=nn.LayerNorm, act_layer="quick_gelu", global_pool="token"
    ).eval()  # fmt: skip
    renamed = checkpoint_filter_fn(state, theirs)
    theirs.load_state_dict({name: value for name, value in renamed.items() if name != "head.bias"}, strict=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        expected = theirs.forward_features((pixels() - mean) / std)[:, 1:] @ state["visual.proj"]
    ours = build_teacher("clip", GRID, weights=write(state, "pth", tmp_path), head_dim=HEAD)(pixels())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_features_are_resampled_to_the_code_grid(tmp_path: Path) -> None:
    """A picture of another size and a finer code grid: constant features stay constant, order stays row by row."""
    path = write(clip_file(), "pth", tmp_path)
    own, finer = (build_teacher("clip", grid, weights=path, head_dim=HEAD) for grid in (GRID, 2 * GRID))
    assert finer(pixels(side=48)).shape == (2, 4 * GRID * GRID, JOINT)
    features, fine = own(pixels()), finer(pixels())
    # A corner of the finer map lies beyond the centre of the corner patch, where bilinear resampling repeats it.
    torch.testing.assert_close(fine[:, [0, 5, 30, 35]], features[:, [0, 2, 6, 8]])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_timm_teacher_gives_the_models_last_features(name: str, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    source = timm.create_model(name, pretrained=False).eval()  # with its classifier, as in published files
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    teacher = build_teacher("timm", 7, name=name, weights=str(tmp_path / "weights.pth"))
    x = pixels(1, 224)
    features = teacher(x)
    assert features.shape == (1, 49, teacher.channels)
    mean, std = (torch.tensor(source.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        own = source.forward_features((x - mean) / std)
    if name.startswith("vit"):  # 14 x 14 patches, so on a finer grid nothing is resampled
        features = build_teacher("timm", 14, name=name, weights=str(tmp_path / "weights.pth"))(x)
        expected = own[:, 1:]
    else:
        expected = (own.permute(0, 3, 1, 2) if name.startswith("swin") else own).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_does_not_fit_is_one_clear_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    torch.save({"conv1.weight": torch.zeros(4, 3, 2, 2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for path, reason in (("none.pth", "does not exist"), ("broken.pth", "cannot be read"), ("list.pth", "no tensors"),
                         ("other.pth", "no CLIP vision transformer")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^teacher.weights=.*{path}.*{reason}") as caught:
            build_teacher("clip", 2, weights=str(tmp_path / path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="does not fit teacher.name=resnet18"):
        build_teacher("timm", 2, name="resnet18", weights=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="teacher.name=no_such_net is no model of timm"):
        build_teacher("timm", 2, name="no_such_net", weights=str(tmp_path / "other.pth"))


def test_a_broken_timm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^teacher.kind=timm needs timm, which cannot be imported"):
        build_teacher("timm", 2, name="resnet18", weights="any.pth")


class Intruder:
    """What a hostile file would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Intruder()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        teacher_weights(str(tmp_path / "hostile.pth"))
    assert "unpickled" not in capsys.readouterr().out
