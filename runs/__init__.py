"""What a run is: on disk, on its devices, and among the jobs of a sweep."""

import re

from omegaconf import OmegaConf


def file_name(text: object) -> str:
    """The last part of a path or of a name on the hub, with no sign that a folder cannot have."""
    last = str(text).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "unnamed"


OmegaConf.register_new_resolver("file_name", file_name, replace=True)  # of ${file_name:…} in conf/
