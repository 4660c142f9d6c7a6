-- Long-term and permanent memories. Short-term ones live in Redis.

CREATE TABLE memories (
    tenant_id        uuid        NOT NULL,
    user_id          uuid        NOT NULL,
    id               uuid        NOT NULL,
    tier             text        NOT NULL CHECK (tier IN ('long_term', 'permanent')),
    content          text        NOT NULL CHECK (octet_length(content) BETWEEN 1 AND 65536),
    tags             text[]      NOT NULL DEFAULT '{}' CHECK (cardinality(tags) <= 32),
    source           text        NOT NULL CHECK (source IN ('chat', 'agent', 'import', 'upload')),
    session_id       text        NOT NULL DEFAULT '' CHECK (length(session_id) <= 128),
    session_position integer     CHECK (session_position >= 0),
    speaker          text        NOT NULL DEFAULT '' CHECK (length(speaker) <= 128),
    occurred_at      timestamptz NOT NULL,
    size_bytes       integer     NOT NULL CHECK (size_bytes >= octet_length(content)),
    content_hash     bytea       NOT NULL CHECK (length(content_hash) = 32),
    version          bigint      NOT NULL DEFAULT 1 CHECK (version >= 1),
    created_at       timestamptz NOT NULL,
    updated_at       timestamptz NOT NULL,
    terms            sparsevec(1000000000) NOT NULL,
    PRIMARY KEY (user_id, id)
);
COMMENT ON TABLE memories IS 'What an assistant knows about a user, beyond the short term.';
COMMENT ON COLUMN memories.terms IS 'BM25 weight of each term of the content, by the hash of its stem.';

-- The same text said at another point of a conversation is another memory; anywhere else the
-- same text of one user and tier is one memory.
CREATE UNIQUE INDEX memories_by_content
    ON memories (user_id, tier, content_hash, session_id, coalesce(session_position, -1));
CREATE INDEX memories_by_session
    ON memories (user_id, session_id, session_position) WHERE session_id <> '';

-- What changes without the text changing. Narrow, so that scoring a million memories does not
-- rewrite a million texts; the free space keeps its updates on the page they start from.
CREATE TABLE memory_scores (
    tenant_id          uuid        NOT NULL,
    user_id            uuid        NOT NULL,
    memory_id          uuid        NOT NULL,
    last_seen_at       timestamptz NOT NULL,
    use_count          integer     NOT NULL DEFAULT 0,
    retrieved_count    integer     NOT NULL DEFAULT 0,
    useful_count       integer     NOT NULL DEFAULT 0,
    feedback           real        CHECK (feedback BETWEEN 0 AND 1),
    sentiment          real        CHECK (sentiment BETWEEN 0 AND 1),
    score              real        CHECK (score BETWEEN 0 AND 1),
    relevance_to_goals real,
    emotional_weight   real,
    predictive_value   real,
    recency_frequency  real,
    scorer_version     integer,
    scored_at          timestamptz,
    PRIMARY KEY (user_id, memory_id),
    FOREIGN KEY (user_id, memory_id) REFERENCES memories (user_id, id) ON DELETE CASCADE
) WITH (fillfactor = 70);
COMMENT ON TABLE memory_scores IS 'How a memory is used and what the last meditation made of it.';

CREATE TABLE attachments (
    tenant_id    uuid        NOT NULL,
    user_id      uuid        NOT NULL,
    id           uuid        NOT NULL,
    memory_id    uuid        NOT NULL,
    file_name    text        NOT NULL CHECK (length(file_name) BETWEEN 1 AND 255),
    content_type text        NOT NULL CHECK (length(content_type) BETWEEN 1 AND 255),
    size_bytes   bigint      NOT NULL CHECK (size_bytes BETWEEN 1 AND 16777216),
    sha256       bytea       NOT NULL CHECK (length(sha256) = 32),
    state        text        NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'complete')),
    created_at   timestamptz NOT NULL,
    PRIMARY KEY (user_id, id),
    FOREIGN KEY (user_id, memory_id) REFERENCES memories (user_id, id) ON DELETE CASCADE
);
COMMENT ON TABLE attachments IS 'Files of memories; the bytes are in S3 under tenant/user/id.';
CREATE INDEX attachments_by_memory ON attachments (user_id, memory_id);

ALTER TABLE memories      ENABLE ROW LEVEL SECURITY;
ALTER TABLE memories      FORCE  ROW LEVEL SECURITY;
ALTER TABLE memory_scores ENABLE ROW LEVEL SECURITY;
ALTER TABLE memory_scores FORCE  ROW LEVEL SECURITY;
ALTER TABLE attachments   ENABLE ROW LEVEL SECURITY;
ALTER TABLE attachments   FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON memories TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON memory_scores TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON attachments TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON memories      TO kimberly_system USING (true);
CREATE POLICY system ON memory_scores TO kimberly_system USING (true);

GRANT SELECT, INSERT, UPDATE, DELETE ON memories, memory_scores, attachments TO kimberly_app;
GRANT SELECT ON memories TO kimberly_system;
GRANT SELECT, UPDATE ON memory_scores TO kimberly_system;
