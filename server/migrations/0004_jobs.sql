-- The durable queue. A job is a row; a lease is three of its columns. All times are Postgres's.

-- One sequence for the leases of all jobs: a later lease has a greater token, so that whatever a
-- job writes can be fenced by it. CACHE must stay 1: a backend that holds numbers back would
-- hand out an old one late.
CREATE SEQUENCE lease_tokens AS bigint CACHE 1;

CREATE TABLE jobs (
    id               uuid        PRIMARY KEY,
    tenant_id        uuid,
    user_id          uuid,
    kind             text        NOT NULL CHECK (length(kind) BETWEEN 1 AND 64),
    state            text        NOT NULL DEFAULT 'waiting'
                                 CHECK (state IN ('waiting', 'running', 'succeeded', 'dead')),
    priority         smallint    NOT NULL DEFAULT 0,
    run_at           timestamptz NOT NULL DEFAULT now(),
    attempt          integer     NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    max_attempts     integer     NOT NULL CHECK (max_attempts BETWEEN 1 AND 100),
    lease_token      bigint      NOT NULL DEFAULT 0,
    lease_expires_at timestamptz,
    worker_id        text,
    payload          jsonb       NOT NULL CHECK (jsonb_typeof(payload) = 'object'),
    result           jsonb       CHECK (jsonb_typeof(result) = 'object'),
    error            text        NOT NULL DEFAULT '',
    progress         real        NOT NULL DEFAULT 0 CHECK (progress BETWEEN 0 AND 1),
    unique_key       text        CHECK (length(unique_key) BETWEEN 1 AND 200),
    created_at       timestamptz NOT NULL DEFAULT now(),
    finished_at      timestamptz,
    CHECK ((tenant_id IS NULL) = (user_id IS NULL)),
    CHECK ((state = 'running') = (lease_expires_at IS NOT NULL)),
    CHECK ((state = 'running') = (worker_id IS NOT NULL)),
    CHECK ((state IN ('succeeded', 'dead')) = (finished_at IS NOT NULL))
) WITH (fillfactor = 80);
COMMENT ON TABLE jobs IS 'Work that is done once, whatever crashes. Without a user it is the system''s own.';
COMMENT ON COLUMN jobs.lease_token IS 'Of the latest lease; only who knows it may write about the job.';

-- Finished jobs are in none of these three: they stay as small as the work that is left.
CREATE INDEX jobs_waiting ON jobs (kind, priority DESC, run_at, id) WHERE state = 'waiting';
-- Not by lease_expires_at: running jobs are few, and so a heartbeat touches no index.
CREATE INDEX jobs_running ON jobs (id) WHERE state = 'running';
CREATE UNIQUE INDEX jobs_unique ON jobs (unique_key) WHERE state IN ('waiting', 'running');

CREATE INDEX jobs_by_user ON jobs (user_id, id) WHERE user_id IS NOT NULL;

CREATE TABLE schedules (
    name        text        PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 64),
    cron        text        NOT NULL,
    kind        text        NOT NULL,
    next_run_at timestamptz NOT NULL,
    last_run_at timestamptz
);
COMMENT ON TABLE schedules IS 'Cron expressions in UTC; each tick makes one job.';

ALTER TABLE jobs      ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobs      FORCE  ROW LEVEL SECURITY;
ALTER TABLE schedules ENABLE ROW LEVEL SECURITY;
ALTER TABLE schedules FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON jobs TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON jobs      TO kimberly_system USING (true);
CREATE POLICY system ON schedules TO kimberly_system USING (true);

-- The application role asks for work; only the system role says how it goes on.
GRANT SELECT ON jobs TO kimberly_app;
GRANT INSERT (id, tenant_id, user_id, kind, priority, run_at, max_attempts, payload, unique_key)
    ON jobs TO kimberly_app;
GRANT SELECT, INSERT, UPDATE ON jobs, schedules TO kimberly_system;
GRANT USAGE ON SEQUENCE lease_tokens TO kimberly_system;
