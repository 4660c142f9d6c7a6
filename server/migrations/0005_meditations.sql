-- Meditation: a run scores memories shard by shard, each shard from a cursor, under a fence.

CREATE TABLE meditations (
    id          uuid        PRIMARY KEY,
    tenant_id   uuid,
    user_id     uuid,
    job_id      uuid        UNIQUE,
    state       text        NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'succeeded')),
    as_of       timestamptz NOT NULL DEFAULT now(),
    shards      integer     NOT NULL CHECK (shards BETWEEN 1 AND 1024),
    created_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    CHECK ((tenant_id IS NULL) = (user_id IS NULL)),
    CHECK ((state = 'succeeded') = (finished_at IS NOT NULL))
);
COMMENT ON TABLE meditations IS 'Scoring runs: over the memories of one user, or of all where there is none.';
COMMENT ON COLUMN meditations.job_id IS 'The job that planned a run of all users: it plans only one.';
COMMENT ON COLUMN meditations.as_of IS 'The instant that ages are measured at.';

-- One run of a user at a time, and one of all users.
CREATE UNIQUE INDEX meditations_running
    ON meditations (user_id, tenant_id) NULLS NOT DISTINCT WHERE state = 'running';

CREATE TABLE meditation_shards (
    meditation_id    uuid             NOT NULL REFERENCES meditations (id) ON DELETE CASCADE,
    shard            integer          NOT NULL CHECK (shard >= 0),
    fence            bigint           NOT NULL DEFAULT 0,
    cursor_user_id   uuid             NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    cursor_memory_id uuid             NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    done             boolean          NOT NULL DEFAULT false,
    scored           bigint           NOT NULL DEFAULT 0 CHECK (scored >= 0),
    score_sum        double precision NOT NULL DEFAULT 0,
    scorer_version   integer,
    PRIMARY KEY (meditation_id, shard)
) WITH (fillfactor = 50);
COMMENT ON TABLE meditation_shards IS 'How far each part of a run is.';
COMMENT ON COLUMN meditation_shards.fence IS 'Lease token of the worker that may write: a smaller one is refused.';
COMMENT ON COLUMN meditation_shards.cursor_memory_id IS 'The last memory that is stored, in order of (user, memory).';

-- Raised with every change of the text, in the row that scoring writes: a write that waited for
-- such a change sees it, and a sentiment found in the old text meets no row.
ALTER TABLE memory_scores ADD COLUMN text_version integer NOT NULL DEFAULT 1;

-- Walks the users of a shard in the order of its cursor, each with their last word.
CREATE INDEX consents_by_user ON consents (user_id, tenant_id, purpose, version DESC);

ALTER TABLE meditations       ENABLE ROW LEVEL SECURITY;
ALTER TABLE meditations       FORCE  ROW LEVEL SECURITY;
ALTER TABLE meditation_shards ENABLE ROW LEVEL SECURITY;
ALTER TABLE meditation_shards FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON meditations TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON meditation_shards TO kimberly_app
    USING (EXISTS (SELECT FROM meditations WHERE meditations.id = meditation_id));
CREATE POLICY system ON meditations       TO kimberly_system USING (true);
CREATE POLICY system ON meditation_shards TO kimberly_system USING (true);

-- The application role starts runs and looks at them; only the system role moves them.
GRANT SELECT ON meditations, meditation_shards TO kimberly_app;
GRANT INSERT (id, tenant_id, user_id, shards) ON meditations TO kimberly_app;
GRANT INSERT (meditation_id, shard) ON meditation_shards TO kimberly_app;
GRANT SELECT, INSERT, UPDATE ON meditations, meditation_shards TO kimberly_system;
