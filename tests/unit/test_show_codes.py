"""tools/show_codes.py on a small tokenizer: its images, and below each the patches that stand for its codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_dist.command_line import to_yaml
from beit3_dist.image_tokenizer.config import TokenizerConfig, TokenizerDataConfig, TokenizerModelConfig
from tests.integration.runs import save_random_tokenizer
from tests.unit.tar_fixtures import small_run
from tools import show_codes

SIDE, PATCH = 32, 8


def test_images_and_their_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show_codes, "OTHERS", 64)
    data = small_run(tmp_path).data
    model = TokenizerModelConfig(image_size=SIDE, patch_size=PATCH)
    (tmp_path / "config.yaml").write_text(
        to_yaml(TokenizerConfig(out=str(tmp_path), data=TokenizerDataConfig(images=str(data.images)), model=model))
    )
    save_random_tokenizer(tmp_path / "image_tokenizer.pth")
    show_codes.main([str(tmp_path), "--pictures", "3"])
    page, zoom = np.asarray(Image.open(tmp_path / "codes.png")), show_codes.LEGIBLE // SIDE
    assert page.shape == (2 * (SIDE + 2) * zoom, 3 * (SIDE + 2) * zoom, 3)
    images, drawn = page[::zoom, ::zoom].reshape(2, SIDE + 2, 3, SIDE + 2, 3)[:, :SIDE, :, :SIDE]
    assert len(np.unique(images)) > 2 and (images != drawn).any()
    patches = drawn.reshape(SIDE // PATCH, PATCH, 3, SIDE // PATCH, PATCH, 3).transpose(2, 0, 3, 1, 4, 5)
    assert 1 < len(np.unique(patches.reshape(-1, PATCH * PATCH * 3), axis=0)) <= 48, "a few codes are drawn"


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        ([str(tmp_path)], "image_tokenizer.pth"),
        ([str(tmp_path / "none")], "none"),
        ([str(tmp_path), "--pictures", "0"], "0"),
    ):
        with pytest.raises(SystemExit) as end:
            show_codes.main(arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2 and named in error and len(error.splitlines()) == 1, error
