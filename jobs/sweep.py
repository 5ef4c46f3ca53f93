"""``ideal sweep`` as a Ray job.

ray job submit --working-dir . -- python -m jobs.sweep jobs/configs/quickstart.yaml --m 0.15,0.3,0.5
"""

from __future__ import annotations

import os
import sys

from service.__main__ import main

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    main(["sweep", *sys.argv[1:]])
