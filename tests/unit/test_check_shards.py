"""The check finds each thing that can be wrong, names shard and key, and is silent about good shards."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.unit.tar_fixtures import exit_code, image_tar, pair_tar, picture, sentences, text_tar, write_tar
from tests.unit.test_index import raw_tar
from tools import check_shards


def check(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> tuple[int, dict]:
    code = check_shards.main([*map(str, arguments), "--json", "--jobs", "1", "--cache", str(folder / "cache")])
    return code, json.loads(capsys.readouterr().out)


def test_good_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_tar(tmp_path / "i0.tar", 3)
    plain = image_tar(tmp_path / "i1.tar", 4)
    (tmp_path / "i2.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pair_tar(tmp_path / "p.tar", 5)
    text_tar(tmp_path / "t.tar", sentences()[:9])
    patterns = ["--images", tmp_path / "i*.tar*", "--texts", tmp_path / "t.tar", "--pairs", tmp_path / "p.tar"]
    code, record = check(capsys, tmp_path, *patterns)
    assert code == 0 and record["problems"] == 0 and len(record["shards"]) == 5
    streams = record["streams"]
    assert [streams[name]["samples"] for name in ("images", "texts", "pairs")] == [11, 2, 5]
    assert streams["texts"]["documents"] == 9 and streams["pairs"]["members"] == 10
    assert check_shards.main([*map(str, patterns), "--jobs", "1", "--cache", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out.count("none") == 3


PAIR_FAULTS = {
    "duplicate": [("k.png", picture(0)), ("k.jpg", picture(1)), ("k.txt", b"words")],
    "not adjacent": [("k.png", picture(0)), ("l.png", picture(1)), ("k.txt", b"words"), ("l.txt", b"words")],
    "incomplete": [("k.png", picture(0))],
    "unreadable image": [("k.png", picture(0)[:60]), ("k.txt", b"words")],
    "too many pixels": [("k.png", picture(0, 50, 50)), ("k.txt", b"words")],
    "bad caption": [("k.png", picture(0)), ("k.txt", b" \n")],
}


@pytest.mark.parametrize("kind", PAIR_FAULTS)
def test_faults_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = raw_tar(tmp_path / "a.tar", PAIR_FAULTS[kind])
    code, record = check(capsys, tmp_path, "--pairs", path, "--max_pixels", 1500)
    [shard] = record["shards"]
    assert code == 1 and {problem["kind"] for problem in shard["problems"]} == {kind}
    assert shard["shard"] == str(path) and shard["problems"][0]["key"] == "k" and shard["problems"][0]["reason"]
    assert record["streams"]["pairs"]["problems"][kind] == record["problems"]


def test_captions_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "a.tar", [{"__key__": "k", "png": picture(0), "json": b'{"title": "words"}'}])
    assert check(capsys, tmp_path, "--pairs", path, "--caption_key", "title")[0] == 0
    assert check(capsys, tmp_path, "--pairs", path, "--caption_key", "alt", "title")[0] == 0
    code, record = check(capsys, tmp_path, "--pairs", path)
    assert code == 1 and "no field 'caption'" in record["shards"][0]["problems"][0]["reason"]


def test_faults_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [{"__key__": "a", "jsonl": b'{"text": "good"}\nnot json\n'}, {"__key__": "b", "txt": b"\xff\nfine\n"},
         {"__key__": "c", "txt": b"\n"}],
    )  # fmt: skip
    code, record = check(capsys, tmp_path, "--texts", path)
    found = [(problem["key"], problem["reason"]) for problem in record["shards"][0]["problems"]]
    assert code == 1 and [key for key, _ in found] == ["a", "b", "c"]
    assert "line 2" in found[0][1] and "line 1" in found[1][1] and "no document" in found[2][1]
    assert record["streams"]["texts"]["documents"] == 2


def test_damaged_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = image_tar(tmp_path / "a.tar", 5)
    with tarfile.open(whole) as tar:
        fourth = tar.getmembers()[3].offset_data
    whole.write_bytes(whole.read_bytes()[: fourth + 1])
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    code, record = check(capsys, tmp_path, "--images", tmp_path / "*.tar")
    cut, other = record["shards"]
    assert code == 1 and cut["samples"] == 3 and f"cut at byte {fourth + 1}" in cut["problems"][0]["reason"]
    assert "not a plain tar" in other["problems"][0]["reason"]


def test_what_the_index_skips_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links, unknown extensions, joined and empty tars: told by shard and reason. What nobody misses is no problem."""
    odd = tmp_path / "odd.tar"
    with tarfile.open(odd, "w") as tar:
        for name, kind in (("0.jpg", tarfile.REGTYPE), ("1.jpg", tarfile.LNKTYPE), ("2.jpg", tarfile.SYMTYPE),
                           ("3.jpg", tarfile.LNKTYPE), ("4.psd", tarfile.REGTYPE), ("0.cls", tarfile.REGTYPE),
                           ("._0.jpg", tarfile.REGTYPE), ("__MACOSX/5.jpg", tarfile.REGTYPE), (".x/6", tarfile.REGTYPE),
                           ("7", tarfile.REGTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname, content = kind, "0.jpg", picture(0)
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(content))
    halves = image_tar(tmp_path / "joined.tar", 2).read_bytes()
    (tmp_path / "joined.tar").write_bytes(halves * 2)
    with tarfile.open(tmp_path / "nothing.tar", "w"):
        pass
    (tmp_path / "zero.tar").write_bytes(b"")
    text_tar(tmp_path / "words.tar", sentences()[:4])
    code, record = check(capsys, tmp_path, "--images", tmp_path / "*.tar")
    shards = {Path(shard["shard"]).name: shard for shard in record["shards"]}
    reasons = {name: [problem["reason"] for problem in shard["problems"]] for name, shard in shards.items()}
    assert code == 1 and reasons["odd.tar"] == [
        "2 left out: a hard link; this is the first",
        "1 left out: a symbolic link; this is the first",
        "1 left out: extension .psd; this is the first",
        "1 left out: no known extension; this is the first",
    ]
    assert [problem["key"] for problem in shards["odd.tar"]["problems"]] == ["1.jpg", "2.jpg", "4.psd", "7"]
    assert shards["odd.tar"]["ignored"] == {"extension .cls": [1, "0.cls"], "hidden": [3, "._0.jpg"]}
    assert record["streams"]["images"]["ignored"] == {"extension .cls": 1, "hidden": 3}
    assert "more follows at byte" in reasons["joined.tar"][0] and shards["joined.tar"]["samples"] == 2
    assert reasons["nothing.tar"] == ["no sample in this shard"] and "cut at byte 0" in reasons["zero.tar"][0]
    assert reasons["words.tar"] == ["no image member"] * 2


def test_table_lists_a_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "a.tar", [{"__key__": f"{number:02d}", "png": b"junk"} for number in range(25)])
    assert check_shards.main(["--images", str(path), "--jobs", "1", "--cache", str(tmp_path / "cache")]) == 1
    shown = capsys.readouterr().out
    assert "25 unreadable image" in shown and shown.count("undecodable") == 20 and "and 5 others" in shown


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([], "--images, --texts or --pairs"),
        (["--images", str(tmp_path / "*.tar")], "--images: no file matches"),
        (["--images", "x", "--jobs", "0"], "--jobs 0"),
    ):
        assert exit_code(check_shards.main, arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.splitlines()) == 1


def test_what_img2dataset_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tables and counts beside the tars are no shards, and a download that failed is no sample."""
    words = {"status": "success", "error_message": None, "caption": "a sign", "alt": None, "width": 40, "exif": "{}"}
    failed = words | {"status": "failed_to_download", "error_message": "HTTP Error 404:\nNot Found"}
    others = {"status": "draft", "caption": "a sign of somebody else's records"}
    members: list[tuple[str, bytes]] = []
    for key, record in (("000000000", words), ("000000001", failed), ("000000002", others)):
        written = json.dumps(record).encode()
        members += [(f"{key}.jpg", picture(0, kind="JPEG")), (f"{key}.json", written), (f"{key}.txt", b"a sign")]
    (tmp_path / "crawl").mkdir()
    path = raw_tar(tmp_path / "crawl" / "00000.tar", [*members, ("000000003.json", json.dumps(failed).encode())])
    (path.parent / "00000.parquet").write_bytes(b"PAR1PAR1")
    (path.parent / "00000_stats.json").write_text('{"count": 4, "successes": 2}')
    for extra in ([], ["--caption_key", "caption", "alt"], ["--caption_key", "caption"]):
        code, record = check(capsys, tmp_path, "--pairs", path.parent / "*", *extra)
        [shard] = record["shards"]
        found = {(problem["kind"], problem["key"]): problem["reason"] for problem in shard["problems"]}
        assert code == 1 and set(found) == {("failed download", "000000001"), ("incomplete", "000000003")}
        assert found["failed download", "000000001"] == "status failed_to_download: HTTP Error 404: Not Found"
    code, record = check(capsys, tmp_path, "--images", path.parent / "0*")
    assert [problem["kind"] for problem in record["shards"][0]["problems"]] == ["failed download", "incomplete"]
    (path.parent / "other.parquet").write_bytes(b"PAR1PAR1")
    assert exit_code(check_shards.main, ["--images", f"{path.parent}/*", "--cache", str(tmp_path / "cache")]) == 2
    assert "other.parquet is a table and no tar" in capsys.readouterr().err
