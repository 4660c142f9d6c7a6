-- What members of a tenant show each other. A transaction sees it only after it said that it wants
-- to (kimberly.reach), so that statements about the user's own rows stay as narrow as they were.

CREATE FUNCTION reaches_tenant() RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE
    RETURN coalesce(current_setting('kimberly.reach', true), '') = 'tenant';

CREATE POLICY shown ON memories FOR SELECT TO kimberly_app
    USING (tenant_id = current_tenant() AND scope <> 'private' AND archived_at IS NULL
           AND reaches_tenant());

-- Whether those who show something still consent to its being kept.
CREATE POLICY shown ON consents FOR SELECT TO kimberly_app
    USING (tenant_id = current_tenant() AND purpose = 'memory.store' AND reaches_tenant());

ALTER TABLE memories ADD CONSTRAINT memories_sensitive_are_private
    CHECK (NOT sensitive OR scope = 'private');
