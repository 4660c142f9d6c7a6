"""`python -m tests.faults.served_jobs SOCKET [GUARD…]`: the jobs service, killed as it answers."""

from server.jobs.queue import Queue
from server.processes import jobs
from tests.crashes.faults import watch_queue
from tests.crashes.served import begin
from tests.faults.unfenced_service import unfence

if __name__ == "__main__":
    watch_queue(Queue)
    begin("jobs", jobs.compose, {"fencing": unfence})
