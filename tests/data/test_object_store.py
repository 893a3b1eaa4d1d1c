"""A corpus written to and read from S3, against a server of this machine."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmlab import remote
from lmlab.data.corpus import CorpusIndex, CorpusOptions, build_corpus
from lmlab.data.corpus_copy import corpus_folder
from lmlab.data.files import find_files
from lmlab.data.prepare import TextEncoder, prepare
from lmlab.data.shards import Shards
from lmlab.data.sources import Intake
from lmlab.data.store import store_at
from lmlab.records import UserError
from lmlab.remote import Remote
from lmlab.tokenizers import load_tokenizer, tokenizer_hash
from lmlab.tokenizers.fast import FastEncoder
from tests.data.test_corpus import Stopped, contents
from tests.object_store import SECRET, ObjectServer, object_server

OPTIONS = CorpusOptions(
    val_fraction=0.2, column="text", shard_bytes=2000, on_bad_record="error", limit_documents=None
)
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with object_server() as found:
        yield found


@pytest.fixture
def s3(server: ObjectServer, own_cache: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    """An empty prefix of the server, with the environment that leads to it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    # One is kept for a process, with the endpoint that it was made for.
    importlib.import_module("s3fs").S3FileSystem.clear_instance_cache()
    return f"s3://lab/{request.node.name}"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("lmlab.data.documents.SMALLEST_UNIT", 100)
    rows = [{"text": f"row {number} " + "of the books " * (number % 9 + 1)} for number in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "rows.jsonl"


@pytest.fixture
def build(bpe: Any, source: Path) -> Callable[..., CorpusIndex]:
    def run(place: str, **told: Any) -> CorpusIndex:
        return build_corpus(
            find_files(str(source)),
            place,
            FastEncoder(bpe),
            OPTIONS,
            tokenizer_hash=tokenizer_hash(bpe, with_chat=False),
            save_tokenizer=bpe.save_pretrained,
            **{"workers": 1, **told},
        )

    return run


def lying_at(url: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{url}/"): Remote(name).read() or b"" for name in Remote(url).files()}


def rows(prepared: Any, side: str) -> list[list[int]]:
    found = prepared.rows(side)
    return [found[index].input_ids.tolist() for index in range(len(found))]


@pytest.mark.slow
def test_a_corpus_goes_to_s3_and_trains_from_there(
    s3: str, build: Callable[..., CorpusIndex], tmp_path: Path, make_config: Make, encoder: TextEncoder
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "encode" and done >= 3000:
            raise Stopped

    build(str(tmp_path / "here"))
    with pytest.raises(Stopped):
        build(s3, progress=stop)
    with pytest.raises(UserError, match=r"not finished .*run the same tokenize_corpus\.py command again"):
        CorpusIndex.load(s3)
    notes = [name for name in lying_at(s3) if name.startswith("units/0")]
    assert notes
    told: list[int] = []
    index = build(s3, verify=True, progress=lambda stage, done, total: told.append(done))
    assert lying_at(s3) == contents(tmp_path / "here")
    assert index == CorpusIndex.load(str(tmp_path / "here"))
    assert build(s3) == index

    near = prepare(make_config("shards", path=str(tmp_path / "here")), encoder, task="pretrain")
    far = prepare(make_config("shards", path=s3), encoder, task="pretrain")
    for side in ("train", "val"):
        assert rows(far, side) == rows(near, side)
    copy = corpus_folder(s3)
    assert contents(copy / "tokenizer").items() >= contents(tmp_path / "here/tokenizer").items()
    assert load_tokenizer(f"{s3}/tokenizer").get_vocab() == load_tokenizer(copy / "tokenizer").get_vocab()
    assert SECRET.encode() not in b"".join(contents(remote.cache_root()).values())


@pytest.mark.slow
def test_a_damaged_shard_is_said_and_a_vanished_network_too(
    s3: str,
    server: ObjectServer,
    build: Callable[..., CorpusIndex],
    make_config: Make,
    encoder: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(s3)
    shard = next(name for name in lying_at(s3) if name.startswith("train/0") and name.endswith(".tokens"))
    whole = Remote(f"{s3}/{shard}").read() or b""
    Remote(f"{s3}/{shard}").write(whole[:-2] + b"\7\0")
    config = make_config("shards", path=s3)
    with pytest.raises(UserError, match=rf"its index says \w+\.\.\. \({s3}/{shard}\): it is damaged there"):
        prepare(config, encoder, task="pretrain")
    Remote(f"{s3}/{shard}").write(whole)
    prepared = prepare(config, encoder, task="pretrain")
    Remote(f"{s3}/{shard}").remove()  # what was loaded and checked is not asked for again
    (remote.cache_root() / "prepared" / prepared.folder.name / "meta.json").unlink()
    assert prepare(config, encoder, task="pretrain").meta == prepared.meta
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    Remote(s3).ask(lambda fs, path: fs.clear_instance_cache())
    with pytest.raises(UserError, match=r"the storage does not answer after 5 tries: .*127\.0\.0\.1:9"):
        prepare(config, encoder, task="pretrain")


@pytest.mark.slow
def test_text_is_read_from_s3(s3: str, source: Path, make_config: Make) -> None:
    Remote(f"{s3}/deep/rows.jsonl").put(source)
    Remote(f"{s3}/notes.bin").write(b"not for us")
    config = make_config("text", path=s3)
    near = make_config("text", path=str(source))
    assert config.content_key() == near.content_key()
    found = list(config.records(Intake("error"), task="pretrain"))
    assert [record.fields for record in found] == [
        record.fields for record in near.records(Intake("error"), task="pretrain")
    ]
    assert found[3].where.endswith(f"{s3.removeprefix('s3://')}/deep/rows.jsonl:4")
    with pytest.raises(UserError, match=r"no data file at s3://lab/nowhere"):
        make_config("text", path="s3://lab/nowhere").content_key()
    with pytest.raises(UserError, match=r"no shards: no such file \(s3://lab/nowhere/index\.json\)"):
        make_config("shards", path="s3://lab/nowhere").content_key()


@pytest.mark.slow
def test_a_missing_bucket_and_a_busy_place_are_said(
    s3: str, build: Callable[..., CorpusIndex], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere to write to: .*make the bucket first"):
        build("s3://nobucket/corpus")
    Remote(f"{s3}/mine.txt").write(b"mine")
    with pytest.raises(UserError, match=rf"not empty, and no corpus \({s3}\)"):
        build(s3)

    def again(stage: str, done: int, total: int) -> None:
        build(f"{s3}-busy")

    with pytest.raises(UserError, match="another process is writing this corpus"):
        build(f"{s3}-busy", progress=again)


def test_what_killed_workers_left_on_this_machine_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("lmlab-corpus-killed", "lmlab-corpus-held", "lmlab-corpus-young", "others"):
        (tmp_path / name / "train").mkdir(parents=True)
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path / "lmlab-corpus-young")
    held = os.open(tmp_path / "lmlab-corpus-held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    store = store_at("memory://staged")
    with store.staged() as folder:
        assert folder.parent == tmp_path
        assert {path.name for path in tmp_path.iterdir()} == {
            "lmlab-corpus-held", "lmlab-corpus-young", "others", folder.name,
        }  # fmt: skip
        (folder / "train").mkdir()
        (folder / "train/a.tokens").write_bytes(b"ids")
    os.close(held)
    assert not folder.exists()
    assert store.sizes() == {"train/a.tokens": 3}


def test_file_urls_are_paths(build: Callable[..., CorpusIndex], tmp_path: Path, make_config: Make) -> None:
    build(f"file://{tmp_path}/corpus")
    assert Shards(tmp_path / "corpus/train").num_documents > 1
    key = make_config("shards", path=f"file://{tmp_path}/corpus").content_key()
    assert key == make_config("shards", path=str(tmp_path / "corpus")).content_key()
