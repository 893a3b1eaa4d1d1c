"""Every file type with its broken variants: the error line of each, and that every record is kept or dropped."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmlab.data.prepare import TextEncoder, prepare
from lmlab.records import UserError

from .broken_files import GOOD, Broken, all_broken, config_for, csv_of, delivered, error_line, jsonl, write

BROKEN = all_broken()


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
@pytest.mark.parametrize("pack", [False, True])
def test_a_broken_file_is_one_line_or_is_counted(broken: Broken, pack: bool, tmp_path: Path) -> None:
    if pack and broken.suffix.endswith(".gz"):
        pytest.skip("packed already")
    file = write(broken, tmp_path, pack=pack)
    line = error_line(lambda: delivered(config_for(file)))
    expected = " ".join(
        broken.line.replace("{{", "{").replace("}}", "}").replace("{file}", str(file)).split()
    )
    assert re.fullmatch(re.escape(expected).replace(r"\{detail\}", ".{5,200}"), line)
    assert "\n" not in line
    if broken.read is None:
        with pytest.raises(UserError) as caught:
            delivered(config_for(file, "skip"))
        assert str(caught.value) == line
        return
    count, intake = delivered(config_for(file, "skip"))
    assert (intake.read, dict(intake.dropped)) == (broken.read, broken.dropped)
    assert intake.read == intake.kept + intake.dropped.total()
    assert count == intake.kept
    assert [row["reason"] for row in intake.dropped_examples] == [
        reason for reason, number in broken.dropped.items() for _ in range(number)
    ]
    assert all(str(file) in row["where"] for row in intake.dropped_examples)


def test_the_table_covers_every_type() -> None:
    from lmlab.data.files import READERS

    assert {broken.suffix.removesuffix(".gz") for broken in BROKEN} == set(READERS)
    assert len({broken.id for broken in BROKEN}) == len(BROKEN) > 60


def written(folder: Path, name: str) -> Path:
    file = folder / name
    kind = name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(GOOD), file, row_group_size=4)
        content = file.read_bytes()
    else:
        content = {
            "jsonl": jsonl(*GOOD),
            "json": json.dumps(GOOD).encode(),
            "csv": csv_of(*GOOD),
            "tsv": csv_of(*GOOD, delimiter="\t"),
        }[kind]
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "A.CSV"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_every_type_gives_the_same_records(name: str, end: str, tmp_path: Path) -> None:
    config = config_for(written(tmp_path, name + end))
    from lmlab.data.intake import Intake

    assert config.format_for("sft") == "triples"
    assert [record.fields for record in config.records(Intake("error"), task="sft")] == GOOD


def test_a_folder_of_all_types_is_prepared_and_accounted_for(
    tmp_path: Path, encoder: TextEncoder, own_cache: Path, make_config: Callable[..., Any]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "b.json", "c.csv.gz", "d.parquet"):
        written(folder, name)
    (folder / "e.jsonl").write_bytes(jsonl(*GOOD, b"{", {"instruction": "x"}))
    config = make_config("jsonl", path=str(folder), on_bad_record="skip", val_fraction=0.3)
    report = prepare(config, encoder, task="sft").meta["report"]
    assert report["records_read"] == 32
    assert report["records_dropped"] == {"broken JSON": 1, "no output": 1}
    assert report["records_kept"] == report["train"]["records"] + report["val"]["records"] == 30
    assert [row["where"].rpartition("/")[2] for row in report["dropped_examples"]] == [
        "e.jsonl:7",
        "e.jsonl:8",
    ]
