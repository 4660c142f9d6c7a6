-- The kind "memories.embed" is called "embedding.batch". What runs under the old name ends under
-- it: its worker and the service that serves it may still be of the release before. So may the
-- planner, which ends at a schedule of a kind that it does not know: schedules keep the name that
-- they were given, and make jobs of the new one.
-- The owner of the table sees rows only like this.
ALTER TABLE jobs NO FORCE ROW LEVEL SECURITY;
UPDATE jobs SET kind = 'embedding.batch' WHERE kind = 'memories.embed' AND state <> 'running';
ALTER TABLE jobs FORCE ROW LEVEL SECURITY;

-- Most jobs have no key: the index need not hold them. Every lease entered them anew.
CREATE UNIQUE INDEX jobs_unique_key ON jobs (unique_key)
    WHERE unique_key IS NOT NULL AND state IN ('waiting', 'running');
DROP INDEX jobs_unique;
ALTER INDEX jobs_unique_key RENAME TO jobs_unique;
