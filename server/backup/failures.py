"""Why a backup was not made, verified or restored."""


class BackupFailed(Exception):
    """It was not done as it should, and says what is wrong."""


class Busy(Exception):
    """The same is being done by another process."""


class Unwanted(Exception):
    """Somebody asked for the end of the job."""
