"""`python -m tests.faults.small_batches`: the worker, with batches so small that a run can be hit.

Everything is the real worker; 20 000 memories would otherwise be two batches.
"""

import sys
from functools import partial
from unittest.mock import patch

from workers.__main__ import main
from workers.meditation import Meditation

BATCH_SIZE = 200

if __name__ == "__main__":
    with patch("workers.__main__.Meditation", partial(Meditation, batch_size=BATCH_SIZE)):
        sys.exit(main())
