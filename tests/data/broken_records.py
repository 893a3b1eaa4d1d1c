"""Every format with its broken records: the reason each is counted under, and the table of docs/data-errors.md.

`python -m tests.data.broken_records > docs/data-errors.md` writes that page, each line by reading a real file.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.data.broken_files import SKIPPED, config_for, delivered, error_line, markdown_table

LONE = "a\ud800"
BAD_FIELDS = [
    ("triples", {"input": "x", "output": "y"}, "no instruction"),
    ("triples", {"instruction": None, "output": "y"}, "no instruction"),
    ("triples", {"instruction": " \n", "output": "y"}, "empty instruction"),
    ("triples", {"instruction": 7, "output": "y"}, "instruction is not text"),
    ("triples", {"instruction": ["x"], "output": "y"}, "instruction is not text"),
    ("triples", {"instruction": "x", "input": 7, "output": "y"}, "input is not text"),
    ("triples", {"instruction": "x", "input": LONE, "output": "y"}, "not Unicode text"),
    ("triples", {"instruction": "x"}, "no output"),
    ("triples", {"instruction": "x", "output": ""}, "empty output"),
    ("triples", {"instruction": "x", "output": True}, "output is not text"),
    ("triples", {"instruction": "x", "output": LONE}, "not Unicode text"),
    ("completion", {"prompt": "x"}, "no completion"),
    ("completion", {"prompt": "", "completion": "y"}, "empty prompt"),
    ("completion", {"prompt": "x", "completion": "\t"}, "empty completion"),
    ("text", {"text": None}, "no text"),
    ("text", {}, "no text"),
    ("text", {"text": "\n"}, "empty text"),
    ("text", {"text": {"a": "b"}}, "text is not text"),
    ("text", {"text": LONE}, "not Unicode text"),
    ("messages", {}, "no messages"),
    ("messages", {"messages": []}, "no messages"),
    ("messages", {"messages": "hello"}, "no messages"),
    ("messages", {"messages": {"role": "user"}}, "no messages"),
    ("messages", {"messages": ["hello"]}, "message without role or content"),
    ("messages", {"messages": [{"role": "user"}]}, "message without role or content"),
    ("messages", {"messages": [{"role": "assistant", "content": None}]}, "empty response"),
    ("messages", {"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
    ("messages", {"messages": [{"role": "assistant", "content": " "}]}, "empty response"),
    ("messages", {"messages": [{"role": "assistant", "content": LONE}]}, "not Unicode text"),
]

HEAD = """# What is said of data that cannot be used

Each line was made by reading such a file; `tests/data/test_files.py` and `test_formats.py` hold them. Behind those that `data.on_bad_record=skip` can
pass over stands "%s". Records read = kept + dropped, always.

## Files

"""


def records_table() -> str:
    """Format, fields, error line and the reason it is counted under."""
    rows = ["| format | fields | `error:` | counted under |", "| --- | --- | --- | --- |"]
    for name, fields, reason in BAD_FIELDS:
        if name == "messages":  # these need a tokenizer's chat template; what is checked here comes before it
            from lmlab.data.fields import BadRecordError
            from lmlab.data.formats import FormatOptions, formats, template_source
            from lmlab.records import Record

            options = FormatOptions(template_source("alpaca"), {}, lambda turns, prompt: str(turns))
            try:
                formats.get(name)(Record(fields, "rows.jsonl:1"), options)
                raise AssertionError("no error")
            except BadRecordError as error:
                line = f"{error} (rows.jsonl:1)"
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "rows.jsonl"
                file.write_text(json.dumps(fields) + "\n", encoding="utf-8")
                config = config_for(file).model_copy(update={"format": name})
                line = error_line(lambda config=config: delivered(config)).replace(f"{folder}/", "")
        shown = json.dumps(fields).replace("|", "\\|")
        rows.append(f"| {name} | `{shown}` | `{line.removesuffix(SKIPPED)}` | {reason} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """docs/data-errors.md."""
    head = HEAD % SKIPPED.removeprefix(": ")
    return head + markdown_table() + "\n## Records\n\n" + records_table()


if __name__ == "__main__":
    print(page(), end="")
