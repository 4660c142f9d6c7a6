"""`python -m tests.faults.silent_service PROCESS`: a service whose streams are silent for long."""

from functools import partial
from unittest.mock import patch

from server.__main__ import app
from server.jobs.watching import JobFeed

if __name__ == "__main__":
    with patch("server.processes.jobs.JobFeed", partial(JobFeed, heartbeat_seconds=3600)):
        app()
