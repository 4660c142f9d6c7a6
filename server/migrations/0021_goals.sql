-- What users are after: the source of a score's relevance to goals.

CREATE TABLE goals (
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL,
    id         uuid        NOT NULL,
    content    text        NOT NULL CHECK (octet_length(content) BETWEEN 1 AND 1024),
    active     boolean     NOT NULL,
    version    bigint      NOT NULL DEFAULT 1 CHECK (version >= 1),
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, id)
);
COMMENT ON TABLE goals IS 'What users are after; memories that have to do with an active one are scored higher.';
-- As with memories: samples in the planner's statistics would outlive the texts.
ALTER TABLE goals ALTER COLUMN content SET STATISTICS 0;

ALTER TABLE goals ENABLE ROW LEVEL SECURITY;
ALTER TABLE goals FORCE  ROW LEVEL SECURITY;
CREATE POLICY own ON goals TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON goals TO kimberly_system USING (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON goals TO kimberly_app;
-- Meditation reads the goals of many users at once.
GRANT SELECT ON goals TO kimberly_system;

-- A text is matched with goals once, as long as neither changes.
ALTER TABLE memory_scores ADD COLUMN goals_key bigint;
COMMENT ON COLUMN memory_scores.goals_key IS 'Of the goals that relevance_to_goals tells the match with; NULL: of none, or the text changed since.';
