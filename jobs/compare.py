"""``ideal compare`` as a Ray job.

ray job submit --working-dir . -- python -m jobs.compare jobs/configs/study.yaml --seeds 5
"""

from __future__ import annotations

import os
import sys

from service.__main__ import main

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    main(["compare", *sys.argv[1:]])
