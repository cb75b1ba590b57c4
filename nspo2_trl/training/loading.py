"""Datasets by name: hub id, local folder, or one file."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any, BinaryIO, cast

import pandas as pd
from datasets import DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
SEPARATORS = ",;\t|"


def load(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    option: str = "dataset_name",
    needs: str = "DPO needs rows with `chosen` and `rejected`",
) -> DatasetDict:
    """The splits of a dataset: hub id, local folder, or one file (its rows are the split `train`).

    Args:
        option: what messages call `name`. needs: what they say that its rows must have.

    Raises:
        ValueError, FileNotFoundError: there is no such dataset, it is empty, or a file of it cannot be read; then the
            message has the line, the first being 1.
    """
    path = Path(name)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    options: dict[str, Any] = {"path": name, "name": config, "streaming": streaming}
    files = [file for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    readers = {reader for file in files if (reader := _reader(file))}
    if path.is_file():
        if not readers:
            raise ValueError(f"`{option}` {name!r}: a file must end in .jsonl, .json, .parquet, .csv, .tsv (or .gz).")
        options |= {"path": next(iter(readers)), "data_files": str(path)}
    elif not path.is_dir() and (name.startswith((".", "/", "~")) or path.suffix.lower() in (*READERS, ".gz")):
        raise FileNotFoundError(f"`{option}`: there is no file or folder {name!r}.")
    log = logging.getLogger("datasets.packaged_modules")  # it writes what is said below
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        for file in files:  # a reader of JSON may find out only when the row is used
            if fault := _fault(file):
                raise ValueError(fault)
        if readers == {"csv"}:
            options |= _csv_options(next(file for file in files if _reader(file) == "csv"))
        return load_dataset(**options)
    except (ValueError, OSError, EOFError, DatasetGenerationError, StopIteration) as error:
        cause = (error.__cause__ or error) if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, (StopIteration, pd.errors.EmptyDataError)) or "corresponds to no data" in str(cause):
            raise ValueError(f"The dataset {name!r} is empty: {needs}.") from error
        if not files and not isinstance(error, DatasetGenerationError):
            words = f"`{option}`: there is no file or folder {name!r}, and as a hub id it could not be loaded"
            raise ValueError(f"{words}: {str(error).strip(' .')}.") from error
        found = [fault for file in files if (fault := _fault(file, parse=True))] or [str(cause).strip(" .\n")]
        raise ValueError(f"`{option}` {name!r} could not be read: {found[0]}.") from error
    finally:
        log.setLevel(level)


def _reader(path: Path) -> str | None:
    """The reader of a file, by its name; None where there is none."""
    found = [READERS[suffix] for suffix in map(str.lower, path.suffixes) if suffix in READERS]
    return found[-1] if found else None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb"))


def _csv_options(path: Path) -> dict[str, Any]:
    """Whatever separates the columns, and every cell as the text that it is: `NA` and `4` are answers too."""
    with _open(path) as file:
        header = file.readline().decode("latin-1")
    separator = max(SEPARATORS, key=header.count)
    with _open(path) as file:
        names = pd.read_csv(file, sep=separator, nrows=0).columns
    return {
        "sep": separator,
        "keep_default_na": False,
        "features": Features({name: Value("string") for name in names}),
    }


def _fault(path: Path, parse: bool = False) -> str | None:
    """The first line of a text file that is no UTF-8, or with `parse` no JSON in a file of JSON lines; in words."""
    reader, lines = _reader(path), parse and ".jsonl" in map(str.lower, path.suffixes)
    try:
        with _open(path) as file:
            for number, line in enumerate(file if reader in ("json", "csv") else (), 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if lines and text and not isinstance(json.loads(text), dict):
                        return f"{path.name}, line {number} is no object of columns and values"
                except UnicodeDecodeError as error:
                    return f"{path.name}, line {number} is not UTF-8 ({error.reason}): save the file as UTF-8"
                except json.JSONDecodeError as error:
                    return f"JSON parse error in {path.name}, line {number}, column {error.colno}: {error.msg}"
    except (OSError, EOFError) as error:
        return f"{path.name}: {error}"
    return None
