"""``ideal fidelity`` as a Ray job.

ray job submit --working-dir . -- python -m jobs.fidelity jobs/configs/fidelity.yaml
"""

from __future__ import annotations

import os
import sys

from service.__main__ import main

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    main(["fidelity", *sys.argv[1:]])
