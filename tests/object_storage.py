"""An S3 server of its own for a test: rclone's, over a folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.waiting import HANGS, until

RCLONE = Path(sys.executable).parent / "rclone"
KEY, SECRET = "a-key-of-the-test", "a-secret-of-the-test"


class ObjectStorage:
    """Serves each folder in ``folder`` as a bucket, at a free port that it keeps when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.port = folder, folder.with_name(f"{folder.name}.log"), 0
        (folder / "bucket").mkdir(parents=True)
        self.start()

    def start(self) -> None:
        with self.output.open("wb") as output:
            self.server = subprocess.Popen(
                [
                    *(RCLONE, "serve", "s3", self.folder, "--config", ""),
                    *("--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}"),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        until(self._serves, self.output.read_text)

    def _serves(self) -> bool:
        assert self.server.poll() is None, self.output.read_text()
        found = re.search(r"127\.0\.0\.1:([1-9]\d*)/", self.output.read_text())
        self.port = int(found[1]) if found else self.port
        return found is not None

    def stop(self) -> None:
        self.server.terminate()
        self.server.wait(HANGS)

    @property
    def environment(self) -> dict[str, str]:
        """What AWS's own library reads."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED",  # rclone doesn't take bodies in chunks
        }
