-- Streams that go on where they stopped: imports, and watching what changes.

CREATE TABLE imports (
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL,
    request_id text        NOT NULL CHECK (length(request_id) BETWEEN 1 AND 64),
    next_index bigint      NOT NULL DEFAULT 0 CHECK (next_index >= 0),
    created    bigint      NOT NULL DEFAULT 0 CHECK (created >= 0),
    existing   bigint      NOT NULL DEFAULT 0 CHECK (existing >= 0),
    refused    bigint      NOT NULL DEFAULT 0 CHECK (refused >= 0),
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, request_id),
    CHECK (created + existing + refused = next_index)
);
COMMENT ON TABLE imports IS 'How far each import came; moved in the transaction that stores a chunk.';
COMMENT ON COLUMN imports.next_index IS 'Everything before this place has been dealt with.';

-- Who watches is served by it every few tenths of a second.
CREATE INDEX audit_events_by_watch ON audit_events (user_id, tenant_id, xid, id);

ALTER TABLE imports ENABLE ROW LEVEL SECURITY;
ALTER TABLE imports FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON imports TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());

GRANT SELECT, INSERT, UPDATE ON imports TO kimberly_app;
