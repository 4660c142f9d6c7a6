-- The index of unique keys holds those that have one: for all others, which are most, three writes of
-- a job's life had an entry of it to make.

DROP INDEX jobs_unique;
CREATE UNIQUE INDEX jobs_unique ON jobs (unique_key)
    WHERE unique_key IS NOT NULL AND state IN ('waiting', 'running');
