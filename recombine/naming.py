"""Run folders: named after what was asked for, so that no two runs of a sweep collide."""

import hashlib
import re


def run_name(overrides: str) -> str:
    """The overrides as a folder name; changed or long ones keep their hash. No overrides: "default"."""
    name = re.sub(r"[^a-zA-Z0-9_.=,+-]", "_", overrides) or "default"
    if name == (overrides or "default") and len(name) <= 120:
        return name
    return f"{name[:110]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
