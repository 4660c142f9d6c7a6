-- Vectors that a local model makes, for users who chose one.

ALTER TABLE settings
    ADD COLUMN embedding_model text NOT NULL DEFAULT '' CHECK (length(embedding_model) <= 64);
COMMENT ON COLUMN settings.embedding_model IS 'The local model that makes vectors of the user''s memories; empty: none does.';

-- Whether the running transaction's user wants vectors made: they chose a model, and consented.
-- The answer holds until the commit: whoever changes it takes the lock alone. Each statement of a
-- volatile function sees what was committed while the one before it waited.
CREATE FUNCTION wants_embedding() RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(
        hashtextextended('memories.embed/' || current_user_id(), 0));
    RETURN EXISTS (SELECT FROM settings
                    WHERE tenant_id = current_tenant() AND user_id = current_user_id()
                      AND embedding_model <> '')
           AND consented('memory.store') AND consented('memory.embed');
END
$$;

-- A job that gives its user's memories vectors hands its key back in the user's transaction that
-- finds nothing missing. The lock that keeps vectors under the job's lease needs the grant, too.
GRANT UPDATE (unique_key) ON jobs TO kimberly_app;
