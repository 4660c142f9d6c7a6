-- A worker that did not hear that its failure was written may tell it again.

ALTER TABLE jobs ADD COLUMN failed_leases bigint[];
COMMENT ON COLUMN jobs.failed_leases IS 'Tokens of the latest leases whose attempt failed, the newest first, at most 10.';
