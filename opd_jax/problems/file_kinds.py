# SPDX-License-Identifier: Apache-2.0
"""What a file is that was given as JSONL and is none: its kind by the first bytes, and what to do.

Each remedy is a command that a shell takes; {file} is the file and {out} the JSONL file it makes.
"""

import json
import pathlib
import re
import shlex

_SCRIPT = "python -c '{code}' {{file}} > {{out}}"
_OPEN = 'open(sys.argv[1], encoding="utf-8-sig")'
_ARRAY = _SCRIPT.format(
    code=f"import json, sys; [print(json.dumps(x)) for x in json.load({_OPEN}, parse_float=str)]"
)
_OBJECT = _SCRIPT.format(
    code=f"import json, sys; print(json.dumps(json.load({_OPEN}, parse_float=str)))"
)
_CSV = _SCRIPT.format(
    code="import csv, json, sys; "
    f'[print(json.dumps(x)) for x in csv.DictReader({_OPEN}, delimiter="DELIMITER")]'
)
# pyarrow, which tensorflow-datasets brings, keeps every digit and every id; pandas does not.
_TABLE = _SCRIPT.format(
    code="import json, sys, pyarrow.ipc, pyarrow.parquet; "
    "[print(json.dumps(x, default=str)) for x in READER(sys.argv[1]).to_pylist()]"
)
_PARQUET = _TABLE.replace("READER", "pyarrow.parquet.read_table")
_ARROW_FILE = _TABLE.replace("READER(sys.argv[1])", "pyarrow.ipc.open_file(sys.argv[1]).read_all()")
_ARROW_STREAM = _TABLE.replace(
    "READER(sys.argv[1])", 'pyarrow.ipc.open_stream(open(sys.argv[1], "rb")).read_all()'
)
_ICONV = "iconv -f {encoding} -t UTF-8 {{file}} > {{out}}"

# First bytes -> kind, remedy.
_SIGNATURES = {
    b"PAR1": ("a Parquet table", _PARQUET),
    b"ARROW1": ("an Arrow table", _ARROW_FILE),
    b"\xff\xff\xff\xff": ("an Arrow stream", _ARROW_STREAM),  # datasets' save_to_disk
    b"\x1f\x8b": ("compressed by gzip", "gunzip -c {file} > {out}"),
    b"BZh": ("compressed by bzip2", "bunzip2 -c {file} > {out}"),
    b"\xfd7zXZ\x00": ("compressed by xz", "unxz -c {file} > {out}"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -dc {file} > {out}"),
    b"PK\x03\x04": ("a zip archive", "unzip -p {file} > {out}"),
    b"version https://git-lfs": ("a pointer to a file in Git LFS, not that file", "git lfs pull"),
    b"\xff\xfe\x00\x00": ("text in UTF-32", _ICONV.format(encoding="UTF-32")),
    b"\x00\x00\xfe\xff": ("text in UTF-32", _ICONV.format(encoding="UTF-32")),
    b"\xff\xfe": ("text in UTF-16", _ICONV.format(encoding="UTF-16")),
    b"\xfe\xff": ("text in UTF-16", _ICONV.format(encoding="UTF-16")),
    b"{\x00": ("text in UTF-16", _ICONV.format(encoding="UTF-16LE")),
    b"\x00{": ("text in UTF-16", _ICONV.format(encoding="UTF-16BE")),
}
_HTML = re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE)
# A first line that holds one of these names among others is the head of a table.
_COLUMNS = {"id", "prompt", "messages", "problem", "question", "answer", "solution"}


def check(data: bytes, path: str) -> None:
    """Raises ValueError, saying what to do, where `data`, without its byte order mark, is no JSONL.

    What cannot be named is left to the reader, which names the line.
    """
    found = _kind(data)
    if found is None:
        return
    kind, remedy = found
    file = pathlib.Path(path)
    stem = f"{file.stem}_lines" if file.suffix == ".jsonl" else file.stem.removesuffix(".jsonl")
    out = file.with_name(f"{stem}.jsonl")
    command = remedy.replace("{file}", shlex.quote(path)).replace("{out}", shlex.quote(str(out)))
    given = f" and give {out}" if "{out}" in remedy else ""
    todo = f"run `{command}`{given}" if remedy else "download the file itself"
    raise ValueError(
        f"{path} is {kind}; it must be JSONL, UTF-8 text with one object in each line: {todo}"
    )


def _kind(data: bytes) -> tuple[str, str] | None:
    for signature, found in _SIGNATURES.items():
        if data.startswith(signature):
            return found
    if _HTML.match(data):
        return "a web page", ""
    start = data.lstrip()
    if start.startswith(b"["):
        return ("one JSON array", _ARRAY) if isinstance(_whole(start), list) else None
    head = start.partition(b"\n")[0]
    if start.startswith(b"{"):
        several = _whole(head) is None and isinstance(_whole(start), dict)
        return ("one JSON object over several lines", _OBJECT) if several else None
    return _table(head)


def _whole(data: bytes):
    """The file as one JSON value; None = it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _table(head: bytes) -> tuple[str, str] | None:
    for delimiter, name in ((",", "commas"), (";", "semicolons"), ("\t", "tabs")):
        fields = head.decode("utf-8", "replace").split(delimiter)
        names = {field.strip().strip('"').casefold() for field in fields}
        if len(fields) > 1 and _COLUMNS & names:
            shown = "\\t" if delimiter == "\t" else delimiter
            return f"a CSV table, parted by {name}", _CSV.replace("DELIMITER", shown)
    return None
