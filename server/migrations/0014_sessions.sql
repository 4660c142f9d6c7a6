-- Conversations that end, and memories that leave the short-term tier.

CREATE TABLE short_term_exits (
    tenant_id uuid        NOT NULL,
    user_id   uuid        NOT NULL,
    memory_id uuid        NOT NULL,
    left_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, memory_id)
);
COMMENT ON TABLE short_term_exits IS 'Memories that were promoted or deleted: a copy that Redis still has, or has again after a crash, counts no more.';
CREATE INDEX short_term_exits_by_time ON short_term_exits (left_at);

CREATE TABLE ended_sessions (
    tenant_id     uuid        NOT NULL,
    user_id       uuid        NOT NULL,
    session_id    text        NOT NULL CHECK (length(session_id) BETWEEN 1 AND 128),
    next_position bigint      NOT NULL CHECK (next_position >= 0),
    promoted      bigint      NOT NULL CHECK (promoted >= 0),
    dropped       bigint      NOT NULL CHECK (dropped >= 0),
    ended_at      timestamptz,
    PRIMARY KEY (user_id, tenant_id, session_id)
);
COMMENT ON TABLE ended_sessions IS 'What became of the short-term turns of conversations, over all their ends.';
COMMENT ON COLUMN ended_sessions.next_position IS 'Turns before it were said, whether they are kept or not.';
COMMENT ON COLUMN ended_sessions.ended_at IS 'When it ended last; NULL: it is about to end.';

ALTER TABLE short_term_exits ENABLE ROW LEVEL SECURITY;
ALTER TABLE short_term_exits FORCE  ROW LEVEL SECURITY;
ALTER TABLE ended_sessions   ENABLE ROW LEVEL SECURITY;
ALTER TABLE ended_sessions   FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON short_term_exits TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON ended_sessions TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON short_term_exits TO kimberly_system USING (true);
CREATE POLICY system ON ended_sessions   TO kimberly_system USING (true);

GRANT SELECT, INSERT         ON short_term_exits TO kimberly_app;
GRANT SELECT, DELETE         ON short_term_exits TO kimberly_system;
GRANT SELECT, INSERT, UPDATE ON ended_sessions   TO kimberly_app;
GRANT SELECT, DELETE         ON ended_sessions   TO kimberly_system;
