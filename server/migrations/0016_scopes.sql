-- What members of a tenant show each other: a view of the owner, which sees nothing else. A second
-- policy for the application's own role would have every statement about a user's own rows look
-- at two conditions for each row, and read all of them by two indexes where it wants a page.

CREATE POLICY shown ON memories FOR SELECT TO CURRENT_USER
    USING (tenant_id = current_tenant() AND scope <> 'private' AND archived_at IS NULL);
CREATE POLICY shown ON consents FOR SELECT TO CURRENT_USER
    USING (tenant_id = current_tenant() AND purpose = 'memory.store');

CREATE VIEW shown_memories WITH (security_barrier) AS
    SELECT id, user_id, tier, content, tags, channels, source, session_id, session_position,
           speaker, occurred_at, size_bytes, content_hash, version, created_at, updated_at, scope,
           protected, created_by, consent_version, archived_at, delete_after, terms,
           sensitive, sealed
      FROM memories
     WHERE tenant_id = current_tenant() AND scope <> 'private' AND archived_at IS NULL
       AND (SELECT granted
              FROM consents
             WHERE tenant_id = memories.tenant_id AND user_id = memories.user_id
               AND purpose = 'memory.store'
             ORDER BY version DESC
             LIMIT 1);
COMMENT ON VIEW shown_memories IS 'What is shown in the tenant of the transaction, by users who still consent to its being kept.';
GRANT SELECT ON shown_memories TO kimberly_app;

ALTER TABLE memories ADD CONSTRAINT memories_sensitive_are_private
    CHECK (NOT sensitive OR scope = 'private');
