import os
from pathlib import Path

from netwright.errors import MissingData


def locate(*parts: str, source: str) -> Path:
    """Return the path of a file under `NETWRIGHT_DATA`; `source` says how to get it."""
    root = os.environ.get("NETWRIGHT_DATA")
    relative = Path(*parts)
    if not root:
        raise MissingData(f"{relative} is needed, and NETWRIGHT_DATA is not set; set it to a "
                          f"folder that holds {relative} ({source})")
    path = Path(root) / relative
    if not path.is_file():
        raise MissingData(f"{path} does not exist; {source}, or point NETWRIGHT_DATA at a folder "
                          f"that holds {relative}")
    return path
