"""Every pair exactly once, whoever asks, however often the run is stopped; and shards that are what they say."""

import collections
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.documents import Document, tokenize_documents
from common.data.packing import Example, ExampleStream
from common.data.shards import Shards, checked, dtype_for, write_shards
from common.data.stream import BatchStream, RandomWindows, Stream
from common.foundation.files import read_json, write_json
from common.model.masks import attention_mask, positions_of
from common.tokenization.bpe import BPETokenizer
from common.tokenization.byte import ByteTokenizer

END = 0


def stream_of(tokens, **options):
    return BatchStream(tokens, **{"length": 8, "batch_size": 2, "end_of_text": END, **options})


def pairs_of(batches):
    """How often each (input, target) pair counts."""
    seen = collections.Counter()
    for batch in batches:
        seen.update(zip(batch.inputs[batch.loss_mask].tolist(), batch.targets[batch.loss_mask].tolist(), strict=True))
    return seen


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(2, 80),
    length=st.integers(1, 20),
    batch=st.integers(1, 4),
    world=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_pair_exactly_once_over_all_ranks(n, length, batch, world, seed):
    tokens = np.arange(100, 100 + n)
    seen, steps = collections.Counter(), set()
    for rank in range(world):
        stream = stream_of(tokens, length=length, batch_size=batch, rank=rank, world_size=world, seed=seed)
        batches = list(stream.epoch_batches())
        seen += pairs_of(batches)
        steps.add(len(batches))
        assert stream.epoch == 1
    assert seen == {(i, i + 1): 1 for i in range(100, 99 + n)}
    assert len(steps) == 1, "all ranks take the same number of steps"


@pytest.mark.parametrize("extra", [-1, 0, 1, 2])
def test_lengths_around_a_chunk(extra):
    n = 8 + extra
    assert sum(pairs_of(stream_of(np.arange(n)).epoch_batches()).values()) == n - 1


def test_ledger_accounts_for_every_place():
    stream = stream_of(np.arange(30), batch_size=3)
    batches = list(stream.epoch_batches())
    places = sum(batch.inputs.numel() for batch in batches)
    counted = sum(int(batch.loss_mask.sum()) for batch in batches)
    assert (stream.ledger.counted, stream.ledger.padded, stream.ledger.cropped) == (counted, places - counted, 0)
    assert stream.ledger.pairs == counted == 29


def test_epochs_differ_and_seeds_differ_and_the_same_seed_repeats():
    def order(seed):
        stream = stream_of(np.arange(1000), seed=seed)
        return [torch.cat([b.inputs[:, 0] for b in stream.epoch_batches()]).tolist() for _ in range(2)]

    first, second = order(1)
    assert first != second
    assert sorted(first) == sorted(second)
    assert order(1) == [first, second]
    assert order(2)[0] != first


@pytest.mark.parametrize("stops", [[0], [1], [5], [3, 4], [2, 2, 9], [13, 14]])
def test_resumed_at_any_batch_any_number_of_times(stops):
    def batches(stream, count):
        return [stream.next_batch().inputs.tolist() for _ in range(count)]

    undisturbed = batches(stream_of(np.arange(200)), 40)  # more than two epochs
    got, stream = [], stream_of(np.arange(200))
    for stop in stops:
        got += batches(stream, stop)
        state = stream.state_dict()
        stream = stream_of(np.arange(200))
        stream.load_state_dict(state)
    got += batches(stream, 40 - len(got))
    assert got == undisturbed


def test_resumed_on_another_number_of_ranks_nothing_is_lost_or_repeated():
    tokens = np.arange(500)
    streams = [stream_of(tokens, rank=r, world_size=2) for r in range(2)]
    seen = sum((pairs_of([s.next_batch() for _ in range(5)]) for s in streams), collections.Counter())
    for rank in range(3):
        stream = stream_of(tokens, rank=rank, world_size=3)
        stream.load_state_dict(streams[0].state_dict())
        seen += pairs_of(stream.epoch_batches())
    assert seen == {(i, i + 1): 1 for i in range(499)}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"length": 9}, {"shuffle": False}, {"tokens": np.append(np.arange(199), 7)}]
)
def test_the_state_of_another_stream_is_refused(change):
    state = stream_of(np.arange(200)).state_dict()
    options = {"tokens": np.arange(200), **change}
    with pytest.raises(ValueError, match="belongs to another stream"):
        stream_of(options.pop("tokens"), **options).load_state_dict(state)


def test_impossible_streams_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        stream_of(np.arange(1))
    with pytest.raises(ValueError, match="rank=2"):
        stream_of(np.arange(9), rank=2, world_size=2)


def test_documents_are_told_apart_and_positions_restart():
    tokens = np.array([END, 5, 6, END, 7, END, 8, 9, 8, END])
    batch = stream_of(tokens, shuffle=False, batch_size=1, length=9).next_batch()
    assert batch.document_ids.tolist() == [[1, 1, 1, 2, 2, 3, 3, 3, 3]]
    assert positions_of(batch.document_ids).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]


def test_attention_stays_within_a_document_and_the_past():
    mask = attention_mask(torch.tensor([[1, 1, 2, 2, -1]]))[0]
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: stream_of(np.arange(200)),
        lambda: RandomWindows(np.arange(200), length=8, batch_size=2),
        lambda: ExampleStream([Example(torch.arange(9) + n) for n in range(7)], length=8, batch_size=2, pad_id=END),
    ],
    ids=["chunks", "windows", "examples"],
)
def test_every_stream_keeps_the_protocol(make):
    """Endless, resumable through JSON to the exact batch, and told apart from another by its state."""
    stream = make()
    assert set(dir(stream)) >= {name for name in vars(Stream) if not name.startswith("_")} | {"epoch"}
    for _ in range(30):
        stream.next_batch()
    state, epoch = json.loads(json.dumps(stream.state_dict())), stream.epoch
    other = make()
    other.load_state_dict(state)
    assert other.epoch == epoch
    for _ in range(30):
        ours, theirs = stream.next_batch(), other.next_batch()
        assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))
    other.seed += 1
    with pytest.raises(ValueError, match="this state belongs to"):
        other.load_state_dict(state)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def documents():
    return [Document(str(i), "g", "né " * (i % 7 + 1) + str(i)) for i in range(50)]


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 10_000])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_shards_hold_the_stream(tmp_path, documents, shard_tokens, kind):
    tokenizer = ByteTokenizer() if kind == "byte" else BPETokenizer.train([d.text for d in documents], 262)
    shards = write_shards(documents, tokenizer, tmp_path, shard_tokens=shard_tokens, batch=9)
    pieces = [ids[:-1] for ids in tokenize_documents(documents, tokenizer)]
    stream = torch.cat([*pieces, pieces[0][:1]]).numpy()
    assert np.array_equal(shards[:], stream)
    assert np.array_equal(shards[3:40], stream[3:40])
    assert shards[5] == shards[np.int64(5)] == stream[5]
    assert shards[-1] == stream[-1]
    with pytest.raises(IndexError):
        shards[len(shards)]
    assert len(shards) == len(stream)
    assert shards.about["documents"] == 50
    assert len(Shards(tmp_path, verify=True)) == len(shards)
    assert shards.about["bytes"] == sum(len(d.text.encode()) for d in documents)


def test_the_batches_of_shards_are_those_of_the_array(tmp_path, documents):
    tokenizer = ByteTokenizer()
    shards = write_shards(documents, tokenizer, tmp_path, shard_tokens=23)
    on_disk, in_memory = (stream_of(tokens, end_of_text=256) for tokens in (shards, shards[:]))
    for a, b in zip(on_disk.epoch_batches(), in_memory.epoch_batches(), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.document_ids, b.document_ids)


def test_dtype_follows_the_vocabulary_and_ids_are_checked():
    assert dtype_for(65_536) == np.dtype("<u2")
    assert dtype_for(65_537) == np.dtype("<u4")
    assert checked(np.array([65_535]), 65_536).tolist() == [65_535]
    for ids in ([65_536], [-1]):
        with pytest.raises(ValueError, match="outside a vocabulary of 65536"):
            checked(np.array(ids), 65_536)


def test_damaged_and_foreign_shards_are_refused(tmp_path, documents):
    tokenizer = ByteTokenizer()
    write_shards(documents, tokenizer, tmp_path, shard_tokens=50)
    Shards.for_tokenizer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="ids mean other bytes"):
        Shards.for_tokenizer(tmp_path, ByteTokenizer(["<x>"]))
    path = tmp_path / "shard-00001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="98 bytes, but shards.json says 100"):
        Shards(tmp_path)
    path.write_bytes(whole[:-1] + b"\x07")
    with pytest.raises(ValueError, match="was altered"):
        Shards(tmp_path, verify=True)
    path.write_bytes(whole)
    about = read_json(tmp_path / "shards.json")
    write_json(tmp_path / "shards.json", {**about, "dtype": "<u4"})
    with pytest.raises(ValueError, match="should be uint16"):
        Shards(tmp_path)
    (tmp_path / "shards.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        Shards(tmp_path)


def test_writing_again_leaves_no_old_shards(tmp_path, documents):
    write_shards(documents, ByteTokenizer(), tmp_path, shard_tokens=50)
    write_shards(documents[:3], ByteTokenizer(), tmp_path, shard_tokens=50)
    listed = {shard["file"] for shard in Shards(tmp_path).about["shards"]}
    assert {path.name for path in tmp_path.glob("*.bin")} == listed


def test_a_stopped_writer_leaves_no_whole_shards(tmp_path, documents):
    write_shards(documents, ByteTokenizer(), tmp_path)

    def stops():
        yield documents[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(stops(), ByteTokenizer(), tmp_path, batch=1)
    with pytest.raises(ValueError, match="not finished"):
        Shards(tmp_path)
    with pytest.raises(ValueError, match="no documents"):
        write_shards([], ByteTokenizer(), tmp_path)
