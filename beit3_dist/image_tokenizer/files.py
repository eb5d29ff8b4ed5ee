"""Files of image tokenizers: ours and BEiT v2's."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.checkpoint.files import replacing
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.looking import of_run
from beit3_dist.opening import blaming
from beit3_dist.weights import read_weights_file, require_finite, state_dict_in

TRAINING_ONLY = ("loss", "teacher", "scaling")
"""First letters of the names that released files hold beside the tokenizer."""


def save_vqkd(model: VQKD, path: str | os.PathLike[str]) -> None:
    """Writes {model: tensors as in the released files, geometry: integers}; `path` is replaced in one step."""
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with replacing(Path(path)) as aside, open(aside, "wb") as file:
        torch.save({"model": tensors, "geometry": model.geometry}, file)


def load_vqkd(path: str | os.PathLike[str]) -> VQKD:
    """The tokenizer of a file of ours or of BEiT v2, frozen, in eval mode, fp32, on the CPU.

    Everything but the number of heads follows from the tensors' shapes. Our files name the heads; without a name they
    are width / 64, as in the released models. Raises ValueError naming `image_tokenizer` for anything else.
    """
    state, heads = read_tokenizer(path)
    wrong = (KeyError, IndexError, RuntimeError, TypeError, ZeroDivisionError)
    with blaming(f"image_tokenizer={path} is not a VQ-KD image tokenizer", *wrong, most=200):
        geometry = infer_geometry(state, heads)
        with torch.device("meta"):
            model = VQKD(**geometry)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    require_finite(model.state_dict().items(), f"image_tokenizer={path}")
    return model.requires_grad_(False).eval()


def open_vqkd(path: str | os.PathLike[str]) -> VQKD:
    """The same for a run, of whose processes one reads the file. The others have a tokenizer of the same shape on the
    meta device, until `give_values`."""
    opened: list[VQKD] = []

    def look() -> dict[str, int]:
        opened.append(load_vqkd(path))
        return opened[0].geometry

    geometry = of_run(look)
    if opened:
        return opened[0]
    with torch.device("meta"):
        return VQKD(**geometry).requires_grad_(False).eval()


def give_values(tokenizer: VQKD, device: torch.device, takes: bool) -> None:
    """Sends what the first process has read to those that take it. Collective over all processes of the run."""
    if dist.get_world_size() == 1:
        return
    state = tokenizer.state_dict()
    sizes = [tensor.numel() for tensor in state.values()]
    if dist.get_rank() == 0:
        flat = torch.cat([tensor.flatten() for tensor in state.values()]).to(device)
    else:
        flat = torch.empty(sum(sizes), device=device)
    dist.broadcast(flat, src=0)
    if takes and dist.get_rank() > 0:
        given = zip(state.items(), flat.cpu().split(sizes), strict=True)
        tokenizer.load_state_dict({n: part.view(whole.shape).clone() for (n, whole), part in given}, assign=True)


def read_tokenizer(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], int | None]:
    """The tokenizer's tensors by name and its number of heads, if the file says so."""
    if not path:
        raise ValueError("image_tokenizer is not given, but visual codes of images are learnt: name its file")
    if Path(path).is_dir():
        raise ValueError(f"image_tokenizer={path} is a folder: name its file, as {path}/image_tokenizer.pth of a run")
    if not Path(path).is_file():
        raise ValueError(f"image_tokenizer={path} does not exist; launchers/train_image_tokenizer.py makes one")
    try:
        content = read_weights_file(path)
        state = state_dict_in(content, str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"image_tokenizer={error}") from error
    geometry = content.get("geometry")
    heads = geometry.get("heads") if isinstance(geometry, dict) else None
    if heads is not None and (type(heads) is not int or heads < 1):
        raise ValueError(f"image_tokenizer={path} is not a VQ-KD image tokenizer: it would have {heads!r} heads")
    return {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}, heads


def infer_geometry(state: dict[str, Tensor], heads: int | None) -> dict[str, int]:
    """VQKD's arguments from the shapes of its tensors. Raises KeyError for a missing one."""

    def layers(part: str) -> int:
        return sum(re.fullmatch(rf"{part}\.blocks\.\d+\.norm1\.weight", name) is not None for name in state)

    width, _, patch_size, _ = state["encoder.patch_embed.proj.weight"].shape
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    grid = math.isqrt(state["encoder.pos_embed"].shape[1] - 1)
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "layers": layers("encoder"),
        "heads": heads or width // 64,
        "codebook_size": codebook_size,
        "code_dim": code_dim,
        "decoder_layers": layers("decoder"),
        "target_dim": state["decode_task_layer.2.weight"].shape[0],
    }
