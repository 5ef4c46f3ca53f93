"""``ideal sweep`` as a Ray job.

ray job submit --working-dir . -- python -m jobs.sweep jobs/configs/quickstart.yaml --m 0.15,0.3,0.5
"""

from __future__ import annotations

import os
import sys

from service.cli import guarded

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    sys.exit(guarded(["sweep", *sys.argv[1:]]))
