"""Fingerprints are plain BLAKE2b of what they are told to be of, and one function says where the cache is."""

import hashlib

import numpy as np
import pytest
import torch

from dic_repa.files.cache import cache_folder
from dic_repa.files.hashing import file_sha256, fingerprint


def test_fingerprint_is_of_the_parts_one_after_the_other():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.blake2b("größe".encode() + b"\x00" + values.T.tobytes(), digest_size=12).hexdigest()
    assert fingerprint("größe", b"\x00", torch.from_numpy(values).T) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_fingerprint_takes_scalars_of_any_dtype(dtype):
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    assert fingerprint(one) != fingerprint(zero)


def test_sha256_of_a_file_longer_than_a_block(tmp_path):
    content = bytes(range(256)) * 20_000  # 5 MB
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_cache_is_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OWN_PLACE", raising=False)
    assert cache_folder("features", "OWN_PLACE") == tmp_path / "dic-repa" / "features"
    monkeypatch.setenv("OWN_PLACE", str(tmp_path / "own"))
    assert cache_folder("features", "OWN_PLACE") == tmp_path / "own"
    assert cache_folder() == tmp_path / "dic-repa"
