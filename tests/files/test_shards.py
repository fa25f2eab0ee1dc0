"""Tensors cut up among files are read as they were, in any cut, by us and by torch; what does not fit is told."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dic_repa.errors import UserError
from dic_repa.files.shards import Rows, join_rows, open_tensors, save_rows, shard_path
from dic_repa.files.weights import read_tensors, weights_fingerprint

TENSORS = {
    "long": torch.randn(7),
    "wide": torch.randn(5, 3, 2),
    "one row": torch.randn(1, 4).bfloat16(),
    "count é": torch.tensor(3),
    "flags": torch.arange(6) > 2,
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(params=[1, 2, 4])
def cut(request, tmp_path):
    """The path that stands for the files of so many processes."""
    path, count = tmp_path / "model.safetensors", request.param
    for process in range(count):
        rows: dict = {}
        for name, tensor in TENSORS.items():
            if tensor.dim() == 0:
                rows[name] = tensor if process == 0 else None
                continue
            chunks = tensor.chunk(count)  # what FSDP2 does
            start = sum(len(chunk) for chunk in chunks[:process])
            rows[name] = Rows(chunks[process] if process < len(chunks) else tensor[:0], start)
        save_rows(rows, shard_path(path, process, count))
    return path


def test_all_rows_and_any_rows_are_read_as_they_were(cut):
    with open_tensors(cut) as stored:
        assert stored.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert stored[name].shape == tensor.shape
            assert stored[name][...].equal(tensor)
            for first in range(len(tensor) + 1 if tensor.dim() else 0):
                for last in range(first, len(tensor) + 1):
                    rows = stored[name][first:last]
                    assert rows.dtype == tensor.dtype
                    assert rows.equal(tensor[first:last])
    assert all(tensor.equal(TENSORS[name]) for name, tensor in read_tensors(cut)[0].items())


def test_joined_file_is_the_one_that_safetensors_writes(cut, tmp_path):
    with open_tensors(cut) as stored:
        join_rows(stored, tmp_path / "joined", {"step": "8"})
    save_file(TENSORS, tmp_path / "whole", {"step": "8"})
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()


def test_torch_reads_them_too(cut):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    if not hasattr(checkpoint, "HuggingFaceStorageReader"):
        pytest.skip("this torch does not read safetensors")
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items() if tensor.numel() and tensor.dim()}
    checkpoint.load(found, storage_reader=checkpoint.HuggingFaceStorageReader(str(cut.parent)), no_dist=True)
    assert all(found[name].equal(TENSORS[name]) for name in found)


@pytest.mark.parametrize(
    ("info", "second", "says"),
    [
        # a row is missing; one is there twice; rows of another length and dtype; what is no row
        ({"a": {"saved_offsets": [3, 0]}}, torch.zeros(2, 3), "the parts of a do not fit together"),
        ({"a": {"saved_offsets": [1, 0]}}, torch.zeros(2, 3), "the parts of a do not fit together"),
        ({"a": {"saved_offsets": [2, 0]}}, torch.zeros(2, 4), "the parts of a do not fit together"),
        ({"a": {"saved_offsets": [2, 0]}}, torch.zeros(2, 3).half(), "the parts of a differ in dtype"),
        ({"a": {"saved_offsets": ["x"]}}, torch.zeros(2, 3), "is damaged"),
        ('{"a": {"saved_offsets": [Infinity]}}', torch.zeros(2, 3), "is damaged"),
        ({"a": {"saved_offsets": 2}}, torch.zeros(2, 3), "is damaged"),
        ({}, torch.zeros(2, 3), "is damaged"),
        ("[" * 100000, torch.zeros(2, 3), "is damaged"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(tmp_path, info, second, says):
    path = tmp_path / "model.safetensors"
    save_rows({"a": torch.zeros(2, 3)}, shard_path(path, 0, 2))
    text = info if isinstance(info, str) else json.dumps(info)
    save_file({"a": second}, shard_path(path, 1, 2), {"DCP_SHARDING_INFO": text})
    with pytest.raises(UserError, match=says), open_tensors(path):
        pass


def test_a_file_that_is_missing_or_cut_short_is_told(tmp_path):
    path = tmp_path / "model.safetensors"
    for process in range(2):
        save_rows({"a": Rows(torch.zeros(2, 3), 2 * process)}, shard_path(path, process, 2))
    weights_fingerprint(path)
    last = shard_path(path, 1, 2)
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is not a whole safetensors file"):
        read_tensors(path)
    last.unlink()
    with pytest.raises(UserError, match="no weights at"), open_tensors(path):
        pass
    with pytest.raises(UserError, match="no weights"):
        weights_fingerprint(path)
    save_file({"a": torch.zeros(4, 3)}, path)  # beside a part of other weights
    with pytest.raises(UserError, match="or both"), open_tensors(path):
        pass
