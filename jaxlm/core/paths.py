"""Paths that users name."""

import re
from pathlib import Path


def local(argument: str, path: str | Path) -> Path:
    """Returns the path. ValueError: it is an address such as gs://bucket/folder, which would become a folder `gs:`."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise ValueError(
            f"{argument}: {path} is an address, and only local files can be written; mount it (gcsfuse, s3fs, rclone), "
            f"or name a local place and copy it afterwards"
        )
    return Path(path)
