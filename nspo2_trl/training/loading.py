"""Datasets by name: hub id, local folder, or one file."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


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
        ValueError, FileNotFoundError: there is no such dataset, it is empty, or a file of it cannot be read.
    """
    path = Path(name)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    options = {"path": name, "name": config, "streaming": streaming}
    if path.is_file():
        suffix = [s for s in path.suffixes if s in READERS]
        if not suffix:
            raise ValueError(f"`{option}` {name!r}: a file must end in .jsonl, .json, .parquet or .csv (or .gz).")
        options |= {"path": READERS[suffix[-1]], "data_files": str(path)}
    elif not path.is_dir() and (name.startswith((".", "/", "~")) or path.suffix in (*READERS, ".gz")):
        raise FileNotFoundError(f"`{option}`: there is no file or folder {name!r}.")
    try:
        return load_dataset(**options)
    except StopIteration as error:  # how datasets says that there is no row
        raise ValueError(f"The dataset {name!r} is empty: {needs}.") from error
    except DatasetGenerationError as error:
        raise ValueError(f"`{option}` {name!r} could not be read: {error.__cause__}.") from error
