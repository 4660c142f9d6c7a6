-- The queue serves users in turn, knows what is due, and cancels.

ALTER TABLE jobs
    DROP CONSTRAINT jobs_state_check,
    DROP CONSTRAINT jobs_check3,
    ADD COLUMN due          boolean NOT NULL DEFAULT true,
    ADD COLUMN cancelled_at timestamptz,
    ADD COLUMN lane         uuid    GENERATED ALWAYS AS
                                    (coalesce(user_id, '00000000-0000-0000-0000-000000000000')) STORED,
    ADD COLUMN urgency      smallint GENERATED ALWAYS AS (-priority) STORED,
    ADD CHECK (state IN ('waiting', 'running', 'succeeded', 'dead', 'cancelled')),
    ADD CHECK ((state IN ('succeeded', 'dead', 'cancelled')) = (finished_at IS NOT NULL)),
    ADD CHECK (priority BETWEEN -1000 AND 1000);
COMMENT ON COLUMN jobs.due IS 'Whether its time has come. The queue looks at due jobs only, however many wait for theirs.';
COMMENT ON COLUMN jobs.cancelled_at IS 'When somebody asked for its end. A running job ends once its worker has stopped.';
COMMENT ON COLUMN jobs.urgency IS 'What is the most urgent is the least: so that one index has it first.';
COMMENT ON COLUMN jobs.lane IS 'Whose turn it takes: the user''s, or the system''s.';

UPDATE jobs SET due = false WHERE state = 'waiting' AND run_at > now();

DROP INDEX jobs_waiting, jobs_running;
-- By urgency, then by lane: finding the next lane skips all jobs of the one before.
CREATE INDEX jobs_due ON jobs (kind, urgency, lane, run_at, id) WHERE state = 'waiting' AND due;
CREATE INDEX jobs_delayed ON jobs (run_at) WHERE state = 'waiting' AND NOT due;
-- Not by lease_expires_at: running jobs are few, and so a heartbeat touches no index.
CREATE INDEX jobs_running ON jobs (kind) WHERE state = 'running';

-- Every job leaves two dead rows behind: waiting for a fifth of the table would be waiting too long.
ALTER TABLE jobs SET (
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_vacuum_insert_scale_factor = 0.1,
    autovacuum_vacuum_cost_delay = 0
);

GRANT INSERT (due) ON jobs TO kimberly_app;
GRANT DELETE ON jobs TO kimberly_system;
