"""The same global batches for every number of ranks, micro-batches and workers, and from any place of resumption."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_dist import opening
from beit3_dist.config import BatchConfig, EvalConfig, RunConfig
from beit3_dist.data import loader as loader_module
from beit3_dist.data.batch import MicroBatch, MixedBatches, Request, hash_terms, mapped, requests_from
from beit3_dist.data.loader import loader
from beit3_dist.data.order import Stream, mix, sample_id
from beit3_dist.hashing import signed
from beit3_dist.image_tokenizer.config import TokenizerDataConfig
from beit3_dist.image_tokenizer.images import ImageBatches
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.objectives.registry import objectives_of
from tests.unit.tar_fixtures import picture, small_run, write_tar

STEPS = 4
SAMPLES = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_run(tmp_path_factory.mktemp("run"))


def opened(run: RunConfig, view: int = 32, rank: int = 0, world: int = 1) -> MixedBatches:
    """The batches of a run, masked as its objective wants it."""
    return MixedBatches(run, view, rank, world, annotators=[*objectives_of(run)])


def read_steps(
    run: RunConfig, world: int, accumulation: int, workers: int = 0, first: int = 0
) -> list[list[MicroBatch]]:
    """All ranks' micro-batches of each step, from step `first` on."""
    run = replace(run, batch=replace(run.batch, accumulation=accumulation))
    steps: list[list[MicroBatch]] = [[] for _ in range(STEPS - first)]
    for rank in range(world):
        dataset = opened(run, 48, rank, world)
        consumed = (first * SAMPLES,) * 3
        requests = itertools.islice(requests_from(consumed, run.batch), (STEPS - first) * accumulation)
        for number, batch in enumerate(loader(dataset, requests, workers, 2, pin=False)):
            steps[number // accumulation].append(batch)
    return steps


def samples_of(batches: Iterable[MicroBatch]) -> dict[tuple[str, int], tuple]:
    """(stream, place in the step) -> everything that is known of the sample, without padding."""
    found = {}
    for batch in batches:
        for name, samples in batch.streams.items():
            drawn = samples.annotations[NAME]
            for row, place in enumerate(samples.positions.tolist()):
                parts = [samples.ids[row]]
                if samples.images is not None:
                    parts += [samples.images[row], samples.tokenizer_images[row], drawn["image_mask"][row]]
                if samples.text is not None:
                    cut = slice(0, int(samples.lengths[row]))
                    parts += [part[row, cut] for part in (samples.text, drawn["text"], drawn["text_mask"])]
                assert (name, place) not in found
                found[name, place] = tuple(part.numpy().tobytes() for part in parts)
    return found


def step_hash(batches: Iterable[MicroBatch]) -> int:
    return signed(sum(hash_terms(batch) for batch in batches) & ((1 << 64) - 1))


@pytest.fixture(scope="module")
def reference(run: RunConfig) -> list[list[MicroBatch]]:
    return read_steps(run, 1, 1)


@pytest.mark.parametrize(
    ("world", "accumulation", "workers", "first"),
    [
        (1, 2, 0, 0),
        (1, 4, 0, 0),
        (2, 1, 0, 0),
        (2, 2, 0, 0),
        (4, 1, 0, 0),
        (4, 2, 0, 0),
        (2, 4, 0, 0),
        (1, 8, 0, 0),
        (1, 1, 2, 0),
        (2, 2, 2, 0),
        (1, 1, 0, 1),
        (2, 2, 0, 3),
        (1, 4, 2, 2),
        (2, 1, 1, 1),
        (1, 2, 3, 0),
    ],
)
def test_global_batches_are_equal(
    run: RunConfig, reference: list[list[MicroBatch]], world: int, accumulation: int, workers: int, first: int
) -> None:
    """Ids, pixels, words, masks and hash of each step, bit for bit; eight samples of 11 to 13 cross epochs."""
    steps = read_steps(run, world, accumulation, workers, first)
    for ours, theirs in zip(steps, reference[first:], strict=True):
        assert len(ours) == world * accumulation
        assert samples_of(ours) == samples_of(theirs)
        assert step_hash(ours) == step_hash(theirs)


LAYOUTS = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))


@pytest.fixture(scope="module")
def larger(run: RunConfig) -> dict[str, tuple[RunConfig, list[int]]]:
    """Runs with steps of 16 samples of each stream, which every layout divides, and the hashes of their steps."""
    found = {}
    for shuffle in ("full", "blocks"):
        data = replace(run.data, shuffle=shuffle, shuffle_block=2, shuffle_window=4)
        config = replace(run, data=data, batch=BatchConfig(images=16, texts=16, pairs=16))
        dataset = MixedBatches(config, 32, 0, 1)
        found[shuffle] = config, [step_hash([dataset[Request((16 * step,) * 3, 0)]]) for step in range(6)]
    assert found["full"][1] != found["blocks"][1]
    return found


@given(before=LAYOUTS, after=LAYOUTS, resume=st.integers(0, 5), shuffle=st.sampled_from(["full", "blocks"]))
@settings(deadline=None, max_examples=25)
def test_hashes_do_not_depend_on_layout_or_resumption(
    larger: dict[str, tuple[RunConfig, list[int]]],
    before: tuple[int, int],
    after: tuple[int, int],
    resume: int,
    shuffle: str,
) -> None:
    """Any layout before the resumption and any other after it, to which nothing passes but what was consumed."""
    run, hashes = larger[shuffle]
    found = []
    for (world, accumulation), steps in ((before, range(resume)), (after, range(resume, len(hashes)))):
        split = replace(run, batch=replace(run.batch, accumulation=accumulation))
        ranks = [MixedBatches(split, 32, rank, world) for rank in range(world)]
        requests = requests_from((16 * steps.start,) * 3, split.batch)
        for _ in steps:
            asked = list(itertools.islice(requests, accumulation))
            found.append(step_hash(rank[request] for rank in ranks for request in asked))
    assert found == hashes


def test_steps_differ(reference: list[list[MicroBatch]]) -> None:
    assert len({step_hash(step) for step in reference}) == STEPS


def test_each_epoch_delivers_each_sample_once(run: RunConfig) -> None:
    dataset = MixedBatches(run, 32, 0, 1)
    assert dataset.lengths()[0] == 11 and dataset.lengths()[2] == 13
    batches = list(loader(dataset, itertools.islice(requests_from((0, 0, 0), run.batch), 11), 0, 1, False))
    for stream, length in zip(Stream, dataset.lengths(), strict=True):
        ids = [int(number) for batch in batches for number in batch.streams[stream.field].ids]
        epochs = len(ids) // length
        expected = {sample_id(stream, epoch, index) for epoch in range(epochs) for index in range(length)}
        assert set(ids[: epochs * length]) == expected and epochs >= 1


def test_shapes_types_and_contents(run: RunConfig, reference: list[list[MicroBatch]]) -> None:
    [batch] = reference[0]
    assert [*batch.streams] == ["images", "pairs", "texts"]
    for samples in batch.streams.values():
        assert samples.positions.tolist() == [*range(8)] and len(samples) == 8
    for samples in batch.with_images:
        mask = samples.annotations[NAME]["image_mask"]
        assert samples.images.shape == (8, 3, 32, 32) and samples.images.dtype == torch.uint8
        assert samples.tokenizer_images.shape == (8, 3, 48, 48)
        assert mask.shape == (8, 16) and (mask.sum(1) == round(0.4 * 16)).all()
    for name, ratio in (("pairs", 0.5), ("texts", 0.15)):
        samples = batch.streams[name]
        drawn = samples.annotations[NAME]
        inputs, targets, mask, lengths = drawn["text"], samples.text, drawn["text_mask"], samples.lengths
        assert inputs.shape == targets.shape == mask.shape == (8, int(lengths.max()))
        assert inputs.dtype == targets.dtype == lengths.dtype == torch.int64 and mask.dtype == torch.bool
        padding = torch.arange(inputs.shape[1]) >= lengths[:, None]
        assert (inputs[padding] == 1).all() and (targets[padding] == 1).all() and not mask[padding].any()
        assert (inputs == targets)[~mask].all() and not (inputs == targets)[mask].all()
        special = (targets == 0) | (targets == 1) | (targets == 2)
        assert not mask[special].any() and (targets[:, 0] == 0).all()
        assert (targets.gather(1, lengths[:, None] - 1) == 2).all()
        words = (~special).sum(1)
        assert mask.sum(1).tolist() == [max(1, round(ratio * int(count))) for count in words]
    assert batch.faults == []
    same_view = opened(run)[Request((0, 0, 0), 0)].streams["images"]
    assert same_view.tokenizer_images is None


def test_hash_is_the_sum_of_the_plain_hash(reference: list[list[MicroBatch]]) -> None:
    for [batch] in reference:
        rows = [
            (Stream[name.upper()], *row)
            for name, samples in batch.streams.items()
            for row in zip(samples.positions.tolist(), samples.ids.tolist(), strict=True)
        ]
        assert hash_terms(batch) == signed(sum(mix(*row) for row in rows) & ((1 << 64) - 1))


def test_one_side_of_a_pair(run: RunConfig, reference: list[list[MicroBatch]]) -> None:
    run = replace(run, objectives={NAME: MaskedDataModelingConfig(mask_pairs="one")})
    sides = []
    for step, [both] in enumerate(reference):
        batch = opened(run, 48)[Request((step * SAMPLES,) * 3, 0)]
        (ours, theirs), (images, texts) = (
            [one.streams["pairs"].annotations[NAME] for one in (batch, both)],
            [[one.streams[name].annotations[NAME] for one in (batch, both)] for name in ("images", "texts")],
        )
        image_masked, caption_masked = ours["image_mask"].any(1), ours["text_mask"].any(1)
        assert (image_masked ^ caption_masked).all()
        assert torch.equal(*(drawn["image_mask"] for drawn in images))
        assert torch.equal(*(drawn["text_mask"] for drawn in texts))
        assert torch.equal(ours["image_mask"][image_masked], theirs["image_mask"][image_masked])
        assert torch.equal(ours["text"][caption_masked], theirs["text"][caption_masked])
        assert torch.equal(ours["text"][~caption_masked], both.streams["pairs"].text[~caption_masked])
        sides += image_masked.tolist()
    assert 5 < sum(sides) < 27  # A fair coin thrown 32 times; outside once in 10,000 seeds.


def test_bad_samples_are_replaced_alike_in_every_layout(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    write_tar(
        tmp_path / "pairs-1.tar",
        [
            {"__key__": "a", "jpg": b"junk", "txt": b"a caption"},
            {"__key__": "b", "jpg": picture(1), "txt": b"\xff"},
            {"__key__": "c", "jpg": picture(2), "txt": b"fine words here"},
        ],
    )
    write_tar(tmp_path / "images-1.tar", [{"__key__": "d", "png": picture(5)[:70]}])
    one = read_steps(run, 1, 1)
    faults = [sorted(map(str, (fault for batch in step for fault in batch.faults))) for step in one]
    assert {fault.key for [batch] in one for fault in batch.faults} == {"a", "b", "d"}
    for world, accumulation, workers in ((2, 2, 0), (1, 4, 2)):
        other = read_steps(run, world, accumulation, workers)
        assert [samples_of(step) for step in other] == [samples_of(step) for step in one]
        assert [sorted(map(str, (fault for batch in step for fault in batch.faults))) for step in other] == faults


def test_held_out_batches_never_change(run: RunConfig, tmp_path: Path) -> None:
    data = run.data
    held = replace(run, eval=EvalConfig(every=1, images=data.images, texts=data.texts, pairs=data.pairs))
    dataset = MixedBatches(held, 32, 0, 1, held_out=True, annotators=[*objectives_of(held)])
    first = dataset[Request((0, 0, 0), 0)]
    for stream in (Stream.IMAGES, Stream.PAIRS):
        assert first.streams[stream.field].ids.tolist() == [sample_id(stream, 0, index) for index in range(8)]
    around = dataset[Request((11, dataset.lengths()[1], 13), 0)]  # One whole round later: the same pictures and masks.
    assert len(tensors_of(first)) == 21 and all(map(torch.equal, tensors_of(first), tensors_of(around)))
    listed = replace(
        run, eval=replace(held.eval, images=list(braceexpand(data.images)), texts=[data.texts], pairs=[data.pairs])
    )
    again = MixedBatches(listed, 32, 0, 1, held_out=True)[Request((0, 0, 0), 0)]
    assert torch.equal(again.streams["images"].images, first.streams["images"].images)
    with pytest.raises(ValueError, match="eval.images: no pattern"):
        MixedBatches(run, 32, 0, 1, held_out=True)
    with pytest.raises(ValueError, match="eval.texts: the list of sources is empty"):
        EvalConfig(texts=[])


def test_config_mistakes(run: RunConfig) -> None:
    with pytest.raises(ValueError, match="batch.images=8 is not divisible by 3"):
        MixedBatches(run, 32, 0, 3)
    with pytest.raises(ValueError, match="text_tokenizer: .* needs model.vocab_size=310, not 320"):
        MixedBatches(replace(run, model=replace(run.model, vocab_size=320)), 32, 0, 1)
    with pytest.raises(ValueError, match="data.texts: no file matches"):
        MixedBatches(replace(run, data=replace(run.data, texts=run.data.texts + "x")), 32, 0, 1)


def test_requests() -> None:
    config = BatchConfig(images=4, texts=6, pairs=8, accumulation=2)
    assert list(itertools.islice(requests_from((1, 2, 3), config), 5)) == [
        Request((1, 2, 3), 0),
        Request((1, 2, 3), 1),
        Request((5, 8, 11), 0),
        Request((5, 8, 11), 1),
        Request((9, 14, 19), 0),
    ]


def test_batches_move_as_a_whole(reference: list[list[MicroBatch]]) -> None:
    [batch] = reference[0]
    moved = batch.to("meta")
    assert len(tensors_of(batch)) == 23 and all(tensor.is_meta for tensor in tensors_of(moved))
    assert moved.faults == batch.faults
    samples = replace(batch.streams["images"], tokenizer_images=None).to("cpu")
    assert samples.tokenizer_images is None


def tensors_of(batch: MicroBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(batch, torch.Tensor, found.append)
    return found


def test_the_global_generators_are_left_alone(run: RunConfig) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    dataset = MixedBatches(run, 32, 0, 1)
    next(iter(loader(dataset, requests_from((0, 0, 0), run.batch), 0, 1, False)))
    next(iter(loader(dataset, requests_from((0, 0, 0), run.batch), 1, 1, False)))
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)


class Probe(torch.utils.data.Dataset):
    """Tells what a loader process is like."""

    def __getitem__(self, _: int) -> tuple[bool, int]:
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN, torch.get_num_threads()


def test_workers_ignore_interrupts_and_use_one_thread() -> None:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    try:
        assert list(loader(Probe(), range(4), 2, 1, False)) == [(True, 1)] * 4
        assert list(loader(Probe(), range(1), 0, 1, False)) == [(False, torch.get_num_threads())]
    finally:
        signal.signal(signal.SIGINT, former)


class Broken(torch.utils.data.Dataset):
    """A dataset that cannot go on."""

    def __getitem__(self, _: int) -> None:
        raise RuntimeError("100 bad samples in a row")


class Announced(torch.utils.data.Dataset):
    """The next positions that a process of a run announces at a request."""

    def __init__(self, run: RunConfig, rank: int) -> None:
        self.batches = MixedBatches(run, 32, rank, 2)

    def __getitem__(self, request: Request) -> list[int]:
        return list(itertools.islice(self.batches._upcoming(self.batches.streams[Stream.IMAGES], request), 6))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_announced_is_what_is_read(run: RunConfig, workers: int) -> None:
    """Eight images a step, two micro-batches, two ranks of two images each, from image 80 on."""
    run = replace(run, batch=replace(run.batch, accumulation=2))
    requests = list(itertools.islice(requests_from((80, 0, 0), run.batch), 3))
    found = list(loader(Announced(run, 1), requests, workers, 2, pin=False))
    micro_batches = [[82 + 4 * number, 83 + 4 * number] for number in range(12)]
    stride = max(workers, 1)
    assert found == [sum(micro_batches[number::stride][:3], []) for number in range(3)]


def test_errors_of_workers_arrive() -> None:
    with pytest.raises(RuntimeError, match="100 bad samples in a row") as error:
        list(loader(Broken(), range(1), 1, 1, False))
    traceback.clear_frames(error.tb)  # They hold the loader; the garbage collector would wait five seconds for it.


def test_a_worker_that_waits_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """As one that waits for a server. The trainer's own end takes seconds; the worker sleeps for ten minutes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time, torch\n"
        "from beit3_dist.data.loader import loader\n"
        "class Sleeper(torch.utils.data.Dataset):\n"
        "    def __getitem__(self, number):\n"
        "        time.sleep(600 * number)\n"
        "        return number\n"
        "if __name__ == '__main__':\n"
        "    batches = iter(loader(Sleeper(), range(2), 1, 2, False))\n"
        "    assert next(batches) == 0\n"
    )
    subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": os.getcwd()}, check=True, timeout=300)


def test_image_batches(run: RunConfig, tmp_path: Path) -> None:
    data = TokenizerDataConfig(images=run.data.images, cache=run.data.cache)
    settings = {"data": data, "size": 24, "seed": 4, "batch": 8}
    whole = ImageBatches(rank=0, world=1, **settings)
    assert len(whole.stream) == 11
    halves = [ImageBatches(rank=rank, world=2, **settings) for rank in range(2)]
    seen = []
    for step in range(3):
        pictures, ids, faults = whole[step]
        assert pictures.shape == (8, 3, 24, 24) and pictures.dtype == torch.uint8 and faults == []
        parts = [half[step] for half in halves]
        assert torch.equal(torch.cat([part[0] for part in parts]), pictures)
        assert torch.cat([part[1] for part in parts]).tolist() == ids.tolist()
        seen += ids.tolist()
    assert set(seen[:11]) == {sample_id(Stream.IMAGES, 0, index) for index in range(11)}
    some = replace(data, images=list(braceexpand(run.data.images)))
    listed = ImageBatches(rank=0, world=1, **settings | {"data": some})
    assert torch.equal(listed[0].images, whole[0].images)
    [loaded] = loader(whole, [2], 0, 1, False)
    assert torch.equal(loaded[0], whole[2][0])
    with pytest.raises(ValueError, match="batch=8 is not divisible by 3"):
        ImageBatches(rank=0, world=3, **settings)


def test_limit_of_open_files_is_raised(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(opening.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(opening.resource, "setrlimit", lambda _, limits: asked.append(limits))
    before: list[bool] = []
    monkeypatch.setattr(loader_module.forkserver, "ensure_running", lambda: before.append(bool(asked)))
    loader(Probe(), range(1), 1, 1, False)
    assert asked == [(4096, 4096)]
    assert before == [True], "the workers' server keeps the limit that it was started with"


def test_faults_of_the_index_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = small_run(tmp_path)
    path = tmp_path / "pairs-0.tar"
    path.write_bytes(path.read_bytes()[:-11000])
    write_tar(tmp_path / "texts-1.tar", [{"__key__": "k", "jsonl": b'{"text": "good"}\nnot json'}])
    with caplog.at_level(logging.WARNING):
        faults = MixedBatches(run, 32, 0, 1).faults()
    assert [(fault.stream, Path(fault.shard).name, fault.key) for fault in faults] == [
        ("texts", "texts-1.tar", "k:2"),
        ("pairs", "pairs-0.tar", ""),
    ]
